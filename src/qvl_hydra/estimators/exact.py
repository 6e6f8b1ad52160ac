"""The exact estimator: a wavefront of perturbed copies.

One walk through the blocks carries one perturbed copy for each target already passed, as rows, beside the reference. At
each segment all of them advance, and the copies of the segment's own targets start. A copy never computes what lies
before its target, and each segment's weights are touched once a sample: about N/2 forwards for N operators, and one for
the reference, whose states can be kept for further walks.

Two directions, both from Neural Compressor's `mse_v2` (`strategy/mse_v2.py`, `adaptor/torch_utils/util.py`):
`requantize` starts a copy from the float state with the target quantized; `fallback` walks a base state with everything
quantized and starts a copy from it with the target in float. Results equal the loop over targets one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from qvl_hydra.blockwise.differences import Differences
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.estimators.metrics import error_counts, error_sums, next_token_labels, output_metrics, token_chunks
from qvl_hydra.estimators.positions import predicted_kinds, scored_positions
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.scores.shrink import SPLIT

QuantizerOf = Callable[[Operator], OperatorQuantizer]
Rows = Mapping[str, Sequence[OperatorQuantizer | None]]  # of some operators, for each row its quantizer or None
FLIPS = "routing_flips"  # share of the choices of experts that a quantized operator changes
OUTPUT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # outputs of all rows of a chunk together


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


@dataclass
class Kept:
    """Of one sample's reference what earlier walks left; what is new is added.

    Attributes:
        states: behind each segment.
        outputs: of the operators whose products are differences, by path.
    """

    states: list[State] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class RowChunk:
    """How many rows advance together. On CUDA it halves when memory runs out, and the work goes on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def advance(self, rows: State, run: Callable[[State, int], Tensor]) -> Tensor:
        """Apply `run(chunk, index of its first row)` to all rows, chunk by chunk."""
        outputs: list[Tensor] = []
        first = 0
        while first < rows.shape[0]:
            size = self.size
            try:
                outputs.append(run(rows[first : first + size], first))
                first += size
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                self.size = max(1, size // 2)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@torch.no_grad()
def score_sample(
    wave: Wavefront, context: Context, start: State, kept: Kept | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of every target on one sample.

    Args:
        start: the component's input, one row.
        kept: the same scores come with it and without (None).

    Returns:
        For each target its metrics: what quantizing it does to the output (`requantize`), or what restoring it gains
        (`fallback`: the metric of everything quantized less that of everything but the target). Of a mixture of experts
        also `FLIPS`, for `requantize`.
    """
    walker = wave.walker
    fallback = bool(wave.base)
    segments = [segment for segment in walker.segments if not walker.skips(segment, context.sample)]
    reference = start
    rows = start if fallback else start[:0]  # in `fallback` row 0 is the base with everything quantized
    started: list[Target] = []
    flips = _Flips(walker)
    for index, segment in enumerate(segments):
        own = wave.targets_in(segment)
        rows = _with_copies(rows, rows[:1] if fallback else reference, len(own))
        started += own
        if segment is segments[-1]:
            break
        known = None if kept is None or index == len(kept.states) else kept.states[index]
        if known is not None and not len(rows):
            reference = known
            continue
        with walker.weights(segment):
            if known is None or wave.differences.paths:  # of which copies need what its operators are given
                outputs = None if kept is None else kept.outputs
                reference = wave.differences.advance(segment, context, reference, outputs)
                reference = flips.of_reference(segment, reference)
            else:
                reference = known
            if len(rows):
                copies = partial(_run, wave, segment, context, _quantized_rows(wave, segment, own, len(rows)))
                rows = wave.chunk.advance(rows, partial(flips.counted, segment, copies))
        if kept is not None and known is None:
            reference = reference.clone()  # as the walk of ranges does: kept where they were made, states leave holes
            kept.states.append(reference)
    with walker.weights(segment):
        values = _compare(wave, segment, context, reference, rows, _quantized_rows(wave, segment, own, len(rows)))
    scores = _by_target(wave, values, started, fallback)
    if flips.mixtures and not fallback:
        for row, target in enumerate(started):
            scores[target.name][FLIPS] = flips.share(row)
    return scores


def _with_copies(rows: State, base: State, count: int) -> State:
    """The rows, and so many copies of one behind them."""
    if not count:
        return rows
    copies = base.repeat(count, 1, 1)
    return torch.cat([rows, copies]) if len(rows) else copies


class _Flips:
    """How many tokens each row sends to another expert than the reference does."""

    def __init__(self, walker: Walker) -> None:
        self.walker = walker
        self.mixtures = list({op.group: op.path for op in walker.operators if op.experts > 1}.values())  # one a block
        self._float: dict[str, Tensor] = {}
        self._changed: Counter[int] = Counter()
        self._seen: Counter[int] = Counter()

    def of_reference(self, segment: Segment, result: Tensor) -> Tensor:
        """Take note of what the float row chose in a segment that it has just run through."""
        for path in filter(segment.holds, self.mixtures):
            self._float[path] = self._chosen(path, 1)[0]
        return result

    def counted(self, segment: Segment, run: Callable[[State, int], Tensor], rows: State, first: int) -> Tensor:
        """Run a chunk of rows and count."""
        result = run(rows, first)
        for path in filter(segment.holds, self.mixtures):
            stayed = (self._chosen(path, len(rows))[..., None] == self._float[path][:, None]).any(-1)
            for row, changed in enumerate((~stayed).flatten(1).sum(-1).tolist(), first):
                self._changed[row] += changed
                self._seen[row] += stayed[0].numel()
        return result

    def _chosen(self, path: str, rows: int) -> Tensor:
        """Experts of each row's tokens, (row, token, choice)."""
        product: Any = self.walker.module.get_submodule(path)
        chosen: Tensor = product.chosen.view(rows, -1, product.active)
        return chosen

    def share(self, row: int) -> float:
        """Of a row's choices behind its operator, those that are others."""
        return self._changed[row] / self._seen[row] if self._seen[row] else 0.0


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


def _quantized_rows(wave: Wavefront, segment: Segment, own: Sequence[Target], count: int) -> Rows:
    """For each operator of the segment that is quantized in some row, of each row its quantizer, or None for float."""
    found: dict[str, list[OperatorQuantizer | None]] = {}
    for op in wave.base:
        if segment.holds(op.path):
            found[op.path] = [wave.quantizer(op)] * count
    for row, target in enumerate(own, count - len(own)):
        for op in target.operators:
            if op.path in found:
                found[op.path][row] = None
            else:
                found[op.path] = [None] * count
                found[op.path][row] = wave.quantizer(op)
    return found


def _run(wave: Wavefront, segment: Segment, context: Context, quantizers: Rows, rows: State, first: int) -> Tensor:
    """Advance a chunk of rows through a segment, each operator quantized in its rows."""
    own = {path: of_rows[first : first + len(rows)] for path, of_rows in quantizers.items()}
    return wave.differences.run_copies(segment, context, rows, own)


def _compare(
    wave: Wavefront, segment: Segment, context: Context, reference: State, rows: State, quantizers: Rows
) -> Float64[Tensor, "row metric"]:
    """Run the last segment and compare every row with the reference; outputs of all are never in memory together.

    The head works on each token by itself, so its tokens are taken in chunks; the merger of the vision tower does not.
    """
    if not len(rows):  # the sample passed over all targets
        rows = reference
    is_text = wave.walker.component != "vision"
    labels = next_token_labels(context.sample.labels).to(rows.device) if is_text else None
    kinds = None
    if is_text and wave.positions == "all":
        kinds = predicted_kinds(context.sample, context.places[0]).to(rows.device)
    if labels is not None:
        counted = scored_positions(context.sample, context.places[0], wave.positions).to(rows.device)
        if not bool(counted.all()):
            reference, rows, labels = reference[:, counted], rows[:, counted], labels[counted]
    a_token = wave.walker.module.lm_head.out_features * 4 * min(wave.chunk.size, rows.shape[0])
    sums: list[Tensor] = []
    for tokens in token_chunks(rows.shape[1], a_token, OUTPUT_BYTES[rows.device.type]) if is_text else [slice(None)]:
        output = wave.differences.advance(segment, context, reference[:, tokens])[0]
        here = [None if all_of is None else all_of[tokens] for all_of in (labels, kinds)]

        def compare(x: State, at: int, output: Tensor = output, here: list[Tensor | None] = here) -> Tensor:
            return error_sums(output, _run(wave, segment, context, quantizers, x, at), *here)

        sums.append(wave.chunk.advance(rows[:, tokens], compare))
    counts = error_counts(rows.shape[1], labels) + ([] if kinds is None else [1] * kinds.shape[1])
    return torch.stack(sums).sum(0) / torch.tensor(counts, device=rows.device, dtype=torch.float64)
