"""Declares two operators of torchvision whose compiled part does not fit a CPU build of PyTorch.

vLLM imports transformers' image processors, which import torchvision; neither calls these operators. On PYTHONPATH, so
that vLLM's own processes see it too.
"""

import contextlib
import importlib.util

if importlib.util.find_spec("torch") is not None:
    from torch import library

    declared = library.Library("torchvision", "DEF")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # where torchvision fits, it has declared it
            declared.define(schema)
