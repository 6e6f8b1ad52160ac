"""A published model's shape on this machine: wall time and peak memory of a whole sketch, resident and streamed.

    python -m benchmarks.full_size [--shape qwen2_5_vl_3b|qwen3_vl_2b|...] [--component lm|full] [--samples 8]
                                   [--tokens 256] [--dtype bfloat16] [--placement resident|streamed]
                                   [--device cpu|cuda] [--positions all|answer]
                                   [--estimator sketch|auto|exact|gradient|gauss_newton]

Random weights, written once as a sharded checkpoint (about 7 GB in --folder), so that streamed placement reads what a
downloaded model would be. Each placement runs in a process of its own, whose peak memory is the operating system's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import SCHEMES, make_job, measure, save_results, text_samples
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.models.memory import GIB, peak_memory_bytes
from qvl_hydra.settings import ModelSettings


def image_samples(model: LoadedModel, count: int, tokens: int) -> tuple[Sample, ...]:
    """Random images of 12 x 16 patches (48 image tokens) in front of random text."""
    from qvl_hydra.calibration.encode import rope_shell

    config, shell = model.config, rope_shell(model.config)
    grid = torch.tensor([[1, 12, 16]])
    tower = config.vision_config
    image_tokens = int(grid.prod()) // tower.spatial_merge_size**2
    values = getattr(tower, "in_channels", 3) * tower.temporal_patch_size * tower.patch_size**2
    found = []
    for index, text in enumerate(text_samples(model, count, tokens - image_tokens - 2)):
        image = torch.full((image_tokens,), config.image_token_id)
        start, end = torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])
        ids = torch.cat([start, image, end, text.input_ids])
        labels = torch.cat([torch.full((image_tokens + 2,), -100), text.labels])
        kinds = (ids == config.image_token_id).int()
        positions, _ = shell.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid)
        pixels = torch.randn(int(grid.prod()), values, generator=torch.Generator().manual_seed(index))
        found.append(Sample(f"image-{index}", ids, positions[:, 0], labels, pixels, grid))
    return tuple(found)


ESTIMATORS = ("sketch", "auto", "exact", "gradient", "gauss_newton")


def write_checkpoint(folder: Path, shape: str, dtype: str) -> None:
    settings = ModelSettings(shape, f"Qwen/{shape}", weights="random", dtype=dtype)  # type: ignore[arg-type]
    load_model(describe_model(settings), torch.device("cpu"), 0).module.save_pretrained(folder, max_shard_size="1GB")


def run_one(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = ModelSettings(
        arguments.shape, str(arguments.folder), dtype=arguments.dtype, placement=arguments.placement
    )
    began = time.perf_counter()
    model = load_model(describe_model(settings), torch.device(arguments.device), 0)
    loaded_s = time.perf_counter() - began
    make = text_samples if arguments.component == "lm" else image_samples
    samples = make(model, arguments.samples, arguments.tokens)
    strategy: dict[str, Any] = {"estimator": arguments.estimator, "probes": arguments.probes}
    if arguments.estimator == "gauss_newton":
        strategy = {"name": "hawq_v2", "probes": arguments.probes}
    if arguments.positions == "answer":
        strategy |= {"metric": "kl", "positions": "answer"}
    job = make_job(model, samples, SCHEMES[arguments.scheme], arguments.component, **strategy)
    scores, report = measure(job)
    found = {
        "shape": arguments.shape, "component": arguments.component, "placement": arguments.placement,
        "estimator": arguments.estimator,
        "dtype": arguments.dtype, "device": arguments.device, "operators": len(scores),
        "samples": arguments.samples, "tokens": arguments.tokens, "probes": arguments.probes,
        "load_s": loaded_s, "engine_s": report.engine_s, "forward_s": report.forward_s,
        "forward_equivalents": report.engine_s / report.forward_s, "wall_s": time.perf_counter() - began,
        "peak_gib": peak_memory_bytes() / GIB,
    }  # fmt: skip
    if arguments.device != "cpu":
        found["peak_cuda_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2_5_vl_3b", help="a shape that the package knows (assets/configs)")
    parser.add_argument("--component", default="lm", choices=["lm", "vision", "full"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--scheme", default="w8a8_static", choices=list(SCHEMES))
    parser.add_argument("--estimator", default="sketch", choices=ESTIMATORS)
    parser.add_argument("--positions", default="all", choices=["all", "answer"], help="answer: KL; all: squared error")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--placement", choices=["resident", "streamed"], help="default: both, one after the other")
    parser.add_argument("--folder", type=Path, help="default: <shape>_random in the folder for temporary files")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder or Path(tempfile.gettempdir()) / f"{arguments.shape}_random"
    if arguments.alone:
        print(json.dumps(run_one(arguments)))
        return
    if not (arguments.folder / "config.json").exists():  # in a process of its own, whose memory goes with it
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(write_checkpoint, arguments.folder, arguments.shape, arguments.dtype).result()
    rows = []
    for placement in [arguments.placement] if arguments.placement else ["resident", "streamed"]:
        command = [sys.executable, "-m", "benchmarks.full_size", *sys.argv[1:], "--placement", placement, "--alone"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
    table = Table("placement", "operators", "engine s", "forward s", "forward-eq.", "wall s", "peak GiB")
    for row in rows:
        table.add_row(
            row["placement"], str(row["operators"]), f"{row['engine_s']:.0f}", f"{row['forward_s']:.1f}",
            f"{row['forward_equivalents']:.1f}", f"{row['wall_s']:.0f}", f"{row['peak_gib']:.1f}",
        )  # fmt: skip
    name = f"full_size_{arguments.shape}_{arguments.component}_{arguments.estimator}"
    Console().print(table, f"written: {save_results(name, rows)}")


if __name__ == "__main__":
    main()
