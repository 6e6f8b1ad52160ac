"""The table of consumers: tools that a profile is written for. Nothing here needs torch.

One addition is a function of a profile and every operator of the model that gives a `Rendered`, and a row here
(docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qvl_hydra.reference import load

ALL_NUMBERS = ("int", "float8_e4m3", "nvfp4", "mxfp4", "mxfp8")


@dataclass(frozen=True)
class Consumer:
    """A tool and the files that it reads.

    Attributes:
        name: an entry of `profile.formats`, and the folder below `exports/`.
        tool: what reads it.
        loaded: version that the tests load it with; None when no test does.
        render: `module:function`, makes the files of a profile, given every operator of the model; it raises
            ProfileError, naming the operators, for what the tool cannot express.
        numbers: number formats that it can say.
        mixed: it can say several schemes in one profile.
        dialect: of its lists of names, in `profiles/patterns.py`; empty where it reads full names alone.
        names: whose names those are read against; each must match (`profiles/names.py`).
    """

    name: str
    tool: str
    loaded: str | None
    render: str
    numbers: tuple[str, ...] = ("int",)
    mixed: bool = False
    dialect: str = ""
    names: tuple[str, ...] = ("hugging_face",)

    def load(self) -> Callable[..., Any]:
        """The function that makes the files, imported now."""
        return load(self.render)


_OWN = "qvl_hydra.profiles.formats"
FORMATS = {
    row.name: row
    for row in (
        Consumer(
            "neural_compressor", "Neural Compressor", "neural-compressor 3.7.1", f"{_OWN}.neural_compressor:render",
            dialect="regex",
        ),
        Consumer(
            "compressed_tensors", "transformers, vLLM", "compressed-tensors 0.20.0",
            f"{_OWN}.compressed_tensors:render", ALL_NUMBERS, mixed=True, dialect="re", names=("hugging_face", "vllm"),
        ),
        Consumer(
            "llm_compressor", "llm-compressor", "llmcompressor 0.14.0", f"{_OWN}.llm_compressor:render", ALL_NUMBERS,
            dialect="re",
        ),
        Consumer("modelopt", "NVIDIA ModelOpt", "nvidia-modelopt 0.47.0", f"{_OWN}.modelopt:render", dialect="glob"),
        Consumer("auto_round", "auto-round", "auto-round 0.16.1", f"{_OWN}.auto_round:render"),
        Consumer(
            "tensorrt_llm", "TensorRT-LLM", None, f"{_OWN}.tensorrt_llm:render", dialect="glob", names=("checkpoint",)
        ),
    )
}  # fmt: skip
