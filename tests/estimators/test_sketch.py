"""The sketch against closed forms: a linear model with mixed tokens, whose Jacobian is written down."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.jobs import SCHEMES, Silent, make_job, with_strategy
from qvl_hydra.backends import torch as native
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.calibration.sample import IGNORED, Sample
from qvl_hydra.estimators.first_order import FirstOrder, OperatorChange, _dot, combine
from qvl_hydra.estimators.probes import (
    Signs,
    _eigenvectors,
    fisher_probes,
    leading_directions,
    loss_gradient,
    sign_probes,
)
from qvl_hydra.estimators.reverse import Part, ReverseSegment, step_back
from qvl_hydra.families.experts import ExpertProduct
from qvl_hydra.families.stages import Segment
from qvl_hydra.models import memory
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.kinds import as_tokens
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.apply import make_quantizer, replaced_forwards
from qvl_hydra.quantization.formats.integer import affine_params
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.qdq import OperatorQuantizer, quantized_operator, weight_change
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.shrink import SPLIT
from tests.conftest import DEVICES, load_tiny

TOKENS, WIDTH, OUT = 6, 16, 10
SCHEME = Scheme("w4a8", WeightFormat(4), ActivationFormat(8), ActivationFormat(8))


class MixedLinear(nn.Module):
    """`F = mix @ first(x) @ second.T`: the Jacobian of F with respect to the first's output is `mix (x) second`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, OUT, bias=False)
        self.register_buffer("mix", torch.tril(torch.rand(TOKENS, TOKENS)))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.mix @ self.first(x))


def operator(path: str) -> Operator:
    return Operator(path, "lm", 0, path, path, "Linear", WIDTH, OUT, 1, "qwen2_5_vl")


def quantizers(model: MixedLinear, x: Tensor, scheme: Scheme) -> dict[str, OperatorQuantizer]:
    inputs = {"first": x, "second": model.mix @ model.first(x)}
    outputs = {"first": model.first(x), "second": model.second(inputs["second"])}

    def params(form: ActivationFormat | None, values: Tensor) -> QuantParams | None:
        if form is None or form.dynamic:
            return None
        scale, zero = affine_params(values.min(), values.max(), form.limits, form.symmetric)
        return QuantParams(float(scale), int(zero), *form.limits)

    ranges = {path: (params(scheme.input, inputs[path]), params(scheme.output, outputs[path])) for path in inputs}
    return {path: make_quantizer(model, path, scheme, ranges) for path in inputs}


def sketched(model: MixedLinear, x: Tensor, scheme: Scheme, reduction: str, probes: list[Tensor]) -> dict[str, Tensor]:
    targets = [Target(path, (operator(path),)) for path in ("first", "second")]
    found = {}
    for path, q in quantizers(model, x, scheme).items():
        change = None if q.weight is None else q.weight - model.get_submodule(path).weight
        found[path] = [OperatorChange(scheme, change, q.input, q.output)]
    segment = Segment("all", False, ("first", "second"), lambda state, context: model(state))
    walker = Mock(spec=Walker, module=model)  # all that is asked of it
    work = ReverseSegment(walker, segment, targets, FirstOrder(found, reduction))
    context = Mock(spec=Context)
    parts = [Part(x[None], [probe[None] for probe in probes])]
    values, _ = step_back(work, context, parts, lambda tokens: [slice(tokens)])
    return {target.name: value[:, 1] for target, value in zip(targets, values[0][0], strict=True)}


def squared_errors(model: MixedLinear, x: Tensor, scheme: Scheme) -> dict[str, float]:
    """The same in closed form: the output's change is linear in the operator's."""
    found = quantizers(model, x, scheme)
    inputs = {"first": x, "second": model.mix @ model.first(x)}
    errors = {}
    for path, jacobian in (("first", lambda d: model.mix @ d @ model.second.weight.T), ("second", lambda d: d)):
        module = model.get_submodule(path)
        change = quantized_operator(module, inputs[path], found[path]) - module(inputs[path])
        errors[path] = float(jacobian(change).square().sum())
    return errors


@pytest.fixture
def model() -> MixedLinear:
    return MixedLinear()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def drawn_signs(count: int, *names: object) -> list[Signs]:
    """Of independent probes, as those of as many samples are."""
    return [Signs(torch.device("cpu"), *names, index) for index in range(count)]


