"""What memory is free, by the files of control groups."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import pytest

from qvl_hydra.models import memory

MIB = 1 << 20


@pytest.mark.parametrize(
    ("version", "own", "room"),
    [
        (2, "/job", 300 + 50), (2, "/job/inner", 100 + 50), (2, "/outside/job", 400 + 50), (2, "/", 400 + 50),
        (1, "/job", 300 + 50), (1, "/job/inner", 100 + 50), (1, "/elsewhere", 400 + 50),
    ],
)  # fmt: skip
def test_control_groups(version: int, own: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / ("groups" if version == 2 else "groups/memory")
    limit, used = memory.GROUP_FILES["" if version == 2 else "memory"]
    for place, most, taken in (("", 900, 500), ("job", 500, 200), ("job/inner", 300, 200), ("endless", None, 200)):
        folder = top / place
        folder.mkdir(parents=True, exist_ok=True)
        endless = "max" if version == 2 else str((1 << 63) - 4096)
        (folder / limit).write_text(f"{endless if most is None else most * MIB}\n")
        (folder / used).write_text(f"{taken * MIB}\n")
        told = {"anon": 1, "inactive_file": 20 * MIB, "active_file": 30 * MIB}
        if version == 1:  # of the group itself, and of those in it too
            told = {"inactive_file": 1, "active_file": 1} | {f"total_{name}": value for name, value in told.items()}
        (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in told.items()))
    (tmp_path / "own").write_text(f"5:cpu,cpuacct:/\n{'0:' if version == 2 else '4:memory'}:{own}\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    assert memory.free_memory_bytes() == room * MIB


def test_a_limit_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (taken + 100 * MIB, -1))
    assert 0 <= memory.free_memory_bytes() <= 100 * MIB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, -1))
    assert memory.free_memory_bytes() > 100 * MIB
