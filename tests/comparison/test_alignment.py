"""Alignment by role and relative depth, against pairs written down by hand."""

from __future__ import annotations

import pandas as pd

from qvl_hydra.comparison.alignment import by_depth, same_names, without_counterpart
from tests.made_up_runs import operator_rows


def table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"block": "Int64"}).set_index("op", drop=False)


def test_equal_depth_meets_itself() -> None:
    tower = table(operator_rows("lm", 4))
    aligned = by_depth(tower, tower)
    assert (aligned["op"] == aligned["other_op"]).all()
    assert set(aligned["match"]) == {"same"}
    pd.testing.assert_frame_equal(aligned, same_names(tower, tower))


def test_deeper_target_meets_nearest_relative_depth() -> None:
    """Seven blocks on three: depths k/6 and 0, 1/2, 1; the shallower of two as near."""
    aligned = by_depth(table(operator_rows("lm", 7)), table(operator_rows("lm", 3))).set_index("op")
    met = [aligned.loc[f"model.language_model.layers.{block}.mlp.down_proj", "other_block"] for block in range(7)]
    assert met == [0, 0, 1, 1, 1, 2, 2]
    assert aligned.loc["lm_head", "other_op"] == "lm_head"
    assert set(aligned.loc[aligned["role"] == "down_proj", "match"]) == {"depth"}


def test_shallower_target_leaves_operators_alone() -> None:
    target, other = table(operator_rows("lm", 2)), table(operator_rows("lm", 4))
    mine, theirs = without_counterpart(by_depth(target, other), other)
    assert mine == []
    assert theirs == [op for op in other.index if ".1." in op or ".2." in op]


def test_plain_and_gated_mlp_meet_where_they_do_the_same() -> None:
    gated = operator_rows("vision", 2)
    plain = [
        {**row, "role": {"up_proj": "fc1", "down_proj": "fc2"}.get(row["role"], row["role"])}
        for row in gated
        if row["role"] != "gate_proj"
    ]
    for row in plain:
        row["op"] = row["op"].replace("up_proj", "fc1").replace("down_proj", "fc2")
    aligned = by_depth(table(gated), table(plain)).set_index("op", drop=False)
    assert aligned.loc["model.visual.blocks.1.mlp.up_proj", "other_op"] == "model.visual.blocks.1.mlp.fc1"
    assert aligned.loc["model.visual.blocks.0.mlp.down_proj", "match"] == "alike"
    alone, _ = without_counterpart(aligned, table(plain))
    assert alone == ["model.visual.blocks.0.mlp.gate_proj", "model.visual.blocks.1.mlp.gate_proj"]


def test_towers_never_meet() -> None:
    aligned = by_depth(table(operator_rows("vision", 2)), table(operator_rows("lm", 2)))
    assert aligned["other_op"].isna().all()
    assert set(aligned["match"]) == {"none"}
