"""The exact estimator: a wavefront of perturbed copies.

One walk through the blocks carries one perturbed copy for each target already passed, as rows, beside the reference. At
each segment all of them advance, and the copies of the segment's own targets start. A copy never computes what lies
before its target: about N/2 forwards for N operators, and one for the reference, whose states can be kept for further
walks. Samples walk one beside the other, so that a segment's weights are touched once for all of them.

Two directions, both from Neural Compressor's `mse_v2` (`strategy/mse_v2.py`, `adaptor/torch_utils/util.py`):
`requantize` starts a copy from the float state with the target quantized; `fallback` walks a base state with everything
quantized and starts a copy from it with the target in float. Results equal the loop over targets one at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from jaxtyping import Float64
from torch import Tensor

from qvl_hydra.blockwise.differences import Differences
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.estimators.flips import FLIPS, Flips
from qvl_hydra.estimators.metrics import output_metrics
from qvl_hydra.estimators.rows import End, RowChunk, Rows, compare_features, compare_logits, run_rows
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.scores.shrink import SPLIT

QuantizerOf = Callable[[Operator], OperatorQuantizer]


@dataclass(frozen=True)
class Wavefront:
    """What the walks of samples need.

    Attributes:
        walker: see `Differences`.
        targets: what is scored, in data order.
        base: operators that are quantized in the base state (`fallback`); empty for `requantize`.
        quantizer: makes an operator's quantizer while its weights are in memory.
        chunk: rows advanced together; halved when CUDA runs out of memory.
        positions: whose outputs are compared, see `scored_positions`.
    """

    walker: Walker
    targets: Sequence[Target]
    base: Sequence[Operator]
    quantizer: QuantizerOf
    chunk: RowChunk
    positions: str = "all"

    @cached_property
    def differences(self) -> Differences:
        """Products of copies, where they are not taken in float32."""
        return Differences(self.walker)

    def targets_in(self, segment: Segment) -> list[Target]:
        """The targets that start in a segment."""
        return [target for target in self.targets if any(segment.holds(op.path) for op in target.operators)]

    def quantizers_in(self, segment: Segment, own: Sequence[Target]) -> dict[str, OperatorQuantizer]:
        """Of the operators of a segment that some row quantizes, by path; `own` are the targets that start there."""
        operators = [*self.base, *(op for target in own for op in target.operators)]
        wanted = {op.path: op for op in operators if segment.holds(op.path)}
        return {path: self.quantizer(op) for path, op in wanted.items()}


@dataclass
class Kept:
    """Of one sample's reference what earlier walks left; what is new is added.

    Attributes:
        states: behind each segment that the sample does not pass over.
        outputs: of the operators whose products are differences, by path.
    """

    states: list[State] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def score_samples(
    wave: Wavefront,
    contexts: Sequence[Context],
    starts: Sequence[State],
    kept: Sequence[Kept | None] | None = None,
    each: Callable[[], None] = lambda: None,
) -> list[dict[str, dict[str, float]]]:
    """Metrics of every target on some samples, which walk one beside the other.

    A segment's weights are read, converted and rounded once for all of them.

    Args:
        starts: the component's input, of each sample one row.
        kept: the same scores come with it and without (None).
        each: called after each segment.

    Returns:
        For each sample and target its metrics: what quantizing it does to the output (`requantize`), or what restoring
        it gains (`fallback`: the metric of everything quantized less that of everything but the target). Of a mixture
        of experts also `FLIPS`, for `requantize`.
    """
    walker = wave.walker
    walks = [
        _Walk(wave, context, start, own)
        for context, start, own in zip(contexts, starts, kept or [None] * len(contexts), strict=True)
    ]
    *inner, last = walker.segments
    for segment in inner:
        own = wave.targets_in(segment)
        here = [walk for walk in walks if not walker.skips(segment, walk.context.sample)]
        if own or any(walk.has_work for walk in here):
            with walker.weights(segment):
                made = wave.quantizers_in(segment, own)
                for walk in here:
                    walk.advance(segment, own, made)
        else:
            for walk in here:
                walk.pass_on()
        each()
    with walker.weights(last):
        own = wave.targets_in(last)
        values = _compared(wave, last, walks, own, wave.quantizers_in(last, own))
    each()
    return [walk.scores(own_values) for walk, own_values in zip(walks, values, strict=True)]


def _compared(
    wave: Wavefront,
    last: Segment,
    walks: Sequence[_Walk],
    own: Sequence[Target],
    made: Mapping[str, OperatorQuantizer],
) -> list[Float64[Tensor, "row metric"]]:
    """Run the last segment; metrics of every row of each walk."""
    quantizers = [walk.start(own, made) for walk in walks]
    if wave.walker.component == "vision":
        of_walks = zip(walks, quantizers, strict=True)
        return [compare_features(wave.differences, last, wave.chunk, walk.end, rows) for walk, rows in of_walks]
    alike: dict[int, list[int]] = defaultdict(list)  # walks by their rows: those without images have fewer
    for index, walk in enumerate(walks):
        alike[len(walk.end.rows)].append(index)
    values: dict[int, Tensor] = {}
    for indexes in alike.values():
        ends, rows = [walks[index].end for index in indexes], quantizers[indexes[0]]
        found = compare_logits(wave.differences, last, wave.chunk, wave.positions, ends, rows)
        values |= zip(indexes, found, strict=True)
    return [values[index] for index in range(len(walks))]


class _Walk:
    """One sample's reference and copies on their way."""

    def __init__(self, wave: Wavefront, context: Context, start: State, kept: Kept | None) -> None:
        self.wave, self.context, self.kept = wave, context, kept
        self._reference = start
        self._rows = start if wave.base else start[:0]  # in `fallback` row 0 is the base with everything quantized
        self._started: list[Target] = []
        self._flips = Flips(wave.walker)
        self._passed = 0  # segments

    @property
    def _known(self) -> State | None:
        """The reference behind the next segment, where an earlier walk left it."""
        return self.kept.states[self._passed] if self.kept and self._passed < len(self.kept.states) else None

    @property
    def has_work(self) -> bool:
        """Whether there is anything to compute in a segment in which no copy starts."""
        return bool(len(self._rows)) or self._known is None

    def pass_on(self) -> None:
        """Take the reference behind the next segment from what was kept."""
        assert self._known is not None
        self._reference = self._known
        self._passed += 1

    def advance(self, segment: Segment, own: Sequence[Target], made: Mapping[str, OperatorQuantizer]) -> None:
        """Run through a segment that is not the last.

        Args:
            own: targets whose copies start here.
            made: see `Wavefront.quantizers_in`.
        """
        quantizers = self.start(own, made)
        if not self.has_work:
            self.pass_on()
            return
        known, differences = self._known, self.wave.differences
        if known is None or differences.paths:  # of which copies need what its operators are given
            outputs = None if self.kept is None else self.kept.outputs
            self._reference = differences.advance(segment, self.context, self._reference, outputs)
            self._reference = self._flips.of_reference(segment, self._reference)
        else:
            self._reference = known
        if len(self._rows):
            copies = partial(run_rows, differences, segment, self.context, quantizers)
            self._rows = self.wave.chunk.advance(self._rows, partial(self._flips.counted, segment, copies))
        if self.kept is not None and known is None:
            self._reference = self._reference.clone()  # as the walk of ranges does: what is kept leaves no holes
            self.kept.states.append(self._reference)
        self._passed += 1

    @property
    def end(self) -> End:
        """What the last segment is given; the reference alone where the sample passed over all targets."""
        return End(self.context, self._reference, self._rows if len(self._rows) else self._reference)

    def scores(self, values: Float64[Tensor, "row metric"]) -> dict[str, dict[str, float]]:
        """Metrics of every target, from those of every row."""
        fallback = bool(self.wave.base)
        scores = _by_target(self.wave, values, self._started, fallback)
        if self._flips.mixtures and not fallback:
            for row, target in enumerate(self._started):
                scores[target.name][FLIPS] = self._flips.share(row)
        return scores

    def start(self, own: Sequence[Target], made: Mapping[str, OperatorQuantizer]) -> Rows:
        """Add the copies that start in a segment; the quantizers of all rows."""
        self._rows = _with_copies(self._rows, self._rows[:1] if self.wave.base else self._reference, len(own))
        self._started += own
        return _quantized_rows(self.wave, own, len(self._rows), made)


