"""Operators: the quantizable modules of a Qwen-VL model, found and selected."""
