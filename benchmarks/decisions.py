"""What decisions are worth: profiles by KL at the answer, over calibration seeds, against baselines; and joint errors.

    python -m benchmarks.decisions

The bundled Qwen2.5-VL, language tower, W8A8 static, units as runtimes fuse them. Three units stay in high precision;
exact match and KL at the answer on 128 held-out samples. Then, on all bundled models, the predicted error of random
profiles against the measured one, as the plain sum of exact scores and with the interactions of four probes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import BUNDLED, SCHEMES, Silent, bundled_model, make_job, save_results
from benchmarks.peers import peer_scores
from qvl_hydra.backends.torch import run
from qvl_hydra.calibration.encode import load_processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.estimators.auto import CONTROLS
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.joint import interactions_from
from qvl_hydra.profiles.measure import measure_profiles
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import profile_of
from qvl_hydra.profiles.units import Unit, units_from_scores, units_with_values
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.table import Scored, score_table
from qvl_hydra.settings import CalibrationSettings

SEEDS, SAMPLES, HELD_OUT, KEPT, PROFILES = 5, 32, 128, 3, 60
PLAIN, TOGETHER = "sum of scores", "with interactions"
ANSWER = {"metric": "kl", "positions": "answer"}


def samples_of(model: LoadedModel, seed: int, split: str, count: int) -> tuple[Sample, ...]:
    settings = CalibrationSettings("bundled", size=count, seed=seed, split=split)  # type: ignore[arg-type]
    return load_calibration(settings, load_processor(model.description.folder)).samples


def scored_units(model: LoadedModel, samples: tuple[Sample, ...], scheme: str, **strategy: Any) -> tuple[Any, ...]:
    """Units with scores, and the per-sample scores."""
    job = make_job(model, samples, SCHEMES[scheme], **strategy)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        report = run(job, folder, Silent())
        frame = folder.frame()
        controls = folder.recall(CONTROLS, {}).get(scheme, ())
    table, _ = score_table(Scored(job.operators, frame, {}, report.metric, report.unit, scheme, controls=controls))
    return units_from_scores(job.operators, {scheme: table}, (scheme, LEAVE)), frame, job


def keeping(units: list[Unit], count: int, scheme: str) -> Profile:
    """The profile that keeps the units with the highest scores, as they decide."""
    order = np.argsort([-unit.decides(scheme) if scheme in unit.scores else 0.0 for unit in units])
    kept = np.zeros(len(units), dtype=bool)
    kept[order[:count]] = True
    return profile_of(units, kept, SCHEMES[scheme], 16, "scores")


def choices(model: LoadedModel, seed: int) -> list[dict[str, Any]]:
    """Exact match and KL at the answer of what each way of scoring keeps."""
    scheme, samples = "w8a8_static", samples_of(model, seed, "calibration", SAMPLES)
    held = samples_of(model, seed, "evaluation", HELD_OUT)
    units, _, job = scored_units(model, samples, scheme, estimator="auto", probes=1, **ANSWER)
    found = {"KL at the answer (auto)": keeping(units, KEPT, scheme)}
    squared, _, _ = scored_units(model, samples, scheme, estimator="auto", probes=1, metric="squared_error")
    found["squared error, all positions (auto)"] = keeping(squared, KEPT, scheme)
    for name, values in peer_scores(dataclasses.replace(job, component="lm"), samples).items():
        found[name] = keeping(units_with_values(units, scheme, values), KEPT, scheme)
    profiles = list(found.values())
    quantizers = Quantizers(model, profiles[0].operators, samples, "lm", [SCHEMES[scheme]])
    measured = measure_profiles(model, profiles, quantizers, held, "lm")
    return [
        {"seed": seed, "chosen by": name, "exact_match": value.exact_match, "kl_answer": value.kl_answer}
        for name, value in zip(found, measured, strict=True)
    ]


def joint(model: LoadedModel, scheme: str, seed: int) -> dict[str, Any]:
    """Mean |log(predicted / measured)| of the squared error of random profiles, on the calibration samples."""
    samples = samples_of(model, seed, "calibration", 8)
    units, *_ = scored_units(model, samples, scheme, estimator="exact", metric="squared_error")
    _, frame, _ = scored_units(model, samples, scheme, estimator="sketch", probes=4, metric="squared_error")
    interactions = interactions_from(frame, units, scheme, "squared_error")
    assert interactions is not None
    rng = np.random.default_rng(seed)
    profiles = [
        profile_of(units, rng.random(len(units)) < rng.uniform(0.1, 0.9), SCHEMES[scheme], 16, "random")
        for _ in range(PROFILES)
    ]
    quantizers = Quantizers(model, profiles[0].operators, samples, "lm", [SCHEMES[scheme]])
    measured = [m.squared_error for m in measure_profiles(model, profiles, quantizers, samples, "lm")]
    with_them = [interactions.joint({n for op in p.low for n in (op.path, op.group)})[0] for p in profiles]
    plain = [p.predicted or 0.0 for p in profiles]

    def off(predicted: list[float]) -> float:
        return float(np.mean(np.abs(np.log(np.array(predicted) / np.array(measured)))))

    return {"seed": seed, "scheme": scheme, PLAIN: off(plain), TOGETHER: off(with_them)}


def main() -> None:
    model = bundled_model()
    rows = [row for seed in range(SEEDS) for row in choices(model, seed)]
    table = Table("chosen by", *(f"seed {seed}" for seed in range(SEEDS)), "KL, geometric mean")
    for name in dict.fromkeys(row["chosen by"] for row in rows):
        own = [row for row in rows if row["chosen by"] == name]
        mean = float(np.exp(np.mean(np.log([row["kl_answer"] for row in own]))))
        table.add_row(name, *(f"{row['exact_match']:.3f}" for row in own), f"{mean:.3g}")
    errors, second = [], Table("model", "scheme", *(f"seed {seed}" for seed in range(SEEDS)), "mean")
    for name in BUNDLED:
        model = bundled_model(name)
        for scheme in ("w8a8_static", "w4a16"):
            own = [{"model": name, **joint(model, scheme, seed)} for seed in range(SEEDS)]
            errors += own
            for column in (PLAIN, TOGETHER):
                values = [row[column] for row in own]
                second.add_row(name, f"{scheme}, {column}", *(f"{x:.3f}" for x in (*values, float(np.mean(values)))))
    path = save_results("decisions", {"choices": rows, "joint": errors})
    Console(width=120).print(table, second, f"written: {path}")


if __name__ == "__main__":
    main()
