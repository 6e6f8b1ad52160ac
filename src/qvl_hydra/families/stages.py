"""The stages of a model: one straight row of segments that states of many rows walk through.

Segments are the patch embedding, the vision blocks and mergers, the join (image features into the token sequence), the
decoder blocks, and the head (final norm and `lm_head`). A state `(row, token, width)` has a row for each copy of a
sample that is under way. Every block is the Hugging Face module itself; what it needs beside the hidden state (rotary
embeddings, windows, masks) is recorded from the model's own forward with all blocks passed over, so that nothing of the
model's logic is written again here.

Side tensors, such as features that leave a tower on the way, travel in the width of the state, behind the hidden state:
whatever copies, pads, packs, keeps or differentiates a state does the same to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.families.record import HEAD

State = Float[Tensor, "_row _token _width"]
BlockInputs = dict[str, dict[str, Any]]  # keyword arguments of each block, by module path


@dataclass(frozen=True)
class VisionInputs:
    """What a vision tower makes of the sizes of its images.

    Attributes:
        order: for each patch in walking order its place in the images; None where they are one.
        back: for each merged feature in image order its place in walking order; None likewise.
        added: added to the embedded patches: learned positions; None where there are none.
    """

    order: Int64[Tensor, "patch"] | None = None
    back: Int64[Tensor, "feature"] | None = None
    added: Float[Tensor, "patch width"] | None = None


@dataclass(frozen=True)
class Inputs:
    """What the segments need to know of the samples that walk together: one mostly.

    Attributes:
        block_inputs: keyword arguments of each block, by module path.
        vision: None without images.
        text: token embeddings, zero where image features go and where a shorter sample is padded.
        places: which tokens take image features.
    """

    block_inputs: BlockInputs
    vision: VisionInputs | None
    text: Float[Tensor, "sample token width"]
    places: Bool[Tensor, "sample token"]


Run = Callable[[State, Any], State]


@dataclass(frozen=True)
class Segment:
    """One step of the walk.

    Attributes:
        name: module path, or `join`.
        vision: passed over by samples without images; samples that walk together arrive packed, not padded.
        roots: module paths whose weights it needs; its operators lie below them.
        run: from the state before and the samples' `Inputs` to the state after.
    """

    name: str
    vision: bool
    roots: tuple[str, ...]
    run: Run

    def holds(self, path: str) -> bool:
        """Whether the operator is computed in this segment."""
        return any(path == root or path.startswith(f"{root}.") for root in self.roots)


@runtime_checkable
class RecordVision(Protocol):
    """Runs a vision tower with every computing part passed over, and notes what its blocks are given."""

    def __call__(self, grid: Int64[Tensor, "image 3"], dtype: torch.dtype, inputs: BlockInputs) -> VisionInputs: ...


@dataclass(frozen=True)
class Stages:
    """A model as a row of segments.

    Attributes:
        vision: of the vision tower; empty for text alone.
        join: image features into the token sequence; empty for text alone.
        language: of the language tower and the head.
        record_vision: None for text alone.
        tables: module paths whose weights `record_vision` reads.
    """

    vision: tuple[Segment, ...]
    join: tuple[Segment, ...]
    language: tuple[Segment, ...]
    record_vision: RecordVision | None = None
    tables: tuple[str, ...] = ()

    def of(self, component: str) -> list[Segment]:
        """The segments of a component."""
        whole = [*self.vision, *self.join, *self.language]
        return {"vision": list(self.vision), "lm": list(self.language), "full": whole}[component]


def join(sides: int = 0) -> Segment:
    """Features into their places in the token sequence, with so many side tensors behind them, zero elsewhere."""

    def run(features: State, context: Inputs) -> State:
        rows, (samples, length, width) = features.shape[0], context.text.shape
        text = functional.pad(context.text, (0, sides * width)) if sides else context.text
        tokens = text.flatten(0, 1).expand(rows, -1, -1)
        index = context.places.flatten().nonzero()[:, 0]
        joined = tokens.index_copy(1, index, features.to(tokens.dtype))
        return joined.view(rows * samples, length, -1)

    return Segment("join", True, (), run)


def decoder_block(module: Any, path: str) -> Segment:
    """A decoder block; rotary embeddings and masks have one row, which broadcasts over all."""
    block = module.get_submodule(path)

    def run(x: State, context: Inputs) -> State:
        y = block(x, **context.block_inputs[path])
        return y[0] if isinstance(y, tuple) else y

    return Segment(path, False, (path,), run)


def head(module: Any, language: str) -> Segment:
    """The final norm and `lm_head`."""
    norm = module.get_submodule(f"{language}.norm")

    def run(x: State, context: Inputs) -> State:
        y: Tensor = module.lm_head(norm(x))
        return y

    return Segment(HEAD, False, (f"{language}.norm", HEAD), run)


def repeat_rows(inputs: Mapping[str, Any], rows: int, patches: int) -> Mapping[str, Any]:
    """A vision block's inputs for several copies of the images, packed one behind the other."""
    if rows == 1:
        return inputs

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(repeat(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if name == "cu_seqlens":
            starts = torch.arange(rows, device=value.device, dtype=value.dtype)[:, None] * patches
            return torch.cat([value[:1], (starts + value[None, 1:]).flatten()])
        return value.repeat(rows, *[1] * (value.dim() - 1)) if value.dim() and value.shape[0] == patches else value

    return {name: repeat(name, value) for name, value in inputs.items()}


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context a module computes with another function."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


@contextmanager
def recording(blocks: nn.ModuleList, path: str, inputs: BlockInputs) -> Iterator[None]:
    """Within the context every block gives its input back and notes its keyword arguments."""

    def recorder(name: str) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            assert not args, "blocks are called with keyword arguments"
            inputs[name] = kwargs
            return hidden_states

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced(block, recorder(f"{path}.{index}")))
        yield
