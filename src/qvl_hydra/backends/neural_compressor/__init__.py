"""Neural Compressor 3.7: its PyTorch FX and ONNX Runtime adaptors, as backends."""
