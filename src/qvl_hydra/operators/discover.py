"""Finds the quantizable operators of a model and selects those to score.

The head belongs to the language tower, mergers and patch embedding to the vision tower. Works on a model without
weights (meta device), so that a selection can be checked early.
"""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvl_hydra.errors import ModelError, OperatorError
from qvl_hydra.families.record import Family
from qvl_hydra.families.stages import Segment
from qvl_hydra.families.table import family_of
from qvl_hydra.operators.kinds import kind_of, mixture, outputs
from qvl_hydra.settings import OperatorSettings, parse_blocks


@dataclass(frozen=True)
class Operator:
    """One quantizable module: a `Linear`, a `Conv`, or one product of all experts of a block.

    Attributes:
        path: Hugging Face module path, such as `model.language_model.layers.3.mlp.down_proj`.
        component: `lm` or `vision`.
        block: layer index in its tower; None for patch embedding, merger and head.
        role: what it is in its block: `down_proj`, `qkv`; `patch_embed`, `merger.0`, `deepstack.1.linear_fc2` or
            `lm_head` outside.
        group: path of the fused operator that a runtime makes of it and its neighbours, or of the experts that it is a
            product of, else its own path.
        kind: class of the module.
        in_features, out_features: width of a token before and after.
        n_params: weight and bias together.
        family: of the model, which tells how consumers name it.
        experts: how many weights of `in_features` by `out_features` it has.
        active: how many of them a token is multiplied with.
    """

    path: str
    component: str
    block: int | None
    role: str
    group: str
    kind: str
    in_features: int
    out_features: int
    n_params: int
    family: str
    experts: int = 1
    active: int = 1


def find_operators(model: Any, component: str) -> list[Operator]:
    """Every operator of the component, in the order in which data meets them: vision tower, language tower, head.

    Args:
        model: of a class that the table of families names, with or without weights.
        component: `lm`, `vision` or `full`.

    Raises:
        ModelError: an operator does not lie in exactly one stage of the family: in none it would score zero in silence,
            and in two twice.
    """
    family = family_of(model.config)
    segments = family.load_stages()(model).of("full")
    found: list[list[Operator]] = [[] for _ in segments]
    for path, module in model.named_modules():
        if (kind := kind_of(module)) is not None:
            found[_place(path, segments)].append(_describe(path, module, kind.name, family))
    operators = [op for inside in found for op in inside]
    return operators if component == "full" else [op for op in operators if op.component == component]


def _place(path: str, segments: Sequence[Segment]) -> int:
    places = [index for index, segment in enumerate(segments) if segment.holds(path)]
    if len(places) != 1:
        where = ", ".join(segments[index].name for index in places) or "no stage"
        raise ModelError(f"{path} lies in {where} of the model, and every operator must lie in exactly one")
    return places[0]


def uncovered(model: Any, component: str, share: float = 0.01) -> dict[str, float]:
    """Parameters of a component that no operator covers and that hold more than a share of its weights.

    Returns:
        Module path of each with its share, largest first: embedding tables, and whatever a family hides elsewhere.
    """
    family, covered = family_of(model.config), {op.path for op in find_operators(model, component)}
    own = {
        path: parameter.numel()
        for path, parameter in model.named_parameters()
        if component == "full" or family.component_of(path) == component
    }
    total = sum(own.values())
    shares = {path: size / total for path, size in own.items() if path.rpartition(".")[0] not in covered}
    return dict(sorted(((path, part) for path, part in shares.items() if part > share), key=lambda item: -item[1]))


def select_operators(operators: Sequence[Operator], settings: OperatorSettings, seed: int) -> list[Operator]:
    """The operators that globs, blocks and the cap leave, in their first order.

    With `operators.fuse` the cap counts fused groups.

    Raises:
        OperatorError: a glob or block names nothing, or nothing is left.
    """
    kept = list(operators)
    problems: list[str] = []
    if settings.include is not None:
        problems += _unmatched("include", settings.include, operators)
        kept = [op for op in kept if _matches(op, settings.include)]
    if settings.exclude is not None:
        problems += _unmatched("exclude", settings.exclude, operators)
        kept = [op for op in kept if not _matches(op, settings.exclude)]
    if settings.blocks is not None:
        blocks = parse_blocks(settings.blocks)
        present = {op.block for op in operators if op.block is not None}
        if blocks - present:
            missing = sorted(blocks - present)
            problems.append(f"operators.blocks={settings.blocks}: no block {missing}; blocks are 0-{max(present)}")
        kept = [op for op in kept if op.block in blocks]
    if settings.experts == "single" and not any(op.experts > 1 for op in kept):
        problems.append("operators.experts=single: none of the operators has experts")
    if problems:
        raise OperatorError("; ".join(problems))
    if not kept:
        raise OperatorError("operators.include, exclude and blocks together leave no operator to score")
    if settings.max_ops is None:
        return kept
    units = list(dict.fromkeys(op.group if settings.fuse else op.path for op in kept))
    chosen = set(_cap(units, settings.max_ops, settings.select, seed))
    return [op for op in kept if (op.group if settings.fuse else op.path) in chosen]


def _cap(units: list[str], cap: int, select: str, seed: int) -> list[str]:
    if cap >= len(units) or select == "first":
        return units[:cap]
    if select == "random":
        return random.Random(seed).sample(units, cap)
    if cap == 1:
        return [units[len(units) // 2]]
    return [units[round(index * (len(units) - 1) / (cap - 1))] for index in range(cap)]


def _describe(path: str, module: nn.Module, kind: str, family: Family) -> Operator:
    match = family.block.match(path)
    block = int(match.group(1)) if match else None
    parts = path.split(".")
    role, own = parts[-1], mixture(module)
    if ".patch_embed." in path:
        role = "patch_embed"
    elif ".merger." in path:
        role = f"merger.{parts[-1]}"
    elif ".deepstack_merger_list." in path:
        role = ".".join(["deepstack", *parts[-2:]])
    elif own is not None:
        role = ".".join(parts[-2:])
    group = path
    if own is not None:
        group = path.rpartition(".")[0]  # runtimes give all products of a block's experts one scheme
    elif block is not None and role in family.fused:
        group = ".".join([*parts[:-1], family.fused[role]])
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    return Operator(
        path=path,
        component=family.component_of(path),
        block=block,
        role=role,
        group=group,
        kind=kind,
        in_features=weight[0].numel(),
        out_features=outputs(module),
        n_params=weight.numel() + (0 if bias is None else bias.numel()),
        family=family.name,
        experts=own.experts if own else 1,
        active=own.active if own else 1,
    )


def _matches(op: Operator, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(op.path, glob) for glob in globs)


def _unmatched(key: str, globs: Sequence[str], operators: Sequence[Operator]) -> list[str]:
    return [
        f"operators.{key}: the glob {unmatched(glob, operators)}"
        for glob in globs
        if not any(fnmatch.fnmatchcase(op.path, glob) for op in operators)
    ]


def unmatched(glob: str, operators: Sequence[Operator]) -> str:
    """What is wrong with a glob that matches no operator, and what may have been meant: a part of a path."""
    meant = f"*{glob.strip('*')}*"
    found = [op.path for op in operators if fnmatch.fnmatchcase(op.path, meant)]
    if not found:
        return f"{glob!r} matches no operator; a path looks like {operators[len(operators) // 2].path}"
    return f"{glob!r} matches no operator; {meant!r} matches {len(found)}, such as {found[0]}"
