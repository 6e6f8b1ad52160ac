"""Export: a component as an ONNX graph with its weights, checked against PyTorch."""
