"""ONNX: graphs of the towers and of the whole model, checked against PyTorch; graphs that others exported."""
