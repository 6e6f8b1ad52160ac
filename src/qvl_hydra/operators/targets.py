"""Targets: what is put into a scheme at a time - one operator, or the operators that a runtime fuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvl_hydra.operators.discover import Operator


@dataclass(frozen=True)
class Target:
    """Operators that are quantized together and get one score.

    Attributes:
        name: the operator's path, or the group's for several.
    """

    name: str
    operators: tuple[Operator, ...]


def make_targets(operators: Sequence[Operator], fuse: bool) -> list[Target]:
    """One target an operator, or one a fused group, in data order."""
    groups: dict[str, list[Operator]] = {}
    for op in operators:
        groups.setdefault(op.group if fuse else op.path, []).append(op)
    return [Target(name, tuple(members)) for name, members in groups.items()]
