"""What formats refuse, report and never drop. That consumers read them is tested beside, one file a consumer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qvl_hydra.errors import ProfileError
from qvl_hydra.models.load import LoadedModel, describe_model
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.formats.rendered import misaligned
from qvl_hydra.profiles.formats.table import FORMATS
from qvl_hydra.profiles.formats.written import not_exported, write_formats
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.settings import ModelSettings
from tests.profiles.rounding import W8A8, W8A8_DYNAMIC, some_profile

LINEAR_ONLY = ("compressed_tensors", "llm_compressor", "auto_round", "tensorrt_llm")


@pytest.mark.parametrize("name", LINEAR_ONLY)
def test_a_convolution_is_refused_by_name(small_model: LoadedModel, name: str) -> None:
    profile = some_profile(small_model, W8A8)
    with pytest.raises(ProfileError, match=rf"{name} .*model\.visual\.patch_embed\.proj \(Conv3d\)"):
        FORMATS[name].load()(profile, profile.operators)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("neural_compressor", W8A8_DYNAMIC),
        ("neural_compressor", Scheme("w4a16", WeightFormat(4, group_size=128), None)),
        ("modelopt", Scheme("asymmetric", WeightFormat(8, symmetric=False), None)),
        ("auto_round", Scheme("a8", None, ActivationFormat(8))),
        ("tensorrt_llm", Scheme("w6", WeightFormat(6), None)),
        ("compressed_tensors", Scheme("a8", None, ActivationFormat(8))),
    ],
)
def test_a_scheme_that_cannot_be_expressed_is_refused(small_model: LoadedModel, name: str, scheme: Scheme) -> None:
    profile = some_profile(small_model, scheme, convolutions=False)
    with pytest.raises(ProfileError, match=rf"{name} cannot express .*{scheme.name}.*{profile.low[0].path}"):
        FORMATS[name].load()(profile, profile.operators)


def test_every_operator_is_in_every_format(small_model: LoadedModel, tmp_path: Path) -> None:
    profile = some_profile(small_model, W8A8, component="lm")
    everything = find_operators(small_model.module, "full")
    low, linear = {op.path for op in profile.low}, {op.path for op in everything if op.kind == "Linear"}
    records = write_formats(profile, everything, [], tmp_path)
    assert [record["format"] for record in records] == list(FORMATS)
    config = json.loads((tmp_path / "compressed_tensors" / "quantization_config.json").read_text())
    assert set(config["ignore"]) == linear - low
    recipe = yaml.safe_load((tmp_path / "llm_compressor" / "recipe.yaml").read_text())
    assert recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]["ignore"] == config["ignore"]
    entries = yaml.safe_load((tmp_path / "modelopt" / "quant_cfg.yaml").read_text())["quant_cfg"]
    assert {entry["quantizer_name"] for entry in entries[1:]} == {
        f"{path}.{part}" for path in low for part in ("weight_quantizer", "input_quantizer")
    }
    layers = json.loads((tmp_path / "auto_round" / "layer_config.json").read_text())
    assert {path for path, layer in layers.items() if layer["bits"] == 8} == low
    assert set(layers) == linear
    named = json.loads((tmp_path / "neural_compressor" / "op_name_dict.json").read_text())
    assert sum(entry["weight"]["dtype"] == ["int8"] for entry in named.values()) == len(low)
    assert len(named) == len(everything) + 1
    quantized = json.loads((tmp_path / "tensorrt_llm" / "quant_cfg.json").read_text())["quantized_layers"]
    assert set(quantized) == {path.replace("model.language_model.", "model.") for path in low}
    written = json.loads((tmp_path / "exports.json").read_text())
    assert written["formats"] == records


def test_a_format_asked_for_by_name_fails_and_others_report(small_model: LoadedModel, tmp_path: Path) -> None:
    profile = some_profile(small_model, W8A8)
    with pytest.raises(ProfileError, match="patch_embed"):
        write_formats(profile, profile.operators, ["compressed_tensors"], tmp_path)
    written = write_formats(profile, profile.operators, [], tmp_path)
    (note,) = not_exported(written)  # one reason, told once
    assert note.startswith(f"not exported: {', '.join(LINEAR_ONLY)}, each of which quantizes Linear modules only")
    alone = [record for record in written if record["format"] not in LINEAR_ONLY[1:]]
    assert not_exported(alone)[0].startswith(f"not exported: {LINEAR_ONLY[0]} quantizes Linear modules only")
    records = {record["format"]: record for record in written}
    assert {name for name, record in records.items() if "error" in record} == set(LINEAR_ONLY)
    assert all("patch_embed" in records[name]["error"] for name in LINEAR_ONLY)
    assert not (tmp_path / "compressed_tensors").exists()


def test_widths_that_kernels_do_not_take_are_reported() -> None:
    settings = ModelSettings("qwen2_5_vl_7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", weights="random")
    operators = tuple(find_operators(describe_model(settings).skeleton, "full"))
    profile = Profile(W8A8, operators, frozenset(op.path for op in operators if op.block == 0), 16, "test")
    found = misaligned(profile)
    mlp = [line for line in found if ".mlp." in line and ".visual.blocks." in line]
    assert len(mlp) == 31 * 3  # gate, up and down of the vision blocks that are quantized
    assert all("3420 not divisible by 64" in line for line in mlp)
    assert not any("language_model" in line for line in found)
