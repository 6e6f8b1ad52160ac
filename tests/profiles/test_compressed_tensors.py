"""The compressed-tensors checkpoint, loaded and run by plain transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.errors import ProfileError
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.agreement import compare
from qvl_hydra.profiles.apply import Quantizers, quantizer_key
from qvl_hydra.profiles.checkpoint import write_checkpoint
from qvl_hydra.profiles.formats.compressed_tensors import quantization_config
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.storable import not_loaded, unlike_qdq, unpacked_narrow
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import Scheme, WeightFormat, scheme_from_settings
from qvl_hydra.tasks.quantize import forward
from tests.families.shapes import load_made_up, made_up_checkpoint, samples_of
from tests.profiles.rounding import W8A8, W8A8_DYNAMIC, W8A8_SYMMETRIC, applied, assert_only_rounding, some_profile

Plan = tuple[Profile, dict[str, OperatorQuantizer]]


def written(
    model: LoadedModel, scheme: Scheme, samples: tuple[Sample, ...], folder: Path, component: str = "full"
) -> tuple[Profile, dict[str, OperatorQuantizer]]:
    profile = some_profile(model, scheme, component, convolutions=False)
    quantizers = dict(Quantizers(model, profile.operators, samples, component, [scheme]))
    write_checkpoint(model, profile, quantizers, folder)
    return profile, quantizers


@pytest.mark.parametrize("scheme", [W8A8, W8A8_SYMMETRIC], ids=lambda scheme: scheme.name)
def test_stored_numbers_are_those_of_qdq(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], scheme: Scheme, tmp_path: Path
) -> None:
    profile, quantizers = written(tiny_model, scheme, tiny_samples, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    low = {op.path for op in profile.low}
    for op in find_operators(tiny_model.module, "full"):
        name, weight = op.path, tiny_model.module.get_submodule(op.path).weight
        if op.path not in low:
            assert torch.equal(stored[f"{name}.weight"], weight)
            assert f"{name}.weight_scale" not in stored
            continue
        assert stored[f"{name}.weight"].dtype == torch.int8
        ours = quantizers[op.path]
        assert torch.equal(stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"], ours.weight)
        assert float(stored[f"{name}.input_scale"]) == pytest.approx(ours.input.scale)
        zero_point = int(stored.get(f"{name}.input_zero_point", torch.zeros(1)))
        assert zero_point - (-128) == ours.input.zero_point - ours.input.qmin
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("scheme", [W8A8, W8A8_SYMMETRIC], ids=lambda scheme: scheme.name)
def test_transformers_computes_what_qdq_computes(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], scheme: Scheme, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    profile, quantizers = written(tiny_model, scheme, tiny_samples, tmp_path)
    loaded, info = FAMILIES["qwen2_5_vl"].load_class().from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    outputs = compare(
        lambda sample: forward(loaded.eval(), sample), tiny_model, profile, quantizers, tiny_samples, "full"
    )
    assert outputs.identical >= len(tiny_samples) // 2
    weights = {op.path: loaded.get_submodule(op.path).weight for op in profile.low}
    assert all(torch.equal(weight, quantizers[path].weight) for path, weight in weights.items())
    for sample in tiny_samples:
        assert_only_rounding(tiny_model, loaded, profile, quantizers, weights, sample)
    # The profile itself is seen: with other operators in high precision the outputs are others.
    mirrored = Profile(scheme, profile.operators, frozenset(op.path for op in profile.low), 16, "test")
    with applied(tiny_model.module, mirrored, quantizers), torch.no_grad():
        others = reference_output(tiny_model.module, tiny_samples[0], "full")
    assert not torch.equal(forward(loaded, tiny_samples[0]), others)


@pytest.mark.compressed_tensors
def test_dynamic_inputs_of_the_language_tower(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    """Per token; only here, because compressed-tensors takes one scale a tensor from the vision tower's 2-d inputs."""
    pytest.importorskip("compressed_tensors")
    _, quantizers = written(tiny_model, W8A8_DYNAMIC, tiny_samples, tmp_path, component="lm")
    loaded = FAMILIES["qwen2_5_vl"].load_class().from_pretrained(tmp_path).eval()
    for path in ("model.language_model.layers.1.mlp.down_proj", "lm_head"):
        target, ours = tiny_model.module.get_submodule(path), quantizers[path]
        x = torch.randn(1, 5, target.in_features, generator=torch.Generator().manual_seed(0))
        forward(loaded, tiny_samples[0])  # decompresses
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        expected = torch.round(x / scale).clamp(-128, 127) * scale @ ours.weight.T
        assert torch.allclose(loaded.get_submodule(path)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_quantized_head_is_untied_from_the_embedding(tiny_model: LoadedModel, tmp_path: Path) -> None:
    head = [op for op in find_operators(tiny_model.module, "lm") if op.path == "lm_head"]
    profile = Profile(W8A8_DYNAMIC, tuple(head), frozenset(), 16, "test")
    quantizers = Quantizers(tiny_model, head, (), "lm", [W8A8_DYNAMIC])
    write_checkpoint(tiny_model, profile, quantizers, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["format"] == "int-quantized"


STORED = ["fp8", "fp8_dynamic", "fp8_block", "nvfp4", "mxfp4", "mxfp8", "w8a8_int", "w8a16", "w4a16_g32"]


def scheme_named(name: str) -> Scheme:
    return scheme_from_settings(scheme_settings(name))


def mixed(model: LoadedModel, samples: tuple[Sample, ...], names: Sequence[str], component: str = "full") -> Plan:
    """Every fused unit in the next of some schemes that it can have, each fourth as it is."""
    schemes = [scheme_named(name) for name in names]
    operators = tuple(op for op in find_operators(model.module, component) if op.kind == "Linear")
    groups = list(dict.fromkeys(op.group for op in operators))
    assigned: dict[str, Scheme] = {}
    for op in operators:
        turn = groups.index(op.group)
        scheme = schemes[turn % len(schemes)]
        if turn % 4 != 3 and op.in_features % 32 == 0 and not_offered([op], scheme) is None:
            assigned[op.path] = scheme
    profile = Profile(
        schemes[0],
        operators,
        frozenset(op.path for op in operators if op.path not in assigned),
        16,
        "test",
        others={path: scheme for path, scheme in assigned.items() if scheme.name != names[0]},
    )
    quantizers: dict[str, OperatorQuantizer] = {}
    for part in profile.by_scheme():
        made = Quantizers(model, part.low, samples, component, [part.scheme])
        quantizers |= {f"{path}#{part.scheme.name}": item for path, item in made.items()}
    return profile, quantizers


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("names", [*([name] for name in STORED), ["w4a16_g32", "w8a8_int"], STORED], ids="-".join)
def test_every_scheme_is_stored_alone_and_beside_others(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], names: list[str], tmp_path: Path
) -> None:
    """transformers finds every tensor, and unpacks the weights that QDQ computes with."""
    pytest.importorskip("compressed_tensors")
    profile, quantizers = mixed(tiny_model, tiny_samples, names)
    assert set(profile.schemes) == set(names)
    write_checkpoint(tiny_model, profile, quantizers, tmp_path)
    loaded, info = FAMILIES["qwen2_5_vl"].load_class().from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    forward(loaded.eval(), tiny_samples[0])  # decompresses
    narrow = unpacked_narrow(profile)
    assert loaded.dtype == (torch.bfloat16 if narrow else torch.float32)
    for op in profile.operators:
        found = loaded.get_submodule(op.path).weight
        if op.path in profile.high:
            assert torch.equal(found, tiny_model.module.get_submodule(op.path).weight.to(loaded.dtype))
            continue
        ours = quantizers[quantizer_key(profile, op, quantizers)].weight
        assert torch.allclose(found.float(), ours, rtol=2**-7 if narrow else 1e-6, atol=0), op.path


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("names", [["w4a16_g32", "w8a8_int"], ["nvfp4", "fp8_dynamic"]], ids="-".join)
def test_mixed_precisions_compute_what_qdq_computes(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], names: list[str], tmp_path: Path
) -> None:
    """In the language tower: of the vision tower's 2-d inputs compressed-tensors takes one scale a tensor."""
    pytest.importorskip("compressed_tensors")
    profile, quantizers = mixed(tiny_model, tiny_samples, names, component="lm")
    write_checkpoint(tiny_model, profile, quantizers, tmp_path)
    loaded = FAMILIES["qwen2_5_vl"].load_class().from_pretrained(tmp_path).eval()
    forward(loaded, tiny_samples[0])  # decompresses
    if unpacked_narrow(profile):  # without bfloat16's rounding what is left is the arithmetic of the inputs
        ours = {op.path: quantizers[quantizer_key(profile, op, quantizers)].weight for op in profile.low}
        state = tiny_model.module.state_dict() | {f"{path}.weight": weight for path, weight in ours.items()}
        torch.nn.Module.float(loaded).load_state_dict(state, strict=False)
    outputs = compare(
        lambda sample: forward(loaded, sample), tiny_model, profile, quantizers, tiny_samples, "full"
    )
    assert outputs.relative_difference < 0.2, outputs


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tiny_model: LoadedModel, tmp_path: Path) -> None:
    (op, *_) = [op for op in find_operators(tiny_model.module, "lm") if op.in_features % 128]

    def error_of(scheme: Scheme) -> str:
        with pytest.raises(ProfileError) as raised:
            write_checkpoint(tiny_model, Profile(scheme, (op,), frozenset(), 16, "test"), {}, tmp_path)
        return str(raised.value)

    ragged = f"{op.path} in w4a16: a compressed-tensors checkpoint holds whole groups of 128 only, and it has "
    assert f"{ragged}{op.in_features} inputs" in error_of(scheme_named("w4a16"))
    assert "no inc_static: it has quantized outputs" in error_of(scheme_named("inc_static"))
    assert "zero points" in error_of(Scheme("odd", WeightFormat(8, symmetric=False), None))


