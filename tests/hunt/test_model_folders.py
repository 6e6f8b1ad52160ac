"""Model folders from anybody: one message and status 2, in seconds, whatever their files hold."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qvl_hydra.calibration.encode import load_processor
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.errors import QvlHydraError
from qvl_hydra.models.load import describe_model, load_model, model_folder
from qvl_hydra.settings import CalibrationSettings, ModelSettings

BUNDLED = model_folder(ModelSettings("", "bundled:tiny_qwen2_5_vl"))
PATIENCE_S = 10.0


def changed(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change what a JSON file of the folder holds."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        given = change(content)
        (folder / name).write_text(json.dumps(content if given is None else given))

    return apply


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def put(tree: dict, path: str, value: object) -> None:
    *above, last = path.split(".")
    for key in above:
        tree = tree[key]
    tree[last] = value


CONFIG = {
    f"config {path}={value!r}": changed("config.json", lambda c, path=path, value=value: put(c, path, value))
    for path, values in {
        "model_type": ("gpt2", None, 7, "../x", ""),
        "auto_map": ({"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},),
        "quantization_config": ({"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, "x"),
        "text_config": (None, [], "x", {}),
        "vision_config": (None, [], "x"),
        "text_config.hidden_size": (0, -4, "x", None, 1 << 40, 127, 3.5),
        "text_config.num_hidden_layers": (100_000, -1, "8"),
        "text_config.num_attention_heads": (0, 3, None),
        "text_config.num_key_value_heads": (0, 3, 100),
        "text_config.vocab_size": (-1, 1 << 40, "x"),
        "text_config.rope_parameters": ({}, "x", {"rope_type": "none"}, None),
        "text_config.hidden_act": ("no_such_act", 3),
        "vision_config.depth": (1_000_000, -1, "x"),
        "vision_config.spatial_merge_size": (0, "x", 1 << 20),
        "vision_config.patch_size": (0, -14, 1 << 30),
        "vision_config.fullatt_block_indexes": ("x", [99], None),
        "image_token_id": (None, "x", -1, 10**9),
    }.items()
    for value in values
}
FILES = {
    "config empty": written("config.json", ""),
    "config list": written("config.json", "[]"),
    "config deep": written("config.json", "[" * 200_000),
    "config binary": written("config.json", bytes(range(256))),
    "tokenizer empty": written("tokenizer.json", ""),
    "tokenizer other": written("tokenizer.json", '{"model": 1}'),
    "tokenizer config list": written("tokenizer_config.json", "[1]"),
    "tokenizer class": changed("tokenizer_config.json", lambda c: put(c, "tokenizer_class", "NoSuchTokenizer")),
    "tokenizer code": changed(
        "tokenizer_config.json", lambda c: put(c, "auto_map", {"AutoTokenizer": ["evil.T", None]})
    ),
    "processor empty": written("preprocessor_config.json", ""),
    "processor sizes": changed("preprocessor_config.json", lambda c: put(c, "patch_size", 0)),
    "processor merge": changed("preprocessor_config.json", lambda c: put(c, "merge_size", "x")),
    "processor mean": changed("preprocessor_config.json", lambda c: put(c, "image_mean", [1])),
    "processor pixels": changed("preprocessor_config.json", lambda c: put(c, "max_pixels", -1)),
    "template broken": written("chat_template.jinja", "{% for x in %}"),
    "template raises": written("chat_template.jinja", "{{ raise_exception('no') }}"),
    "template other": written("chat_template.jinja", "hello"),
    "template loops": written(
        "chat_template.jinja",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
    ),
    "template reaches": written("chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
    "weights empty": written("model.safetensors", b""),
    "weights short": written("model.safetensors", b"\xff" * 7),
    "weights header": written("model.safetensors", b"\xff" * 4096),
    "weights other": written("model.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
    "index other": written("model.safetensors.index.json", '{"weight_map": []}'),
    "index outside": written("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}'),
}


def everything(folder: Path) -> None:
    """What a run does with a model folder."""
    description = describe_model(ModelSettings("foreign", str(folder)))
    processor = load_processor(folder)
    load_calibration(CalibrationSettings("bundled", size=2), processor)
    load_model(description, torch.device("cpu"), 0)


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(BUNDLED, folder / "model"))


@pytest.mark.parametrize("name", [*CONFIG, *FILES])
def test_a_wrong_file_is_one_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tmp_path)
    for module in ("evil.py", "folder.py"):
        (folder / module).write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    ({**CONFIG, **FILES})[name](folder)
    began = time.monotonic()
    with contextlib.suppress(QvlHydraError):  # one message
        everything(folder)
    assert time.monotonic() - began < PATIENCE_S
    assert not (tmp_path / "ran").exists()


def hunt(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    folder = copied(tmp_path)
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
             "chat_template.jinja", "model.safetensors"]  # fmt: skip
    path = folder / draw.choice(names)
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 6)):
        content[draw.randrange(min(len(content), 20_000))] = draw.randrange(256)
    path.write_bytes(bytes(content[: draw.choice([len(content), draw.randrange(len(content))])]))
    with contextlib.suppress(QvlHydraError):  # one message
        everything(folder)


@pytest.mark.parametrize("seed", range(12))
def test_a_corrupt_file_is_one_message(seed: int, tmp_path: Path) -> None:
    hunt(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_corrupt_files_are_one_message(seed: int, tmp_path: Path) -> None:
    hunt(seed, tmp_path)
