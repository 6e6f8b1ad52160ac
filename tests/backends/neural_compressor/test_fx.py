"""Neural Compressor's FX adaptor against plain quantize-dequantize and its own calls; failures and interruptions."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from tests.backends.neural_compressor.inc_job import STATIC, Steps, make_job, make_sample, small_model

pytest.importorskip("neural_compressor.strategy", reason="needs the 2.x API of neural-compressor")

from neural_compressor.adaptor.torch_utils import util
from neural_compressor.config import options

from qvl_hydra.backends.neural_compressor import fx as inc_fx
from qvl_hydra.backends.neural_compressor.adaptor import Batches, open_session
from qvl_hydra.backends.neural_compressor.order import inc_order
from qvl_hydra.backends.neural_compressor.quantizers import inc_quantizers, read_quantizers
from qvl_hydra.backends.neural_compressor.session import guest
from qvl_hydra.backends.neural_compressor.wrapper import ComponentWrapper, WrapperBatch, wrapper_input
from qvl_hydra.errors import EngineError, MissingExtraError
from qvl_hydra.estimators.job import SweepJob
from qvl_hydra.models.forward import reference_output
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.quantization.apply import observe_ranges, quantized
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.settings import StrategySettings

pytestmark = [pytest.mark.inc, pytest.mark.filterwarnings("ignore")]
FALLBACK = StrategySettings(name="mse_v2", metric="squared_error", estimator="exact", direction="fallback")


def squared_errors(job: SweepJob, quantizers: dict[str, OperatorQuantizer]) -> dict[str, float]:
    """Squared output difference of each scored sample with these operators in plain quantize-dequantize."""
    module = job.model.module
    found = {}
    for sample in job.scored:
        if job.component == "vision" and sample.pixel_values is None:
            continue
        with torch.no_grad():
            before = reference_output(module, sample, job.component)
            with quantized(module, quantizers):
                after = reference_output(module, sample, job.component)
        found[sample.id] = float((after - before).double().pow(2).sum())
    return found


def scores(folder: RunFolder, metric: str = "squared_error") -> dict[str, dict[str, float]]:
    """Operator -> sample -> value."""
    frame = folder.frame()
    found: dict[str, dict[str, float]] = {}
    for row in frame[frame["metric"] == metric].itertuples():
        found.setdefault(row.op, {})[row.sample] = row.value
    return found


@pytest.mark.parametrize(
    ("component", "roles"),
    [
        ("lm", ["q_proj", "up_proj", "down_proj", "lm_head"]),
        ("vision", ["patch_embed", "qkv", "merger.2"]),
        ("full", ["patch_embed", "merger.0", "gate_proj"]),
    ],
)
def test_requantize_equals_one_operator_in_plain_qdq(component: str, roles: list[str], tmp_path: Path) -> None:
    job = make_job(tmp_path, component, roles=roles)
    folder, steps = RunFolder(tmp_path), Steps()
    report = inc_fx.run(job, folder, steps)
    quantizers = inc_quantizers(job)
    found = scores(folder)
    assert set(found) == {op.path for op in job.operators}
    for path, quantizer in quantizers.items():
        expected = squared_errors(job, {path: quantizer})
        assert found[path] == pytest.approx(expected, rel=0.01)
        assert max(expected.values()) > 0
    assert steps.done == steps.expected == len(job.operators)
    assert (report.estimator, report.metric) == ("inc", "squared_error")
    assert report.forward_s > 0
    assert report.engine_s > 0
    assert set(folder.frame()["scheme"]) == {"inc_static"}


@pytest.mark.parametrize(
    ("component", "roles"), [("lm", ["v_proj", "down_proj", "lm_head"]), ("vision", ["qkv", "proj"])]
)
def test_fallback_is_what_restoring_an_operator_gains(component: str, roles: list[str], tmp_path: Path) -> None:
    job = make_job(tmp_path, component, roles=roles, strategy=FALLBACK)
    folder = RunFolder(tmp_path)
    inc_fx.run(job, folder, Steps())
    quantizers = inc_quantizers(job)
    everything = squared_errors(job, quantizers)
    for path, found in scores(folder).items():
        others = {other: quantizer for other, quantizer in quantizers.items() if other != path}
        without = squared_errors(job, others)
        for sample, value in found.items():
            # a difference of two numbers that agree to a thousandth each
            assert value == pytest.approx(everything[sample] - without[sample], abs=2e-3 * everything[sample])


def test_kl_and_loss_come_from_the_same_outputs(tmp_path: Path) -> None:
    job = make_job(tmp_path, roles=["o_proj"])
    folder = RunFolder(tmp_path)
    inc_fx.run(job, folder, Steps())
    ((path, quantizer),) = inc_quantizers(job).items()
    kl, change = scores(folder, "kl")[path], scores(folder, "loss_change")[path]
    for sample in job.scored:
        with torch.no_grad():
            before = reference_output(job.model.module, sample, "lm").log_softmax(-1)
            with quantized(job.model.module, {path: quantizer}):
                after = reference_output(job.model.module, sample, "lm").log_softmax(-1)
        divergence = functional.kl_div(after, before, log_target=True, reduction="sum") / len(before)
        answer = sample.labels[-4:]
        loss = [
            -torch.stack([logs[-5 + k, token] for k, token in enumerate(answer)]).mean() for logs in (before, after)
        ]
        assert kl[sample.id] == pytest.approx(float(divergence), rel=0.02)
        assert change[sample.id] == pytest.approx(float(loss[1] - loss[0]), rel=0.05, abs=1e-5)


@pytest.mark.parametrize("observer", ["histogram", "minmax"])
def test_our_observers_give_neural_compressors_ranges(observer: str, tmp_path: Path) -> None:
    scheme = dataclasses.replace(STATIC, observer=observer)
    job = make_job(tmp_path, scheme=scheme)
    theirs = inc_quantizers(job)
    paths = [op.path for op in job.operators]
    ours = observe_ranges(job.model.module, paths, job.calibration.samples, "lm", scheme)
    for path, (inputs, output) in ours.items():
        assert inputs is not None
        assert output is not None
        for mine, inc in ((inputs, theirs[path].input), (output, theirs[path].output)):
            assert inc is not None
            assert mine.scale == pytest.approx(inc.scale, rel=1e-5)
            assert (mine.zero_point, mine.qmin, mine.qmax) == (inc.zero_point, inc.qmin, inc.qmax)


def obvious_int8(weight: Tensor) -> Tensor:
    """Per-channel symmetric int8 as PyTorch's observers scale it, written out."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight * scale.reciprocal()).round().clamp(
        -128, 127
    ) * scale  # a division would fall on the other side of .5