def test_what_transformers_computes_otherwise_is_told(tiny_model: LoadedModel) -> None:
    """Each is seen in the tests above: bfloat16 weights, scales of tokens, one scale in the vision tower."""
    language, vision = (find_operators(tiny_model.module, name)[-2] for name in ("lm", "vision"))

    def told(scheme: str, op: Operator, dtype: torch.dtype = torch.float32) -> list[str]:
        said = unlike_qdq(Profile(scheme_named(scheme), (op,), frozenset(), 16, "test"), dtype)
        words = ("unpacks", "in bfloat16: its", "in float16: its", "127.5", "one scale")
        return [word for word in words for sentence in said if word in sentence]

    assert told("fp8_dynamic", language) == told("w8a8_static", vision) == told("w8a8_dynamic", language) == []
    assert told("nvfp4", language) == ["unpacks"]
    assert told("nvfp4", language, torch.float16) == ["unpacks"]  # in bfloat16, whatever the model's dtype
    assert told("fp8_dynamic", language, torch.bfloat16) == ["in bfloat16: its"]
    assert told("w8a8_int", language, torch.float16) == ["in float16: its", "127.5"]
    assert told("w8a8_int", language) == ["127.5"]
    assert told("w8a8_int", vision) == ["127.5", "one scale"]
    assert told("fp8_dynamic", vision) == ["one scale"]


