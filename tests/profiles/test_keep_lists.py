"""Lists that others keep: read as their consumers read them, and judged against an enumeration."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml

from qvl_hydra.errors import ProfileError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.keep_lists import PRESETS, KeepList, judge, kept_by, read_keep_list
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.units import Unit
from tests.profiles.rounding import W8A8
from tests.profiles.test_select import operator

TERMS = Terms({W8A8.name: W8A8})


@pytest.mark.parametrize(
    ("entry", "parts", "expected"),
    [
        ("re:.*lm_head", False, r"lm_head"),
        ("re:visual.*", False, r"visual"),  # vLLM's and the hub's names begin so
        ("*layers.3.*", False, r"layers\.3\."),
        ("model.layers.3.mlp.down_proj", False, r"layers\.3\.mlp\.down_proj"),  # the hub's name
        ("language_model.model.layers.3.mlp.down_proj", False, r"layers\.3\.mlp\.down_proj"),  # vLLM's
        ("visual", False, None),
        ("visual", True, r"visual"),
        ("proj", True, r"attn\.proj|patch_embed\.proj"),  # whole parts alone
        ("re:layers.*", False, None),  # matched from the start
    ],
)
def test_entries_are_read_as_their_consumers_read_them(
    tiny_model: LoadedModel, entry: str, parts: bool, expected: str | None
) -> None:
    import re

    operators = find_operators(tiny_model.module, "full")
    assert kept_by(entry, operators, parts) == {
        op.path for op in operators if expected is not None and re.search(expected, op.path)
    }


def test_lists_are_found_in_the_files_that_people_have(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    files = {
        "ckpt/config.json": json.dumps({"a": 1, "quantization_config": {"ignore": ["lm_head", "re:.*visual.*"]}}),
        "recipe.yaml": yaml.safe_dump({"stage": {"mods": {"QuantizationModifier": {"ignore": ["lm_head"]}}}}),
        "hf_quant_config.json": json.dumps({"quantization": {"exclude_modules": ["lm_head*"]}}),
        "old.json": json.dumps({"modules_to_not_convert": ["visual"]}),
        "list.yml": "- lm_head\n",
        "names.txt": "# mine\nlm_head\n\n*visual*\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = {name: read_keep_list(str(tmp_path / name)) for name in files}
    assert found["ckpt/config.json"].entries == ("lm_head", "re:.*visual.*")
    assert found["ckpt/config.json"].name == "ckpt"
    assert found["names.txt"].entries == ("lm_head", "*visual*")
    assert [item.parts for item in found.values()] == [False, False, False, True, False, False]
    assert read_keep_list("llm_compressor") is PRESETS["llm_compressor"]


@pytest.mark.parametrize("text", ["{}", '{"ignore": []}', "[1, 2]", "{", '{"ignore": {"a": 1}}', "3"])
def test_what_is_no_list_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ProfileError, match=r"compare_with=.*x\.json"):
        read_keep_list(str(tmp_path / "x.json"))
    with pytest.raises(ProfileError, match="neither a preset .llm_compressor"):
        read_keep_list("nobody")


def units() -> list[Unit]:
    losses = {"head": 4.0, "qkv": 8.0, "down": 1.0, "up": 0.5, "early": 0.01}
    found = []
    for name, loss in losses.items():
        members = [operator(name, group=name)]
        if name == "qkv":
            members = [operator(f"qkv.{part}", group="qkv") for part in "qkv"]
        found.append(Unit(name, tuple(members), {W8A8.name: loss, LEAVE: 0.0}))
    return found


def test_an_entry_earns_its_place_if_the_same_bits_win_no_more_elsewhere() -> None:
    found = judge(KeepList("mine", ("head", "early", "nothing", "head"), "here"), units(), W8A8.name, TERMS)
    entries = {entry["entry"]: entry for entry in found.entries}
    assert entries["head"]["earns"]
    assert entries["head"]["loses"] == pytest.approx(4.0)
    assert not entries["early"]["earns"]
    assert entries["nothing"]["units"] == 0
    # Two operators of equal size may stay: of all pairs ours keeps the one that loses least.
    assert found.ours.high == {"head", "down"}
    pairs = itertools.combinations(["head", "down", "up", "early"], 2)
    lost = {pair: 13.51 - sum(u.scores[W8A8.name] for u in units() if u.name in pair) for pair in pairs}
    assert found.ours.predicted == pytest.approx(min(lost.values()))
    assert found.forgotten == {"down": 1.0}


def test_a_part_of_what_is_fused_is_kept_whole_and_said() -> None:
    found = judge(KeepList("mine", ("qkv.q",), "here"), units(), W8A8.name, TERMS)
    assert found.split == ("qkv",)
    assert found.theirs.high == {"qkv.q", "qkv.k", "qkv.v"}


def test_entries_that_repeat_each_other_add_nothing_alone() -> None:
    found = judge(KeepList("mine", ("head", "hea*"), "here"), units(), W8A8.name, TERMS)
    assert [entry["alone"] for entry in found.entries] == [0, 0]
    assert not any(entry["earns"] for entry in found.entries)
