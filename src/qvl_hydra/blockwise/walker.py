"""The block walker: a Qwen-VL model as one straight row of segments that states of many rows walk through.

Segments are the patch embedding, the vision blocks, the merger, the join (image features into the token sequence), the
decoder blocks, and the head (final norm and `lm_head`). A state `(row, token, width)` has a row for each copy of a
sample that is under way. Every block is the Hugging Face module itself; what it needs beside the hidden state (rotary
embeddings, windows, masks) is recorded from the model's own forward with all blocks passed over, so nothing of the
model's logic is written again here, and both families and all image sizes are served alike.

Several samples can also walk together: packed in one row, one behind the other, up to the join, and after it with a row
each, padded at the end, where a causal model lets no other token see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qvl_hydra.blockwise.recording import recording, replaced
from qvl_hydra.calibration.sample import Sample, collate
from qvl_hydra.errors import ModelError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator, find_operators

State = Float[Tensor, "row token width"]
VISUAL, LANGUAGE, HEAD = "model.visual", "model.language_model", "lm_head"


@dataclass(frozen=True)
class Context:
    """What the segments need to know of the samples that walk together: one mostly.

    Attributes:
        block_inputs: keyword arguments of each block, by module path.
        order: for each patch in walking order its place in the images (windows are walked one by one).
        back: for each merged feature in image order its place in walking order.
        text: token embeddings, zero where image features go and where a shorter sample is padded.
        places: which tokens take image features.
    """

    samples: tuple[Sample, ...]
    block_inputs: dict[str, dict[str, Any]]
    order: Int64[Tensor, "patch"] | None
    back: Int64[Tensor, "feature"] | None
    text: Float[Tensor, "sample token width"]
    places: Bool[Tensor, "sample token"]

    @property
    def sample(self) -> Sample:
        """The sample of a context of one."""
        (only,) = self.samples
        return only


@dataclass(frozen=True)
class Segment:
    """One step of the walk.

    Attributes:
        name: module path, or `join`.
        vision: passed over by samples without images; samples that walk together arrive packed, not padded.
        roots: module paths whose weights it needs; its operators lie below them.
        run: from the state before and the sample's context to the state after.
    """

    name: str
    vision: bool
    roots: tuple[str, ...]
    run: Callable[[State, Context], State]

    def holds(self, op: Operator) -> bool:
        """Whether the operator is computed in this segment."""
        return any(op.path == root or op.path.startswith(f"{root}.") for root in self.roots)


class Walker:
    """The segments of a model for one component.

    Args:
        dtype: what the walk computes in; None is the model's own. In another, a segment's weights are converted while
            it is walked.

    Attributes:
        prefix: walked in float to make the input of the component (vision tower and join, for `lm`).
        segments: the component's own.
        operators: all of the component's, in the order in which data meets them.
    """

    def __init__(self, model: LoadedModel, component: str, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.dtype = dtype or model.dtype
        self.module: Any = model.module
        self.component = component
        vision, language = self._vision_segments(), self._language_segments()
        join = [Segment("join", True, (), _join)]
        self.prefix: list[Segment] = [*vision, *join] if component == "lm" else []
        self.segments: list[Segment] = {
            "vision": vision,
            "lm": language,
            "full": [*vision, *join, *language],
        }[component]
        self.operators = find_operators(self.module, component)
        self._check_stages()

    def _check_stages(self) -> None:
        """An operator in no segment would score zero in silence, and one in two twice.

        Raises:
            ModelError: an operator does not lie in exactly one segment.
        """
        for op in self.operators:
            holding = [segment.name for segment in self.segments if segment.holds(op)]
            if len(holding) != 1:
                where = ", ".join(holding) or "no segment"
                raise ModelError(f"{op.path} lies in {where} of the walk, and every operator must lie in exactly one")

    def weights(self, segment: Segment) -> AbstractContextManager[None]:
        """Have the segment's weights in memory for a while."""
        return self.model.weights(segment.roots, self.dtype)

    def usable(self, sample: Sample) -> bool:
        """Whether the sample reaches the component at all: the vision tower needs an image."""
        return self.component != "vision" or sample.pixel_values is not None

    def skips(self, segment: Segment, sample: Sample) -> bool:
        """Whether the sample passes over the segment."""
        return segment.vision and sample.pixel_values is None

    @torch.no_grad()
    def contexts(self, samples: Sequence[Sample]) -> list[Context]:
        """Contexts of samples; costs no pass through any block."""
        table = f"{LANGUAGE}.embed_tokens"
        with self.model.weights([table]):
            embedding = self.module.get_submodule(table)
            texts = [embedding(sample.input_ids.to(self.model.device)).to(self.dtype) for sample in samples]
        return [self._context([sample], text[None]) for sample, text in zip(samples, texts, strict=True)]

    def packed(self, border: int) -> bool:
        """Whether samples that walk together are packed before segment `border` (after the last one, for its index)."""
        return self.segments[min(border, len(self.segments) - 1)].vision

    @torch.no_grad()
    def together(self, contexts: Sequence[Context]) -> Context:
        """One context for samples that are to walk together: either all have images, or none has."""
        samples = [context.sample for context in contexts]
        return self._context(samples, pad_sequence([context.text[0] for context in contexts], batch_first=True))

    @torch.no_grad()
    def starts(self, contexts: Sequence[Context]) -> list[State]:
        """The input of the component for each sample, one row; the prefix is walked once for all samples."""
        states = [self._first_state(context) for context in contexts]
        for segment in self.prefix:
            self.advance(segment, contexts, states)
        return states

    def advance(self, segment: Segment, contexts: Sequence[Context], states: list[State]) -> None:
        """Take every sample's state through a segment, in place; its weights are touched once."""
        with self.weights(segment):
            for index, context in enumerate(contexts):
                if not self.skips(segment, context.sample):
                    states[index] = segment.run(states[index], context)

    def _first_state(self, context: Context) -> State:
        if context.sample.pixel_values is None:
            return context.text
        return context.sample.pixel_values.to(device=self.model.device, dtype=self.dtype)[None]

    def _context(self, samples: Sequence[Sample], text: Tensor) -> Context:
        batch = collate(samples)
        places = (batch["input_ids"] == self.model.config.image_token_id).to(self.model.device)
        inputs: dict[str, dict[str, Any]] = {}
        order = back = None
        if "image_grid_thw" in batch:
            order, back = self._record_vision(batch["image_grid_thw"], inputs)
        if self.component != "vision":
            self._record_language(batch["position_ids"], text, inputs)
        return Context(tuple(samples), inputs, order, back, text.masked_fill(places[..., None], 0), places)

    def _record_vision(self, grid: Tensor, inputs: dict[str, dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Run the vision tower with numbered patches and every computing part passed over."""
        visual: Any = self.module.get_submodule(VISUAL)
        grid = grid.to(self.model.device)
        patches = int(grid.prod(-1).sum())
        merged = patches // visual.spatial_merge_size**2
        seen: list[Tensor] = []

        def number_features(x: Tensor) -> Tensor:
            seen.append(x[:, 0].long())
            return torch.arange(merged, device=x.device, dtype=torch.float64)[:, None]

        with ExitStack() as stack:
            stack.enter_context(recording(visual.blocks, f"{VISUAL}.blocks", inputs))
            stack.enter_context(replaced(visual.patch_embed, lambda x: x))
            stack.enter_context(replaced(visual.merger, number_features))
            numbers = torch.arange(patches, device=self.model.device, dtype=torch.float64)
            result = visual(numbers[:, None].repeat(1, 2), grid_thw=grid)
        return seen[0], result.pooler_output[:, 0].long()

    def _record_language(self, positions: Tensor, text: Tensor, inputs: dict[str, dict[str, Any]]) -> None:
        language: Any = self.module.get_submodule(LANGUAGE)
        with recording(language.layers, f"{LANGUAGE}.layers", inputs), replaced(language.norm, lambda x: x):
            language(inputs_embeds=text, position_ids=positions.to(self.model.device), use_cache=False)

    def _vision_segments(self) -> list[Segment]:
        visual: Any = self.module.get_submodule(VISUAL)

        def embed(x: State, context: Context) -> State:
            rows, patches, _ = x.shape
            embedded: Tensor = visual.patch_embed(x.reshape(rows * patches, -1))
            return embedded.view(rows, patches, -1)[:, context.order]

        def merge(x: State, context: Context) -> State:
            rows = x.shape[0]
            merged: Tensor = visual.merger(x.reshape(rows * x.shape[1], -1))
            return merged.view(rows, -1, merged.shape[-1])[:, context.back]

        paths = [f"{VISUAL}.blocks.{index}" for index in range(len(visual.blocks))]
        return [
            Segment(f"{VISUAL}.patch_embed", True, (f"{VISUAL}.patch_embed",), embed),
            *(Segment(path, True, (path,), self._vision_block(path)) for path in paths),
            Segment(f"{VISUAL}.merger", True, (f"{VISUAL}.merger",), merge),
        ]

    def _vision_block(self, path: str) -> Callable[[State, Context], State]:
        block = self.module.get_submodule(path)

        def run(x: State, context: Context) -> State:
            rows, patches, width = x.shape
            inputs = _repeat_rows(context.block_inputs[path], rows, patches)
            y: Tensor = block(x.reshape(rows * patches, width), **inputs)
            return y.view(rows, patches, width)

        return run

    def _language_segments(self) -> list[Segment]:
        language: Any = self.module.get_submodule(LANGUAGE)

        def head(x: State, context: Context) -> State:
            y: Tensor = self.module.lm_head(language.norm(x))
            return y

        paths = [f"{LANGUAGE}.layers.{index}" for index in range(len(language.layers))]
        return [
            *(Segment(path, False, (path,), self._language_block(path)) for path in paths),
            Segment(HEAD, False, (f"{LANGUAGE}.norm", HEAD), head),
        ]

    def _language_block(self, path: str) -> Callable[[State, Context], State]:
        block = self.module.get_submodule(path)

        def run(x: State, context: Context) -> State:
            # Rotary embeddings and masks have one row, which broadcasts over all.
            y = block(x, **context.block_inputs[path])
            return y[0] if isinstance(y, tuple) else y

        return run


def _join(features: State, context: Context) -> State:
    rows = features.shape[0]
    tokens = context.text.flatten(0, 1).expand(rows, -1, -1)
    index = context.places.flatten().nonzero()[:, 0]
    joined = tokens.index_copy(1, index, features.to(tokens.dtype))
    return joined.view(rows * len(context.samples), *context.text.shape[1:])


def _repeat_rows(inputs: dict[str, Any], rows: int, patches: int) -> dict[str, Any]:
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