def test_int8_weights_are_read_back(tmp_path: Path) -> None:
    job = make_job(tmp_path, roles=["gate_proj", "lm_head"])
    for path, quantizer in inc_quantizers(job).items():
        weight = job.model.module.get_submodule(path).weight
        assert quantizer.weight is not None
        torch.testing.assert_close(quantizer.weight, obvious_int8(weight), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_every_operator_has_neural_compressors_name(family: str) -> None:
    model = small_model(family)
    operators = find_operators(model, "full")
    batch = WrapperBatch([wrapper_input(model, make_sample(model, 0), "full")])
    with guest():
        session = open_session(ComponentWrapper(model, "full"), operators, STATIC, batch)
    assert set(session.names) == {op.path for op in operators}
    for path, (name, kind) in session.names.items():
        assert name in (path, f"{path}.module")
        assert kind == type(model.get_submodule(path)).__name__


@pytest.mark.parametrize("component", ["lm", "vision", "full"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_the_wrapper_computes_what_the_model_does(family: str, component: str) -> None:
    model = small_model(family)
    samples = [make_sample(model, 0), make_sample(model, 2)]
    batch = WrapperBatch([wrapper_input(model, sample, component) for sample in samples])
    with torch.no_grad():
        joined = ComponentWrapper(model, component)(batch)
        apart = torch.cat([reference_output(model, sample, component) for sample in samples])
    torch.testing.assert_close(joined, apart, atol=1e-6, rtol=1e-5)
    assert [item.rows for item in batch.inputs] == [len(reference_output(model, s, component)) for s in samples]


@pytest.mark.parametrize(
    ("direction", "roles", "returned_at_least"),
    [
        ("fallback", ["q_proj", "o_proj", "down_proj", "lm_head"], 4),
        ("fallback", ["q_proj", "k_proj", "o_proj"], 1),  # scores close together: theirs measures again and cuts
        ("requantize", ["q_proj", "o_proj", "down_proj", "lm_head"], 4),
    ],
)
def test_the_order_is_the_one_neural_compressor_returns(
    direction: str, roles: list[str], returned_at_least: int, tmp_path: Path
) -> None:
    job = make_job(tmp_path, roles=roles)
    model = job.model.module
    batches = [
        WrapperBatch([wrapper_input(model, make_sample(model, seed), "lm") for seed in pair])
        for pair in ((0, 1), (2, 3))
    ]
    with guest():
        session = open_session(ComponentWrapper(model, "lm"), job.operators, STATIC, batches[0])
        util.op_cfg_mapping.update(session.qconfigs)  # which a fallback stage before would have left there
        try:
            tune_cfg = session.tune_cfg if direction == "fallback" else session.float_cfg()
            returned = session.adaptor.calculate_op_sensitivity(
                _Holder(copy.deepcopy(session.wrapper)),
                Batches([(batch, 0) for batch in batches], 1),
                copy.deepcopy(tune_cfg),
                None,
                len(batches),
                fallback=direction == "fallback",
            )
        finally:
            util.op_cfg_mapping.clear()
        remade = inc_order(session, batches, direction)
    assert returned_at_least <= len(remade) <= len(roles)
    assert [name.removesuffix(".module") for name, _ in returned] == remade


class _Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


def test_first_batch_counts_for_nothing_in_their_fallback_order() -> None:
    """The first fault told in docs/neural_compressor.md, on their own function."""
    orders = iter([["a", "b", "c"], ["c", "b", "a"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, "get_mse_order_per_fp32", lambda *_: next(orders))
        result = util.get_fallback_order(None, nn.Identity(), [(0, 0), (1, 0)], {}, 2, fallback=True)
    assert result == ["c", "b", "a"]  # with both batches heard, all three would tie and stay a, b, c


def test_the_order_is_kept_beside_the_scores(tmp_path: Path) -> None:
    job = make_job(tmp_path, roles=["k_proj", "o_proj", "lm_head"], strategy=FALLBACK, batch_size=1)
    inc_fx.run(job, RunFolder(tmp_path), Steps())
    kept = json.loads((tmp_path / "inc_order.json").read_text())
    assert kept["confidence_batches"] == 2
    assert set(kept["order"]) <= {op.path for op in job.operators}
    assert kept["order"]
    assert any("rank weight 0" in fault for fault in kept["faults"])


class AdaptedLinear(nn.Linear):
    """As adapters make them: a Linear of another class, which Neural Compressor does not know."""


def test_an_operator_that_is_not_listed_is_skipped(tmp_path: Path) -> None:
    model = small_model()
    attention = model.model.language_model.layers[0].self_attn
    old = attention.k_proj
    attention.k_proj = AdaptedLinear(old.in_features, old.out_features).requires_grad_(False)
    job = make_job(tmp_path, model=model, roles=["k_proj", "v_proj"])
    folder = RunFolder(tmp_path)
    inc_fx.run(job, folder, Steps())
    ((path, (status, reason)),) = folder.endings().items()
    assert path.endswith("k_proj")
    assert status == "skipped"
    assert "does not list" in reason
    assert [op.rsplit(".", 1)[-1] for op in scores(folder)] == ["v_proj"]


@pytest.mark.parametrize("direction", ["requantize", "fallback"])
def test_a_weight_that_is_not_finite_fails_operators_not_the_run(direction: Any, tmp_path: Path) -> None:
    strategy = dataclasses.replace(FALLBACK, direction=direction)
    model = small_model()
    model.lm_head.weight[3, 4] = math.nan
    job = make_job(tmp_path, model=model, roles=["lm_head"], strategy=strategy)
    folder = RunFolder(tmp_path)
    inc_fx.run(job, folder, Steps())
    assert folder.endings()["lm_head"][0] == "failed"
    assert folder.frame().empty


def test_an_operator_that_breaks_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = inc_fx.measure

    def breaking(session: object, path: str, *rest: object) -> object:
        if path.endswith("q_proj"):
            raise RuntimeError("no kernel")
        return measure(session, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inc_fx, "measure", breaking)
    job = make_job(tmp_path, roles=["q_proj", "k_proj"])
    folder, steps = RunFolder(tmp_path), Steps()
    inc_fx.run(job, folder, steps)
    assert folder.endings() == {job.operators[0].path: ("failed", "RuntimeError: no kernel")}
    assert set(scores(folder)) == {job.operators[1].path}
    assert steps.done == 2


def test_everything_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = make_job(tmp_path / "run", roles=["q_proj", "lm_head"], strategy=FALLBACK)
    job.workdir.mkdir()
    model = job.model.module
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    state, workspace = torch.random.get_rng_state(), options.workspace
    level = logging.getLogger("neural_compressor").level
    functions = dict(vars(util))
    inc_fx.run(job, RunFolder(job.workdir), Steps())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (options.workspace, logging.getLogger("neural_compressor").level) == (workspace, level)
    assert util.op_cfg_mapping == {}
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, GraphModule)]  # else they pile up
    assert dict(vars(util)) == functions
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_resumed_run_measures_what_is_missing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, roles=["q_proj", "k_proj"])
    folder = RunFolder(tmp_path)
    inc_fx.run(job, folder, Steps())
    whole = folder.frame()
    (folder.parts / "inc_0001.parquet").unlink()
    asked: list[str] = []
    measure = inc_fx.measure

    def counting(session: object, path: str, *rest: object) -> object:
        asked.append(path)
        return measure(session, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inc_fx, "measure", counting)
    steps = Steps()
    inc_fx.run(job, folder, steps)
    assert asked == [job.operators[1].path]
    assert steps.done == steps.expected == 2
    assert folder.frame().equals(whole)


def test_another_scheme_is_named_in_a_note(tmp_path: Path) -> None:
    other = dataclasses.replace(STATIC, name="w8a8_static", output=None, observer="percentile")
    job = make_job(tmp_path, roles=["q_proj"], scheme=other)
    folder = RunFolder(tmp_path)
    report = inc_fx.run(job, folder, Steps())
    assert any(
        "w8a8_static" in note and "outputs are quantized too" in note and "percentile" in note for note in report.notes
    )
    assert set(folder.frame()["scheme"]) == {"inc_static"}


def test_refusals_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, roles=["q_proj"])
    folder = RunFolder(tmp_path)
    text_only = dataclasses.replace(
        make_job(tmp_path, "vision"), scored=(make_sample(job.model.module, 1, image=False),)
    )
    with pytest.raises(EngineError, match="image"):
        inc_fx.run(text_only, folder, Steps())
    with pytest.raises(EngineError, match="needs logits"):
        inc_fx.run(make_job(tmp_path, "vision", strategy=StrategySettings(name="mse_v2", metric="kl")), folder, Steps())
    with pytest.raises(EngineError, match=r"model\.dtype=float32"):
        inc_fx.run(make_job(tmp_path, model=small_model().bfloat16()), folder, Steps())
    on_gpu = dataclasses.replace(job, model=dataclasses.replace(job.model, device=torch.device("cuda")))
    with pytest.raises(EngineError, match=r"backend\.device=cpu"):
        inc_fx.run(on_gpu, folder, Steps())
    monkeypatch.setattr(inc_fx, "free_memory_bytes", lambda: 1000)
    with pytest.raises(EngineError, match="GiB"):
        inc_fx.run(job, folder, Steps())


def test_without_neural_compressor_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("qvl_hydra.backends.neural_compressor."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "neural_compressor", None)
    with pytest.raises(MissingExtraError, match=r"qvl-hydra\[inc\]"):
        importlib.import_module("qvl_hydra.backends.neural_compressor.fx")


def test_the_package_does_not_import_it() -> None:
    code = (
        "import sys, qvl_hydra, qvl_hydra.backends.protocol, qvl_hydra.backends.neural_compressor.memory;"
        "sys.exit('neural_compressor' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_calibration_decides_the_ranges_not_the_scored_batch(tmp_path: Path) -> None:
    """More calibration samples change the scores; in Neural Compressor's own loop they would not."""
    few, many = (make_job(tmp_path, roles=["q_proj"], calibration=n, scored=1) for n in (1, 3))
    ranges = []
    for job in (few, many):
        wrapper = ComponentWrapper(job.model.module, "lm")
        batches = [WrapperBatch([wrapper_input(job.model.module, s, "lm")]) for s in job.calibration.samples]
        with guest():
            session = open_session(wrapper, job.operators, STATIC, batches[0])
            ranges.append(read_quantizers(session, batches)[job.operators[0].path].output)
    assert ranges[0] != ranges[1]
