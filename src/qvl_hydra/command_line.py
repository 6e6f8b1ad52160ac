"""Checks a whole command line before Hydra runs it: every override and every job, all faults together.

Hydra itself stops at the first wrong override, lets `+key` past the schema, and finds a bad value in the third job of
a sweep only after two have run.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qvl_hydra.errors import SettingsError
from qvl_hydra.settings import Settings, build_settings
from qvl_hydra.tasks.prepare import environment_faults

MOST_JOBS = 64  # of a larger sweep only so many jobs are checked beforehand
_PASSED_ON = ("help", "hydra_help", "cfg", "info", "shell_completion")


def config_folder() -> Path:
    """The absolute folder of the configs: the checkout's `conf`, else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


def settings_from_config(config: DictConfig) -> Settings:
    """The typed settings of a composed config.

    Raises:
        SettingsError: with every fault.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return build_settings({str(key): value for key, value in plain.items()})


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse a command line that cannot run.

    Args:
        arguments: without the program's name.

    Raises:
        SettingsError: with every fault of every override and every job.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    if any(getattr(parsed, name) for name in _PASSED_ON) or parsed.config_dir or parsed.config_name or parsed.config_path:
        return
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        faults: list[str] = []
        overrides = _parse(parsed.overrides, faults)
        sound = [item for item in overrides if not _group_fault(item, faults)]
        sound = [item for item in sound if not _key_fault(item, sound, faults)]
        if not parsed.multirun:
            for item in sound:
                if item.is_sweep_override():
                    faults.append(f"{item.input_line} names several values, which needs -m (a sweep)")
            sound = [item for item in sound if not item.is_sweep_override()]
        for job in itertools.islice(_jobs(sound, parsed.multirun, faults), MOST_JOBS):
            faults.extend(fault for fault in _job_faults(job) if fault not in faults)
    if faults:
        raise SettingsError(faults)


def _parse(lines: Sequence[str], faults: list[str]) -> list[Override]:
    overrides: list[Override] = []
    for line in lines:
        try:
            overrides += OverridesParser.create().parse_overrides([line])
        except HydraException:
            faults.append(f"{line!r} is no override; expected key=value")
    return overrides


def _group_fault(item: Override, faults: list[str]) -> bool:
    """Note and tell a choice that a config group does not have."""
    loader = GlobalHydra.instance().config_loader()
    group = item.key_or_group
    options = loader.get_group_options(group)
    if not options or group == "hydra" or group.startswith("hydra/"):
        return False
    if item.is_delete():
        faults.append(f"{item.input_line}: {group} cannot be left out; allowed: {', '.join(options)}")
        return True
    values = [str(value) for value in item.sweep_iterator()] if item.is_sweep_override() else [item.value()]
    wrong = [value for value in values if value not in options and not (group == "experiment" and value is None)]
    for value in wrong:
        faults.append(f"{group}={value}; allowed: {', '.join(options)}")
    return bool(wrong)


def _key_fault(item: Override, overrides: Sequence[Override], faults: list[str]) -> bool:
    """Note and tell a key that the config does not have, also with `+`."""
    loader = GlobalHydra.instance().config_loader()
    if loader.get_group_options(item.key_or_group) or item.key_or_group.split(".")[0] == "hydra":
        return False
    choices = [
        line for other in overrides if (line := _first_choice(other)) and loader.get_group_options(other.key_or_group)
    ]
    base = compose("config", overrides=choices)
    known = list(_keys(OmegaConf.to_container(base)))
    if item.key_or_group in known and not item.is_delete():
        return False
    if item.is_delete():
        faults.append(f"{item.input_line}: keys cannot be taken out")
        return True
    close = difflib.get_close_matches(item.key_or_group, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "python -m qvl_hydra --cfg job shows all keys"
    faults.append(f"unknown key {item.key_or_group}; {hint}")
    return True


def _first_choice(item: Override) -> str:
    if not item.is_sweep_override():
        return item.input_line or ""
    first = next(iter(item.sweep_iterator()))
    return f"{item.key_or_group}={first}"


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _jobs(overrides: Sequence[Override], multirun: bool, faults: list[str]) -> Iterator[list[str]]:
    """The overrides of each job, as Hydra's basic sweeper makes them, the experiment's own sweep included."""
    lines = [item.input_line or "" for item in overrides]
    if not multirun:
        yield lines
        return
    choices = [_first_choice(item) for item in overrides]
    try:
        params = compose("config", overrides=choices, return_hydra_config=True).hydra.sweeper.get("params") or {}
    except (HydraException, OmegaConfBaseException):
        params = {}
    given = {item.key_or_group for item in overrides}
    own = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items() if key not in given])
    lists = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [item.input_line or ""]
        for item in [*own, *overrides]
    ]
    for combination in itertools.product(*lists):
        yield list(combination)


def _job_faults(overrides: Sequence[str]) -> list[str]:
    try:
        settings = settings_from_config(compose("config", overrides=list(overrides)))
    except SettingsError as error:
        return list(error.faults)
    except (HydraException, OmegaConfBaseException) as error:
        return [str(error).splitlines()[0]]
    return environment_faults(settings)
