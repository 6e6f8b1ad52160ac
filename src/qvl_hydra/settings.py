"""The typed settings of a run, and the one door from a composed config to them.

Nothing past `build_settings` reads a raw config. The door checks types, names and values, collects every fault and
raises them together, before a model is loaded. Values and their reasons live in `conf/`, types and limits here. One
file because a setting, its limits and its rules with other settings are read together, in the order of `conf/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from qvl_hydra.backends.table import BACKENDS, Backend
from qvl_hydra.errors import SettingsError
from qvl_hydra.estimators.table import Estimator, estimator_of, of_curvature, of_outputs
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.profiles.costs import COSTS, ERROR, LEAVE, MEASURED_SECONDS
from qvl_hydra.profiles.formats.table import FORMATS as CONSUMERS

T = TypeVar("T")
LAST_BLOCK = 9_999
EACH_ITS_OWN = "cuda:shard"  # device of a run whose shards take the next GPU each
MOST = {  # what allocates, loops or draws; far above what is meant, far below what never answers
    "size": 1_000_000, "batch_size": 100_000, "max_length": 10_000_000, "min_pixels": 1 << 28, "max_pixels": 1 << 28,
    "probes": 65_536, "max_probes": 65_536, "top_k": 1_000_000, "controls": 1_000_000, "threads": 1024,
    "row_chunk": 1_000_000, "resamples": 100_000, "regret_samples": 1_000_000, "random_draws": 1_000,
    "evaluation_size": 1_000_000, "high_bits": 64, "check_samples": 10_000, "image_height": 4_200, "image_width": 4_200,
    "confidence_batches": 1_000_000, "weight_group_size": 1 << 20, "input_group_size": 1 << 20, "opset": 30,
    "max_ops": 10_000_000, "prompt_tokens": 1 << 24, "image_tokens": 1 << 24, "answer_tokens": 1 << 24,
    "requests": 1 << 20,
}  # fmt: skip
SCORING = ("sweep", "profile", "quantize")  # tasks that score: they can be long, and take a streamed model
SEEDS = 2**32  # numpy's random generators take none below 0


@dataclass(frozen=True)
class ModelSettings:
    """Which model, from where, and how it is held in memory."""

    name: str
    path: str  # local folder, `bundled:<name>`, or hub id
    family: str | None = None  # null: what the checkpoint says
    weights: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    placement: Literal["resident", "streamed"] = "resident"
    overrides: dict[str, Any] = field(default_factory=dict)  # text/vision config keys changed for weights=random
    memory_limit_gib: float | None = None  # null: what the machine has free

    def faults(self) -> list[str]:
        found = [] if self.path else ["model.path is empty; give a local folder or a hub id"]
        if self.family not in (None, *FAMILIES):
            found.append(f"model.family={self.family}; allowed: {', '.join(FAMILIES)}, or null (docs/extending.md)")
        if self.overrides and self.weights != "random":
            found.append("model.overrides changes a shape, which needs model.weights=random")
        if self.memory_limit_gib is not None and self.memory_limit_gib <= 0:
            found.append(f"model.memory_limit_gib={self.memory_limit_gib}; must be above 0, or null")
        return found


@dataclass(frozen=True)
class ComponentSettings:
    """What is scored: the language tower with its head, the vision tower, or both end to end."""

    name: Literal["lm", "vision", "full"]


@dataclass(frozen=True)
class OperatorSettings:
    """Which operators of the component are scored."""

    include: list[str] | None = None  # globs over module paths; null: all
    exclude: list[str] | None = None
    blocks: str | None = None  # "0-3,7"; blocks of every tower in the component
    max_ops: int | None = None  # the cap
    select: Literal["even", "first", "random"] = "even"  # how the cap chooses
    fuse: bool = False  # score what runtimes fuse (q/k/v, gate/up) as one
    experts: Literal["fused", "single"] = "fused"  # single: the experts of a mixture each by itself, too

    def faults(self) -> list[str]:
        found = []
        if self.max_ops is not None and self.max_ops < 1:
            found.append(f"operators.max_ops={self.max_ops}; must be 1 or more, or null for no cap")
        if self.blocks is not None:
            try:
                parse_blocks(self.blocks)
            except ValueError as error:
                found.append(f"operators.blocks={self.blocks!r}; {error}")
        return found


def parse_blocks(text: str) -> frozenset[int]:
    """Block indices named by a text such as `0-3,7`.

    Raises:
        ValueError: the text is not a list of indices and ranges.
    """
    blocks: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError("expected indices and ranges such as '0-3,7'")
        first, last = int(low), int(high) if dash else int(low)
        if last > LAST_BLOCK:
            raise ValueError(f"block {last} is in no model; the last that can be named is {LAST_BLOCK}")
        if last < first:
            raise ValueError(f"the range {part.strip()} runs backwards")
        blocks.update(range(first, last + 1))
    return frozenset(blocks)


@dataclass(frozen=True)
class StrategySettings:
    """What a score is, and how it is estimated (docs/estimators.md)."""

    name: Literal["kl", "mse_v2", "hawq_v2"]
    estimator: str = "auto"  # of estimators/table.py
    direction: Literal["requantize", "fallback"] = "requantize"
    metric: Literal["auto", "squared_error", "kl", "loss_change"] = "auto"  # auto: kl, of features squared_error
    positions: Literal["answer", "text", "all"] = "all"  # output positions that are compared
    confidence_batches: int | None = None  # batches of calibration.batch_size samples that are scored; null: all
    probes: int = 2  # sketch: backward passes a sample; samples are worth more
    split_positions: bool = False  # sketch, auto: squared errors apart where image, text and answer are predicted
    reduction: Literal["shrunk", "split", "sequence", "token"] = "shrunk"  # sketch: how tokens are summed
    top_k: int = 20  # auto: the most sensitive operators, which shall be the right ones; at most half of all
    missed: float = 0.05  # auto: expected number of operators on the wrong side of their border when it stops
    controls: int = 6  # auto: operators drawn at random that are measured exactly, too
    agreement_warn: float = 0.5  # auto: warn when sketch and exact agree less (Spearman) on the controls
    curvature: str = "gauss_newton"  # hawq_v2: gauss_newton or hessian
    weighting: Literal["weight_error", "trace"] = "weight_error"  # hawq_v2: `trace` is Neural Compressor's order
    max_probes: int = 64  # hawq_v2, curvature=hessian: at most so many Hutchinson probes; `probes` is the first round
    tolerance: float = 0.05  # the same: stop when the median relative standard error is below

    @property
    def row(self) -> Estimator:
        """The row of the table of estimators that measures it."""
        return estimator_of(self.name, self.estimator, self.direction, self.curvature)

    def faults(self) -> list[str]:
        found = []
        for key, able in (("estimator", of_outputs()), ("curvature", of_curvature())):
            if getattr(self, key) not in able:
                found.append(f"strategy.{key}={getattr(self, key)}; allowed: {', '.join(able)}")
        if self.confidence_batches is not None and self.confidence_batches < 1:
            found.append(f"strategy.confidence_batches={self.confidence_batches}; must be 1 or more, or null for all")
        if self.probes < 1:
            found.append(f"strategy.probes={self.probes}; must be 1 or more")
        if self.max_probes < self.probes:
            found.append(f"strategy.max_probes={self.max_probes}; must not be below strategy.probes={self.probes}")
        if self.top_k < 1:
            found.append(f"strategy.top_k={self.top_k}; must be 1 or more")
        if self.missed <= 0:
            found.append(f"strategy.missed={self.missed}; must be above 0")
        if self.controls < 0:
            found.append(f"strategy.controls={self.controls}; must not be negative")
        if self.tolerance <= 0:
            found.append(f"strategy.tolerance={self.tolerance}; must be above 0")
        if not -1 <= self.agreement_warn <= 1:
            found.append(f"strategy.agreement_warn={self.agreement_warn}; must lie between -1 and 1")
        return found


@dataclass(frozen=True)
class QuantSettings:
    """The scheme an operator is put into. `null` for a part means that the part stays in float."""

    name: str
    weight_bits: int | None = 8
    weight_format: str = "int"  # of quantization/formats/table.py
    weight_granularity: Literal["channel", "tensor", "block"] = "channel"  # what shares a scale; block: 128 x 128
    weight_group_size: int | None = None  # inputs of a channel that share a scale; null: as the granularity says
    weight_symmetric: bool = True
    input_bits: int | None = 8
    input_format: str = "int"
    input_granularity: Literal["tensor", "token"] = "tensor"  # `token` ranges are taken at run time
    input_group_size: int | None = None  # channels of a token that share a scale; null: all
    input_symmetric: bool = False
    rounding: Literal["pytorch", "runtime"] = "pytorch"  # of integers: as PyTorch, or as checkpoints and kernels do
    output_bits: int | None = None
    observer: Literal["minmax", "percentile", "histogram"] = "minmax"
    percentile: float = 99.99  # observer=percentile: share of values inside the range, per cent
    perturb: Literal["both", "weight", "activation"] = "both"
    also: list[str] = field(default_factory=list)  # further schemes by name, sharing the sketch's backward passes

    def faults(self) -> list[str]:
        found = []
        if self.name == LEAVE or not re.fullmatch(r"[\w.+-]+", self.name, re.ASCII):
            found.append(f"quant.name={self.name!r}; must be of letters, digits, _ . + -, and not {LEAVE}")
        for key in ("weight_bits", "input_bits", "output_bits"):
            bits = getattr(self, key)
            if bits is not None and not 2 <= bits <= 8:
                found.append(f"quant.{key}={bits}; must lie between 2 and 8, or null for float")
        if self.weight_bits is None and self.input_bits is None and self.output_bits is None:
            found.append("quant: weight, input and output all stay in float, so nothing would be measured")
        for key in ("weight_group_size", "input_group_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append(f"quant.{key}={value}; must be 1 or more, or null")
        if not 50 < self.percentile <= 100:
            found.append(f"quant.percentile={self.percentile}; must be above 50 and at most 100")
        if self.perturb == "weight" and self.weight_bits is None:
            found.append("quant.perturb=weight, but quant.weight_bits is null")
        if self.perturb == "activation" and self.input_bits is None and self.output_bits is None:
            found.append("quant.perturb=activation, but neither quant.input_bits nor quant.output_bits is set")
        return found


@dataclass(frozen=True)
class BackendSettings:
    """Who measures, and where."""

    name: str  # of backends/table.py
    device: str = "auto"  # auto, cpu, cuda, cuda:<index>, cuda:shard
    threads: int | None = None  # null: torch's own choice
    row_chunk: int | None = None  # perturbed copies advanced together; null: sized from free memory
    tf32: bool = True  # CUDA: float32 products on tensor cores
    graph: str | None = None  # onnxrt, inc_onnxrt: an ONNX file to score; null: export the model first
    method: Literal["gradient", "kl_div"] = "gradient"  # modelopt: its scoring method

    def faults(self) -> list[str]:
        found = []
        if self.name not in BACKENDS:
            found.append(f"backend={self.name}; allowed: {', '.join(BACKENDS)}")
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (
            index and not (index.isdigit() and len(index) < 4) and self.device != EACH_ITS_OWN
        ):
            found.append(f"backend.device={self.device!r}; allowed: auto, cpu, cuda, cuda:<index>, cuda:shard")
        for key in ("threads", "row_chunk"):
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append(f"backend.{key}={value}; must be 1 or more, or null")
        return found


@dataclass(frozen=True)
class CalibrationSettings:
    """Where samples come from."""

    source: Literal["bundled", "coco_captions", "imagefolder", "jsonl"]
    size: int = 32  # samples; activation ranges come from all of them
    seed: int = 0
    batch_size: int = 4  # samples a batch, the unit of strategy.confidence_batches
    split: Literal["calibration", "evaluation"] = "calibration"  # bundled: which of its two disjoint parts
    on_bad: Literal["skip", "fail"] = "skip"  # corrupt image, missing file, empty caption
    path: str | None = None  # jsonl file, or folder of imagefolder
    annotations: str | None = None  # coco_captions: annotation json
    images: str | None = None  # coco_captions, jsonl: folder the image names are relative to
    dataset: str | None = None  # coco_captions: a data set id instead of files
    prompt: str = "Describe the image."  # for sources without a question of their own
    min_pixels: int | None = None  # null: the image processor's own
    max_pixels: int | None = None
    max_length: int | None = None  # tokens; longer samples count as bad

    def faults(self) -> list[str]:
        found = []
        for key in ("size", "batch_size"):
            if getattr(self, key) < 1:
                found.append(f"calibration.{key}={getattr(self, key)}; must be 1 or more")
        for key in ("min_pixels", "max_pixels", "max_length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append(f"calibration.{key}={value}; must be 1 or more, or null")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            found.append(f"calibration.min_pixels={self.min_pixels} is above calibration.max_pixels={self.max_pixels}")
        if not 0 <= self.seed < SEEDS:
            found.append(f"calibration.seed={self.seed}; must lie between 0 and {SEEDS - 1}")
        if self.source in ("imagefolder", "jsonl") and not self.path:
            found.append(f"calibration={self.source} needs calibration.path")
        if self.source == "coco_captions" and not self.dataset and not (self.annotations and self.images):
            found.append(
                "calibration=coco_captions needs calibration.annotations and calibration.images, or calibration.dataset"
            )
        return found


@dataclass(frozen=True)
class TrackingSettings:
    """Where MLflow writes."""

    uri: str | None  # null: SQLite beside the working folder
    experiment: str = "qvl_hydra"
    run_name: str | None = None
    artifact_location: str | None = None  # null: beside the store
    enabled: bool = True
    register: str | None = None  # name in the model registry that a profile or checkpoint becomes a version of

    def faults(self) -> list[str]:
        if self.register is None or (self.register.strip() and not set(self.register) & set("/:")):
            return []
        return [f"tracking.register={self.register!r}; a name without / and :, or null"]


@dataclass(frozen=True)
class TaskSettings:
    """What the entry does."""

    name: Literal["sweep", "merge", "compare", "profile", "quantize", "export_onnx", "measure_costs"]


@dataclass(frozen=True)
class MergeSettings:
    """task=merge: the shards of one sweep as one run."""

    runs: list[str] = field(default_factory=list)  # run folders of shards, or of their multirun
    partial: bool = False  # also where shards are missing


@dataclass(frozen=True)
class CompareSettings:
    """task=compare, and the comparison that follows an experiment which asks for one."""

    runs: list[str] = field(default_factory=list)  # run ids or run folders
    sweep_id: str | None = None
    filter: str | None = None  # MLflow search filter
    reference: str | None = None  # id or folder of the run to compare with; null: most samples, or with proxy the first
    top_k: int = 10
    overlap: float = 0.9  # share of the top k in common from which a ranking counts as stable
    confidence: float = 0.95
    resamples: int = 1000
    kind: Literal["runs", "calibration_sizes", "proxy"] = "runs"
    after: bool = False  # compare the jobs of a multirun when it has ended
    regret_shares: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2])  # proxy: kept in float
    regret_samples: int = 16  # proxy: samples the target's error is measured on
    random_draws: int = 5  # proxy: random choices measured for each share

    def faults(self) -> list[str]:
        found = []
        if self.top_k < 1:
            found.append(f"compare.top_k={self.top_k}; must be 1 or more")
        if not 0.5 < self.confidence < 1:
            found.append(f"compare.confidence={self.confidence}; must lie between 0.5 and 1")
        if not 0 < self.overlap <= 1:
            found.append(f"compare.overlap={self.overlap}; must be above 0 and at most 1")
        if self.resamples < 100:
            found.append(f"compare.resamples={self.resamples}; must be 100 or more")
        if any(not 0 < share < 1 for share in self.regret_shares):
            found.append(f"compare.regret_shares={self.regret_shares}; every share must lie between 0 and 1")
        for key in ("regret_samples", "random_draws"):
            if getattr(self, key) < 1:
                found.append(f"compare.{key}={getattr(self, key)}; must be 1 or more")
        return found


@dataclass(frozen=True)
class SpaceSettings:
    """What some operators alone may have: an entry of `profile.spaces`."""

    match: str  # a glob over module paths
    choices: list[str]  # of profile.choices; one alone fixes them

    def faults(self) -> list[str]:
        return [] if self.choices else [f"profile.spaces: {self.match} has no choices; name schemes, or [leave]"]


@dataclass(frozen=True)
class DeviceSettings:
    """What timed costs are priced for: published peaks of a device."""

    name: str
    bandwidth_gb_s: float  # of its memory
    tera_ops: dict[str, float]  # dense products by what they compute in: bf16, fp8, int8, fp4

    def faults(self) -> list[str]:
        found = [f"device.{key}={value}; must be above 0" for key, value in
                 [("bandwidth_gb_s", self.bandwidth_gb_s), *((f"tera_ops.{k}", v) for k, v in self.tera_ops.items())]
                 if not isinstance(value, int | float) or value <= 0]  # fmt: skip
        return found if "bf16" in self.tera_ops else [*found, "device.tera_ops has no bf16, what everything else is in"]


@dataclass(frozen=True)
class ProfileSettings:
    """task=profile and task=quantize: which operators stay in high precision."""

    scores: str | None = None  # run id or run folder of a sweep; null: the sweep is run first
    budget: str = "share"  # a row of profiles/costs.py, or error
    value: float = 0.1  # of the budget: operators, share of operators, bits, bytes, seconds, or the error allowed
    spectrum: list[float] = field(default_factory=list)  # shares kept in high precision; empty: one profile
    choices: list[str] = field(default_factory=list)  # schemes, and `leave`; empty: quant and leave
    cost: str = "average_bits"  # with choices: a row of profiles/costs.py
    costs: str | None = None  # run folder of task=measure_costs, for measured_seconds
    values: list[float] = field(default_factory=list)  # with choices: of the cost; empty: from least to most
    spaces: list[SpaceSettings] = field(default_factory=list)  # choices of some operators alone; of several the last
    compare_with: list[str] = field(default_factory=list)  # files or presets of operators that others keep
    families: int = 5  # largest families of modules that are measured: quantized alone, and left alone; 0: none
    candidates: int = 8  # best plans of a budget, measured on the scored samples; the best measured is taken
    prompt_tokens: int = 64  # of a request: text,
    image_tokens: int = 1024  # image tokens of the language model; 0: no image,
    answer_tokens: int = 128  # and what it answers
    requests: int = 1  # that are answered at once
    high_bits: int = 16  # bits that a kept operator's weights count with
    evaluation_size: int = 256  # held-out samples that profiles are measured on
    baselines: bool = True
    formats: list[str] = field(default_factory=list)  # exports to write; empty: all that can express it
    quantize_with: list[Literal["inc", "compressed_tensors"]] = field(default_factory=list)  # empty: both

    def faults(self) -> list[str]:
        found = self._unread()
        for key, name in (("budget", self.budget), ("cost", self.cost)):
            allowed = (*COSTS, ERROR) if key == "budget" else tuple(COSTS)
            if name not in allowed:
                found.append(f"profile.{key}={name}; allowed: {', '.join(allowed)}")
        if MEASURED_SECONDS in (self.cost if self.choices else self.budget,) and self.costs is None:
            found.append("measured_seconds needs profile.costs=<run folder of task=measure_costs>")
        if any(value < 0 for value in self.values):
            found.append(f"profile.values={self.values}; no value may be negative")
        for space in self.spaces:
            if foreign := [name for name in space.choices if name not in self.choices]:
                found.append(f"profile.spaces: {space.match} has {foreign}, which profile.choices has not")
        if unknown := [name for name in self.formats if name not in CONSUMERS]:
            found.append(f"profile.formats={unknown}; allowed: {', '.join(CONSUMERS)}")
        if self.choices and set(self.choices) <= {LEAVE}:
            found.append("profile.choices=[leave] leaves nothing to choose; name schemes: [nvfp4,fp8_dynamic,leave]")
        if any(not 0 <= share <= 1 for share in self.spectrum):
            found.append(f"profile.spectrum={self.spectrum}; every share must lie between 0 and 1")
        if (self.budget != ERROR and self.value < 0) or (self.budget == "share" and self.value > 1):
            found.append(f"profile.value={self.value}; must not be negative, nor above 1 for profile.budget=share")
        for key in ("families", "image_tokens"):
            if getattr(self, key) < 0:
                found.append(f"profile.{key}={getattr(self, key)}; must not be negative")
        for key in (
            "prompt_tokens", "answer_tokens", "requests", "evaluation_size", "high_bits", "candidates",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                found.append(f"profile.{key}={getattr(self, key)}; must be 1 or more")
        return found

    def _unread(self) -> list[str]:
        """What is set and would not be read: budgets of two choices with several, and the other way about."""
        found, own = [], ProfileSettings
        if not self.choices:
            if self.values:
                found.append("profile.values are budgets of profile.choices=[<scheme>,...,leave], which is empty")
            if self.cost != own.cost:
                found.append(f"profile.cost={self.cost} is of profile.choices; without take profile.budget={self.cost}")
            return found
        if (self.budget, self.value) != (own.budget, own.value):
            instead = f"profile.cost={self.budget} profile.values=[{self.value:g}]"
            if self.budget == ERROR:
                instead = "profile.cost and profile.values"
            found.append(
                f"profile.budget={self.budget} and its value are of one scheme; with profile.choices take {instead}"
            )
        if self.spectrum:
            found.append("profile.spectrum is of one scheme; with profile.choices take profile.values")
        return found


@dataclass(frozen=True)
class ExportSettings:
    """task=export_onnx."""

    folder: str | None = None  # null: `onnx/` in the run folder
    opset: int = 18
    exporter: Literal["auto", "torchscript", "dynamo"] = "auto"  # auto: torchscript, and dynamo where that fails
    external_data: bool = False  # true: weights in a file of their own; beyond 2 GB they are in any case
    image_height: int | None = None  # pixels, multiple of an image token's side; null: a calibration image's
    image_width: int | None = None
    tolerance: float = 1e-4  # largest difference to PyTorch allowed, relative to the largest output
    check_samples: int = 2  # calibration samples that the graph is compared on

    def faults(self) -> list[str]:
        found = []
        if self.check_samples < 1:
            found.append(f"export.check_samples={self.check_samples}; must be 1 or more")
        if (self.image_height is None) != (self.image_width is None):
            found.append("export.image_height and export.image_width are given together, or both null")
        for key in ("image_height", "image_width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append(f"export.{key}={value}; must be 1 or more")
        if self.tolerance <= 0:
            found.append(f"export.tolerance={self.tolerance}; must be above 0")
        return found


@dataclass(frozen=True)
class Settings:
    """Everything a run needs to know."""

    model: ModelSettings
    component: ComponentSettings
    strategy: StrategySettings
    quant: QuantSettings
    backend: BackendSettings
    calibration: CalibrationSettings
    tracking: TrackingSettings
    task: TaskSettings
    operators: OperatorSettings = field(default_factory=OperatorSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    device: DeviceSettings | None = None
    seed: int = 0
    resume: str = "auto"  # auto, never, or the folder of the run to go on with
    shard: str | None = None  # i/n: part i (from 0) of n of the scored samples (docs/scale.md)
    cache: Literal["on", "off"] = "on"  # take scores that a finished run measured under the same settings
    dry_run: bool = False  # say what the command would do and cost, and do nothing

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the scored samples is measured, and of how many."""
        index, _, count = (self.shard or "0/1").partition("/")
        return int(index), int(count)

    @property
    def schemes(self) -> list[str]:
        """Names of the schemes to score, that which ranks first: choices of a profile, else `quant` and `also`."""
        wanted = [name for name in self.profile.choices if name != LEAVE]
        if self.task.name == "sweep" or not wanted:
            return [self.quant.name, *self.quant.also]
        first = self.quant.name if self.quant.name in wanted else wanted[0]
        return list(dict.fromkeys([first, *wanted]))

    def faults(self) -> list[str]:
        """Faults between groups, and of the keys that belong to none."""
        found = [] if 0 <= self.seed < SEEDS else [f"seed={self.seed}; must lie between 0 and {SEEDS - 1}"]
        known = self.strategy.estimator in of_outputs() and self.strategy.curvature in of_curvature()
        if known:
            found += self._strategy_faults()
        if known and self.backend.name in BACKENDS:
            found += self._backend_faults(BACKENDS[self.backend.name])
        family = FAMILIES.get(self.model.family or "")
        if family is not None and self.component.name not in family.components:
            has = ", ".join(family.components)
            found.append(f"component={self.component.name}, but a model of model.family={family.name} has {has}")
        if self.model.placement == "streamed" and self.model.weights == "random":
            found.append("model.placement=streamed reads a checkpoint, and model.weights=random has none")
        if self.model.placement == "streamed" and self.task.name not in SCORING:
            found.append(f"model.placement=streamed is for task={', '.join(SCORING)}, not {self.task.name}")
        found += self._shard_faults()
        if self.dry_run and self.task.name not in SCORING:
            found.append(f"dry_run tells what task={', '.join(SCORING)} would measure, not {self.task.name}")
        if self.tracking.register is not None and self.task.name not in ("profile", "quantize"):
            found.append(f"tracking.register is for what task=profile and task=quantize make, not {self.task.name}")
        if self.quant.also and self.task.name in ("profile", "quantize"):
            found.append("quant.also scores further schemes of a sweep; a profile is told them by profile.choices")
        names = [self.quant.name, *self.quant.also]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(
                f"quant and quant.also have {', '.join(twice)} twice; leave it out, or give a changed scheme a name of "
                "its own (quant.name)"
            )
        return found

    def device_name(self, devices: int) -> str:
        """`backend.device`; with `cuda:shard` each shard takes the next of so many."""
        return f"cuda:{self.part[0] % max(1, devices)}" if self.backend.device == EACH_ITS_OWN else self.backend.device

    def _shard_faults(self) -> list[str]:
        if self.shard is None:
            own = self.backend.device == EACH_ITS_OWN
            return [f"backend.device={EACH_ITS_OWN} gives each shard a GPU, and shard is null"] if own else []
        if not re.fullmatch(r"\d{1,4}/\d{1,4}", self.shard) or not self.part[0] < self.part[1]:
            return [f"shard={self.shard!r}; expected i/n with i below n: 0/4, 1/4, 2/4 and 3/4 are all of four shards"]
        if self.task.name != "sweep":
            return [f"shard divides the samples of task=sweep, not of {self.task.name}"]
        able = [row.name for row in BACKENDS.values() if row.shards]
        if self.backend.name not in able:
            return [f"shard is for backend={', '.join(able)}, not {self.backend.name}"]
        strategy = self.strategy
        row = strategy.row
        return [] if row.shards else [f"shard: {row.name} decides by all samples when it stops; take no shards"]

    def _backend_faults(self, row: Backend) -> list[str]:
        """What of the settings the backend has not, by its row."""
        strategy, quant, name = self.strategy, self.quant, self.backend.name
        asked = {
            "strategy": strategy.name, "strategy.estimator": strategy.estimator,
            "strategy.direction": strategy.direction, "quant.weight_format": quant.weight_format,
            "quant.input_format": quant.input_format, "model.placement": self.model.placement,
            "model.dtype": self.model.dtype,
        }  # fmt: skip
        found = []
        for key, value in asked.items():
            able = row.able(key)
            if able and value not in able:
                others = [other.name for other in BACKENDS.values() if value in other.able(key) or not other.able(key)]
                elsewhere = f"; {value} is done by backend={', '.join(others)}" if others else ""
                found.append(f"{key}={value}, but backend={name} has {', '.join(able)}{elsewhere}")
        if strategy.name == "mse_v2" and strategy.positions != "all" and not row.positions:
            found.append(f"strategy.positions={strategy.positions}; backend={name} compares all")
        if row.device == "cpu" and not row.computes and self.backend.device.startswith("cuda"):
            found.append(
                f"backend.device={self.backend.device}; backend={name} runs on the CPU; "
                "Neural Compressor's way to CUDA is backend=inc_onnxrt"
            )
        if self.operators.fuse and not row.fuses:
            fusing = " and ".join(other.name for other in BACKENDS.values() if other.fuses)
            found.append(f"operators.fuse is done by backend={fusing}, not {name}")
        decides = self.task.name in ("profile", "quantize") and self.profile.scores is None
        if decides and row.scheme and self.schemes != [row.scheme]:
            found.append(f"backend={name} scores {row.scheme} alone; plans from its scores need quant={row.scheme}")
        estimator = strategy.row
        if not (row.several and estimator.several):
            who = f"backend={name}" if not row.several else f"{estimator.name}"
            if quant.also:
                found.append(
                    f"quant.also={quant.also}, but {who} scores one scheme in a run; give each scheme its own run"
                )
            elif decides and len(self.schemes) > 1:
                found.append(f"profile.choices has {len(self.schemes)} schemes, but {who} scores one in a run")
        return found

    def _strategy_faults(self) -> list[str]:
        """Faults between the strategy and what it is measured on, by the row of its estimator."""
        strategy, component = self.strategy, self.component.name
        row = strategy.row
        found = row.faults(strategy.direction, strategy.metric, self.model.placement)
        if strategy.metric in ("kl", "loss_change") and component == "vision":
            found.append(
                f"strategy.metric={strategy.metric} compares distributions over tokens, which component=vision has not"
            )
        of_all = strategy.metric == "squared_error" and strategy.positions == "all" and component != "vision"
        if strategy.split_positions and not (row.sketches and of_all):
            found.append(
                "strategy.split_positions=true tells what image, text and answer positions have of the squared error "
                "of all: take strategy=mse_v2 with strategy.estimator=sketch or auto, and a component with logits; "
                "exact scores are split without it"
            )
        if self.operators.experts == "single" and not row.sketches:
            found.append(f"operators.experts=single needs strategy.estimator=sketch or auto, not {row.name}")
        lacks = "quant.weight_bits is null" if self.quant.weight_bits is None else ""
        if self.quant.perturb == "activation":
            lacks = lacks or "quant.perturb is activation"
        if row.weighs_errors and strategy.weighting == "weight_error" and lacks:
            found.append(f"strategy={strategy.name} weighs by the weight error, but {lacks}")
        return found

    def settled(self) -> Settings:
        """The same with what is left to the program filled in: features are compared whole, and by squared error."""
        strategy = self.strategy
        if self.component.name == "vision":
            row = strategy.row
            positions = "all" if row.metrics else strategy.positions
            strategy = dataclasses.replace(strategy, positions=positions)
        if strategy.metric == "auto":
            metric: Literal["squared_error", "kl"] = "squared_error" if self.component.name == "vision" else "kl"
            strategy = dataclasses.replace(strategy, metric=metric)
        return dataclasses.replace(self, strategy=strategy)


