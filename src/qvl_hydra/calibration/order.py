"""The order in which a source's rows come: drawn from the seed, whatever the rows hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from datasets import Dataset

Row = TypeVar("Row")


def shuffled(rows: Sequence[Row], seed: int) -> Iterator[Row]:
    """The rows in the order that `datasets` shuffles as many into."""
    if rows:
        for place in Dataset.from_dict({"place": range(len(rows))}).shuffle(seed=seed)["place"]:
            yield rows[place]