def _with_copies(rows: State, base: State, count: int) -> State:
    """The rows, and so many copies of one behind them."""
    if not count:
        return rows
    copies = base.repeat(count, 1, 1)
    return torch.cat([rows, copies]) if len(rows) else copies


def _by_target(
    wave: Wavefront, values: Float64[Tensor, "row metric"], started: Sequence[Target], fallback: bool
) -> dict[str, dict[str, float]]:
    names = output_metrics(wave.walker.component)
    names += SPLIT if values.shape[1] > len(names) else ()
    # A target that the sample passed over (the vision tower without an image) changes nothing in it.
    scores = {target.name: dict.fromkeys(names, 0.0) for target in wave.targets}
    gains = values[:1] - values[1:] if fallback else values[: len(started)]
    for target, gain in zip(started, gains.tolist(), strict=True):
        scores[target.name] = dict(zip(names, gain, strict=True))
    return scores


def _quantized_rows(
    wave: Wavefront, own: Sequence[Target], count: int, made: Mapping[str, OperatorQuantizer]
) -> Rows:
    """For each operator of a segment that is quantized in some row, of each row its quantizer, or None for float."""
    base = {op.path for op in wave.base}
    found = {path: [quantizer if path in base else None] * count for path, quantizer in made.items()}
    for row, target in enumerate(own, count - len(own)):
        for op in target.operators:
            found[op.path][row] = None if op.path in base else made[op.path]
    return found
