"""Observers against PyTorch's own, and against numpy's percentiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver

from qvl_hydra.quantization.observers import RangeObserver
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme

FORMS = {"asymmetric": ActivationFormat(8), "symmetric": ActivationFormat(8, symmetric=True)}


def observer(kind: str, form: ActivationFormat = FORMS["asymmetric"], percentile: float = 99.99) -> RangeObserver:
    return RangeObserver(form, Scheme("s", None, form, observer=kind, percentile=percentile))  # type: ignore[arg-type]


def batches() -> list[Tensor]:
    """Skewed activations whose range grows from tensor to tensor."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 50, 16, generator=generator).exp() * scale - 1 for scale in (1.0, 0.5, 3.0)]


@pytest.mark.parametrize(("kind", "peers"), [("minmax", MinMaxObserver), ("histogram", HistogramObserver)])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parameters_are_pytorchs(form: ActivationFormat, kind: str, peers: Any) -> None:
    qscheme, dtype = (
        (torch.per_tensor_symmetric, torch.qint8) if form.symmetric else (torch.per_tensor_affine, torch.quint8)
    )
    peer, own = peers(dtype=dtype, qscheme=qscheme), observer(kind, form)
    for batch in batches():
        peer(batch)
        own.observe(batch)
    scale, zero = peer.calculate_qparams()
    assert (own.params().scale, own.params().zero_point) == (float(scale), int(zero))


@pytest.mark.parametrize("percentile", [99.0, 99.9, 90.0])
def test_percentile_is_numpys(percentile: float) -> None:
    """To within a bin of the histogram at either end, on a million values."""
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).mul(0.5).exp() - 1.5
    own = observer("percentile", percentile=percentile)
    for batch in x.chunk(4):
        own.observe(batch)
    params = own.params()
    outside = (100 - percentile) / 2
    low, high = np.percentile(x.numpy(), [outside, 100 - outside])
    assert low < 0 < high
    found_low, found_high = -params.zero_point * params.scale, (255 - params.zero_point) * params.scale
    bin_width = float(x.max() - x.min()) / 2048
    assert found_high - found_low == pytest.approx(high - low, abs=4 * bin_width)
    assert found_low == pytest.approx(low, abs=2 * bin_width + params.scale)  # the zero point is a whole number
    assert found_high < float(x.max()) * 0.9


def test_a_percentile_of_100_is_the_whole_range() -> None:
    whole, own = observer("minmax"), observer("percentile", percentile=100)
    for batch in batches():
        whole.observe(batch)
        own.observe(batch)
    assert own.params().scale == pytest.approx(whole.params().scale, rel=2e-3)


@pytest.mark.parametrize("kind", ["minmax", "percentile", "histogram"])
def test_nothing_observed(kind: str) -> None:
    own = observer(kind)
    own.observe(torch.empty(0, 5))
    with pytest.raises(ValueError, match="not finite"):
        own.params()


@pytest.mark.parametrize("kind", ["minmax", "percentile", "histogram"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_value_that_is_not_finite(kind: str, value: float, first: bool) -> None:
    own, sound = observer(kind), torch.randn(8, 8)
    broken = sound.clone()
    broken[3, 3] = value
    for batch in (broken, sound) if first else (sound, broken):
        own.observe(batch)
    with pytest.raises(ValueError, match="not finite"):
        own.params()


@pytest.mark.parametrize("kind", ["minmax", "percentile", "histogram"])
def test_a_constant(kind: str) -> None:
    """Scales stay above zero, and the constant itself survives."""
    for value in (0.0, 2.5, -2.5):
        own = observer(kind)
        own.observe(torch.full((4, 4), value))
        params = own.params()
        assert params.scale > 0
        rounded = (round(value / params.scale) + params.zero_point - params.zero_point) * params.scale
        assert rounded == pytest.approx(value, abs=params.scale)
