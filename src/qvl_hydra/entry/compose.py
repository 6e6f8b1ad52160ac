"""From Hydra's composed configs to typed settings: the door, schemes by name, and settings that a run left."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qvl_hydra.errors import SettingsError
from qvl_hydra.runs.files import read_yaml
from qvl_hydra.settings import QuantSettings, Settings, build_settings

CONFIG = "config"
SAVED = "saved_settings"  # what a run's own config.yaml is called while it is composed


def config_folder() -> Path:
    """The absolute folder of the configs: the checkout's `conf`, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


def settings_from_config(config: DictConfig) -> Settings:
    """The typed settings of a composed config.

    Raises:
        SettingsError: with every fault.
    """
    return build_settings(plain(config))


def plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def scheme_settings(name: str) -> QuantSettings:
    """Settings of a scheme named in `quant.also` or `profile.choices`.

    Raises:
        SettingsError: no such scheme.
    """
    folder = config_folder() / "quant"
    allowed = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in allowed:  # a name, never a path
        raise SettingsError([f"quant.also or profile.choices names {name!r}; allowed: {', '.join(allowed)}"])
    own = yaml.safe_load((folder / f"{name}.yaml").read_text())
    content: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        if base != "_self_":
            content |= vars(scheme_settings(base))
    return QuantSettings(**{**content, **own})


def with_choices(settings: Settings) -> tuple[Settings, list[QuantSettings]]:
    """The settings whose `quant` is the first scheme to score, and the further ones.

    Raises:
        SettingsError: no such scheme.
    """
    first, *further = settings.schemes
    if first != settings.quant.name:
        quant = dataclasses.replace(scheme_settings(first), perturb=settings.quant.perturb)
        settings = dataclasses.replace(settings, quant=quant)
    return settings, [scheme_settings(name) for name in further]


def take_saved_settings(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Let the `config.yaml` that a run left be what is composed: `--config-dir <run folder> --config-name config`.

    It stands over `conf/config.yaml`, which keeps what it does not hold; overrides stand over it. It may set settings
    and nothing else: Hydra's own part, whose callbacks and logging name classes to call, and interpolations, which read
    this machine's environment, are refused, as are folders of configs.

    Args:
        arguments: without the program's name.

    Returns:
        The arguments without those two, and the name of the config to compose.

    Raises:
        SettingsError: no such file, no settings in it or more than settings, or a folder of configs is given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-path", "-cp")
    parsed, kept = parser.parse_known_args(list(arguments))
    given = [name for name in ("config_dir", "config_name", "config_path") if getattr(parsed, name) is not None]
    if not given:
        return list(arguments), CONFIG
    if given != ["config_dir", "config_name"]:
        raise SettingsError(
            ["the configs of this program are its own; --config-dir <run folder> --config-name config repeats a run"]
        )
    path = Path(parsed.config_dir).expanduser() / f"{parsed.config_name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise SettingsError([f"--config-dir and --config-name name {path}, which is not there; give a run's folder"])
    content = read_yaml(path)
    if not content:
        raise SettingsError([f"{path} holds no settings; give a run's folder, whose config.yaml does"])
    known = {item.name for item in dataclasses.fields(Settings)}
    if faults := [
        *(f"{path} holds {key!r}, which is no setting; a saved config sets settings and nothing else"
          for key in content if key not in known),
        *(f"{path}: {key}={value!r}; a saved config has values, not interpolations"
          for key, value in _leaves(content) if "${" in str(value) or "${" in key),
    ]:  # fmt: skip
        raise SettingsError(faults)
    ConfigStore.instance().store(SAVED, {"defaults": [CONFIG, "_self_"], **content})
    return kept, SAVED


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{prefix}[{index}]")
    else:
        yield prefix, tree
