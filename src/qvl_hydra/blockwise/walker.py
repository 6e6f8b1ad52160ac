"""The block walker: samples go through the stages of a model as states of many rows.

Several samples can also walk together: packed in one row, one behind the other, up to the join, and after it with a row
each, padded at the end, where a causal model lets no other token see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qvl_hydra.calibration.sample import Sample, collate
from qvl_hydra.families.stages import BlockInputs, Inputs, Segment, State, recording, replaced
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators


@dataclass(frozen=True)
class Context(Inputs):
    """What the segments need to know of the samples that walk together, and these samples: one mostly."""

    samples: tuple[Sample, ...]

    @property
    def sample(self) -> Sample:
        """The sample of a context of one."""
        (only,) = self.samples
        return only


class Walker:
    """The segments of a model for one component.

    Args:
        dtype: what the walk computes in; None is the model's own. In another, a segment's weights are converted while
            it is walked.
        kept: paths of operators whose weights are not converted.

    Attributes:
        kept: these paths.
        prefix: walked in float to make the input of the component (vision tower and join, for `lm`).
        segments: the component's own.
        operators: all of the component's, in the order in which data meets them.
    """

    def __init__(
        self, model: LoadedModel, component: str, dtype: torch.dtype | None = None, kept: Iterable[str] = ()
    ) -> None:
        self.model = model
        self.dtype = dtype or model.dtype
        self.kept = tuple(kept)
        self._kept = frozenset(f"{path}.weight" for path in self.kept)
        self.module: Any = model.module
        self.component = component
        self.family = model.family
        self.stages = self.family.load_stages()(self.module)
        self.prefix: list[Segment] = [*self.stages.vision, *self.stages.join] if component == "lm" else []
        self.segments: list[Segment] = self.stages.of(component)
        self.operators = find_operators(self.module, component)

    def weights(self, segment: Segment) -> AbstractContextManager[None]:
        """Have the segment's weights in memory for a while."""
        return self.model.weights(segment.roots, self.dtype, self._kept)

    def usable(self, sample: Sample) -> bool:
        """Whether the sample reaches the component at all: the vision tower needs an image."""
        return self.component != "vision" or sample.pixel_values is not None

    def skips(self, segment: Segment, sample: Sample) -> bool:
        """Whether the sample passes over the segment."""
        return segment.vision and sample.pixel_values is None

    @torch.no_grad()
    def contexts(self, samples: Sequence[Sample]) -> list[Context]:
        """Contexts of samples; costs no pass through any block."""
        table = f"{self.family.language}.embed_tokens"
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
    def starts(self, contexts: Sequence[Context], step: Callable[[], None] = lambda: None) -> list[State]:
        """The input of the component for each sample, one row; the prefix is walked once for all samples.

        Args:
            step: called after each segment of the prefix.
        """
        states = [self._first_state(context) for context in contexts]
        for segment in self.prefix:
            self.advance(segment, contexts, states)
            step()
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
        image_token = getattr(self.model.config, "image_token_id", None)
        places = batch["input_ids"] == (-1 if image_token is None else image_token)
        places = places.to(self.model.device)
        inputs: BlockInputs = {}
        vision = None
        if "image_grid_thw" in batch:
            assert self.stages.record_vision is not None, "models for text are given no images"
            with self.model.weights(self.stages.tables, self.dtype):
                vision = self.stages.record_vision(batch["image_grid_thw"].to(self.model.device), self.dtype, inputs)
        if self.component != "vision":
            self._record_language(batch["position_ids"], text, inputs)
        return Context(inputs, vision, text.masked_fill(places[..., None], 0), places, tuple(samples))

    def _record_language(self, positions: Tensor, text: Tensor, inputs: BlockInputs) -> None:
        path = self.family.language
        language: Any = self.module.get_submodule(path)
        positions = positions.to(self.model.device)
        with recording(language.layers, f"{path}.layers", inputs), replaced(language.norm, lambda x: x):
            language(
                inputs_embeds=text, position_ids=positions if len(positions) > 1 else positions[0], use_cache=False
            )
