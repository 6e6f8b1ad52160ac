"""Checkpoints in vLLM: every layer has the scheme that the profile says, and answers are those of transformers.

`make test-vllm` runs them in an environment of their own. A wrong list of names loads without an error, so that loading
proves nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from qvl_hydra.calibration.encode import encode, load_processor
from qvl_hydra.calibration.sample import IGNORED, Sample
from qvl_hydra.calibration.scenes import scene_examples
from qvl_hydra.families.record import FUSED
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.checkpoint import write_checkpoint
from qvl_hydra.profiles.formats.table import FORMATS
from qvl_hydra.profiles.formats.written import paste
from qvl_hydra.profiles.names import rename
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.tasks.quantize import forward
from tests.conftest import load_tiny
from tests.families.shapes import load_made_up
from tests.profiles.rounding import applied
from tests.profiles.test_compressed_tensors import mixed, scheme_named
from tests.vllm.serve import SEED

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
MODELS = ["tiny_qwen2_5_vl", "tiny_qwen2_vl", "tiny_qwen3_vl"]
SCENES = 32
SCHEMES = {  # ours to vLLM's
    "w8a8_static": "W8A8Int8",
    "w8a8_dynamic": "W8A8Int8",
    "w8a8_int": "W8A8Int8",
    "fp8_dynamic": "W8A8Fp8",
    "w4a16_g32": "WNA16",
}


def serve(checkpoint: Path, dtype: str, folder: Path) -> dict[str, Any]:
    """What vLLM makes of a checkpoint; see `serve.py`."""
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, script, checkpoint, dtype, str(SCENES), folder / "said.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    said: dict[str, Any] = torch.load(folder / "said.pt")
    return said


def scenes(folder: Path) -> list[Sample]:
    """The samples that `serve.py` asks."""
    processor = load_processor(folder)
    examples = scene_examples("evaluation", SCENES, SEED)
    return [encode(processor, item.id, item.prompt, item.answer, [item.image]) for item in examples]


@dataclass(frozen=True)
class Agreement:
    """vLLM beside somebody else on the evaluation scenes.

    Attributes:
        answered: scenes that vLLM answers right, greedily.
        right: scenes that the other answers right, each token given those before it.
        kl: KL(other || vLLM), nats an answer token.
    """

    answered: int
    right: int
    kl: float


def agreement(said: dict[str, Any], samples: Sequence[Sample], other: Callable[[Sample], Tensor]) -> Agreement:
    """vLLM's answers beside the logits of another, given by sample."""
    assert said["prompts"] == [sample.input_ids.tolist() for sample in samples]
    right, divergences = 0, []
    for sample, theirs in zip(samples, said["log_probabilities"], strict=True):
        asked = sample.labels[1:] != IGNORED
        ours = other(sample)[:-1][asked].double().log_softmax(-1)
        right += bool((ours.argmax(-1) == sample.labels[1:][asked]).all())
        divergences.append(float((ours.exp() * (ours - theirs[asked].double())).sum(-1).mean()))
    expected = [item.answer for item in scene_examples("evaluation", SCENES, SEED)]
    answered = sum(ours == theirs for ours, theirs in zip(said["answers"], expected, strict=True))
    return Agreement(answered, right, sum(divergences) / len(divergences))


def in_transformers(model: LoadedModel, checkpoint: Path) -> Callable[[Sample], Tensor]:
    """Logits by plain transformers, in the checkpoint's own dtype."""
    loaded = model.family.load_class().from_pretrained(checkpoint).eval()
    return lambda sample: forward(loaded, sample)


def in_vllm(path: str) -> str:
    """vLLM's name of the layer that computes an operator: what is fused has one name."""
    parent, _, leaf = path.rpartition(".")
    tower = "visual" in path
    return path if tower and leaf.endswith("_proj") and leaf not in FUSED else f"{parent}.{FUSED.get(leaf, leaf)}"


