"""task=measure_costs: seconds of every product of a model on the machine at hand, for `profile.cost` to plan by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from qvl_hydra.backends.protocol import pick_device
from qvl_hydra.blockwise.stopwatch import synchronize
from qvl_hydra.errors import ProfileError
from qvl_hydra.models.load import DTYPES, describe_model
from qvl_hydra.models.memory import peak_memory_bytes
from qvl_hydra.operators.discover import Operator, find_operators, select_operators
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.kernels import make_product, padded
from qvl_hydra.profiles.prices import Terms, bytes_moved, lengths_of, products, rate_of, roofline
from qvl_hydra.quantization.scheme import scheme_from_settings
from qvl_hydra.runs.files import read_table, write_parquet
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.runs.record import RunRecord, write_record
from qvl_hydra.screen import Screen
from qvl_hydra.settings import DeviceSettings, QuantSettings, Settings
from qvl_hydra.tasks.sweep import versions

FILE = "costs.parquet"
COLUMNS = ("in_features", "out_features", "choice", "tokens")  # of a product
REPEATS, ENOUGH_S = 5, 0.05  # of one product, at least so often and for so long
COLD_BYTES = 1 << 27  # of copies of a weight that take turns, so that it comes from memory and not from a cache


def run(settings: Settings, folder: RunFolder, screen: Screen, further: Sequence[QuantSettings] = ()) -> None:
    """Time every product of the model in every choice, write the table, say what this machine reaches.

    Args:
        further: schemes of `profile.choices` beside `settings.quant`.

    Raises:
        QvlHydraError: the model cannot be found; no operator is left.
    """
    began = time.perf_counter()
    description = describe_model(settings.model)
    found = find_operators(description.skeleton, settings.component.name)
    operators = [op for op in select_operators(found, settings.operators, settings.seed) if op.kind == "Linear"]
    schemes = {item.name: scheme_from_settings(item) for item in (settings.quant, *further)}
    lengths = lengths_of(settings.profile, description.family)
    terms = Terms(schemes, settings.profile.high_bits, settings.device, lengths)
    wanted = {
        (op.in_features, op.out_features, choice, tokens): op
        for op in operators
        for choice in (LEAVE, *schemes)
        for tokens, _ in products(op, lengths)
    }
    device = pick_device(settings.backend.device)
    threads = torch.get_num_threads()
    if settings.backend.threads is not None:
        torch.set_num_threads(settings.backend.threads)
    rows: list[dict[str, Any]] = []
    lacks: dict[str, str] = {}
    screen.total(len(wanted), f"timing {len(wanted)} products")
    try:
        for (inputs, outputs, choice, tokens), op in wanted.items():
            try:
                row = _time(inputs, outputs, choice, tokens, terms, device, DTYPES[settings.model.dtype])
            except NotImplementedError as error:
                lacks[choice] = str(error)
            else:
                rows.append(row | _reached(op, choice, tokens, terms, row["seconds"]))
            screen.step()
    finally:
        screen.finish()
        torch.set_num_threads(threads)
    table = pd.DataFrame(rows)
    write_parquet(folder.path / FILE, table)
    notes = [f"no product in {name}: {reason}; plans by these costs cannot have it" for name, reason in lacks.items()]
    typical = reached_by(table)
    write_record(
        folder.path,
        RunRecord(
            task="measure_costs",
            status="complete",
            model=settings.model.name,
            component=settings.component.name,
            device=str(device),
            n_ops=len(operators),
            wall_s=time.perf_counter() - began,
            peak_memory_bytes=peak_memory_bytes(),
            versions=versions(),
            notes=notes,
            further={"costs": {"products": len(rows), "bandwidth_gb_s": typical.bandwidth_gb_s, **typical.tera_ops}},
        ),
    )
    for note in notes:
        screen.say(note)
    reached = ", ".join(f"{name} {value:.4g}" for name, value in typical.tera_ops.items())
    screen.say(f"{len(rows)} products of {len(operators)} operators timed on {device}; plan by them with\n"
               f"profile.cost=measured_seconds profile.costs={folder.path}\n"
               f"they typically reach {typical.bandwidth_gb_s:.4g} GB/s of memory, and in 10^12 operations a second: "
               f"{reached}")  # fmt: skip


def read_costs(folder: str) -> dict[tuple[int, int, str, int], float]:
    """Seconds of each product, by what it takes in, what it gives, choice and tokens.

    Raises:
        ProfileError: there is no table.
    """
    path = Path(folder).expanduser() / FILE
    if not path.exists():
        raise ProfileError(f"profile.costs={folder}: no {FILE} there; give the run folder of a task=measure_costs")
    table = read_table(path, (*COLUMNS, "seconds"))
    return {
        (int(row["in_features"]), int(row["out_features"]), str(row["choice"]), int(row["tokens"])): row["seconds"]
        for row in table.to_dict("records")
    }


@torch.no_grad()
def _time(
    inputs: int, outputs: int, choice: str, tokens: int, terms: Terms, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Median and quartiles of one product, its weight cold."""
    wide, high = padded(inputs), padded(outputs)
    copies = max(1, min(16, COLD_BYTES // (wide * high)))
    made = [make_product(terms.of(choice), wide, high, device, dtype) for _ in range(copies)]
    x = torch.randn(tokens, wide, device=device, dtype=dtype)
    made[0](x)  # pays for allocations
    seconds: list[float] = []
    while len(seconds) < REPEATS * copies and (len(seconds) < REPEATS or sum(seconds) < ENOUGH_S):
        product = made[len(seconds) % copies]
        synchronize(device)
        began = time.perf_counter()
        product(x)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    low, middle, high_s = statistics.quantiles(seconds, n=4)
    return {"in_features": inputs, "out_features": outputs, "choice": choice, "tokens": tokens,
            "seconds": middle, "first_quartile": low, "third_quartile": high_s}  # fmt: skip


def _reached(op: Operator, choice: str, tokens: int, terms: Terms, seconds: float) -> dict[str, Any]:
    """Operations and bytes a second, and what the roofline of `device` says."""
    scheme = terms.of(choice)
    rate = rate_of(scheme)
    moved = bytes_moved(op, scheme, terms, tokens)
    return {"rate": rate, "tera_ops": 2 * tokens * op.in_features * op.out_features / seconds / 1e12,
            "gb_s": moved / seconds / 1e9, "roofline_s": roofline(op, scheme, terms, tokens)}  # fmt: skip


def reached_by(table: pd.DataFrame) -> DeviceSettings:
    """What products typically reach: medians, of operations over many tokens and of bytes over few."""
    few = table["tokens"] == table.groupby(["in_features", "out_features", "choice"])["tokens"].transform("min")
    many = table[~few] if (~few).any() else table
    rates = {str(name): float(rows["tera_ops"].median()) for name, rows in many.groupby("rate")}
    bandwidth = float(table[few]["gb_s"].median())
    return DeviceSettings("measured", bandwidth, rates)
