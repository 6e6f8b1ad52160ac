"""Every option of every group and every experiment composes, and passes the typed door."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qvl_hydra.entry.command_line import check_command_line
from qvl_hydra.entry.compose import config_folder, scheme_settings, settings_from_config
from qvl_hydra.settings import Settings

CONF = config_folder()
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("experiment", "hydra"))
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# What an option cannot know by itself.
NEEDED = {
    "text": ["model.path=some/folder"],
    "qwen3_5": ["model.path=some/folder"],
    "jsonl": ["calibration.path=some.jsonl"],
    "imagefolder": ["calibration.path=some/folder"],
    "coco_captions": ["calibration.annotations=some.json", "calibration.images=some/folder"],
    "inc_fx": ["strategy=mse_v2"],  # Neural Compressor's own strategies
    "inc_onnxrt": ["strategy=mse_v2"],
}


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def settings_of(*overrides: str) -> Settings:
    return settings_from_config(compose("config", overrides=list(overrides)))


def test_the_folder_holds_what_the_design_names() -> None:
    assert set(GROUPS) >= {"model", "component", "strategy", "quant", "backend", "calibration", "tracking", "task"}
    assert {"lm_mse_v2", "lm_hawq_v2", "vision_mse_v2", "full_mse_v2"} <= set(EXPERIMENTS)
    quant = {option for group, option in OPTIONS if group == "quant"}
    assert {"w8a8_static", "inc_static", "w8a8_dynamic", "w8a16", "w4a16"} <= quant


def test_every_group_is_a_field_of_the_settings() -> None:
    assert set(GROUPS) <= {field.name for field in dataclasses.fields(Settings)}


def test_every_key_of_the_settings_stands_in_the_config() -> None:
    """So that each can be set without `+`, and is seen in `--cfg job`."""
    composed = OmegaConf.to_container(compose("config"))
    assert isinstance(composed, dict)
    expected = dataclasses.asdict(settings_of())
    assert set(composed) == set(expected)
    for name, section in expected.items():
        if isinstance(section, dict):
            assert set(composed[name]) == set(section), name


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option(group: str, option: str) -> None:
    settings = getattr(settings_of(f"{group}={option}", *NEEDED.get(option, [])), group)
    chosen = settings.source if group == "calibration" else option if group == "tracking" else settings.name
    assert chosen == option


@pytest.mark.parametrize("name", [option for group, option in OPTIONS if group == "quant"])
def test_a_scheme_by_name_is_the_scheme_composed(name: str) -> None:
    assert scheme_settings(name) == settings_of(f"quant={name}").quant


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str) -> None:
    settings_of(f"experiment={name}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_begins_with_its_command(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    program, arguments = lines[1].removeprefix("# ").split("qvl_hydra ", 1)
    assert program == "python -m "
    overrides = [item for item in shlex.split(arguments) if item != "-m"]
    assert f"experiment={name}" in overrides
    content = yaml.safe_load("\n".join(lines))
    swept = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    assert not swept or "-m" in shlex.split(arguments)
    settings_of(*overrides)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_holds_deltas_only(name: str) -> None:
    """Each value that it sets is another than the one that its groups have already."""
    content = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    choices = [
        f"{key.removeprefix('override /')}={value}"
        for item in content.pop("defaults", [])
        for key, value in item.items()
    ]
    content.pop("hydra", None)
    without = OmegaConf.to_container(compose("config", overrides=choices))
    assert isinstance(without, dict)
    for section, values in content.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert without[section][key] != value, f"{section}.{key}"


def test_composing_all_experiments_as_a_sweep_is_sound() -> None:
    """Each job of each experiment's own sweep passes the check before a run."""
    from hydra.core.global_hydra import GlobalHydra

    for name in EXPERIMENTS:
        GlobalHydra.instance().clear()
        path = CONF / "experiment" / f"{name}.yaml"
        command = path.read_text().splitlines()[1].split("qvl_hydra ", 1)[1]
        if "inc" not in name and "onnx" not in name and "modelopt" not in name:  # these need packages
            check_command_line(shlex.split(command))