def assert_layers(profile: Profile, model: LoadedModel, layers: dict[str, str]) -> None:
    """Each Linear operator is computed as the profile says, by the schemes of the loaded layers."""
    seen = set()
    for op in find_operators(model.module, "full"):
        if op.kind != "Linear":
            continue
        name = in_vllm(rename(op, "vllm"))
        name = "language_model.lm_head" if op.path == "lm_head" else name
        low = {item.path for item in profile.low}
        expected = SCHEMES[profile.others.get(op.path, profile.scheme).name] if op.path in low else ""
        assert layers.get(name, "missing") == expected, (op.path, name)
        seen.add(name)
    assert {name for name, scheme in layers.items() if scheme} <= seen


@pytest.mark.parametrize("name", MODELS)
def test_the_float_model_answers_as_in_transformers(name: str, tmp_path: Path) -> None:
    model = load_tiny(name)
    folder = Path(model.description.folder)
    said = serve(folder, "float32", tmp_path)
    found = agreement(said, scenes(folder), in_transformers(model, folder))
    print(f"\n{name} float: {found}")
    assert not any(said["layers"].values())
    assert found.answered == found.right > SCENES // 2
    assert found.kl < 1e-6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (["w8a8_static"], "float32"),
        (["w8a8_dynamic"], "float32"),
        (["w8a8_int"], "float32"),
        (["fp8_dynamic"], "float32"),
        (["fp8_dynamic", "w8a8_int"], "float32"),
        (["w4a16_g32", "w8a8_int"], "bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_checkpoint_computes_what_the_profile_says(
    name: str, names: Sequence[str], dtype: str, tmp_path: Path
) -> None:
    model = load_tiny(name)
    samples = scenes(Path(model.description.folder))
    profile, quantizers = mixed(model, tuple(samples[:4]), names)
    said, found, effect = served(profile, quantizers, model, tmp_path, pasted=True, dtype=dtype)
    assert_layers(profile, model, said["layers"])
    print(f"transformers: {agreement(said, samples, in_transformers(model, tmp_path / 'checkpoint'))}")
    assert abs(found.answered - found.right) <= (0 if dtype == "float32" else 1)
    own_rule = names == ["w8a8_dynamic"]  # scales of amax / 127.5, where vLLM takes amax / 127
    assert found.kl < (1e-2 if dtype == "bfloat16" or own_rule else 0.02 * effect + 1e-5)


