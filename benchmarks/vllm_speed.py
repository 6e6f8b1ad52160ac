"""Float and W8A8 checkpoints in vLLM on a CPU: seconds to the first token, tokens a second, memory.

    make test-vllm                                # makes the environment
    PYTHONPATH=tests/vllm/environment .venv-vllm/bin/python -m benchmarks.vllm_speed

Random weights in the shape of a Qwen2.5-VL of about 0.4 billion parameters, one image of 384 tokens, one thread. Every
checkpoint is loaded in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import bundled_model, save_results, shaped_model
from qvl_hydra.calibration.encode import load_processor, render
from qvl_hydra.calibration.record import Turn
from qvl_hydra.calibration.scenes import enlarged, scene_examples
from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.checkpoint import BESIDE, write_checkpoint
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.scheme import scheme_from_settings
from qvl_hydra.tasks.prepare import TOKEN_IDS

SHAPE = {
    "text_config.hidden_size": 1024,
    "text_config.intermediate_size": 2816,
    "text_config.num_hidden_layers": 24,
    "text_config.num_attention_heads": 8,
    "text_config.num_key_value_heads": 2,
    "text_config.vocab_size": 32000,
    "vision_config.depth": 12,
    "vision_config.hidden_size": 640,
    "vision_config.intermediate_size": 1728,
    "vision_config.num_heads": 10,
    "vision_config.out_hidden_size": 1024,
}
CELL, ANSWER, REPEATS = 112, 64, 3


def write_checkpoints(folder: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoints by name, with the dtype that vLLM runs each in."""
    tiny, model = bundled_model(), shaped_model(SHAPE)
    for name in TOKEN_IDS:
        setattr(model.config, name, getattr(tiny.config, name))
        setattr(model.module.config, name, getattr(tiny.config, name))
    operators = [op for op in find_operators(model.module, "full") if op.kind == "Linear"]
    scheme = scheme_from_settings(scheme_settings("w8a8_int"))
    profile = Profile(scheme, tuple(operators), frozenset(), 16, "everything")
    model.module.save_pretrained(folder / "float")  # type: ignore[operator]
    write_checkpoint(model, profile, dict(Quantizers(model, operators, (), "full", [scheme])), folder / "w8a8_int")
    for place in (folder / "float", folder / "w8a8_int"):
        for pattern in BESIDE:
            for path in tiny.description.folder.glob(pattern):
                if path.name not in ("config.json", "generation_config.json"):
                    shutil.copyfile(path, place / path.name)
        images = json.loads((place / "preprocessor_config.json").read_text())
        images["max_pixels"] = 1024 * 28 * 28
        (place / "preprocessor_config.json").write_text(json.dumps(images))
    count = sum(parameter.numel() for parameter in model.module.parameters())
    print(f"{count / 1e9:.2f} billion parameters, {len(operators)} operators in W8A8")
    return {
        "float32": (folder / "float", "float32"),
        "bfloat16": (folder / "float", "bfloat16"),
        "W8A8 in float32": (folder / "w8a8_int", "float32"),
        "W8A8 in bfloat16": (folder / "w8a8_int", "bfloat16"),
    }


def serve(checkpoint: str, dtype: str) -> None:
    """Print the figures of one checkpoint as the last line; a process of its own."""
    from vllm import LLM, SamplingParams, TokensPrompt

    processor = load_processor(bundled_model().description.folder)
    (example,) = scene_examples("evaluation", 1, 0)
    image = Image.fromarray(enlarged(np.asarray(example.image), CELL))
    question, _ = render(processor, (Turn("user", (None, example.prompt)),), example.answer)
    asked = processor.tokenizer.encode(question, add_special_tokens=False)
    model = LLM(
        checkpoint, dtype=dtype, enforce_eager=True, max_model_len=1024, max_num_seqs=1,
        limit_mm_per_prompt={"image": 1, "video": 0}, enable_prefix_caching=False, mm_processor_cache_gb=0,
    )  # fmt: skip
    found: dict[str, list[float]] = {"first": [], "whole": []}
    tokens = 0
    for repeat in range(REPEATS + 1):
        for name, count in (("first", 1), ("whole", ANSWER + 1)):
            prompt = TokensPrompt(prompt_token_ids=asked, multi_modal_data={"image": image})
            began = time.perf_counter()
            (output,) = model.generate(
                [prompt], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False
            )
            if repeat:  # the first pays for allocations
                found[name].append(time.perf_counter() - began)
            tokens = len(output.prompt_token_ids)
    first = float(np.median(found["first"]))
    rate = ANSWER / (float(np.median(found["whole"])) - first)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**20  # of this process alone
    print(json.dumps({"prompt_tokens": tokens, "first_token_s": first, "tokens_per_s": rate, "peak_gib": peak}))


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (checkpoint, dtype) in write_checkpoints(Path(folder)).items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.vllm_speed", str(checkpoint), dtype],
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
                                  "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
            rows.append({"checkpoint": name, "file_mb": size / 1e6, **json.loads(done.stdout.splitlines()[-1])})
    table = Table("checkpoint", "file, MB", "first token, s", "tokens a second", "peak, GiB")
    for row in rows:
        table.add_row(row["checkpoint"], f"{row['file_mb']:.0f}", f"{row['first_token_s']:.2f}",
                      f"{row['tokens_per_s']:.1f}", f"{row['peak_gib']:.1f}")  # fmt: skip
    path = save_results("vllm_speed", rows)
    Console(width=100).print(table, f"prompt: {rows[0]['prompt_tokens']} tokens; written: {path}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(*sys.argv[1:]) if len(sys.argv) > 1 else main()
