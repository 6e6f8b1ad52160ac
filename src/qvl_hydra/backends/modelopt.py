"""Backend `modelopt`: the sensitivity scores of NVIDIA ModelOpt's `auto_quantize`, methods `gradient` and `kl_div`.

ModelOpt turns image-text scoring away; given the component alone, with token embeddings that hold the image features
already, it sees a plain decoder. It scores what TensorRT-LLM fuses (q/k/v, gate/up) as one: each operator of a group
gets the group's score. Scores are read sample by sample while its own loop runs.

Source: modelopt/torch/quantization/algorithms.py of ModelOpt 0.47 (`AutoQuantizeGradientSearcher`: sum of squared
products of the loss gradient and the output change; `AutoQuantizeKLDivSearcher`: KL(float || quantized), summed).
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvl_hydra.errors import EngineError, MissingExtraError

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers releases it was not tested with
        import modelopt
        import modelopt.torch.quantization as mtq
        from modelopt.torch.opt.utils import named_hparams
        from modelopt.torch.quantization import algorithms
except ImportError as error:
    raise MissingExtraError("nvidia-modelopt", "modelopt", "backend=modelopt") from error

from qvl_hydra.backends.neural_compressor.wrapper import (
    ComponentWrapper,
    WrapperBatch,
    WrapperInput,
    usable,
    wrapper_input,
)
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import next_token_labels
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.runs.folder import RunFolder, SampleScore

METRICS = {"gradient": "gradient", "kl_div": "kl_sum"}
UNITS = {"gradient": "squared gradient x output change a sample", "kl_div": "nats a sample"}
ESTIMATOR = "modelopt"
OWN = "gradient_own"  # what an operator adds to its group's gradient score
FLOAT_BITS = 16.0  # the budget of the search that follows the scoring: nothing has to be quantized
Totals = dict[str, tuple[float, float]]  # operator -> its group's score and its own part, so far


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score the job's operators with ModelOpt; see `backends.protocol.Engine`.

    Raises:
        EngineError: a scheme or direction that ModelOpt does not have, no usable sample, or ModelOpt failed.
    """
    _check(job)
    method, module = job.backend.method, job.model.module
    # Its scores are about logits: the vision tower is scored through the whole model.
    component = "lm" if job.component == "lm" else "full"
    wrapper = ComponentWrapper(module, component)
    scored = [wrapper_input(module, sample, component) for sample in usable(job.scored, job.component)]
    scored = [item for item in scored if method == "kl_div" or bool((item.sample.labels[1:] >= 0).any())]
    if not scored:
        raise EngineError(
            "no scored sample can be used: the vision tower needs an image, method=gradient an answer; "
            "take other samples (calibration.source, calibration.seed) or backend.method=kl_div"
        )
    calibration = [
        wrapper_input(module, sample, component) for sample in usable(job.calibration.samples, job.component)
    ]
    forward_s = _forward_seconds(wrapper, scored)
    left = [(index, item) for index, item in enumerate(scored) if not folder.done(_unit(index))]
    started = time.perf_counter()
    groups: dict[str, list[str]] = {}
    if left:
        groups = _score(job, wrapper, calibration, left, folder, progress)
    fused = sum(len(members) > 1 for members in groups.values())
    notes = [f"{fused} groups of operators (q/k/v, gate/up) were scored as one: each operator has its group's score"]
    if job.component == "vision":
        notes.append("the vision tower is scored through the whole model, on its logits or loss")
    notes += differences(job.scheme)
    details = {"modelopt": modelopt.__version__, "method": method, "groups": len(groups), "fused_groups": fused}
    engine_s = time.perf_counter() - started
    return EngineReport(ESTIMATOR, METRICS[method], UNITS[method], forward_s, engine_s, notes, details)


def _check(job: SweepJob) -> None:
    if job.strategy.name == "hawq_v2" or job.strategy.direction != "requantize":
        raise EngineError(
            f"backend=modelopt has scores of its own, not strategy={job.strategy.name} with direction="
            f"{job.strategy.direction}; leave strategy=kl, strategy.direction=requantize and choose backend.method"
        )
    if job.model.streamed:
        raise EngineError("backend=modelopt needs model.placement=resident")
    if job.fuse:
        raise EngineError("operators.fuse=true, but ModelOpt fuses by its own rules; leave it false")


