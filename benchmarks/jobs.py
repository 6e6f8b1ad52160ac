"""Jobs for benchmarks: the bundled model, or a shape of any size with injected outliers, and made-up samples."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from qvl_hydra.backends.protocol import Engine
from qvl_hydra.backends.torch import run
from qvl_hydra.calibration.encode import load_processor
from qvl_hydra.calibration.sample import CalibrationSet, Sample, samples_sha
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.estimators.auto import CONTROLS
from qvl_hydra.estimators.job import EngineReport, SweepJob
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.table import Scored, score_table
from qvl_hydra.settings import BackendSettings, CalibrationSettings, ModelSettings, StrategySettings

BUNDLED = ("tiny_qwen2_5_vl", "tiny_qwen2_vl", "tiny_qwen3_vl")
RESULTS = Path(__file__).parent / "results"
SCHEMES = {
    "w8a8_static": Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8)),
    "w8a8_dynamic": Scheme("w8a8_dynamic", WeightFormat(8), ActivationFormat(8, symmetric=True, dynamic=True)),
    "inc_static": Scheme("inc_static", WeightFormat(8), ActivationFormat(8), ActivationFormat(8), observer="histogram"),
    "w8a16": Scheme("w8a16", WeightFormat(8), None),
    "w4a16": Scheme("w4a16", WeightFormat(4, group_size=128), None),
}
COMPARED = ("w8a8_static", "w8a8_dynamic", "w4a16")  # schemes that every study of an estimator shows


class Silent:
    """A progress bar that shows nothing."""

    def total(self, steps: float, label: str) -> None: ...

    def step(self, steps: float = 1) -> None: ...


def bundled_model(name: str = "tiny_qwen2_5_vl", device: str = "cpu", dtype: str = "float32") -> LoadedModel:
    settings = ModelSettings(name, f"bundled:{name}", name.removeprefix("tiny_"), dtype=dtype)  # type: ignore[arg-type]
    return load_model(describe_model(settings), torch.device(device), 0)


def bundled_samples(model: LoadedModel, count: int) -> tuple[Sample, ...]:
    processor = load_processor(model.description.folder)
    return load_calibration(CalibrationSettings("bundled", size=count), processor).samples


def shaped_model(
    overrides: dict[str, Any], name: str = "qwen2_5_vl_3b", device: str = "cpu", **changes: Any
) -> LoadedModel:
    """Qwen2.5-VL-3B's shape with random weights, some of its sizes changed."""
    settings = ModelSettings(name, f"Qwen/{name}", "qwen2_5_vl", weights="random", overrides=overrides, **changes)
    return load_model(describe_model(settings), torch.device(device), 0)


NARROW_36_BLOCKS = {
    "text_config.hidden_size": 256,
    "text_config.intermediate_size": 704,
    "text_config.num_attention_heads": 2,
    "text_config.num_key_value_heads": 1,
    "text_config.vocab_size": 2048,
    "vision_config.depth": 2,
    "vision_config.hidden_size": 320,
    "vision_config.intermediate_size": 480,
    "vision_config.num_heads": 4,
    "vision_config.out_hidden_size": 256,
}


@torch.no_grad()
def inject_outliers(model: LoadedModel, seed: int = 0, strongest: float = 48.0) -> None:
    """Massive activations without a change of function: a norm's gain up, the next linears' columns down.

    Every block gets channels scaled by powers of two up to `strongest`, of random strength, before its attention and
    its MLP, and between up_proj and down_proj.
    """
    draw = torch.Generator().manual_seed(seed)
    for layer in model.module.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            channels, factor = _draw(norm.weight.numel(), strongest, draw)
            norm.weight[channels] *= factor
            for reader in readers:
                reader.weight[:, channels] /= factor
        channels, factor = _draw(mlp.up_proj.weight.shape[0], strongest, draw)
        mlp.up_proj.weight[channels] *= factor
        mlp.down_proj.weight[:, channels] /= factor


def outlier_model() -> LoadedModel:
    """36 narrow blocks of random weights with injected outlier channels."""
    model = shaped_model(NARROW_36_BLOCKS)
    inject_outliers(model)
    return model


def _draw(width: int, strongest: float, draw: torch.Generator) -> tuple[torch.Tensor, float]:
    channels = torch.randperm(width, generator=draw)[:3]
    exponent = torch.rand((), generator=draw).item() * torch.log2(torch.tensor(strongest)).item()
    return channels, float(2 ** round(exponent))


def text_samples(model: LoadedModel, count: int, tokens: int, seed: int = 0) -> tuple[Sample, ...]:
    """Random token ids, text only; the last quarter is the answer."""
    draw = torch.Generator().manual_seed(seed)
    low = 1000 if model.config.text_config.vocab_size > 100_000 else 300
    samples = []
    for index in range(count):
        ids = torch.randint(0, low, (tokens,), generator=draw)
        labels = torch.full_like(ids, -100)
        labels[-tokens // 4 :] = ids[-tokens // 4 :]
        samples.append(Sample(f"random-{index}", ids, torch.arange(tokens).expand(3, -1), labels, None, None))
    return tuple(samples)


def make_job(
    model: LoadedModel, samples: tuple[Sample, ...], scheme: Scheme, component: str = "lm", **strategy: Any
) -> SweepJob:
    """A job over all operators of a component; every sample calibrates and is scored."""
    return SweepJob(
        model=model,
        component=component,
        operators=tuple(find_operators(model.module, component)),
        calibration=CalibrationSet(samples, "benchmark", samples_sha(samples)),
        scored=samples,
        batch_size=len(samples),
        schemes=(scheme,),
        strategy=StrategySettings(**{"name": "mse_v2", "metric": "squared_error", "probes": 4} | strategy),
        backend=BackendSettings("torch"),
        fuse=False,
        seed=0,
        workdir=RESULTS / "engine",
    )


def measure(job: SweepJob, engine: Engine = run, column: str = "score") -> tuple[dict[str, float], EngineReport]:
    """Scores of a job, as a column of a run's table has them, and its report."""
    with tempfile.TemporaryDirectory() as folder:
        kept = RunFolder(Path(folder))
        report = engine(job, kept, Silent())
        scored = Scored(
            job.operators, kept.frame(), kept.endings(), report.metric, report.unit, job.scheme.name, job.fuse,
            kept.recall(CONTROLS, {}).get(job.scheme.name, ()),
        )  # fmt: skip
    table, _ = score_table(scored)
    table = table[table["status"] == "scored"]
    return dict(zip(table["op"], table[column].astype(float), strict=True)), report


def with_strategy(job: SweepJob, **changes: Any) -> SweepJob:
    return dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, **changes))


def save_results(name: str, content: Any) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
