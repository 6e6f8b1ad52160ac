"""Gauss-Newton curvature at every operator's weight: what strategy=hawq_v2 multiplies with the weight's error.

The Gauss-Newton matrix of the answer's cross-entropy at a weight `W` is `G = E_r v v'` with `v = vec(sum_t g_t x_t')`,
where `g` is the gradient of `<r, F>` at the operator's output for a probe `r` whose covariance is the Fisher
information of the answer's distributions, and `x` is the operator's input. So one backward pass gives an unbiased
estimate of its trace for every operator,

    ||sum_t g_t x_t'||_F^2 = sum_{t,t'} (g_t . g_t') (x_t . x_t'),

from the two Gram matrices of a sample's tokens, or from the product itself where that is cheaper. There is no second
derivative: it works streamed, in bfloat16 and for batches. `G` is the Hessian of HAWQ-V2 (Dong et al. 2020, equation 8)
without the part that comes from second derivatives of the network, which is indefinite and large for a network that is
sure of its answers (Martens 2014, New insights and perspectives on the natural gradient method, section 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvl_hydra.blockwise.walker import Context
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators.bench import Bench, measuring
from qvl_hydra.estimators.first_order import SamplesOf
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.metrics import UNITS
from qvl_hydra.estimators.probes import Signs, fisher_probes
from qvl_hydra.estimators.reverse_walk import MakeSampleProbes, reverse_walk
from qvl_hydra.estimators.table import CURVATURE_METRICS
from qvl_hydra.operators.discover import Operator
from qvl_hydra.operators.kinds import as_tokens, mixture
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.qdq import mean_weight_error
from qvl_hydra.runs.folder import RunFolder, SampleScore

ESTIMATOR = "gauss_newton"


def run(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every target by curvature and weight error; see `Engine`.

    Raises:
        EngineError: no sample reaches the component.
    """
    with measuring(job, folder, progress, ESTIMATOR, True, logits=True) as bench:
        reverse_walk(bench, GaussNewton(ESTIMATOR, job.strategy.probes, 1 + len(job.schemes)))
    bench.report.metric = CURVATURE_METRICS[job.strategy.weighting]
    bench.report.unit = UNITS[bench.report.metric]
    return bench.report


@dataclass
class WeightGram:
    """Squared norms of `sum_t g_t x_t'` of an operator, one (sample,) tensor a probe.

    Attributes:
        experts: whose weight each value is multiplied with; None: there is one weight.
    """

    x: Float[Tensor, "token in"]
    samples_of: SamplesOf
    experts: Tensor | None = None
    traces: list[Tensor] = field(default_factory=list)

    def take(self, g: Float[Tensor, "token out"], to_input: Float[Tensor, "token in"]) -> None:
        """Take one probe's."""
        self.traces.append(torch.stack([self._trace(g, own) for own in self.samples_of(len(g))]))

    def _trace(self, g: Float[Tensor, "value out"], values: slice) -> Tensor:
        g, x = g[values], self.x[values]
        if self.experts is None:
            return _squared_norm(g, x)
        experts = self.experts[values]
        return torch.stack([_squared_norm(g[experts == e], x[experts == e]) for e in experts.unique()]).sum()


def _squared_norm(g: Float[Tensor, "token out"], x: Float[Tensor, "token in"]) -> Tensor:
    g, x = g.float(), x.float()
    tokens, by_product = len(g), g.shape[1] * x.shape[1]
    if tokens * (g.shape[1] + x.shape[1]) <= by_product:
        return ((g @ g.T) * (x @ x.T)).sum(dtype=torch.float64)
    return (g.T @ x).square().sum(dtype=torch.float64)


@dataclass(frozen=True)
class WeightCurvature:
    """A reading of the reverse walk: the Gauss-Newton trace at every weight.

    Attributes:
        factors: of each operator's trace: 1, and for each scheme the mean squared error of the weight.
    """

    factors: Mapping[str, Sequence[float]]
    joined: ClassVar[None] = None  # every pair of tokens counts

    def tap(self, path: str, module: nn.Module, x: Tensor, samples_of: SamplesOf) -> list[WeightGram]:
        own = mixture(module)
        return [WeightGram(as_tokens(module, x), samples_of, own.chosen if own else None)]

    def collect(
        self,
        targets: Sequence[Target],
        taps: Mapping[str, Sequence[WeightGram]],
        samples_of: SamplesOf,
        kinds: object = None,
    ) -> list[list[Float[Tensor, "target probe part"]]]:
        """Sums over the operators of a target, for each factor and sample; part 1 is the value."""
        found = []
        for column in range(len(next(iter(self.factors.values()), ()))):
            rows = [
                sum(self.factors[op.path][column] * torch.stack(taps[op.path][0].traces) for op in target.operators)
                for target in targets
            ]  # (probe, sample) each
            by_sample = torch.stack(rows).unbind(-1)  # type: ignore[arg-type]
            found.append([torch.stack([torch.zeros_like(value), value], dim=-1) for value in by_sample])
        return found


@dataclass(frozen=True)
class GaussNewton:
    """The plan of the Gauss-Newton curvature; see `Plan`."""

    name: str
    probes: int
    values: int

    def targets(self, bench: Bench) -> list[Target]:
        return bench.targets

    def probe_maker(self, bench: Bench) -> MakeSampleProbes:
        def probes(sample: Sample, places: Tensor, output: Tensor, piece: int) -> Iterator[Tensor]:
            names = (bench.job.seed, sample.id)
            signs = [Signs(output.device, *names, probe=k, probes=self.probes) for k in range(self.probes)]
            return fisher_probes(output, signs)

        return probes

    def reading(self, bench: Bench, operators: Sequence[Operator]) -> WeightCurvature:
        return WeightCurvature({op.path: [1.0, *_mean_errors(bench, op)] for op in operators})

    def scores(
        self, bench: Bench, context: Context, targets: Sequence[Target], values: Sequence[Tensor]
    ) -> Iterator[SampleScore]:
        """The trace of the mean loss of the answer tokens, its mean over weights, and its product with the error."""
        tokens = int(bench.scored_positions(context)[0].sum())
        traces, *weighted = [(column[..., 1].double() / tokens).tolist() for column in values]
        for row, target in enumerate(targets):
            weights = sum(bench.walker.module.get_submodule(op.path).weight.numel() for op in target.operators)
            for k, trace in enumerate(traces[row]):
                for scheme, omegas in zip(bench.job.schemes, weighted, strict=True):
                    if not bench.offered(target, scheme):
                        continue
                    found = {"trace": trace, "mean_trace": trace / weights, "omega": omegas[row][k]}
                    for metric in ("trace", CURVATURE_METRICS[bench.job.strategy.weighting]):
                        yield SampleScore(
                            target.name, context.sample.id, k, found[metric], metric, ESTIMATOR, scheme.name
                        )


def _mean_errors(bench: Bench, op: Operator) -> list[float]:
    """For each scheme `||Q(W) - W||^2 / n`; nothing where the scheme leaves the weight alone or is not offered."""
    weight: Tensor = bench.walker.module.get_submodule(op.path).weight
    return [
        0.0
        if scheme.weight is None or not_offered([op], scheme)
        else mean_weight_error(weight, scheme.weight, bench.shared_largest(op, scheme))
        for scheme in bench.job.schemes
    ]