def mixture(folder: Path) -> LoadedModel:
    """The bundled Qwen3-VL with four experts in each MLP's place, each of them that MLP; two see a token.

    Their inner channels stand in another order and at another scale in each: whoever takes a product or a scale of one
    expert for that of another is far off, and who chooses another expert is not.
    """
    dense, row = load_tiny("tiny_qwen3_vl"), FAMILIES["qwen3_vl_moe"]
    config = dense.config.to_dict()
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    text |= {"norm_topk_prob": True}  # as published configs say, and vLLM asks
    towers = {"text_config": text, "vision_config": config["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}}
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    torch.manual_seed(0)
    made = row.load_class()(row.load_class().config_class(**towers, **ids))
    state = dense.module.state_dict()
    made.load_state_dict(state, strict=False)
    for index, layer in enumerate(made.model.language_model.layers):
        gate, up, down = (
            state[f"model.language_model.layers.{index}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        experts = layer.mlp.experts
        for expert, factor in enumerate((1.0, 4.0, 0.25, 16.0)):
            order = torch.randperm(256)  # of which some are no channel of the MLP
            wider = [torch.nn.functional.pad(own, (0, 0, 0, 256 - len(own)))[order] for own in (gate, up, down.T)]
            experts.gate_up_proj.data[expert] = torch.cat([wider[0], wider[1] * factor])
            experts.down_proj.data[expert] = wider[2].T / factor
        layer.mlp.gate.weight.data.normal_()
    shutil.copytree(dense.description.folder, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    made.save_pretrained(folder)
    return load_made_up(folder)


@pytest.mark.parametrize(
    ("name", "kept", "pasted"),
    [("w8a8_int", (), False), ("w8a8_int", (0, 3), False), ("fp8_block", (2,), True)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_quantized_experts_compute_what_the_profile_says(
    name: str, kept: Sequence[int], pasted: bool, tmp_path: Path
) -> None:
    """vLLM reads them one by one; its CPU build runs these in bfloat16, as which all else is left."""
    model = mixture(tmp_path / "model")
    operators = tuple(op for op in find_operators(model.module, "full") if not op.kind.startswith("Conv"))
    high = frozenset(op.path for op in operators if op.experts == 1 or op.block in kept)
    profile = Profile(scheme_named(name), operators, high, 16, "test")
    said, found, effect = served(profile, quantizers_of(profile, model), model, tmp_path, pasted)
    methods = {layer: method for layer, method in said["layers"].items() if method}
    assert set(methods.values()) == {"W8A8Int8MoEMethod" if name == "w8a8_int" else "W8A8Fp8MoEMethod"}
    blocks = {int(re.search(r"layers\.(\d+)\.mlp\.experts", layer)[1]) for layer in methods}  # type: ignore[index]
    assert blocks == set(range(8)) - set(kept)
    assert found.answered == found.right > SCENES // 2
    assert found.kl < 0.05 * effect + 3e-5  # bfloat16 rounds whatever is left


def test_experts_that_are_left_are_read_as_published(tmp_path: Path) -> None:
    model = mixture(tmp_path / "model")
    operators = tuple(op for op in find_operators(model.module, "full") if not op.kind.startswith("Conv"))
    high = frozenset(op.path for op in operators if op.experts > 1)
    profile = Profile(scheme_named("w8a8_int"), operators, high, 16, "test")
    said, found, effect = served(profile, quantizers_of(profile, model), model, tmp_path, dtype="float32")
    assert not any(method for layer, method in said["layers"].items() if ".mlp.experts" in layer)
    assert found.answered == found.right > SCENES // 2
    assert found.kl < 0.02 * effect + 1e-5


def quantizers_of(profile: Profile, model: LoadedModel) -> Mapping[str, OperatorQuantizer]:
    """Of a profile of one scheme without static ranges."""
    return dict(Quantizers(model, profile.operators, (), "full", [profile.scheme]))


def served(
    profile: Profile,
    quantizers: Mapping[str, OperatorQuantizer],
    model: LoadedModel,
    folder: Path,
    pasted: bool = False,
    dtype: str = "bfloat16",
) -> tuple[dict[str, Any], Agreement, float]:
    """What vLLM makes of a profile's checkpoint, how it agrees with QDQ, and KL(float || QDQ), nats an answer token."""
    samples = scenes(Path(model.description.folder))
    write_checkpoint(model, profile, quantizers, folder / "checkpoint")
    if pasted:
        paste_lists(folder / "checkpoint", profile, model)
    said = serve(folder / "checkpoint", dtype, folder)
    float_logits = [forward(model.module, sample) for sample in samples]
    with applied(model.module, profile, quantizers):
        found = agreement(said, samples, lambda sample: forward(model.module, sample))
        effect = sum(map(divergence, float_logits, [forward(model.module, sample) for sample in samples], samples))
    schemes = "+".join(profile.schemes)
    print(f"\n{schemes} in {dtype}: {len(profile.low)} of {len(profile.operators)} quantized")
    print(f"QDQ: {found}; KL(float || QDQ) {effect / SCENES:.2g}")
    return said, found, effect / SCENES


def divergence(reference: Tensor, found: Tensor, sample: Sample) -> float:
    """KL(reference || found), nats an answer token."""
    asked = sample.labels[1:] != IGNORED
    p, q = (logits[:-1][asked].double().log_softmax(-1) for logits in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def paste_lists(checkpoint: Path, profile: Profile, model: LoadedModel) -> None:
    """The short lists that a run gives to paste, in the place of the checkpoint's own lists of full names."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    lists = paste(profile, find_operators(model.module, "full"), FORMATS["compressed_tensors"])
    quantization = config["quantization_config"]
    quantization["ignore"] = lists.pop("leave")
    for scheme, group in zip(lists, quantization["config_groups"].values(), strict=False):
        group["targets"] = lists[scheme]
    file.write_text(json.dumps(config))
