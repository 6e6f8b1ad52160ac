"""Memory that a walk needs for a moment goes back to the system, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

WALK = """
import sys, torch
from pathlib import Path
from qvl_hydra.models.memory import return_large_allocations

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if sys.argv[1] == "returned":
    return_large_allocations()
torch.empty(16 << 20, dtype=torch.uint8).fill_(1)
before, kept = resident(), []
for _ in range(40):
    moment = [torch.empty(6 << 20, dtype=torch.uint8).fill_(1) for _ in range(3)]
    kept.append(torch.empty(1 << 18, dtype=torch.uint8).fill_(1))
    del moment[0]
    kept.append(torch.empty(1 << 18, dtype=torch.uint8).fill_(1))
    del moment
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_what_a_block_needs_for_a_moment_goes_back() -> None:
    def mib(how: str) -> float:
        command = [sys.executable, "-c", WALK, how]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert mib("returned") < 40 < mib("kept"), "20 MiB are kept"