@pytest.mark.parametrize("scheme", [SCHEME, SCHEME.only("weight"), SCHEME.only("activation")])
def test_sequence_sum_is_unbiased_with_relative_variance_two(model: MixedLinear, x: Tensor, scheme: Scheme) -> None:
    count, axes = 4000, torch.zeros(OUT, 0)
    probes = list(sign_probes(model(x), axes, drawn_signs(count, "unbiased")))
    values = sketched(model, x, scheme, "sequence", probes)
    for path, expected in squared_errors(model, x, scheme).items():
        mean, error = values[path].mean().item(), values[path].std().item() / count**0.5
        # Products with the activation's error leave the rounding of both together out: of second order.
        assert abs(mean - expected) < 4 * error + 0.02 * expected, path
        assert 1.0 < values[path].var().item() / mean**2 < 2.6, path


def test_directions_of_the_last_weight_keep_the_mean_and_cut_the_noise(model: MixedLinear, x: Tensor) -> None:
    model.second.weight += 2.0  # one direction far above the others, as in a trained head
    count, output = 2000, model(x)
    directions = leading_directions(model.second.weight)
    noise = {}
    for name, along in (("axes", torch.zeros(OUT, 0)), ("directions", directions)):
        probes = list(sign_probes(output, along, drawn_signs(count, name)))
        values = sketched(model, x, SCHEME, "sequence", probes)["first"]
        expected = squared_errors(model, x, SCHEME)["first"]
        assert abs(values.mean().item() - expected) < 4 * values.std().item() / count**0.5 + 0.02 * expected
        noise[name] = values.var().item()
    assert noise["directions"] < 0.9 * noise["axes"]


def test_leading_directions_are_the_singular_vectors() -> None:
    torch.manual_seed(0)
    weight = torch.randn(90, 50) * torch.logspace(1, -1, 50)
    found = leading_directions(weight)
    expected = torch.linalg.svd(weight, full_matrices=False).U[:, : found.shape[1]]
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close((found.T @ expected)[:8, :8].abs(), torch.eye(8), atol=1e-2, rtol=0)
    assert (found.amax(0) > -found.amin(0)).all()
    assert leading_directions(torch.ones(3, 2)).shape == (3, 2)
    assert leading_directions(weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_directions_have_their_signs_from_themselves(device: str) -> None:
    """What a solver makes of them differs between devices and numbers of threads."""
    for vectors in (
        leading_directions(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(device)),
        _eigenvectors(torch.tensor([[0.8, 0.5, 0.2], [0.6, 0.4, 0.3]]).to(device), torch.tensor([0.5, 0.4]).to(device)),
    ):
        assert (vectors.amax(-2) == vectors.abs().amax(-2)).all()


def test_values_that_are_not_finite_stay_in_the_probe() -> None:
    weight, logits = torch.ones(3, 2), torch.randn(4, 5)
    weight[0, 0], logits[1, 2] = torch.inf, torch.nan
    assert leading_directions(weight).isfinite().all()
    assert next(fisher_probes(logits, drawn_signs(1)))[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("probes", [1, 2, 3, 4, 8])
def test_every_probe_of_a_sample_is_as_random_as_another(probes: int) -> None:
    output, count = torch.zeros(3, 4), 3000
    for probe in range(probes):
        drawn = torch.stack(
            [
                drawn
                for index in range(count)
                for drawn in sign_probes(
                    output, torch.eye(4)[:, :2], [Signs(output.device, index, probe=probe, probes=probes)]
                )
            ]
        ).flatten(1)
        torch.testing.assert_close(drawn.T @ drawn / count, torch.eye(12), atol=0.08, rtol=0)


def test_probes_of_a_block_are_orthogonal_over_neighbouring_tokens() -> None:
    rows = torch.stack([Signs(torch.device("cpu"), "a", probe=k, probes=4).draw(6, 1)[:, 0] for k in range(4)])
    products = rows.T @ rows / 4
    assert torch.equal(products, (torch.arange(6)[:, None] % 4 == torch.arange(6)[None] % 4).float() * products)


def test_fisher_probes_give_twice_the_divergence(model: MixedLinear, x: Tensor) -> None:
    scheme = Scheme("w8", WeightFormat(8), None)  # a small error, for which the divergence is quadratic
    logits = model(x)
    probes = list(fisher_probes(logits, drawn_signs(6000, "fisher")))
    values = sketched(model, x, scheme, "sequence", probes)
    found = quantizers(model, x, scheme)
    for path in ("first", "second"):
        before = model.get_submodule(path).weight.clone()
        model.get_submodule(path).weight.copy_(found[path].weight)
        after = model(x)
        model.get_submodule(path).weight.copy_(before)
        p, q = logits.double().log_softmax(-1), after.double().log_softmax(-1)
        divergence = float((p.exp() * (p - q)).sum())
        error = values[path].std().item() / len(probes) ** 0.5
        assert abs(values[path].mean().item() / 2 - divergence) < 4 * error / 2 + 0.03 * divergence, path


@pytest.mark.parametrize("vocab", [4, 50])  # all tokens likely ones, and more than those
def test_fisher_probe_has_the_fisher_covariance(vocab: int) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.softmax(-1)[0]
    drawn = torch.cat(list(fisher_probes(logits, drawn_signs(20000, "covariance"))))
    expected = torch.diag(p) - p[:, None] * p[None]
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), expected, atol=0.01, rtol=0)


