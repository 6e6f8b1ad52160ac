"""ONNX: towers exported as graphs, and what makes a graph scorable."""
