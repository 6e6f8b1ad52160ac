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
        expert: the only one of a mixture's experts that is put into the scheme; None: all.
    """

    name: str
    operators: tuple[Operator, ...]
    expert: int | None = None


def make_targets(operators: Sequence[Operator], fuse: bool) -> list[Target]:
    """One target an operator, or one a fused group, in data order."""
    groups: dict[str, list[Operator]] = {}
    for op in operators:
        groups.setdefault(op.group if fuse else op.path, []).append(op)
    return [Target(name, tuple(members)) for name, members in groups.items()]


def single_experts(targets: Sequence[Target]) -> list[Target]:
    """Each expert of each mixture among the targets by itself, named by its place behind the operator's path."""
    return [
        Target(f"{op.path}.{expert}", (op,), expert)
        for target in targets
        for op in target.operators
        if op.experts > 1
        for expert in range(op.experts)
    ]