def quant_format(scheme: Scheme) -> dict[str, Any]:
    """The scheme as a ModelOpt quantization config.

    Raises:
        EngineError: the weight format is one that ModelOpt does not have.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, part in (("weight", scheme.weight), ("input", scheme.input), ("output", scheme.output)):
        if part is not None:
            entries.append({"quantizer_name": f"*{name}_quantizer", "cfg": _quantizer(part)})
    return {"quant_cfg": entries, "algorithm": "max"}


def _quantizer(part: WeightFormat | ActivationFormat) -> dict[str, Any]:
    if isinstance(part, ActivationFormat):
        if part.dynamic:
            return {"num_bits": part.bits, "type": "dynamic", "block_sizes": {-1: None}}
        return {"num_bits": part.bits, "axis": None}
    if not part.symmetric:
        raise EngineError("backend=modelopt quantizes weights symmetrically; set quant.weight_symmetric=true")
    if part.group_size is None:
        return {"num_bits": part.bits, "axis": 0}
    return {"num_bits": part.bits, "block_sizes": {-1: part.group_size, "type": "static"}}


def differences(scheme: Scheme) -> list[str]:
    """Where ModelOpt's format is not the scheme's."""
    found = []
    static = [part for part in (scheme.input, scheme.output) if part is not None and not part.dynamic]
    if any(not part.symmetric for part in static):
        found.append(
            f"quant={scheme.name} has asymmetric activations; ModelOpt's are symmetric, from the largest magnitude"
        )
    if static and scheme.observer != "minmax":
        found.append(f"quant.observer={scheme.observer}; ModelOpt calibrated by the largest magnitude (max)")
    return found


class _Samples:
    """What ModelOpt iterates over: all calibration samples the first time, then the samples to score.

    Args:
        scored: called after each pass over one sample of the second round.
    """

    def __init__(
        self,
        calibration: Sequence[WrapperInput],
        left: Sequence[tuple[int, WrapperInput]],
        after: Callable[[int], None],
    ) -> None:
        self.calibration, self.left, self.after, self.rounds = calibration, left, after, 0

    def __iter__(self) -> Iterator[WrapperInput]:
        self.rounds += 1
        if self.rounds == 1:
            yield from self.calibration
            return
        for place, (_, item) in enumerate(self.left):
            yield item
            self.after(place)


def _score(
    job: SweepJob,
    wrapper: ComponentWrapper,
    calibration: Sequence[WrapperInput],
    left: Sequence[tuple[int, WrapperInput]],
    folder: RunFolder,
    progress: Progress,
) -> dict[str, list[str]]:
    """Let ModelOpt calibrate and score; write each sample's scores when it is done. Returns its groups."""
    before: Totals = {}
    groups: dict[str, list[str]] = {}
    wanted = {op.path for op in job.operators}

    def after(place: int) -> None:
        index, item = left[place]
        if not groups:
            groups.update(_groups(wrapper, wanted))
        totals = _totals(wrapper, wanted)
        folder.write(_unit(index), _sample_scores(job, item.sample.id, before, totals))
        before.update(totals)
        progress.step()

    def forward_step(model: nn.Module, item: WrapperInput) -> Tensor:
        output: Tensor = model(WrapperBatch([item]))
        return output

    steps = max(len(calibration), len(left)) + 1  # one more than there are: it then asks for the end of the samples
    progress.total(len(left), f"ModelOpt auto_quantize, {job.backend.method}")
    with _quiet():
        try:
            mtq.auto_quantize(
                wrapper,
                constraints={"effective_bits": FLOAT_BITS},
                quantization_formats=[quant_format(job.scheme)],
                data_loader=_Samples(calibration, left, after),
                forward_step=forward_step,
                loss_func=_loss if job.backend.method == "gradient" else None,
                disabled_layers=_others(wrapper, wanted),
                num_calib_steps=steps,
                num_score_steps=steps,
                method=job.backend.method,
            )
        except EngineError:
            raise
        except Exception as error:  # ModelOpt asserts, and raises many kinds
            raise EngineError(
                f"ModelOpt {modelopt.__version__} failed: {type(error).__name__}: {error}; what was scored is kept"
            ) from error
    for path in wanted - {op for members in groups.values() for op in members}:
        folder.skip(path, f"ModelOpt {modelopt.__version__} does not quantize this operator")
    return groups


def _loss(output: Tensor, item: WrapperInput) -> Tensor:
    """Mean cross-entropy of the answer tokens, as the Hugging Face model's own loss."""
    labels = next_token_labels(item.sample.labels).to(output.device)
    return functional.cross_entropy(output.float(), labels, ignore_index=-100)


def _others(wrapper: nn.Module, wanted: set[str]) -> list[str]:
    """Modules that ModelOpt would quantize and that were not asked for."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [name for name, module in wrapper.named_modules() if isinstance(module, kinds) and name not in wanted]


def _hparams(wrapper: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, hparam in named_hparams(wrapper, configurable=True):
        if isinstance(hparam, algorithms.QuantRecipeHparam):
            yield name, hparam


def _groups(wrapper: nn.Module, wanted: set[str]) -> dict[str, list[str]]:
    found = {name: [path for path in hparam.quant_module_names if path in wanted] for name, hparam in _hparams(wrapper)}
    return {name: members for name, members in found.items() if members}


def _totals(wrapper: nn.Module, wanted: set[str]) -> Totals:
    """Scores summed so far: of each operator's group, and the operator's own part."""
    paths = {id(module): name for name, module in wrapper.named_modules()}
    totals: Totals = {}
    for _, hparam in _hparams(wrapper):
        for recipe, by_module in hparam._importance_dict.items():
            if recipe == algorithms.QuantRecipe(quant_cfg=None):
                continue
            parts = {paths[id(module)]: 0.0 if value is None else float(value) for module, value in by_module.items()}
            for path in hparam.quant_module_names:
                if path in wanted:
                    totals[path] = sum(parts.values()), parts.get(path, math.nan)
    return totals


def _sample_scores(job: SweepJob, sample: str, before: Totals, totals: Totals) -> list[SampleScore]:
    method = job.backend.method
    metrics = (METRICS[method], OWN) if method == "gradient" else (METRICS[method],)
    scores = []
    for path, values in totals.items():
        earlier = before.get(path, (0.0, 0.0))
        for metric, now, then in zip(metrics, values, earlier, strict=False):
            scores.append(SampleScore(path, sample, None, now - then, metric, ESTIMATOR, job.scheme.name))
    return scores


@torch.no_grad()
def _forward_seconds(wrapper: ComponentWrapper, scored: Sequence[WrapperInput]) -> float:
    wrapper(WrapperBatch(scored[:1]))  # the first pass pays for allocations
    started = time.perf_counter()
    for item in scored:
        wrapper(WrapperBatch([item]))
    return time.perf_counter() - started


def _unit(index: int) -> str:
    return f"modelopt_{index:05d}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt draws bars and prints by itself; there is one bar, and it is ours."""
    bar = algorithms.tqdm
    algorithms.tqdm = functools.partial(bar, disable=True)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        algorithms.tqdm = bar
