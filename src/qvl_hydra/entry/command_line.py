"""Checks a whole command line before Hydra runs it: every override and every job, all faults together.

Hydra itself stops at the first wrong override, lets `+key` past the schema, and finds a bad value in the third job of
a sweep only after two have run.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qvl_hydra.entry.compose import CONFIG, config_folder, plain, scheme_settings
from qvl_hydra.errors import SettingsError
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.settings import Settings, judge_settings

MOST_JOBS = 64  # of a larger sweep only so many jobs are checked beforehand
LARGEST_SWEEP = 10_000  # jobs
_PASSED_ON = ("help", "hydra_help", "cfg", "info", "shell_completion")


@dataclass(frozen=True)
class Checked:
    """A command line that can run.

    Attributes:
        jobs: how many it has; None where Hydra only says something.
        folder: of its run, or of its multirun; None where Hydra only says something.
        multirun: which of both.
        swept: keys with a value a job.
        dry: settings of the jobs that only say what they would do.
    """

    jobs: int | None = None
    folder: Path | None = None
    multirun: bool = False
    swept: tuple[str, ...] = ()
    dry: tuple[Settings, ...] = ()

    @property
    def sweep_folder(self) -> Path | None:
        """The folder of its multirun; None for one run."""
        return self.folder if self.multirun else None


def check_command_line(arguments: Sequence[str], name: str = CONFIG) -> Checked:
    """Refuse a command line that cannot run.

    Args:
        arguments: without the program's name.
        name: of the config to compose.

    Returns:
        What was found out about it.

    Raises:
        SettingsError: with every fault of every override and every job.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    if any(getattr(parsed, option) for option in _PASSED_ON):
        return Checked()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        faults: list[str] = []
        overrides = _parse(parsed.overrides, faults)
        if not parsed.multirun:
            overrides = [item for item in overrides if not _sweep_fault(item, faults)]
        sound = [item for item in overrides if not _group_fault(item, faults)]
        known = _known_keys(sound, name)
        sound = [item for item in sound if not _key_fault(item, known, faults)]
        count, dry = 0, []
        every = [*(_own_sweep(sound, name) if parsed.multirun else []), *sound]
        for job in _jobs(every, faults):
            count += 1
            if count <= MOST_JOBS:
                settings, own = _judge_job(job, name)
                faults.extend(fault for fault in own if fault not in faults)
                dry += [settings] if settings is not None and settings.dry_run else []
        if not count and not faults:
            faults.append("the sweep has no job: one of its lists or ranges is empty")
        if faults:
            raise SettingsError(faults)
        swept = tuple(item.key_or_group for item in every if item.is_sweep_override())
        folder = _folder(parsed.overrides, name, parsed.multirun)
        return Checked(count, folder, parsed.multirun, swept, tuple(dry))


def _folder(overrides: Sequence[str], name: str, multirun: bool) -> Path:
    """Where Hydra will put a run or a multirun, whose time is taken here and now."""
    fixed = [line for line in overrides if line.lstrip("+").startswith(("hydra.", "hydra/"))]
    try:
        config = compose(name, overrides=[*fixed, f"hydra.mode={'MULTIRUN' if multirun else 'RUN'}"],
                         return_hydra_config=True).hydra  # fmt: skip
        folder = Path(str(config.sweep.dir if multirun else config.run.dir)).expanduser().absolute()
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError([" ".join(line.strip() for line in str(error).splitlines()[:2])]) from error
    if "${" in str(folder):
        raise SettingsError([f"a run in {folder}: a folder's name must not hold ${{, which Hydra reads as a value"])
    return folder


def as_typed(arguments: Sequence[str]) -> list[str]:
    """The arguments, with quotes around those values that Hydra's grammar cannot read but nobody would quote.

    A home folder's `~`, letters beyond ASCII, `=`, `#` and brackets within a name are no part of that grammar; shells
    leave them to the program. Commas keep their meaning, and so do the brackets of a list.
    """
    return [_with_quotes(line) for line in arguments]


def _with_quotes(line: str) -> str:
    parts = re.fullmatch(r"""(\+{0,2}[\w./@:][\w./@:-]*=)(?:\[(.+)\]|(?!\[|\w+\()(.+))""", line)
    if parts is None or set(line) & set("'\"{}") or _is_read(line):
        return line
    key, items, text = parts.groups()
    values = (value.strip() for value in (items or text).split(","))
    written = ",".join(value if _is_read(f"key={value}") else quoted(value) for value in values)
    return key + (f"[{written}]" if items else written)


def _is_read(line: str) -> bool:
    try:
        OverridesParser.create().parse_override(line)
    except HydraException:
        return False
    return True


