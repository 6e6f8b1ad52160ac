"""Checkpoints of every state: whole, sharded, older names, broken; shapes without weights; memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvl_hydra.backends.torch import extra_bytes
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ModelError
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel, ModelDescription, describe_model, is_local, load_model, require_memory
from qvl_hydra.settings import ModelSettings
from tests.conftest import load_tiny
from tests.program import composed

CPU = torch.device("cpu")
PLACEMENTS = ("resident", "streamed")


def load(path: Path | str, family: str = "qwen2_5_vl", seed: int = 0, **changes: object) -> LoadedModel:
    settings = ModelSettings("a model", str(path), family, **changes)  # type: ignore[arg-type]
    return load_model(describe_model(settings), CPU, seed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: LoadedModel) -> Path:
    """The bundled model as published ones are laid out: shards with an index."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model.module.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def change_shard(folder: Path, key_part: str, change: dict[str, Tensor | None]) -> None:
    """Rewrite the shard that holds a weight whose name contains `key_part`; None takes a weight out."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    key = next(key for key in index["weight_map"] if key_part in key)
    shard = folder / index["weight_map"][key]
    tensors = load_file(shard)
    for value in change.values():
        if value is None:
            del tensors[key]
            del index["weight_map"][key]
        else:
            tensors[key] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def output(model: LoadedModel, sample: Sample) -> Tensor:
    with torch.no_grad():
        return reference_output(model.module, sample, "full")


def test_a_sharded_folder_is_the_model_itself(
    checkpoint: Path, tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...]
) -> None:
    loaded = load(checkpoint)
    expected, found = tiny_model.module.state_dict(), loaded.module.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(output(loaded, tiny_samples[0]), output(tiny_model, tiny_samples[0]))
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_names_of_older_checkpoints(checkpoint: Path, tmp_path: Path, tiny_samples: tuple[Sample, ...]) -> None:
    """Published Qwen checkpoints say `visual.` and `model.layers.`, from before the towers had one parent."""
    older = copy_of(checkpoint, tmp_path / "older")
    index = json.loads((older / "model.safetensors.index.json").read_text())

    def old_name(key: str) -> str:
        return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    for shard in older.glob("model-*.safetensors"):
        save_file({old_name(key): value for key, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    index["weight_map"] = {old_name(key): name for key, name in index["weight_map"].items()}
    assert any(key.startswith("visual.blocks.0") for key in index["weight_map"])
    assert any(key.startswith("model.layers.0") for key in index["weight_map"])
    (older / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = output(load(checkpoint), tiny_samples[0])
    assert torch.equal(output(load(older), tiny_samples[0]), expected)
    streamed = load(older, placement="streamed")
    with streamed.weights(["model", "lm_head"]):
        assert torch.equal(output(streamed, tiny_samples[0]), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_missing_shard(placement: str, checkpoint: Path, tmp_path: Path) -> None:
    broken = copy_of(checkpoint, tmp_path / "broken")
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load(broken, placement=placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["model-00002", "model.safetensors"])
def test_a_truncated_file(placement: str, name: str, checkpoint: Path, tmp_path: Path) -> None:
    source = checkpoint if name == "model-00002" else load_tiny().description.folder
    broken = copy_of(source, tmp_path / "broken")
    (shard,) = broken.glob(f"{name}*" if name == "model-00002" else name)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load(broken, placement=placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_missing_weight(placement: str, checkpoint: Path, tmp_path: Path) -> None:
    for key in ("layers.5.mlp.up_proj.weight", "lm_head.weight"):
        broken = copy_of(checkpoint, tmp_path / key)
        change_shard(broken, key, {"": None})
        with pytest.raises(ModelError, match=f"1 weights are missing, first .*{key}"):
            load(broken, placement=placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_weight_of_another_shape(placement: str, checkpoint: Path, tmp_path: Path) -> None:
    broken = copy_of(checkpoint, tmp_path / "broken")
    change_shard(broken, "layers.5.mlp.up_proj.weight", {"": torch.zeros(3, 3)})
    with pytest.raises(ModelError, match=r"layers\.5\.mlp\.up_proj"):
        load(broken, placement=placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_folder_without_weights(placement: str, checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(empty, placement=placement)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give a checkpoint's folder"):
        load(tmp_path)


def test_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is no model config"):
        load(tmp_path)


@pytest.mark.parametrize("sections", [[1e30, 2, 2], [2, 2, 2], ["4", 6, 6], [4, 6]])
def test_sections_of_positions_that_no_head_has(sections: list[object], checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = sections
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"describes no model that can be built \((Type|Runtime)Error: split_with"):
        load(tmp_path)


def test_another_family(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="holds a 'qwen2_5_vl' model, but model.family=qwen2_vl; set model.family"):
        load(checkpoint, family="qwen2_vl")


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "nowhere", "a/b/c", "~/nowhere"])
def test_a_folder_that_is_not_there(path: str) -> None:
    assert is_local(path)
    with pytest.raises(ModelError, match="no such folder"):
        load(path)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not is_local("nobody/nothing")
    with pytest.raises(ModelError, match="neither a local folder nor a hub model .* set model.weights=random"):
        load("nobody/nothing")


def test_a_downloaded_snapshot_is_found_offline(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: LoadedModel
) -> None:
    """A hub id whose files are in the cache, in its layout, loads without the hub, at the revision asked for."""
    import huggingface_hub.constants

    commit = "0123456789012345678901234567890123456789"
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v1").write_text(commit)
    (cached / "snapshots").mkdir()
    copy_of(checkpoint, cached / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = load("owner/name", revision="v1")
    assert torch.equal(found.module.state_dict()["lm_head.weight"], tiny_model.module.state_dict()["lm_head.weight"])
    with pytest.raises(ModelError, match="owner/name"):
        load("owner/name", revision="v2")


def test_random_weights_come_from_the_seed() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return load("bundled:tiny_qwen2_5_vl", seed=seed, weights="random").module.state_dict()

    before = torch.random.get_rng_state()
    first, second, other = weights(0), weights(0), weights(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert all(bool(value.isfinite().all()) for value in first.values())


def test_overrides_change_a_shape() -> None:
    changes = {"text_config.num_hidden_layers": 2, "vision_config.depth": 2}
    model = load("bundled:tiny_qwen2_5_vl", weights="random", overrides=changes)
    assert len(model.module.get_submodule("model.language_model.layers")) == 2
    assert len(model.module.get_submodule("model.visual.blocks")) == 2
    for key in ("num_hidden_layers", "text_config.layers", "audio_config.depth"):
        with pytest.raises(ModelError, match=r"expected text_config.<key> or vision_config.<key>"):
            load("bundled:tiny_qwen2_5_vl", weights="random", overrides={key: 2})


def real(name: str, **changes: object) -> ModelDescription:
    settings = ModelSettings(name, f"Qwen/{name}", name.rsplit("_", 1)[0], weights="random", **changes)  # type: ignore[arg-type]
    return describe_model(settings)


def test_weight_bytes_count_tied_embeddings_once() -> None:
    """Published sizes: 3.75 billion parameters with tied embeddings, 8.29 billion without, 2.21 billion tied."""
    for name, billions in (("qwen2_5_vl_3b", 3.75), ("qwen2_5_vl_7b", 8.29), ("qwen2_vl_2b", 2.21)):
        assert real(name, dtype="bfloat16").weight_bytes / 2 / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_model_that_does_not_fit_is_refused() -> None:
    description = real("qwen2_5_vl_7b", dtype="float32", memory_limit_gib=8)
    with pytest.raises(ModelError) as caught:
        require_memory(description, 2 * 1024**3, "a test")
    text = str(caught.value)
    assert "needs 32.9 GiB for a test (30.9 GiB of it weights), and 8.0 GiB are free" in text
    assert "model.placement=streamed, model.dtype=bfloat16" in text
    with pytest.raises(ModelError, match="take backend=torch with model.placement=streamed, fewer operators"):
        require_memory(real("qwen2_5_vl_7b", dtype="bfloat16", memory_limit_gib=8), 0, "a test")
    require_memory(real("qwen2_vl_2b", dtype="bfloat16", memory_limit_gib=8), 1024**3, "a test")


def test_a_block_that_does_not_fit_in_every_scheme_is_refused() -> None:
    """Of Qwen3-VL-235B-A22B, streamed: 2.4 billion parameters a block, of 14 bytes in two schemes."""
    model = ["model=qwen3_vl_235b_a22b", "model.weights=random", "model.dtype=bfloat16", "model.memory_limit_gib=30"]
    needed = []
    for experiment in ("lm_mse_v2", "profile_choices"):
        settings = composed(f"experiment={experiment}", *model)
        settings = replace(settings, model=replace(settings.model, placement="streamed"))
        description = describe_model(settings.model)
        needed.append(extra_bytes(settings, description, ()))
    one, two = needed
    assert (one + description.weight_bytes) / 12 == pytest.approx((two + description.weight_bytes) / 14)
    require_memory(description, one, "a test")
    with pytest.raises(ModelError, match=r"needs 3\d\.\d GiB for a test \(its largest block.*profile\.choices"):
        require_memory(description, two, "a test")


def test_the_sha_names_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    first = load(checkpoint).sha
    moved = copy_of(checkpoint, tmp_path / "moved")
    assert load(moved).sha == first
    assert load(moved, placement="streamed").sha == first
    key = "layers.5.mlp.up_proj.weight"
    weight = load(moved).module.get_submodule("model.language_model.layers.5.mlp.up_proj").weight.clone()
    weight[0, 0] += 1e-3
    change_shard(moved, key, {"": weight})
    assert load(moved).sha != first
    shas = {load("bundled:tiny_qwen2_5_vl", weights="random", seed=seed).sha for seed in (0, 1, 1)}
    assert len(shas) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(dtype: str, checkpoint: Path) -> None:
    model = load(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.module.parameters()} == {getattr(torch, dtype)} == {model.dtype}
