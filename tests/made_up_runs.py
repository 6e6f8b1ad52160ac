"""Run folders made up by the files' schema, with scores that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ROLES = {
    "lm": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    "vision": ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
BLOCKS = {"lm": "model.language_model.layers", "vision": "model.visual.blocks"}
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def operator_rows(component: str = "lm", blocks: int = 4, head: bool = True) -> list[dict[str, Any]]:
    """The operators of a tower with so many blocks, as `scores.parquet` names them."""
    if component == "full":
        return operator_rows("vision", max(1, blocks // 2), head) + operator_rows("lm", blocks, head)
    rows = []
    for block in range(blocks):
        for part in ROLES[component]:
            path = f"{BLOCKS[component]}.{block}.{part}"
            role = part.rpartition(".")[2]
            fused = FUSED.get(role)
            group = f"{path.rpartition('.')[0]}.{fused}" if fused else path
            rows.append(
                {"op": path, "component": component, "block": block, "role": role, "group": group, "n_params": 4096}
            )
    if head and component == "lm":
        rows.append(
            {"op": "lm_head", "component": "lm", "block": None, "role": "lm_head", "group": "lm_head", "n_params": 9999}
        )
    if head and component == "vision":
        path = "model.visual.merger.mlp.0"
        rows.append(
            {"op": path, "component": "vision", "block": None, "role": "merger.0", "group": path, "n_params": 9999}
        )
    return rows


def write_run(
    folder: Path,
    *,
    means: Sequence[float] | None = None,
    noise: float = 0.1,
    samples: int = 8,
    seed: int = 0,
    failed: int = 0,
    skipped: int = 0,
    component: str = "lm",
    blocks: int = 4,
    rows: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
) -> Path:
    """Write a whole run folder.

    Args:
        means: true score of each operator; null: log-normal, drawn from `seed`.
        noise: relative standard deviation of a sample's score around its mean.
        failed, skipped: so many operators, from the end, without a score.
        config, run: values that replace those of `config.yaml` (dotted keys) and `run.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = operator_rows(component, blocks) if rows is None else rows
    true = np.exp(rng.normal(size=len(rows))) if means is None else np.asarray(means, dtype=float)
    values = true[:, None] * (1 + noise * rng.normal(size=(len(rows), samples)))
    statuses = ["scored"] * (len(rows) - failed - skipped) + ["failed"] * failed + ["skipped"] * skipped
    frame = pd.DataFrame(rows).astype({"block": "Int64"})
    frame["status"] = statuses
    frame["reason"] = [
        {"scored": None, "failed": "the measurement was not finite", "skipped": "weight <all> zero"}[status]
        for status in statuses
    ]
    scored = frame["status"].eq("scored").to_numpy()
    width = 1.96 * values.std(axis=1, ddof=1) / np.sqrt(samples) if samples > 1 else np.full(len(rows), np.nan)
    for name, column in (
        ("score", values.mean(axis=1)),
        ("score_low", values.mean(axis=1) - width),
        ("score_high", values.mean(axis=1) + width),
    ):
        frame[name] = np.where(scored, column, np.nan)
    order = np.argsort(-frame["score"].to_numpy()[scored], kind="stable")
    ranks = np.empty(len(order), dtype=int)
    ranks[order] = np.arange(1, len(order) + 1)
    frame["rank"] = pd.array([pd.NA] * len(frame), dtype="Int64")
    frame.loc[scored, "rank"] = ranks
    frame = frame.assign(metric="squared_error", unit="squared logits", estimator="exact", n_samples=samples)
    frame["squared_error"] = frame["score"]
    frame.to_parquet(folder / "scores.parquet", index=False)
    samples_frame = pd.DataFrame(
        [
            {"op": row["op"], "sample": f"s{seed}-{index}", "value": values[number, index]}
            for number, row in enumerate(rows)
            if scored[number]
            for index in range(samples)
        ],
        columns=["op", "sample", "value"],
    ).assign(probe=pd.NA, metric="squared_error", estimator="exact", scheme="w8a8_static")
    samples_frame.astype({"probe": "Int64"}).to_parquet(folder / "sample_scores.parquet", index=False)
    _write_texts(folder, component, samples, seed, statuses, config or {}, run or {})
    return folder


def _write_texts(
    folder: Path,
    component: str,
    samples: int,
    seed: int,
    statuses: list[str],
    config: dict[str, Any],
    run: dict[str, Any],
) -> None:
    settings: dict[str, Any] = {
        "model": {"name": "tiny_qwen2_5_vl", "path": "bundled:tiny_qwen2_5_vl", "family": "qwen2_5_vl"},
        "component": {"name": component},
        "strategy": {"name": "mse_v2", "estimator": "exact", "metric": "squared_error"},
        "quant": {"name": "w8a8_static"},
        "backend": {"name": "torch"},
        "calibration": {"source": "bundled", "size": 16, "seed": seed},
        "tracking": {"uri": None, "experiment": "qvl_hydra"},
        "task": {"name": "sweep"},
        "seed": 0,
    }
    for key, value in config.items():
        group, _, name = key.rpartition(".")
        (settings.setdefault(group, {}) if group else settings)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    totals = {
        "task": "sweep",
        "status": "complete",
        "backend": settings["backend"]["name"],
        "device": "cpu",
        "strategy": settings["strategy"]["name"],
        "estimator": settings["strategy"]["estimator"],
        "scheme": settings["quant"]["name"],
        "component": component,
        "model": settings["model"]["name"],
        "n_ops": len(statuses),
        "n_scored": statuses.count("scored"),
        "n_skipped": statuses.count("skipped"),
        "n_failed": statuses.count("failed"),
        "n_samples": samples,
        "calibration_size": settings["calibration"]["size"],
        "calibration_seed": seed,
        "wall_s": 3.5,
        "engine_s": 3.0,
        "forward_s": 0.25,
        "forward_equivalents": 12.0,
        "peak_memory_bytes": 10**9,
        "versions": {"torch": "2.13.0"},
        "model_sha": f"m-{settings['model']['name']}",
        "calibration_sha": f"0123abcd{seed:08d}",
        "notes": ["made up"],
        "details": {},
        "fingerprint": "f" * 16,
    }
    (folder / "run.json").write_text(json.dumps({**totals, **run}))
    ids = [f"s{seed}-{index}" for index in range(samples)]
    calibration = {
        "source": "bundled",
        "size": 16,
        "seed": seed,
        "sha": totals["calibration_sha"],
        "bad": [],
        "samples": ids,
    }
    (folder / "calibration.json").write_text(json.dumps(calibration))
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "ranked.png").write_bytes(b"\x89PNG made up")
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "run.lock").write_text("")