def quoted(text: str) -> str:
    """A value as Hydra's command line reads it back, whatever stands in it."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def _parse(lines: Sequence[str], faults: list[str]) -> list[Override]:
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides: list[Override] = []
    for line in lines:
        try:
            (item,) = parser.parse_overrides([line])
        except HydraException:
            quotes = "; such a value needs quotes of its own: \"key='value'\"" if "=" in line else ""
            faults.append(f"{line!r} is no override; expected key=value{quotes}")
            continue
        if item.is_sweep_override() and not item.is_discrete_sweep():
            faults.append(f"{line} has no end of values; a sweep takes a,b,c or range(start,stop,step) or glob(*)")
        else:
            overrides.append(item)
    return overrides


def _values(item: Override) -> list[str]:
    """What an override sets, as it is written: one value, or each of a sweep, as far as a sweep may go."""
    if item.is_sweep_override():
        return list(itertools.islice(item.sweep_string_iterator(), LARGEST_SWEEP + 1))
    return [item.get_value_element_as_str()]


def _line(item: Override, value: str | None = None) -> str:
    """The override as it is written, with one of a sweep's values where that is given."""
    return item.input_line or "" if value is None else f"{item.get_key_element()}={value}"


def _sweep_fault(item: Override, faults: list[str]) -> bool:
    """Note and tell several values where there is one run."""
    if item.is_sweep_override():
        faults.append(f"{item.input_line} names several values, which needs -m (a sweep)")
        return True
    return False


def _group_fault(item: Override, faults: list[str]) -> bool:
    """Note and tell a choice that a config group does not have."""
    group = item.key_or_group
    if not _is_group(group) or group.startswith("hydra"):
        return False
    options = GlobalHydra.instance().config_loader().get_group_options(group)
    if item.is_delete():
        faults.append(f"{item.input_line}: {group} cannot be left out; allowed: {', '.join(options)}")
        return True
    values = _values(item)
    wrong = [f"{group}={value}" for value in values if value not in options] if values else [_line(item)]
    faults.extend(f"{given}; allowed: {', '.join(options)}" for given in wrong)
    return bool(wrong)


def _is_group(name: str) -> bool:
    return bool(name) and bool(GlobalHydra.instance().config_loader().get_group_options(name))


def _known_keys(overrides: Sequence[Override], name: str) -> list[str] | None:
    """Every key of the config with the groups' first choices; None where it cannot be composed."""
    choices = [_line(item, _values(item)[0]) for item in overrides if _is_group(item.key_or_group)]
    try:
        return list(_keys(OmegaConf.to_container(compose(name, overrides=choices))))
    except (HydraException, OmegaConfBaseException):
        return None  # composing the jobs says what is wrong


def _key_fault(item: Override, known: Sequence[str] | None, faults: list[str]) -> bool:
    """Note and tell a key that the config does not have, also with `+`."""
    key = item.key_or_group
    if _is_group(key) or key.split(".")[0] == "hydra":
        return False
    if item.is_delete():
        faults.append(f"{item.input_line}: keys cannot be taken out")
        return True
    if known is None or key in known:
        return False
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "python -m qvl_hydra --cfg job shows all keys"
    faults.append(f"unknown key {key}; {hint}")
    return True


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _own_sweep(overrides: Sequence[Override], name: str) -> list[Override]:
    """What an experiment sweeps by itself, as far as the command line does not say otherwise."""
    fixed = [_line(item) for item in overrides if not item.is_sweep_override()]
    try:
        params = compose(name, overrides=fixed, return_hydra_config=True).hydra.sweeper.get("params") or {}
    except (HydraException, OmegaConfBaseException):
        params = {}  # composing the jobs says what is wrong
    given = {item.key_or_group for item in overrides}
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return list(parser.parse_overrides([f"{key}={value}" for key, value in params.items() if key not in given]))


def _jobs(overrides: Sequence[Override], faults: list[str]) -> Iterator[list[str]]:
    """The overrides of each job, as Hydra's basic sweeper makes them."""
    lists = [
        [_line(item, value) for value in _values(item)] if item.is_sweep_override() else [_line(item)]
        for item in overrides
    ]
    if (count := math.prod(map(len, lists))) > LARGEST_SWEEP:
        faults.append(f"the sweep has {count} jobs; at most {LARGEST_SWEEP} are run by one command")
        return
    for combination in itertools.product(*lists):
        yield list(combination)


def _judge_job(overrides: Sequence[str], name: str) -> tuple[Settings | None, list[str]]:
    try:
        settings, faults = judge_settings(plain(compose(name, overrides=list(overrides))))
    except (HydraException, OmegaConfBaseException) as error:
        return None, [" ".join(line.strip() for line in str(error).splitlines()[:2])]
    if settings is None:
        return None, faults
    from qvl_hydra.tasks.prepare import environment_faults  # takes seconds to import, which help need not

    faults += environment_faults(settings)
    for scheme in (*settings.quant.also, *(name for name in settings.profile.choices if name != LEAVE)):
        try:
            scheme_settings(scheme)
        except SettingsError as error:
            faults.extend(error.faults)
    return settings, faults
