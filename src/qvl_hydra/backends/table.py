"""The table of backends: what everybody else must know of each. Nothing here needs torch or a backend's packages.

One addition is a module whose function takes `SweepJob`, `RunFolder` and `Progress` and gives an `EngineReport`, a row
here and a YAML (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qvl_hydra.estimators.table import BOTH, Estimator, ranking_metric


@dataclass(frozen=True)
class Backend:
    """Who measures scores.

    Attributes:
        name: `backend.name`.
        run: `module:function`, the engine; its packages are imported with it.
        memory: `module:function`; bytes that it needs beside the weights, from settings, description and operators.
        strategies: of `strategy.name` that it measures.
        estimators: of `strategy.estimator`; empty: all of the table; `auto` and `exact` mean its own where it has one
            way.
        metrics: by `backend.method` what it ranks by, whatever `strategy.metric` says; empty: that one.
        weighting: of `strategy.weighting` that it has; empty: either.
        directions: of `strategy.direction` that it measures.
        positions: it compares at the positions that `strategy.positions` names, and else at all.
        formats: number formats that it puts operators into; empty: all of the table.
        scheme: that it always runs, whatever `quant` says; empty: the one asked for.
        several: it scores the schemes of `quant.also` in the same run.
        fuses: it scores what runtimes fuse as one.
        shards: it measures a part of the samples, and its runs can be merged.
        shares: an operator's score is that of all operators that runtimes fuse with it.
        placements, dtypes: of `model.placement` and `model.dtype` that it works with.
        device: where the PyTorch model is held: `any`, as `backend.device` says, or `cpu`.
        computes: kinds of device that it computes on, if not where the model is held; it checks them itself.
        towers: it takes a family's towers apart, so that the family's row must allow that.
        package: module to look for, what installs it, and the extra of this package that does.
    """

    name: str
    run: str
    memory: str
    strategies: tuple[str, ...]
    estimators: tuple[str, ...] = ("auto", "exact")
    metrics: Mapping[str, str] = field(default_factory=dict)
    weighting: str = ""
    directions: tuple[str, ...] = BOTH
    positions: bool = True
    formats: tuple[str, ...] = ("int",)
    scheme: str = ""
    several: bool = False
    fuses: bool = False
    shards: bool = False
    shares: bool = False
    placements: tuple[str, ...] = ("resident",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    device: str = "any"
    computes: tuple[str, ...] = ()
    towers: bool = False
    package: tuple[str, str, str] | None = None

    def able(self, key: str) -> tuple[str, ...]:
        """What it has of a setting; empty: all that there is."""
        return {
            "strategy": self.strategies, "strategy.estimator": self.estimators, "strategy.direction": self.directions,
            "quant.weight_format": self.formats, "quant.input_format": self.formats,
            "model.placement": self.placements, "model.dtype": self.dtypes,
        }[key]  # fmt: skip

    @property
    def foreign_device(self) -> bool:
        """Whether it computes elsewhere than the PyTorch model is held, and checks that place itself."""
        return bool(self.computes)

    def ranks_by(self, row: Estimator, metric: str, weighting: str, method: str) -> str:
        """The metric that its scores will be in, known before a report is there."""
        return self.metrics.get(method) or ranking_metric(row, metric, self.weighting or weighting)


_OWN = "qvl_hydra.backends"
BACKENDS = {
    row.name: row
    for row in (
        Backend(
            "torch", f"{_OWN}.torch:run", f"{_OWN}.torch:extra_bytes", ("kl", "mse_v2", "hawq_v2"),
            estimators=(), formats=(), several=True, fuses=True, shards=True, placements=("resident", "streamed"),
        ),
        Backend(
            "onnxrt", f"{_OWN}.onnxrt:run", f"{_OWN}.onnx_graphs:extra_bytes", ("kl", "mse_v2"),
            several=True, fuses=True, device="cpu", computes=("cpu", "cuda"), towers=True,
            package=("onnxruntime", "onnxruntime-gpu", "onnx"),
        ),
        Backend(
            "inc_fx", f"{_OWN}.neural_compressor.fx:run", f"{_OWN}.neural_compressor.memory:extra_bytes",
            ("mse_v2", "hawq_v2"), weighting="trace", positions=False, scheme="inc_static", dtypes=("float32",),
            device="cpu", towers=True, package=("neural_compressor", "neural-compressor", "inc"),
        ),
        Backend(
            "inc_onnxrt", f"{_OWN}.neural_compressor.onnxrt:run", f"{_OWN}.onnx_graphs:extra_bytes", ("mse_v2",),
            positions=False, scheme="inc_static", device="cpu", computes=("cpu", "cuda"), towers=True,
            package=("neural_compressor", "neural-compressor", "inc"),
        ),
        Backend(
            "modelopt", f"{_OWN}.modelopt:run", f"{_OWN}.torch:extra_bytes", ("kl", "mse_v2"),
            metrics={"gradient": "gradient", "kl_div": "kl_sum"}, directions=("requantize",), shares=True, towers=True,
            package=("modelopt", "nvidia-modelopt", "modelopt"),
        ),
    )
}  # fmt: skip
