"""Families of modules against plain sums, and against effects that are known to add up or cancel."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.families import THIRDS, families, family_plans, name_of
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.scheme import Scheme

NO_SAMPLES = pd.DataFrame({"op": []})


def table(blocks: int = 6) -> pd.DataFrame:
    rows = [
        {"op": f"layers.{b}.{role}", "component": "lm", "block": b, "role": role, "group": f"layers.{b}.qk", "score": s}
        for b in range(blocks)
        for role, s in (("q_proj", 1.0 + b), ("k_proj", 0.5))
    ]
    head = dict.fromkeys(("op", "role", "group"), "lm_head")
    rows.append({**head, "component": "lm", "block": None, "score": 4.0})
    return pd.DataFrame(rows).assign(status="scored", metric="kl")


def test_without_signed_sums_families_are_sums() -> None:
    found = families(table(), NO_SAMPLES, "w8")
    by_name = {name_of(row): row for row in found.to_dict("records")}
    assert set(by_name) == {f"language {role} {third}" for role in ("q_proj", "k_proj") for third in THIRDS} | {
        "language lm_head"
    }
    late = by_name["language q_proj late"]  # blocks 4 and 5
    assert (late["n_ops"], late["together"], late["sum_of_scores"]) == (2, 11.0, 11.0)
    assert found["sum_of_scores"].is_monotonic_decreasing


def test_a_sum_is_the_same_in_every_process() -> None:
    """Taken in the order of the operators; in that of a set of their names it would change with the names' hashes."""
    scores = [0.1 * 3**block for block in range(36)]
    names = [f"layers.{block}.o_proj" for block in range(36)]
    rows = {"op": names, "group": names, "block": range(36), "score": scores}
    given = pd.DataFrame(rows).assign(component="lm", role="o", status="scored", metric="kl")
    found = families(given, NO_SAMPLES, "w8")
    thirds = [scores[first : first + 12] for first in (24, 12, 0)]
    assert found["sum_of_scores"].tolist() == [pd.Series(own).sum() for own in thirds]


def test_of_a_unit_that_shares_its_score_one_operator_counts() -> None:
    found = families(table(), NO_SAMPLES, "w8", shared=True)
    assert found["n_ops"].sum() == 7  # six units and the head


def test_effects_that_cancel_and_add_up_are_seen() -> None:
    """Two operators of opposite sign in every draw undo each other; two of equal sign cost four times one."""
    scores = pd.DataFrame(
        {"op": list("abcd"), "component": "vision", "block": [0, 0, 0, 0], "role": ["up", "up", "down", "down"],
         "group": list("abcd"), "score": 1.0, "status": "scored", "metric": "kl"}
    )  # fmt: skip
    rng = np.random.default_rng(0)
    rows = []
    for sample in range(200):
        one, other = rng.choice([-1.0, 1.0], 2)
        for op, signed in zip("abcd", (one, -one, other, other), strict=True):
            rows.append({"op": op, "sample": str(sample), "probe": 0, "signed": signed, "scheme": "w8", "metric": "kl"})
    found = families(scores, pd.DataFrame(rows), "w8").set_index("role")
    assert found.loc["up", "together"] == pytest.approx(0.0, abs=0.05)
    assert found.loc["down", "together"] == pytest.approx(4.0, rel=0.05)
    assert found.loc["up", "sum_of_scores"] == 2.0


def test_plans_of_a_family_quantize_it_alone_and_everything_but_it() -> None:
    """Operators that were not scored stay in high precision; of a score that a unit shares the whole unit goes."""
    scores = table()
    scores.loc[scores["op"] == "layers.0.k_proj", "status"] = "skipped"
    operators = tuple(
        Operator(row["op"], "lm", None, row["role"], row["group"], "Linear", 4, 4, 16, "qwen2_5_vl")
        for row in scores.to_dict("records")
    )
    every = {op.path for op in operators}
    kept = Profile(Scheme("w8", None, None), operators, frozenset(every), 16, "families")
    largest = families(scores, NO_SAMPLES, "w8").head(2)
    assert [name_of(row) for row in largest.to_dict("records")] == ["language q_proj late", "language q_proj middle"]
    late = {"layers.4.q_proj", "layers.5.q_proj"}
    plans = family_plans(scores, largest, kept)
    low = [{op.path for op in plan.low} for plan in plans]
    scored = every - {"layers.0.k_proj"}
    assert low[:3] == [scored, late, scored - late]
    assert low[3] == {"layers.2.q_proj", "layers.3.q_proj"}
    shared = family_plans(table(), families(table(), NO_SAMPLES, "w8", shared=True).head(1), kept, shared=True)
    assert {op.path for op in shared[1].low} == late | {"layers.4.k_proj", "layers.5.k_proj"}


def test_nothing_scored_has_no_families() -> None:
    assert families(table().assign(status="failed"), NO_SAMPLES, "w8").empty
