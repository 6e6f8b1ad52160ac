"""Quantization schemes: formats, observers of activation ranges, quantize-dequantize."""
