"""What measuring plans together saves: ten plans in one walk, against one walk a plan.

    python -m benchmarks.plans

36 narrow blocks (`benchmarks.jobs.outlier_model`) and the bundled Qwen2.5-VL; plans keep the first k units of a random
order, W8A8 for the rest, or part from each other in the last quarter of the blocks alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import SCHEMES, bundled_model, bundled_samples, outlier_model, save_results, text_samples
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.measure import measure_profiles
from qvl_hydra.profiles.profile import Profile

PLANS = 10


def plans(model: LoadedModel, late: bool) -> list[Profile]:
    """Random plans; with `late` they agree on all but the last quarter of the operators."""
    operators = tuple(find_operators(model.module, "lm"))
    rng, border = np.random.default_rng(0), len(operators) * 3 // 4 if late else 0
    found = []
    for _ in range(PLANS):
        kept = rng.random(len(operators)) < 0.5
        kept[:border] = False
        high = frozenset(op.path for op, keep in zip(operators, kept, strict=True) if keep)
        found.append(Profile(SCHEMES["w8a8_dynamic"], operators, high, 16, "random"))
    return found


def seconds(model: LoadedModel, profiles: Sequence[Profile], samples: Sequence[Sample]) -> float:
    quantizers = Quantizers(model, profiles[0].operators, samples, "lm", [profiles[0].scheme])
    began = time.perf_counter()
    measure_profiles(model, profiles, quantizers, samples, "lm")
    return time.perf_counter() - began


def main() -> None:
    table, rows = Table("model", "plans", "together", "one by one", "ratio"), []
    tiny, narrow = bundled_model(), outlier_model()
    for name, model, samples in (
        ("tiny_qwen2_5_vl", tiny, bundled_samples(tiny, 32)),
        ("36 narrow blocks", narrow, text_samples(narrow, 8, 64)),
    ):
        seconds(model, plans(model, False)[:1], samples[:1])  # the first pays for allocations
        for late in (False, True):
            found = plans(model, late)
            together = seconds(model, found, samples)
            apart = sum(seconds(model, [plan], samples) for plan in found)
            kind = "differ late" if late else "differ everywhere"
            rows.append({"model": name, "plans": kind, "together_s": together, "one_by_one_s": apart})
            table.add_row(name, kind, f"{together:.2f} s", f"{apart:.2f} s", f"{together / apart:.2f}")
    Console(width=100).print(table, f"written: {save_results('plans', rows)}")


if __name__ == "__main__":
    main()
