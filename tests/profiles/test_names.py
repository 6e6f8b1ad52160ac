"""Names against what transformers writes to disk, and against vLLM's own prefix rules written down again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from qvl_hydra.models.load import LoadedModel, describe_model
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.names import neural_compressor_pattern, rename
from qvl_hydra.settings import ModelSettings

# hf_to_vllm_mapper of Qwen2_5_VLForConditionalGeneration in vLLM: the first prefix that fits is replaced.
VLLM_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)


def operators(family: str) -> list[Operator]:
    settings = ModelSettings("shape", f"bundled:tiny_{family}", family, weights="random")  # type: ignore[arg-type]
    return find_operators(describe_model(settings).skeleton, "full")


def paths(family: str) -> list[str]:
    return [op.path for op in operators(family)]


def vllm_name(name: str) -> str:
    for prefix, replacement in VLLM_PREFIXES:
        if f"{name}.weight".startswith(prefix):
            return (replacement + f"{name}.weight".removeprefix(prefix)).removesuffix(".weight")
    return name


def test_checkpoint_names_are_those_that_transformers_saves(small_model: LoadedModel, tmp_path: Path) -> None:
    small_model.module.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key.removesuffix(".weight") for key in file.keys()}  # noqa: SIM118
    for op in find_operators(small_model.module, "full"):
        assert rename(op, "checkpoint") in saved


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_vllm_finds_every_name_from_either_spelling(family: str) -> None:
    for op in operators(family):
        assert vllm_name(op.path) == rename(op, "vllm")
        # The hub's spelling of the vision tower, `visual.`, is vLLM's own already.
        assert vllm_name(rename(op, "checkpoint")) == rename(op, "vllm")


@pytest.mark.parametrize("convention", ["hugging_face", "checkpoint", "vllm"])
def test_no_two_operators_share_a_name(convention: str) -> None:
    names = [rename(op, convention) for op in operators("qwen2_5_vl")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_a_neural_compressor_pattern_matches_its_operator_alone(family: str) -> None:
    everything = paths(family)
    # As the adaptor may call them: traced from the model or from the component, alone or within their block.
    called = {
        form: path
        for path in everything
        for form in (path, f"{path}.module", path.removeprefix("model."), f"wrapper.{path}.module")
    }
    for path in everything:
        pattern = re.compile(neural_compressor_pattern(path))
        matched = {name for name in called if pattern.fullmatch(name)}
        assert matched == {name for name, owner in called.items() if owner == path}


def test_a_bare_role_would_hit_both_towers() -> None:
    """Why names carry their tower: the usual `re:.*gate_proj` reaches vision and language alike."""
    hit = {path.split(".")[1] for path in paths("qwen2_5_vl") if re.match(r".*gate_proj", path)}
    assert hit == {"language_model", "visual"}
