"""Rounding to FP8 and FP4, against PyTorch's cast to FP8 and back and against a choice among FP4's steps.

    python -m benchmarks.rounding [--values 1048576] [--repeats 15]

Both ways give the same bits, which is checked; they take turns, and the ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.jobs import save_results
from qvl_hydra.quantization.formats import float4, float8


def cast(x: Tensor) -> Tensor:
    return x.clamp(-float8.LARGEST, float8.LARGEST).to(torch.float8_e4m3fn).float()


def choice(x: Tensor) -> Tensor:
    """Steps of a half below 2, of one below 4, of two above."""
    size = x.abs()
    fine = (size * 2).round_().div_(2)
    coarse = torch.where(size < 4, size.round(), (size / 2).round_().mul_(2).clamp_(max=float4.LARGEST))
    return torch.where(size < 2, fine, coarse).copysign_(x)


# format: our way, the other, and the largest value that it is given
FORMATS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]] = {
    "float8_e4m3": (float8.rounded, cast, float8.LARGEST),
    "float4_e2m1": (float4.rounded, choice, float4.LARGEST),
}


def seconds(work: Callable[[Tensor], Tensor], x: Tensor) -> float:
    began = time.perf_counter()
    work(x)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    normal = torch.randn(given.values, generator=torch.Generator().manual_seed(0))
    table = Table("format", "ours, ms", "the other, ms", "ours takes", title=f"{torch.get_num_threads()} threads")
    found = {}
    for name, (ours, other, largest) in FORMATS.items():
        x = normal * (largest / normal.abs().amax())
        assert torch.equal(ours(x), other(x))
        times = [(seconds(ours, x), seconds(other, x)) for _ in range(given.repeats)]
        ratio = statistics.median(a / b for a, b in times)
        means = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
        table.add_row(name, *(f"{value:.1f}" for value in means), f"{ratio:.2f}")
        found[name] = {"ours_ms": means[0], "other_ms": means[1], "ratio": ratio}
    Console().print(table)
    save_results("rounding", {"torch": torch.__version__, **vars(given), **found})


if __name__ == "__main__":
    main()
