"""qvl_hydra: which operators of a Qwen-VL model can go to INT8, and which must not."""

__version__ = "0.1.0"
