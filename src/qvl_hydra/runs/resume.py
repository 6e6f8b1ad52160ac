"""Whose results a folder holds, and where an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qvl_hydra.errors import RunFolderError
from qvl_hydra.runs.files import read_json, read_yaml, write_json
from qvl_hydra.runs.folder import (
    FINGERPRINT,
    RunFolder,
    adopt,
    earlier_runs,
    find_finished,
    find_resumable,
)
from qvl_hydra.runs.reuse import APART, SCHEMES, extend, find_schemes, find_smaller, reuse, take_schemes
from qvl_hydra.runs.versions import code_sha
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings, judge_settings
from qvl_hydra.version import __version__

# What decides neither a score nor its place among others.
UNFINGERPRINTED = ("tracking", "resume", "compare", "merge", "profile", "export", "device", "task", "dry_run", "cache")
ROOTS = ("outputs", "multirun")  # where resume=auto looks, below the working folder


def fingerprint_of(settings: Settings, further: Sequence[QuantSettings], model_sha: str, calibration_sha: str) -> str:
    """Hash of everything that decides the result.

    Args:
        further: schemes beside `settings.quant`, in order.
    """
    return _together(_apart(settings, model_sha, calibration_sha), _schemes(settings, further))


def _together(apart: str, schemes: dict[str, str]) -> str:
    return _hash([apart, list(schemes.items())])


def _apart(settings: Settings, model_sha: str, calibration_sha: str) -> str:
    """Hash of all that decides but the schemes."""
    content = deciding(settings) | {
        "model_sha": model_sha,
        "calibration_sha": calibration_sha,
        "torch": torch.__version__,
        "qvl_hydra": f"{__version__}+{code_sha()}",
    }
    del content["quant"]
    return _hash(content)


def _schemes(settings: Settings, further: Sequence[QuantSettings]) -> dict[str, str]:
    """Hash of each scheme's definition, by name."""
    perturb = settings.quant.perturb  # is one for all
    return {quant.name: _hash(asdict(replace(quant, also=[], perturb=perturb))) for quant in (settings.quant, *further)}


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def refuse_other_settings(settings: Settings, folder: RunFolder) -> None:
    """Leave a folder alone that holds scores of other settings; called before anything is written there.

    Raises:
        RunFolderError: it does, or it holds scores and `resume=never`.
    """
    saved = folder.path / "config.yaml"
    if not (folder.path / FINGERPRINT).exists() or not saved.exists():
        return
    earlier, _ = judge_settings(read_yaml(saved))
    if earlier is None or deciding(earlier) != deciding(settings) or earlier.schemes != settings.schemes:
        raise RunFolderError(
            f"{folder.path} holds the results of a run with other settings; give this one its own hydra.run.dir"
        )
    if settings.resume == "never":
        raise RunFolderError(f"{folder.path} holds results already; give resume=never its own hydra.run.dir")


@dataclass(frozen=True)
class Asked:
    """A run that looks for what was measured before.

    Attributes:
        further: schemes beside `settings.quant`, in order.
        count: of its calibration samples.
        sha_of: hash of the first so many of them.
        takes: a part of its scores may be those of another finished run.
        grows: the score of a sample does not depend on the others, so that those of a smaller run will do.
        of_all: see `extend`.
        by_scheme, report: see `take_schemes`.
    """

    settings: Settings
    further: tuple[QuantSettings, ...]
    model_sha: str
    count: int
    sha_of: Callable[[int], str]
    takes: bool
    grows: bool
    of_all: tuple[str, ...]
    by_scheme: tuple[str, ...]
    report: str

    @cached_property
    def fingerprint(self) -> str:
        return _together(self.apart, self.schemes)

    @cached_property
    def apart(self) -> str:
        return _apart(self.settings, self.model_sha, self.sha_of(self.count))

    @cached_property
    def schemes(self) -> dict[str, str]:
        return _schemes(self.settings, self.further)

    @cached_property
    def earlier(self) -> list[tuple[float, Path, str]]:
        """Runs that it may look at without being told of one."""
        return earlier_runs([Path.cwd() / root for root in ROOTS]) if self.settings.resume == "auto" else []

    def of_first(self, size: int) -> str:
        """The fingerprint of the same with so many samples."""
        calibration = replace(self.settings.calibration, size=size)
        settings = replace(self.settings, calibration=calibration)
        return _together(_apart(settings, self.model_sha, self.sha_of(size)), self.schemes)


def other_schemes(asked: Asked, own: Path) -> tuple[Path, list[str]] | None:
    """The finished run that has most of the schemes, with nothing else that decides different; and which it has."""
    return find_schemes(asked.earlier, asked.apart, asked.schemes, own) if asked.takes else None


def smaller_run(asked: Asked, own: Path) -> tuple[Path, int] | None:
    """The finished run of most of the first samples, with nothing else that decides different; and of how many."""
    grows = asked.takes and asked.grows
    return find_smaller(asked.earlier, asked.of_first, asked.count, own) if grows else None


def take_up(asked: Asked, folder: RunFolder, screen: Screen, finished: bool) -> None:
    """Find what an earlier run measured under the same settings, and note whose folder this is.

    Args:
        finished: see `source_of`.

    Raises:
        RunFolderError: the folder, or the one that `resume` names, holds another run's results.
    """
    path, settings, fingerprint = folder.path / FINGERPRINT, asked.settings, asked.fingerprint
    if path.exists():
        if _kept(folder.path) != fingerprint:
            raise RunFolderError(
                f"{folder.path} holds results of another model, other samples, schemes or versions; give this run "
                "its own hydra.run.dir"
            )
    else:
        source, whole = source_of(settings, asked.earlier, folder.path, fingerprint, finished)
        if source is not None and whole:
            reuse(source, folder)
        elif source is not None:
            adopt(source, folder)
            screen.say(f"going on where {source} stopped")
        elif (others := other_schemes(asked, folder.path)) is not None:
            take_schemes(others[0], folder, others[1], asked.by_scheme, asked.report)
        elif (smaller := smaller_run(asked, folder.path)) is not None:
            extend(smaller[0], folder, smaller[1], asked.of_all)
    apart = {APART: asked.apart, SCHEMES: asked.schemes}
    write_json(path, {"fingerprint": fingerprint, "qvl_hydra": __version__, **apart})


def source_of(
    settings: Settings, earlier: Sequence[tuple[float, Path, str]], own: Path, fingerprint: str, finished: bool
) -> tuple[Path | None, bool]:
    """The folder of a run whose scores one in its own folder takes over, if there is one.

    Args:
        earlier: see `find_resumable`.
        finished: look among finished runs, too.

    Returns:
        The folder; and whether that run came to its end, so that nothing is left to measure.

    Raises:
        RunFolderError: `resume` names another run's folder.
    """
    if settings.resume == "never":
        return None, False
    if settings.resume == "auto":
        unfinished = find_resumable(earlier, fingerprint, own)
        if unfinished is not None or not finished:
            return unfinished, False
        return find_finished(earlier, fingerprint, own), True
    given = Path(settings.resume).expanduser()
    if not (given / FINGERPRINT).exists():
        raise RunFolderError(f"resume={given}: no unfinished run there; allowed: auto, never, or a run's folder")
    if _kept(given) != fingerprint:
        raise RunFolderError(f"resume={given}: that run had other settings, samples or versions")
    return given, False


def _kept(folder: Path) -> str:
    return str(read_json(folder / FINGERPRINT).get("fingerprint"))


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result."""
    return {key: value for key, value in asdict(settings).items() if key not in UNFINGERPRINTED}
