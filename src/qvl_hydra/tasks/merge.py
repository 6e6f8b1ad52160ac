"""task=merge: the shards of one sweep become the run that they are parts of; also what follows a multirun of shards.

Shards measure neighbouring samples and leave their scores in parts that are named by the samples' places, so that the
parts of all shards are those of one whole run. That run is taken up as one that was stopped would be: nothing is
measured twice, and what takes all samples (which operators `auto` measures exactly) is measured now.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvl_hydra.errors import RunFolderError
from qvl_hydra.estimators.bench import CENSUS, FORWARD, RANGES
from qvl_hydra.estimators.groups import GROUPS
from qvl_hydra.runs.files import read_yaml, write_atomically, write_json
from qvl_hydra.runs.folder import END, SECONDS, RunFolder
from qvl_hydra.runs.record import RunRecord, read_record
from qvl_hydra.runs.resume import deciding
from qvl_hydra.screen import Screen
from qvl_hydra.settings import QuantSettings, Settings, TaskSettings, judge_settings
from qvl_hydra.tasks import sweep
from qvl_hydra.tracking.content import leaves
from qvl_hydra.tracking.record import tracked_beside

FOLDER = "merged"  # of a multirun's merged run, in the sweep folder
SAME = (RANGES, CENSUS, "row_chunk")  # what every shard found alike
Schemes = Callable[[Settings], tuple[Settings, list[QuantSettings]]]  # the settings, and those of further schemes
DECIDING_VERSIONS = ("torch", "qvl_hydra")


@dataclass(frozen=True)
class Shard:
    """One shard's run folder, settings and record."""

    folder: Path
    settings: Settings
    record: RunRecord

    @property
    def identity(self) -> dict[str, Any]:
        """What it has in common with the other shards of its sweep, by name."""
        record = self.record
        versions = {name: record.versions.get(name) for name in DECIDING_VERSIONS}
        own = {key: value for key, value in leaves(deciding(self.settings), ".") if key != "shard"}
        return own | {"model": record.model_sha, "samples": record.calibration_sha, **versions}


def run(settings: Settings, folder: RunFolder, screen: Screen, schemes: Schemes) -> None:
    """Merge the shards that `merge.runs` names.

    Args:
        schemes: finds the schemes that settings name.

    Raises:
        RunFolderError: nothing is named, one is no finished shard, they are of different sweeps, one stands twice, or
            one is missing and `merge.partial` is false.
        QvlHydraError: see `sweep.run`.
    """
    wanted = settings.merge
    if not wanted.runs:
        raise RunFolderError("task=merge needs shards: merge.runs=[<run folder>,...], or the folder of their multirun")
    shards, unfinished = [], {}
    for path in _run_folders(wanted.runs):
        shard = _read(path)
        if shard is None:
            unfinished[path] = "it has no result"
        elif shard.record.status != "complete":
            unfinished[path] = f"it is {shard.record.status}"
        else:
            shards.append(shard)
    missing = _require_one_sweep(shards, unfinished, wanted.partial)
    whole = dataclasses.replace(_whole(shards), tracking=settings.tracking)
    _merge(shards, missing, whole, folder, screen, schemes)


def merge_multirun(sweep_folder: Path, screen: Screen, schemes: Schemes) -> int:
    """Merge every sweep whose shards are jobs of a multirun.

    Returns:
        How many were merged.

    Raises:
        QvlHydraError: see `run`.
    """
    groups: dict[str, list[Shard]] = defaultdict(list)
    for path in sorted(sweep_folder.glob("*/config.yaml")):
        shard = _read(path.parent) if path.parent.name.isdigit() else None
        if shard is not None and shard.record.status == "complete":
            groups[repr(sorted(shard.identity.items(), key=str))].append(shard)
    for number, shards in enumerate(groups.values()):
        folder = RunFolder(sweep_folder / (FOLDER if len(groups) == 1 else f"{FOLDER}-{number}"))
        settings = shards[0].settings
        tags = {"task": "sweep", "merged": str(settings.part[1])}
        beside = tracked_beside(sweep_folder, folder.path, settings.tracking, "merged", tags, screen.say)
        with folder.locked(), beside:
            (folder.path / END).unlink(missing_ok=True)
            missing = _require_one_sweep(shards, {}, partial=False)
            _merge(shards, missing, _whole(shards), folder, screen, schemes)
            write_json(folder.path / END, {"end": "FINISHED"})
    return len(groups)


def _run_folders(named: Sequence[str]) -> list[Path]:
    """The run folders named, and those below the folders of multiruns."""
    found: list[Path] = []
    for name in named:
        path = Path(name).expanduser()
        if (path / "config.yaml").is_file():
            found.append(path)
            continue
        below = [item.parent for item in sorted(path.glob("*/config.yaml")) if item.parent.name.isdigit()]
        if not below:
            raise RunFolderError(f"merge.runs: {path} is no run folder, and has none below; give those of the shards")
        found += below
    return found


