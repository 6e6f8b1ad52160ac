"""The error of a whole profile, with interactions: what operators do to the output together is no sum.

To first order the change of the output is the sum of what each operator does, so the joint error is quadratic,

    E = sum_i e_i + sum_{i != j} R_ij sqrt(e_i e_j),

over the quantized operators, with `e_i` their scores and `R_ij` the cosine between what two of them do. A sketch's
signed sums `s_i`, one a probe and sample, have `E[s_i s_j]` as the product of both effects, so their mean over samples
and probes gives `R` without a further pass. From few samples the cosines are noisy, so they are drawn towards zero by
the share of their mean square that their spread from sample to sample explains: probes of a sample are no further
samples, since what is lost sits in few of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from qvl_hydra.profiles.units import Unit

Array = np.ndarray
RESAMPLES = 200


@dataclass(frozen=True)
class Interactions:
    """What a sketch says of operators together.

    Attributes:
        names: rows of the sweep, operators or fused ones.
        signed: signed sums of each, one column a sample and probe.
        samples: which sample each column is of.
        scores: of each row, in the sweep's metric.
    """

    names: tuple[str, ...]
    signed: Float[Array, "row draw"]
    samples: Shaped[Array, " draw"]
    scores: Float[Array, " row"]

    def error(self, quantized: Collection[str]) -> float:
        """The predicted error with exactly these rows quantized."""
        signed, scores = self._of(quantized)
        return _joint(signed, scores, _kept(signed, self.samples)) if len(scores) else 0.0

    def joint(self, quantized: Collection[str]) -> tuple[float, float, float]:
        """The predicted error with exactly these rows quantized, and an interval of 95 % over samples.

        In it both what operators lose and their cosines vary from sample to sample.
        """
        signed, scores = self._of(quantized)
        if not len(scores):
            return 0.0, 0.0, 0.0
        kept = _kept(signed, self.samples)
        value = _joint(signed, scores, kept)
        rng = np.random.default_rng(0)
        groups = [np.flatnonzero(self.samples == sample) for sample in np.unique(self.samples)]
        if len(groups) < 2:
            return value, float("nan"), float("nan")
        each, drawn = scores / np.maximum((signed**2).mean(1), 1e-300), []
        for _ in range(RESAMPLES):
            some = signed[:, np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])]
            drawn.append(_joint(some, each * (some**2).mean(1), kept))
        spread = float(np.std(np.log(np.maximum(drawn, 1e-300))))
        return value, value * float(np.exp(-1.96 * spread)), value * float(np.exp(1.96 * spread))

    def _of(self, quantized: Collection[str]) -> tuple[Float[Array, "row draw"], Float[Array, " row"]]:
        """Signed sums and scores of these rows."""
        chosen = np.array([name in quantized for name in self.names])
        return self.signed[chosen], np.maximum(self.scores[chosen], 0.0)


def _joint(signed: Float[Array, "row draw"], scores: Float[Array, " row"], kept: float) -> float:
    """E over all rows given, with so much of the cosines."""
    unit = _unit(signed)
    cosines = unit @ unit.T / signed.shape[1]
    np.fill_diagonal(cosines, 0.0)
    root = np.sqrt(scores)
    return max(float(scores.sum() + kept * (root @ cosines @ root)), 0.0)


def _kept(signed: Float[Array, "row draw"], samples: Shaped[Array, " draw"]) -> float:
    """The share of the cosines' mean square that their spread from sample to sample leaves; none from one sample."""
    unit, rows, names = _unit(signed), len(signed), np.unique(samples)
    total, squares = np.zeros((rows, rows)), np.zeros((rows, rows))
    for name in names:
        own = unit[:, samples == name]
        product = own @ own.T
        total += product
        squares += product**2
    between = ~np.eye(rows, dtype=bool)
    square, count = (total[between] ** 2).sum(), len(names)
    if count < 2 or square == 0:
        return 0.0
    noise = (squares[between].sum() - square / count) * count / (count - 1)
    return max(0.0, 1.0 - float(noise / square))


def _unit(signed: Float[Array, "row draw"]) -> Float[Array, "row draw"]:
    """Each row with a mean square of one."""
    length = np.sqrt((signed**2).mean(1, keepdims=True))
    return signed / np.where(length > 0, length, 1.0)


def interactions_of(
    samples: pd.DataFrame, scores: pd.Series, scheme: str | None, metric: str
) -> Interactions | None:
    """The interactions of a sweep's rows, one by one; None where one has no signed sums.

    Args:
        samples: `sample_scores.parquet`.
        scores: of each row, by its name.
    """
    if "signed" not in samples:
        return None
    frame = samples[(samples["metric"] == metric) & samples["signed"].notna()]
    frame = frame if scheme is None else frame[frame["scheme"] == scheme]
    table = frame.pivot_table(index="op", columns=["sample", "probe"], values="signed", sort=False)
    if table.empty or not scores.index.isin(table.index).all():
        return None
    signed = table.loc[scores.index].to_numpy()
    whole = np.isfinite(signed).all(0)
    places = table.columns.get_level_values("sample").astype(str).to_numpy()[whole]
    return Interactions(tuple(scores.index), signed[:, whole], places, scores.to_numpy(dtype=float))


def interactions_from(samples: pd.DataFrame, units: Sequence[Unit], scheme: str, metric: str) -> Interactions | None:
    """The interactions of a sweep's decision units; None where the sweep has no signed sums of them.

    Args:
        samples: `sample_scores.parquet`.
        units: from `units_from_scores`; the signed sums of a unit's members add up.
    """
    if "signed" not in samples:
        return None
    frame = samples[(samples["scheme"] == scheme) & (samples["metric"] == metric) & samples["signed"].notna()]
    table = frame.pivot_table(index="op", columns=["sample", "probe"], values="signed", sort=False)
    scored = [unit for unit in units if scheme in unit.scores]
    rows = [[unit.name] if unit.name in table.index else [op.path for op in unit.members] for unit in scored]
    if not scored or table.empty or any(path not in table.index for members in rows for path in members):
        return None
    signed = np.stack([table.loc[members].to_numpy().sum(0) for members in rows])
    whole = np.isfinite(signed).all(0)
    return Interactions(
        tuple(unit.name for unit in scored),
        signed[:, whole],
        table.columns.get_level_values("sample").astype(str).to_numpy()[whole],
        np.array([float(unit.scores[scheme]) for unit in scored]),
    )
