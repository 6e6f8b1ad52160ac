"""Joint errors against a linear model whose output change is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.joint import Interactions, interactions_from
from qvl_hydra.profiles.units import Unit


def drawn(effects: np.ndarray, draws: int, seed: int = 0) -> Interactions:
    """Signed sums of operators whose effects on the output (row, value) are known, by random signs."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (effects.shape[1], draws))
    names = tuple(f"op{index}" for index in range(len(effects)))
    return Interactions(names, effects @ signs, np.arange(draws) // 4, (effects**2).sum(1))


def test_many_draws_give_the_norm_of_the_sum() -> None:
    base = np.random.default_rng(1).normal(size=20)
    effects = np.stack([base, 0.5 * base + 0.1, -base, np.random.default_rng(2).normal(size=20)])
    found = drawn(effects, 40_000)
    for chosen in ([0, 1], [0, 2], [0, 1, 3], [0, 1, 2, 3]):
        expected = float((effects[chosen].sum(0) ** 2).sum())
        value, low, high = found.joint({f"op{index}" for index in chosen})
        assert value == pytest.approx(expected, abs=0.05 * float((effects[chosen] ** 2).sum()))
        assert low <= value <= high


def test_few_draws_of_unrelated_operators_are_a_plain_sum() -> None:
    effects = np.random.default_rng(0).normal(size=(40, 4000))
    found = drawn(effects, 8)
    value, _, _ = found.joint(set(found.names))
    assert value == pytest.approx(float((effects**2).sum()), rel=0.15)


def test_what_sits_in_one_sample_shows_no_interactions() -> None:
    """Eight samples with four probes each, of which one loses nearly all: its four cosines are noise, not 32 draws."""
    effects = np.random.default_rng(0).normal(size=(40, 4000))
    found = drawn(effects, 32)
    found.signed[:, :4] *= 100
    assert found.error(set(found.names)) == pytest.approx(float((effects**2).sum()), rel=0.05)


def test_nothing_quantized_is_no_error() -> None:
    assert drawn(np.ones((2, 3)), 8).joint(set()) == (0.0, 0.0, 0.0)


def test_members_of_a_unit_add_their_signed_sums() -> None:
    def operator(path: str) -> Operator:
        return Operator(path, "lm", 0, path, "fused", "Linear", 4, 4, 16, "qwen2_5_vl")

    rows = [
        (op, "s0", probe, value * (1 if probe else -1), "kl", "w8")
        for op, value in (("a", 1.0), ("b", 2.0))
        for probe in (0, 1)
    ]
    frame = pd.DataFrame(rows, columns=["op", "sample", "probe", "signed", "metric", "scheme"])
    unit = Unit("fused", (operator("a"), operator("b")), {"w8": 9.0, LEAVE: 0.0})
    found = interactions_from(frame, [unit], "w8", "kl")
    assert found is not None
    assert found.signed.tolist() == [[-3.0, 3.0]]
    assert interactions_from(frame.drop(columns="signed"), [unit], "w8", "kl") is None
    assert interactions_from(frame, [unit], "w8", "squared_error") is None