def test_fisher_probe_of_two_tokens_has_no_noise() -> None:
    """The Fisher information of two tokens has one eigenvector: the sign along it is all that is random."""
    logits = torch.tensor([[0.4, 0.0]])
    p = logits.softmax(-1)[0]
    change = torch.tensor([0.3, -0.2])
    expected = float((p * change.square()).sum() - (p * change).sum() ** 2)
    for probe in fisher_probes(logits, drawn_signs(20, "two")):
        assert float((probe[0] @ change) ** 2) == pytest.approx(expected, rel=1e-4)


def test_loss_gradient_is_autograds() -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    labels = torch.tensor([-100, 3, 0, -100, 6])
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss_gradient(logits.detach(), labels), torch.autograd.grad(loss, logits)[0])


def test_combine_by_hand() -> None:
    weight, activation = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    assert combine("sequence", weight, activation).tolist() == [[5.0, 25.0]]
    assert combine("sequence", -weight, None).tolist() == [[-3.0, 9.0]]
    assert combine("token", weight, activation).tolist() == [[5.0, 17.0]]
    assert combine("split", weight, activation).tolist() == [[5.0, 19.0]]
    assert combine("split", None, activation).tolist() == [[2.0, 10.0]]
    assert combine("shrunk", weight, activation).tolist() == [[5.0, 17.0, 4.0, 4.0]]
    assert combine("shrunk", weight, None).tolist() == [[3.0, 5.0, 4.0, 0.0]]


@pytest.mark.parametrize("device", DEVICES)
def test_probes_depend_on_their_names_alone(device: str) -> None:
    def probe(index: int, device: str = "cpu") -> Tensor:
        output, directions = torch.zeros(3, 4, device=device), torch.zeros(4, 0, device=device)
        return next(sign_probes(output, directions, [Signs(output.device, 0, "a", index)])).cpu()

    assert torch.equal(probe(1), probe(1, device))
    assert not torch.equal(probe(1), probe(2))
    assert set(probe(1).unique().tolist()) == {-1.0, 1.0}


def test_large_matrices_in_parts_come_out_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> tuple[Tensor, ...]:
        drawn = Signs(torch.device("cpu"), "a", probe=1, probes=2).draw(50, 37)
        gradient = torch.randn(50, 37, generator=torch.Generator().manual_seed(0))
        return drawn, _dot(drawn, gradient), weight_change(gradient, WeightFormat(8))

    whole = results()
    monkeypatch.setitem(memory.PART_VALUES, "cpu", 100)  # two rows
    for mine, expected in zip(results(), whole, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_do_not_overflow(dtype: torch.dtype) -> None:
    large = torch.full((2, 8), 400.0, dtype=dtype)
    assert _dot(large, large).tolist() == pytest.approx([8 * 400.0**2] * 2, rel=1e-2)


@pytest.mark.parametrize("metric", ["squared_error", "kl"])
@pytest.mark.parametrize("component", ["lm", "vision", "full"])
def test_sketch_ranks_like_exact_on_the_bundled_model(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], component: str, metric: str
) -> None:
    if component == "vision" and metric == "kl":
        pytest.skip("features have no distribution")
    from benchmarks.jobs import make_job, measure

    scheme = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8))
    job = make_job(tiny_model, tiny_samples, scheme, component, metric=metric, probes=8, estimator="sketch")
    sketch, _ = measure(job)
    exact, _ = measure(make_job(tiny_model, tiny_samples, scheme, component, metric=metric, estimator="exact"))
    assert spearmanr([exact[op] for op in exact], [sketch[op] for op in exact]).statistic > 0.95


