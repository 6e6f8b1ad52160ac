"""Lists of patterns mean exactly the operators that they are made for, in every dialect."""

from __future__ import annotations

import fnmatch
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qvl_hydra.models.load import LoadedModel, describe_model
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.formats.table import FORMATS
from qvl_hydra.profiles.formats.written import paste, pasted, write_formats
from qvl_hydra.profiles.names import rename
from qvl_hydra.profiles.patterns import DIALECTS, shortest
from qvl_hydra.settings import ModelSettings
from tests.profiles.rounding import W8A8, some_profile
from tests.profiles.test_compressed_tensors import mixed

MATCH: dict[str, Callable[[str, str], object]] = {  # as each consumer's source has it
    "re": lambda pattern, name: re.match(pattern.removeprefix("re:"), name),
    "regex": lambda pattern, name: re.compile(pattern).fullmatch(name),
    "glob": lambda pattern, name: fnmatch.fnmatch(name, pattern),
}


def linear(name: str) -> list[Operator]:
    settings = ModelSettings(name=name, path=f"bundled:{name}", family=name.removeprefix("tiny_"))
    return [op for op in find_operators(describe_model(settings).skeleton, "full") if op.kind == "Linear"]


@pytest.fixture(scope="module", params=["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def operators(request: pytest.FixtureRequest) -> list[Operator]:
    return linear(request.param)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (r"visual", ["re:.*\\bvisual\\..*"]),
        (r"lm_head", ["re:.*\\blm_head$"]),
        (r"layers\.\d+\.mlp\.down_proj", ["re:.*\\blayers\\.\\d+\\.mlp\\.down_proj$"]),
        (r"layers\.(0|3)\.mlp\.down_proj", ["re:.*\\blayers\\.(0|3)\\.mlp\\.down_proj$"]),
        (r"layers\.2\.self_attn\.[qkv]_proj", ["re:.*\\blayers\\.2\\.self_attn\\.(q|k|v)_proj$"]),
        (r"blocks\.1\.", ["re:.*\\bblocks\\.1\\..*"]),
    ],
)
def test_what_a_person_would_write(operators: list[Operator], wanted: str, expected: list[str]) -> None:
    names = [op.path for op in operators]
    own = [name for name in names if re.search(wanted, name)]
    assert shortest(own, [name for name in names if name not in own], DIALECTS["re"]) == expected


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_random_choices_are_met_exactly(operators: list[Operator], dialect: str) -> None:
    names, rng = [op.path for op in operators], random.Random(0)
    for share in (0.02, 0.2, 0.5, 0.8, 1.0):
        own = [name for name in names if rng.random() < share]
        found = shortest(own, [name for name in names if name not in own], DIALECTS[dialect])
        caught = [name for name in names if any(MATCH[dialect](pattern, name) for pattern in found)]
        assert caught == own
        assert len(found) <= len(own)


def test_a_name_that_no_pattern_can_tell_apart_is_given_in_full() -> None:
    assert shortest(["a.x.1.q"], ["b.x.1.q"], DIALECTS["glob"]) == ["*a.*"]
    names = {"one": ("one", "eins"), "two": ("two", "zwei")}
    found = shortest(["one"], ["two"], DIALECTS["re"], lambda name: names[name])
    assert found == ["re:one$", "re:eins$"]


@pytest.mark.parametrize("consumer", [row.name for row in FORMATS.values() if row.dialect])
def test_every_consumer_reads_the_profile_back(tiny_model: LoadedModel, consumer: str) -> None:
    row = FORMATS[consumer]
    profile = some_profile(tiny_model, W8A8, convolutions=False)
    everything = find_operators(tiny_model.module, "full")
    found = paste(profile, everything, row)
    assert list(found) == ["leave"]
    low = {op.path for op in profile.low}
    for convention in row.names:
        for op in everything:
            if op.kind == "Linear":
                caught = any(MATCH[row.dialect](pattern, rename(op, convention)) for pattern in found["leave"])
                assert caught == (op.path not in low), (convention, op.path)


def test_several_schemes_have_a_list_each(tiny_model: LoadedModel, tmp_path: Path) -> None:
    profile, _ = mixed(tiny_model, (), ["w4a16_g32", "w8a8_int"])
    records = write_formats(profile, find_operators(tiny_model.module, "full"), ["compressed_tensors"], tmp_path)
    lines = pasted(records)
    assert [line.partition(":")[0] for line in lines] == ["ignore", "targets of w4a16_g32", "targets of w8a8_int"]
    targets = json.loads(lines[2].partition(": ")[2])
    assert {op.path for op in profile.low if profile.scheme_of(op).name == "w8a8_int"} == {
        op.path for op in profile.operators if any(MATCH["re"](pattern, op.path) for pattern in targets)
    }
    assert json.loads((tmp_path / "exports.json").read_text())["formats"] == records