def test_what_the_cpu_build_of_vllm_does_not_load_is_told() -> None:
    def told(scheme: str, *outputs: int) -> list[str]:
        ops = [Operator(f"o{n}", "lm", 0, "o", "g", "Linear", 64, n, 64 * n, "qwen3_vl") for n in outputs]
        return not_loaded(Profile(scheme_named(scheme), tuple(ops), frozenset({"o33"}), 16, "test"))

    assert told("w4a16_g32", 64, 96, 33) == told("w8a8_int", 48) == []
    (said,) = told("w4a16_g32", 64, 48, 40, 33)
    assert "o48 has 48, and 1 more" in said


@pytest.mark.parametrize("name", ["fp8", "fp8_dynamic", "fp8_block", "nvfp4", "mxfp4", "mxfp8", "w8a8_int"])
def test_deployed_formats_are_the_packages_presets(name: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    path = "model.language_model.layers.0.mlp.up_proj"
    op = Operator(path, "lm", 0, "up_proj", "g", "Linear", 128, 128, 128 * 128, "qwen2_5_vl")
    made = Profile(scheme_from_settings(scheme_settings(name)), (op,), frozenset(), 16, "scores")
    config = QuantizationConfig.model_validate(quantization_config(made, [op], "hugging_face"))
    (group,) = config.config_groups.values()
    preset = preset_name_to_scheme("W8A8" if name == "w8a8_int" else name.upper(), ["Linear"])
    for own, theirs in ((group.weights, preset.weights), (group.input_activations, preset.input_activations)):
        same = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "scale_dtype")
        assert {key: getattr(own, key) for key in same} == {key: getattr(theirs, key) for key in same}


@pytest.mark.compressed_tensors
def test_a_model_for_text_alone(tmp_path: Path) -> None:
    """Its config has no parts, its positions one axis, and a head of its own once that is quantized."""
    pytest.importorskip("compressed_tensors")
    model = load_made_up(made_up_checkpoint("text_plain", tmp_path / "model"))
    samples = samples_of(tmp_path / "model")
    operators = tuple(find_operators(model.module, "lm"))
    profile = Profile(W8A8, operators, frozenset({operators[3].path}), 16, "test")
    quantizers = dict(Quantizers(model, operators, samples, "lm", [W8A8]))
    write_checkpoint(model, profile, quantizers, tmp_path / "written")
    loaded, info = FAMILIES["llama"].load_class().from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not any(info.values())
    found = compare(lambda sample: forward(loaded.eval(), sample), model, profile, quantizers, samples, "lm")
    assert found.relative_difference < 0.01
