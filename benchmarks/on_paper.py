"""What the default sweep of published shapes takes on GPUs, on paper: seconds, bytes read, and money.

    python -m benchmarks.on_paper results/full_size_*.json [--device h100_sxm] [--gpus 1 8 64] [--samples 128]
                                  [--text 256] [--image 768] [--peak 0.6] [--read 5] [--price 3]

A model of the time, fitted to what `benchmarks.full_size` has measured on this machine and left in its results:

    seconds = weights / read rate * times read  +  operations / (peak * reached * efficiency) * forward-equivalents

Forward-equivalents are the median of the results. The efficiency is what a forward of theirs reached of what a large
product of bfloat16 reaches on the same cores, timed here. What a large product reaches of a GPU's published peak
(`--peak`), the read rate and the price are assumptions. The operations of a shape are counted from its operators, two
for each weight and token, experts by how many a token goes to; attention's own products, a few per cent at these
lengths, are left out. A model that does not fit into four fifths of a GPU's memory is streamed: read once for ranges
and twice for each group of samples whose states fit beside it. Shards divide the samples; every shard loads the model
and observes ranges on all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import save_results
from qvl_hydra.entry.compose import config_folder
from qvl_hydra.models.load import describe_model, outline_model
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.settings import ModelSettings

# Qwen2.5-VL-72B's published config, by what differs from the 7B's.
LARGEST_QWEN2_5 = {
    "text_config.hidden_size": 8192, "text_config.num_hidden_layers": 80, "text_config.num_attention_heads": 64,
    "text_config.num_key_value_heads": 8, "text_config.intermediate_size": 29568, "text_config.vocab_size": 152064,
    "text_config.layer_types": ["full_attention"] * 80, "text_config.max_window_layers": 80,
    "vision_config.out_hidden_size": 8192,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-VL-8B": ("qwen3_vl_8b", {}),
    "Qwen3-VL-32B": ("qwen3_vl_32b", {}),
    "Qwen2.5-VL-72B": ("qwen2_5_vl_7b", LARGEST_QWEN2_5),
    "Qwen3-VL-235B-A22B": ("qwen3_vl_235b_a22b", {}),
}
MEMORY_GIB = {"h100_sxm": 80, "h200_sxm": 141, "a100_80gb_sxm": 80, "b200_hgx": 180, "l40s": 48}
USABLE, GIB = 0.8, 2**30
PATCHES = 4  # of an image token
BYTES = 2  # of a number in bfloat16


@dataclass(frozen=True)
class Shape:
    """What decides the time of a model.

    Attributes:
        weight_bytes: of all weights in bfloat16.
        text_weights, vision_weights: that one token, or one patch, is multiplied with.
        state_bytes: of one text token between all segments.
    """

    weight_bytes: float
    text_weights: float
    vision_weights: float
    state_bytes: float

    def operations(self, text: int, image: int) -> float:
        """Of one forward of one sample."""
        return 2 * (self.text_weights * (text + image) + self.vision_weights * image * PATCHES)


@dataclass(frozen=True)
class Fit:
    """What was measured: forward-equivalents of a sweep, and a forward's share of the machine's rate."""

    forward_equivalents: float
    efficiency: float


def shape_of(name: str, overrides: dict[str, Any] | None = None) -> Shape:
    """A published shape; no weight is made."""
    settings = ModelSettings(name, f"Qwen/{name}", weights="random", placement="streamed", overrides=overrides or {})
    description = describe_model(settings)
    module = outline_model(description, torch.device("cpu"), 0).module
    operators = find_operators(module, "full")
    weights = dict.fromkeys(("lm", "vision"), 0.0)
    for op in operators:
        weights[op.component] += op.in_features * op.out_features * op.active
    text = description.config.get_text_config()
    return Shape(
        sum(parameter.numel() for parameter in module.parameters()) * BYTES,
        weights["lm"],
        weights["vision"],
        text.hidden_size * BYTES * (text.num_hidden_layers + 1),
    )


def product_rate(size: int = 2048, least_s: float = 2.0) -> float:
    """Operations a second of a large product in bfloat16 on this machine."""
    first, second = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    first @ second
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < least_s:
        first @ second
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - began)


def fit(results: Sequence[dict[str, Any]], rate: float) -> Fit:
    """The constants of the model from resident or streamed results, `full` or `lm`."""
    efficiencies = []
    for row in results:
        shape = shape_of(row["shape"])
        image = 48 if row["component"] == "full" else 0  # of `full_size`'s samples
        done = shape.operations(row["tokens"] - image, image) * row["samples"] / row["forward_s"]
        efficiencies.append(done / rate)
    return Fit(statistics.median(row["forward_equivalents"] for row in results), statistics.median(efficiencies))


def cost(shape: Shape, known: Fit, device: dict[str, Any], gpus: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of one sweep on so many GPUs, a shard each."""
    memory = MEMORY_GIB[device["name"]] * GIB * USABLE
    own = math.ceil(arguments.samples / gpus)
    resident = shape.weight_bytes < memory
    reads, groups = 1, 1
    if not resident:
        states = shape.state_bytes * (arguments.text + arguments.image)
        groups = math.ceil(own * states / (memory / 2))
        reads = 1 + 2 * groups
    read_s = shape.weight_bytes * reads / (arguments.read * 1e9)
    rate = device["tera_ops"]["bf16"] * 1e12 * arguments.peak * known.efficiency
    forward_s = shape.operations(arguments.text, arguments.image) / rate
    computed_s = forward_s * (arguments.samples + (known.forward_equivalents - 1) * own)
    seconds = read_s + computed_s
    return {
        "gpus": gpus, "placement": "resident" if resident else "streamed", "reads": reads,
        "read_bytes": shape.weight_bytes * reads * gpus, "read_s": read_s, "compute_s": computed_s,
        "seconds": seconds, "money": seconds / 3600 * gpus * arguments.price,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files that benchmarks.full_size wrote")
    parser.add_argument("--device", default="h100_sxm", choices=list(MEMORY_GIB))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--text", type=int, default=256, help="text tokens of a sample")
    parser.add_argument("--image", type=int, default=768, help="image tokens of a sample, four patches each")
    parser.add_argument("--peak", type=float, default=0.6, help="of the published peak that a large product reaches")
    parser.add_argument("--read", type=float, default=5.0, help="GB a second that a GPU's process reads weights at")
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU hour")
    arguments = parser.parse_args()
    results = [row for path in arguments.results for row in json.loads(path.read_text())]
    known = fit([row for row in results if row["estimator"] == "sketch"], product_rate())
    device = yaml.safe_load((config_folder() / "device" / f"{arguments.device}.yaml").read_text())
    table = Table("shape", "GPUs", "placement", "weights", "read", "compute", "time", "money")
    rows = []
    for name, (base, overrides) in SHAPES.items():
        shape = shape_of(base, overrides)
        for gpus in arguments.gpus:
            row = {"shape": name, **cost(shape, known, device, gpus, arguments)}
            rows.append(row)
            table.add_row(
                name, str(gpus), row["placement"], f"{shape.weight_bytes / 1e9:.0f} GB", f"{row['read_s']:.0f} s",
                f"{row['compute_s']:.0f} s", f"{row['seconds'] / 60:.1f} min", f"{row['money']:.2f}",
            )  # fmt: skip
    written = save_results("on_paper", {"fit": vars(known), "device": device, "rows": rows})
    Console().print(
        f"{known.forward_equivalents:.2f} forward-equivalents, {known.efficiency:.0%} of the rate of a large product, "
        f"from {len(results)} results; {arguments.samples} samples of {arguments.text} text and {arguments.image} "
        f"image tokens, {arguments.device}, {arguments.peak:.0%} of its peak, {arguments.read} GB/s, "
        f"{arguments.price} an hour",
        table, f"written: {written}", sep="\n",
    )  # fmt: skip


if __name__ == "__main__":
    main()