@pytest.mark.parametrize("component", ["lm", "full"])
def test_a_split_sketch_tells_what_exact_scores_tell_at_each_kind_of_position(
    tiny_model: LoadedModel, tiny_samples: tuple[Sample, ...], tmp_path: Path, component: str
) -> None:
    """Of one sample without an answer, too; the parts of a sample add up to the whole."""
    one, *others = tiny_samples[:8]
    samples = (dataclasses.replace(one, labels=torch.full_like(one.labels, IGNORED)), *others)
    scheme, found = Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8)), {}
    for estimator in ("sketch", "exact"):
        job = make_job(tiny_model, samples, scheme, component, estimator=estimator, probes=4, reduction="sequence")
        folder = RunFolder(tmp_path / estimator)
        native.run(with_strategy(job, split_positions=True), folder, Silent())
        found[estimator] = folder.frame().groupby(["sample", "metric", "op"])["value"].mean().unstack("metric")
    for frame in found.values():
        assert frame[list(SPLIT)].sum(axis=1).to_numpy() == pytest.approx(frame["squared_error"].to_numpy())
        assert frame.loc[one.id, SPLIT[2]].eq(0).all()
    exact, sketch = (found[name].groupby("op")[list(SPLIT)].mean() for name in ("exact", "sketch"))
    for kind in SPLIT:
        ratios = (sketch[kind] / exact[kind]).to_numpy()
        assert spearmanr(exact[kind], sketch[kind][exact.index]).statistic > 0.95
        assert float(np.exp(np.median(np.log(ratios)))) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("component", ["full", "vision"])
@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen2_vl"])
def test_sketch_of_a_model_is_what_autograd_gives(
    name: str, component: str, dtype: str, tiny_samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    found, expected = sketch_and_autograd(load_tiny(name, dtype=dtype), tiny_samples[0], component, tmp_path)
    if dtype == "float32":
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6 * max(expected))
    else:
        assert spearmanr(found, expected).statistic > 0.97


def sketch_and_autograd(
    model: LoadedModel, sample: Sample, component: str, path: Path
) -> tuple[list[float], list[float]]:
    """Every operator by the whole engine, and by one plain backward pass through all of the model at once."""
    frame, products = frame_and_products(model, sample, component, path)
    found = frame["value"]
    return [found[name] for name in products], [float(own.sum()) ** 2 for own in products.values()]


def frame_and_products(
    model: LoadedModel, sample: Sample, component: str, path: Path
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Rows of a sketch by operator; and of each operator the products of gradient and change at every value."""
    job = make_job(
        model, (sample,), SCHEMES["w8a16"], component, estimator="sketch", reduction="sequence", probes=1
    )
    native.run(job, RunFolder(path), Silent())
    frame = RunFolder(path).frame().set_index("op")

    walker, seen = Walker(model, component), {}

    def forward(module: nn.Module, x: Tensor, path: str) -> Tensor:
        y = type(module).forward(module, x)
        seen[path] = (as_tokens(module, x.detach()), y)
        return y

    taps = {op.path: partial(forward, path=op.path) for op in job.operators}
    (context,) = walker.contexts([sample])
    state = walker.starts([context])[0].requires_grad_()
    with replaced_forwards(model.module, taps):
        for segment in walker.segments:
            state = segment.run(state, context)
    directions = leading_directions(model.module.get_submodule(job.operators[-1].path).weight)
    directions = functional.pad(directions, (0, 0, 0, state.shape[-1] - len(directions)))
    probe = next(sign_probes(state[0].detach(), directions, [Signs(model.device, job.seed, sample.id)]))
    gradients = torch.autograd.grad(state, [y for _, y in seen.values()], probe[None])
    found = {}
    for (path, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
        change = weight_change(model.module.get_submodule(path).weight, WeightFormat(8)).float()
        module = model.module.get_submodule(path)
        made = x.float().flatten(0, -2) @ change.T
        if isinstance(module, ExpertProduct):  # every expert's product, and of these the chosen one's
            made = made.unflatten(-1, (module.experts, -1))[torch.arange(len(made)), module.chosen]
        found[path] = made * gradient.float().reshape(made.shape)
    return frame, found