def _read(folder: Path) -> Shard | None:
    """The shard in a run folder; None where it has no result.

    Raises:
        RunFolderError: its run is no shard.
    """
    settings, faults = judge_settings(read_yaml(folder / "config.yaml"))
    if settings is None:
        raise RunFolderError(f"{folder} has settings that this version does not read: {'; '.join(faults)}")
    if settings.shard is None:
        raise RunFolderError(f"{folder} is the run of no shard; give those that were started with shard=i/n")
    record = read_record(folder)
    return None if record is None else Shard(folder, settings, record)


def _merge(
    shards: Sequence[Shard],
    missing: Sequence[int],
    whole: Settings,
    folder: RunFolder,
    screen: Screen,
    schemes: Schemes,
) -> None:
    for path in folder.parts.iterdir():  # of a merge that was stopped
        path.unlink() if path.is_file() else shutil.rmtree(path)
    _gather(shards, folder)
    text = yaml.safe_dump(dataclasses.asdict(whole), sort_keys=False)
    write_atomically(folder.path / "config.yaml", text.encode())
    screen.say(f"merging {len(shards)} of {shards[0].settings.part[1]} shards")
    settings, further = schemes(whole)
    why = f"shards {', '.join(map(str, missing))} are missing: scores are of the other samples" if missing else ""
    sweep.run(settings, folder, screen, further, only_there=why)
    if why:
        screen.say(why)


def _whole(shards: Sequence[Shard]) -> Settings:
    """The settings of the run that the shards are parts of."""
    return dataclasses.replace(shards[0].settings, shard=None, resume="never", task=TaskSettings("sweep"))


def _require_one_sweep(shards: Sequence[Shard], unfinished: dict[Path, str], partial: bool) -> list[int]:
    """The numbers of the shards that are missing.

    Raises:
        RunFolderError: see `run`.
    """
    told = "".join(f"\n  - {path}: {reason}" for path, reason in unfinished.items())
    if not shards:
        raise RunFolderError(f"no finished shard was given{told}")
    first = shards[0]
    for other in shards[1:]:
        differing = sorted(
            key for key in first.identity.keys() | other.identity.keys()
            if first.identity.get(key) != other.identity.get(key)
        )  # fmt: skip
        if differing:
            raise RunFolderError(
                f"{first.folder} and {other.folder} are shards of different sweeps: they differ in "
                f"{', '.join(differing[:5])}"
            )
        if first.settings.part[1] != other.settings.part[1]:
            raise RunFolderError(
                f"{first.folder} is shard={first.settings.shard} and {other.folder} shard={other.settings.shard}: "
                "their samples overlap"
            )
    places: dict[int, Path] = {}
    for shard in shards:
        index = shard.settings.part[0]
        if index in places:
            raise RunFolderError(f"shard={shard.settings.shard} stands twice: {places[index]} and {shard.folder}")
        places[index] = shard.folder
    missing = [index for index in range(first.settings.part[1]) if index not in places]
    if missing and not partial:
        names = ", ".join(f"shard={index}/{first.settings.part[1]}" for index in missing)
        raise RunFolderError(
            f"{names} missing; run what is missing, or take merge.partial=true for what there is{told}"
        )
    return missing


def _gather(shards: Sequence[Shard], folder: RunFolder) -> None:
    """Put the parts of all shards into one folder, and what they remember."""
    ordered = sorted(shards, key=lambda shard: shard.settings.part[0])
    kept = [RunFolder(shard.folder) for shard in ordered]
    for own in kept:
        for path in own.parts.glob("*.parquet"):
            target = folder.parts / path.name
            if target.exists():
                raise RunFolderError(f"{path.name} was measured by two shards, {own.path} one of them")
            shutil.copy2(path, target)
    for name in SAME:
        if (value := kept[0].recall(name)) is not None:
            folder.remember(name, value)
    groups = [group for own in kept for group in own.recall(GROUPS, [])]
    if groups:
        folder.remember(GROUPS, groups)
    for name in ("skipped", "failed"):
        reasons: dict[str, str] = {}
        for own in reversed(kept):  # of several reasons the first
            reasons |= own.recall(name, {})
        if reasons:
            folder.remember(name, reasons)
    folder.remember(SECONDS, sum(own.seconds for own in kept))
    forwards = [forward for own in kept if (forward := own.recall(FORWARD)) is not None]
    if len(forwards) == len(kept):
        sizes = [size for forward in forwards for size in forward["state_bytes"]]
        seconds = sum(forward["seconds"] for forward in forwards)
        folder.remember(FORWARD, forwards[0] | {"seconds": seconds, "state_bytes": sizes})
    write_json(folder.path / "shards.json", {"shards": [str(shard.folder.absolute()) for shard in ordered]})