def build_settings(config: Mapping[str, Any]) -> Settings:
    """Turn a composed config (plain dict, interpolations resolved) into typed settings.

    Raises:
        SettingsError: with every fault found: unknown and missing keys, wrong types, values out of range.
    """
    settings, faults = judge_settings(config)
    if faults or settings is None:
        raise SettingsError(faults)
    return settings


def judge_settings(config: Mapping[str, Any]) -> tuple[Settings | None, list[str]]:
    """As `build_settings`, with the faults given back; those of sound keys and types can be judged further."""
    faults: list[str] = []
    limits: list[str] = []
    settings = _build(Settings, config, "", faults, limits)
    faults += limits
    return settings if settings is None or faults else settings.settled(), faults


def _build(cls: type[T], given: Mapping[str, Any], path: str, faults: list[str], limits: list[str]) -> T | None:
    """One dataclass from its keys; None where keys or types are wrong (`faults`), so that values cannot be judged.

    Values out of range are `limits`: they are reported too, and keep nothing else from being judged.
    """
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    before = len(faults)
    for key in given:
        if key not in fields:
            close = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f"did you mean {path}{close[0]}?" if close else f"known keys: {', '.join(fields)}"
            faults.append(f"unknown key {path}{key}; {hint}")
    values: dict[str, Any] = {}
    for name, item in fields.items():
        if name in given:
            values[name] = _convert(hints[name], given[name], f"{path}{name}", faults, limits)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            faults.append(f"missing key {path}{name}")
    if len(faults) > before:
        return None
    built = cls(**values)
    limits.extend(
        f"{path}{name}={value}; at most {MOST[name]}"
        for name, value in values.items()
        if name in MOST and isinstance(value, int) and value > MOST[name]
    )
    if hasattr(built, "faults"):
        limits.extend(built.faults())
    return built


def _convert(hint: Any, value: Any, path: str, faults: list[str], limits: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, path, faults, limits)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return _build(hint, value, f"{path}.", faults, limits)
        faults.append(f"{path}={value!r}; expected a group of keys")
        return None
    if origin is Literal:
        if value not in typing.get_args(hint):
            faults.append(f"{path}={value!r}; allowed: {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if origin is list:
        if not isinstance(value, list | tuple):
            faults.append(f"{path}={value!r}; expected a list such as [a,b]")
            return None
        kind = typing.get_args(hint)[0]
        return [_convert(kind, item, f"{path}[{index}]", faults, limits) for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            faults.append(f"{path}={value!r}; expected a mapping")
            return None
        return dict(value)
    return _convert_scalar(hint, value, path, faults)


def _convert_scalar(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        expected = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]
        faults.append(f"{path}={value!r}; expected {expected}")
    elif isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{path}={value}; expected a finite number")
    return value
