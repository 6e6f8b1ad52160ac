"""No tensor stays behind: the native engine on tensors that claim to be on a GPU, where there is none."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.jobs import SCHEMES, make_job, measure
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.estimators import reverse
from qvl_hydra.models import stream
from qvl_hydra.models.load import LoadedModel
from tests.backends.claimed_gpu import GPU, ClaimedGpu, claim, claimed_parameter, claims
from tests.conftest import load_tiny


@pytest.fixture
def _claiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no function mode sees, and what asks the driver."""
    apply, backward = reverse._Tapped.apply, reverse._Tapped.backward

    def claiming_backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        to_input, *rest = backward(ctx, claim(g))
        return claim(to_input), *rest

    monkeypatch.setattr(reverse._Tapped, "backward", staticmethod(claiming_backward))
    monkeypatch.setattr(reverse._Tapped, "apply", staticmethod(lambda *arguments: claim(apply(*arguments))))
    monkeypatch.setattr(stream, "nn", SimpleNamespace(Parameter=claimed_parameter, Module=nn.Module))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (1 << 34, 1 << 34))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _=None: None)


def on_gpu(model: LoadedModel) -> LoadedModel:
    """The model, as if it had been loaded there."""
    for tensor in (*model.module.parameters(), *model.module.buffers()):
        if tensor.device.type != "meta":
            claim(tensor)
    return dataclasses.replace(model, device=GPU)


@pytest.mark.usefixtures("_claiming")
@pytest.mark.parametrize(
    ("component", "scheme", "strategy", "settings"),
    [
        ("full", "w8a8_static", {"estimator": "auto"}, {}),
        ("full", "w8a8_static", {"estimator": "auto"}, {"placement": "streamed"}),
        ("lm", "w8a8_dynamic", {"estimator": "auto", "metric": "kl"}, {"dtype": "bfloat16"}),
        ("lm", "inc_static", {"estimator": "exact"}, {}),
        ("lm", "w4a16", {"direction": "fallback"}, {}),
        ("lm", "w8a8_static", {"estimator": "gradient", "positions": "answer"}, {}),
        ("vision", "w4a16", {"estimator": "auto"}, {}),
        ("lm", "w8a16", {"name": "hawq_v2", "probes": 2, "max_probes": 2}, {}),
    ],
    ids=str,
)
def test_no_tensor_stays_behind(
    tiny_samples: tuple[Sample, ...], component: str, scheme: str, strategy: dict[str, Any], settings: dict[str, str]
) -> None:
    def scores(model: LoadedModel) -> dict[str, float]:
        job = make_job(model, tiny_samples[:2], SCHEMES[scheme], component)
        return measure(dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, **strategy)))[0]

    expected = scores(load_tiny(**settings))
    model = on_gpu(load_tiny(**settings))
    with ClaimedGpu():
        found = scores(model)
    assert found.keys() == expected.keys()
    assert spearmanr(list(found.values()), [expected[op] for op in found]).statistic > 0.98


def test_a_mix_of_devices_is_found() -> None:
    here, there = torch.ones(2), claim(torch.ones(2))
    with ClaimedGpu():
        assert there.device == GPU
        assert here.device.type == "cpu"
        assert claims(there * 2)
        assert claims(here.to(GPU))
        assert not claims(there.cpu())
        assert not claims(here)
        with pytest.raises(RuntimeError, match="mul mixes devices"):
            there * here
