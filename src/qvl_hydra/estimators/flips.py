"""How a quantized operator changes which experts a mixture's tokens go to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.families.stages import Segment, State

FLIPS = "routing_flips"  # share of the choices of experts that a quantized operator changes


class Flips:
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
