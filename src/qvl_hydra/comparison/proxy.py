"""Whether a small model can answer for a large one: agreement in parts, and what choosing by the small one costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qvl_hydra.comparison.agreement import pair
from qvl_hydra.comparison.runs import Mapped
from qvl_hydra.comparison.stability import Criterion

TARGET, PROXY, FIRST, LAST, RANDOM, NONE = "target", "proxy", "first blocks", "last blocks", "random", "none kept"


def agreement_in_parts(target: Mapped, proxy: Mapped, criterion: Criterion, draws: int, seed: int) -> pd.DataFrame:
    """Agreement over all aligned operators, each component and each role: columns of `agreement.pair`, and `part`."""
    table = target.run.table
    parts: dict[str, pd.Index] = {"all": table.index}
    components = list(dict.fromkeys(table["component"]))
    for component in components if len(components) > 1 else []:
        parts[str(component)] = table.index[table["component"] == component]
    for (component, role), group in table.groupby(["component", "role"], sort=False):
        if len(group) > 1:
            parts[f"{component}: {role}"] = group.index
    rows = [{"part": name, **pair(target, proxy, criterion, draws, seed, ops)} for name, ops in parts.items()]
    return pd.DataFrame(rows)


def kept_sets(target: Mapped, proxies: Sequence[Mapped], k: int, random_draws: int, seed: int) -> dict[str, list[str]]:
    """Which `k` operators each chooser would keep in float.

    Args:
        target: of which every scored operator is quantized unless kept.
        proxies: seen through the target's operators; operators without a score come last, in data order.
        random_draws: sets drawn at random.

    Returns:
        Operators by chooser: the target's own scores, each proxy's, depth alone from either end, and random sets.
    """
    ops = list(target.run.scores.index)
    sets = {TARGET: _highest(target.scores[ops], k)}
    for mapped in proxies:
        name = PROXY if len(proxies) == 1 else f"{PROXY} {mapped.name}"
        sets[name] = _highest(mapped.scores[ops], k)
    sets[FIRST], sets[LAST] = ops[:k], ops[len(ops) - k :]
    rng = np.random.default_rng(seed)
    for index in range(random_draws):
        sets[f"{RANDOM} {index + 1}"] = [ops[place] for place in sorted(rng.choice(len(ops), k, replace=False))]
    return sets


def _highest(scores: pd.Series, k: int) -> list[str]:
    return list(scores.sort_values(ascending=False, kind="stable", na_position="last").index[:k])


def regret_table(
    sets: Mapping[int, Mapping[str, list[str]]], measure: Callable[[Sequence[Sequence[str]]], list[dict[str, float]]]
) -> pd.DataFrame:
    """The target's measured output error under every choice, and what each loses against the target's own.

    Args:
        sets: for each budget (operators kept) the sets of `kept_sets`.
        measure: gives for each set of kept operators the target's errors with all others quantized; `squared_error`
            is what regret is taken of.

    Returns:
        One row a budget and chooser: `kept`, `chooser`, the errors measured, `regret` (error minus that of the
        target's own choice), and `gain_share` (of the error the target's choice takes away, how much this one does).
    """
    labels: list[tuple[int, str]] = [(0, NONE)]
    asked: list[list[str]] = [[]]
    for k, choosers in sets.items():
        for chooser, ops in choosers.items():
            labels.append((k, chooser))
            asked.append(list(ops))
    errors = measure(asked)
    none = errors[0]["squared_error"]
    own = {k: found["squared_error"] for (k, chooser), found in zip(labels, errors, strict=True) if chooser == TARGET}
    rows: list[dict[str, Any]] = []
    for (k, chooser), found in zip(labels, errors, strict=True):
        row = {"kept": k, "chooser": chooser, **found}
        if k in own:
            row["regret"] = found["squared_error"] - own[k]
            gain = none - own[k]
            row["gain_share"] = (none - found["squared_error"]) / gain if gain > 0 else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def regret_summary(regret: pd.DataFrame) -> pd.DataFrame:
    """The regret table with the random sets of a budget as one row: their mean, and the lowest and highest error."""
    table = regret.assign(chooser=regret["chooser"].where(~regret["chooser"].str.startswith(RANDOM), RANDOM))
    numbers = [name for name in table.columns if name not in ("kept", "chooser")]
    grouped = table.groupby(["kept", "chooser"], sort=False)
    ends = grouped["squared_error"].agg(error_low="min", error_high="max")
    return grouped[numbers].mean().join(ends).reset_index()
