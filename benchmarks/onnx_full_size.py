"""Real widths over ONNX: towers of Qwen2.5-VL-3B's width export with external data, load, and score a few operators.

    python -m benchmarks.onnx_full_size {lm,vision} [--blocks 8] [--ops 6]

Random weights; a small vocabulary, since the head and the embedding are no part of a block. Prints seconds and peak
memory, of which the PyTorch model is a part throughout.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.jobs import SCHEMES, Silent, make_job, save_results, shaped_model, text_samples
from qvl_hydra.backends import onnxrt
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.models.memory import GIB, peak_memory_bytes
from qvl_hydra.onnx.export.component import export_component
from qvl_hydra.onnx.scoring.session import pick_provider
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import BackendSettings, ExportSettings

SIDE = 224  # pixels of the square image; 16 x 16 patches
TOKENS = 64


def image_sample(model: LoadedModel, side: int) -> Sample:
    """Random patches of one square image, and the image tokens alone."""
    patches = side // 14
    grid = torch.tensor([[1, patches, patches]])
    pixels = torch.randn(patches**2, 1176, generator=torch.Generator().manual_seed(0))
    ids = torch.full((patches**2 // 4,), model.config.image_token_id)
    return Sample("random", ids, torch.zeros(3, len(ids), dtype=torch.long), ids, pixels, grid)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("component", choices=["lm", "vision"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--ops", type=int, default=6)
    arguments = parser.parse_args()
    lm = arguments.component == "lm"
    overrides = {"text_config.vocab_size": 2048, "text_config.num_hidden_layers": arguments.blocks if lm else 1}
    overrides |= {"vision_config.depth": 1} if lm else {}
    model = shaped_model(overrides, dtype="float32")
    samples = text_samples(model, 1, TOKENS) if lm else (image_sample(model, SIDE),)
    job = make_job(model, samples, SCHEMES["w8a8_static"], arguments.component, estimator="exact")
    chosen = job.operators[:: max(1, len(job.operators) // arguments.ops)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        settings = ExportSettings(external_data=True)
        done = export_component(
            model, arguments.component, samples, Path(folder) / "graph", settings, pick_provider("cpu", None)
        )
        export_s = time.perf_counter() - began
        backend = BackendSettings("onnxrt", device="cpu", graph=str(done.path))
        began = time.perf_counter()
        run = RunFolder(Path(folder) / "run")
        report = onnxrt.run(dataclasses.replace(job, operators=chosen, backend=backend), run, Silent())
        score_s = time.perf_counter() - began
        frame = run.frame()
    result = {
        "component": arguments.component,
        "operators": len(job.operators),
        "scored": int(frame["op"].nunique()),
        "weight_bytes": done.manifest.weight_bytes,
        "relative_difference": done.difference.relative,
        "export_and_check_s": export_s,
        "score_s": score_s,
        "forward_s": report.forward_s,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    Console().print(
        f"{arguments.component}: {result['operators']} operators, {result['weight_bytes'] / GIB:.2f} GiB of external "
        f"data, exported and checked in {export_s:.0f} s (relative difference {done.difference.relative:.1g}); "
        f"{result['scored']} operators scored in {score_s:.0f} s (one forward {report.forward_s:.1f} s); "
        f"peak memory {peak_memory_bytes() / GIB:.1f} GiB"
    )
    Console().print(f"written: {save_results(f'onnx_full_size_{arguments.component}', result)}")


if __name__ == "__main__":
    main()
