"""Copies of a sample as rows: how they advance together, and how their outputs compare with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from qvl_hydra.blockwise.differences import Differences
from qvl_hydra.blockwise.walker import Context
from qvl_hydra.estimators.metrics import error_counts, error_sums, next_token_labels
from qvl_hydra.estimators.positions import predicted_kinds, scored_positions
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.quantization.qdq import OperatorQuantizer

Rows = Mapping[str, Sequence[OperatorQuantizer | None]]  # of some operators, for each row its quantizer or None
OUTPUT_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}  # logits of the reference, and of the rows that are in memory with it


class RowChunk:
    """How many rows advance together. On CUDA it halves when memory runs out, and the work goes on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def advance(self, rows: State, run: Callable[[State, int], Tensor], most: int | None = None) -> Tensor:
        """Apply `run(chunk, index of its first row)` to all rows, chunk by chunk.

        Args:
            most: rows of a chunk, where fewer than usual are to go together.
        """
        outputs: list[Tensor] = []
        first = 0
        while first < rows.shape[0]:
            size = min(self.size, most or self.size)
            try:
                outputs.append(run(rows[first : first + size], first))
                first += size
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                self.size = max(1, size // 2)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def run_rows(
    differences: Differences, segment: Segment, context: Context, quantizers: Rows, rows: State, first: int
) -> Tensor:
    """Advance a chunk of rows through a segment, each operator quantized in its rows.

    Args:
        quantizers: of all rows.
        first: index of the chunk's first row.
    """
    own = {path: of_rows[first : first + len(rows)] for path, of_rows in quantizers.items()}
    return differences.run_copies(segment, context, rows, own)


@dataclass(frozen=True)
class End:
    """One sample before the last segment: its reference, of one row, and its copies."""

    context: Context
    reference: State
    rows: State


def compare_features(
    differences: Differences, segment: Segment, chunk: RowChunk, end: End, quantizers: Rows
) -> Float64[Tensor, "row metric"]:
    """Run the vision tower's last segment and compare every row with the reference."""
    output = differences.advance(segment, end.context, end.reference)[0]

    def compare(x: State, at: int) -> Tensor:
        return error_sums(output, run_rows(differences, segment, end.context, quantizers, x, at), None)

    return chunk.advance(end.rows, compare)


def compare_logits(
    differences: Differences,
    segment: Segment,
    chunk: RowChunk,
    positions: str,
    ends: Sequence[End],
    quantizers: Rows,
) -> list[Float64[Tensor, "row metric"]]:
    """Run the head and compare every row of some samples with the reference.

    Outputs of all are never in memory together. The head works on each token by itself, so it is given tokens of
    several samples at a time, as they fit: its weights are the largest, and of most samples few tokens are compared.

    Args:
        positions: whose outputs are compared, see `scored_positions`.
        ends: with equally many rows, row by row with the same operators quantized.
    """
    compared = [_Compared.of(end, positions) for end in ends]
    sums: list[list[Tensor]] = [[] for _ in ends]
    a_token = differences.walker.module.lm_head.out_features * torch.float32.itemsize
    limit = OUTPUT_BYTES[ends[0].rows.device.type]
    for pieces in packed([len(own.labels) for own in compared], max(1, limit // a_token)):
        parts = [compared[index].part(tokens) for index, tokens in pieces]
        output = differences.advance(segment, ends[0].context, torch.cat([part.reference for part in parts], 1))[0]
        outputs = output.split([len(part.labels) for part in parts])

        def compare(x: State, at: int, parts: list[_Compared] = parts, outputs: Sequence[Tensor] = outputs) -> Tensor:
            found = run_rows(differences, segment, ends[0].context, quantizers, x, at)
            of_parts = zip(outputs, found.split([len(own) for own in outputs], 1), parts, strict=True)
            return torch.stack([error_sums(own, other, part.labels, part.kinds) for own, other, part in of_parts], 1)

        rows = torch.cat([part.rows for part in parts], 1)
        values = chunk.advance(rows, compare, max(1, limit // (a_token * rows.shape[1])))
        for (index, _), value in zip(pieces, values.unbind(1), strict=True):
            sums[index].append(value)
    return [torch.stack(values).sum(0) / own.counts for values, own in zip(sums, compared, strict=True)]


@dataclass(frozen=True)
class _Compared:
    """Of one sample the tokens whose outputs are compared.

    Attributes:
        labels: of the tokens that follow.
        kinds: see `predicted_kinds`; where all positions count.
    """

    reference: State
    rows: State
    labels: Int64[Tensor, "token"]
    kinds: Float64[Tensor, "token kind"] | None

    @classmethod
    def of(cls, end: End, positions: str) -> _Compared:
        """The tokens at some positions."""
        sample, places, device = end.context.sample, end.context.places[0], end.rows.device
        labels = next_token_labels(sample.labels).to(device)
        kinds = predicted_kinds(sample, places).to(device) if positions == "all" else None
        own = cls(end.reference, end.rows, labels, kinds)
        counted = scored_positions(sample, places, positions).to(device)
        return own if bool(counted.all()) else own.part(counted)

    def part(self, tokens: slice | Tensor) -> _Compared:
        """Some of the tokens."""
        kinds = None if self.kinds is None else self.kinds[tokens]
        return _Compared(self.reference[:, tokens], self.rows[:, tokens], self.labels[tokens], kinds)

    @property
    def counts(self) -> Float64[Tensor, "metric"]:
        """What sums over the tokens are divided by."""
        counts = error_counts(len(self.labels), self.labels) + [1] * (0 if self.kinds is None else self.kinds.shape[1])
        return torch.tensor(counts, device=self.labels.device, dtype=torch.float64)


def packed(counts: Sequence[int], most: int) -> Iterator[list[tuple[int, slice]]]:
    """Tokens of several samples in turn, at most so many together: of each sample that has some there, which.

    Args:
        counts: tokens of each sample.
    """
    group: list[tuple[int, slice]] = []
    room = most
    for index, count in enumerate(counts):
        first = 0
        while first < count:
            size = min(room, count - first)
            group.append((index, slice(first, first + size)))
            first, room = first + size, room - size
            if not room:
                yield group
                group, room = [], most
    if group:
        yield group
