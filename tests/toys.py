"""The worked example of docs/extending.md: one addition to every table, each a function and a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qvl_hydra.backends.table import Backend
from qvl_hydra.estimators.bench import measuring
from qvl_hydra.estimators.job import EngineReport, Progress, SweepJob
from qvl_hydra.estimators.table import Estimator
from qvl_hydra.families.record import Family
from qvl_hydra.families.stages import Stages
from qvl_hydra.families.text import language_segments
from qvl_hydra.models.load import ModelDescription
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.costs import Cost
from qvl_hydra.profiles.formats.rendered import Rendered
from qvl_hydra.profiles.formats.table import Consumer
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.qdq import weight_change
from qvl_hydra.quantization.scheme import Scheme, WeightFormat
from qvl_hydra.runs.folder import RunFolder, SampleScore
from qvl_hydra.settings import Settings


# A model family: a class of transformers that no row knows.
def mistral_stages(module: Any) -> Stages:
    """Stages of a Mistral model: decoder blocks, and the head."""
    return Stages((), (), language_segments(module))


FAMILY = Family("mistral", "MistralForCausalLM", "tests.toys:mistral_stages", language="model", visual=None)


# A number format: multiples of a half.
def halves(weight: Tensor, form: WeightFormat, largest: Tensor | None) -> Tensor:
    """Every value as the nearest multiple of a half."""
    return (weight * 2).round() / 2


FORMAT = dataclasses.replace(FORMATS["int"], name="halves", bits=9, weight=halves, scale_bits=lambda form, inputs: 0.0)


# An estimator over the block walker: the weight's own error, which needs no sample.
def weight_error(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every operator by `||Q(W) - W||^2`."""
    with measuring(job, folder, progress, "weight_error", keep_states=False) as bench:
        for sample in job.scored:
            scores = [
                SampleScore(op.path, sample.id, None, error_of(job, op), "weight_error", "weight_error", scheme.name)
                for scheme in job.schemes
                for op in job.operators
            ]
            folder.write(f"weight_error-{sample.id.replace('/', '_')}", scores)
            progress.step()
    bench.report.metric, bench.report.unit = "weight_error", "squared weights"
    return bench.report


def error_of(job: SweepJob, op: Operator) -> float:
    """`||Q(W) - W||^2` of one operator."""
    weight: Tensor = job.model.module.get_submodule(op.path).weight  # type: ignore[assignment]
    assert job.scheme.weight is not None
    return float(weight_change(weight.detach(), job.scheme.weight).double().square().sum())


ESTIMATOR = Estimator("weight_error", "tests.toys:weight_error", ("requantize",), metric="weight_error")


# A backend: somebody else who measures.
def rehearse(job: SweepJob, folder: RunFolder, progress: Progress) -> EngineReport:
    """Score every operator by its place in the order of the model."""
    for sample in job.scored:
        scores = [
            SampleScore(op.path, sample.id, None, float(place), "place", "rehearsal", job.scheme.name)
            for place, op in enumerate(job.operators, 1)
        ]
        folder.write(sample.id.replace("/", "_"), scores)
    return EngineReport("rehearsal", "place", "places", forward_s=1.0, engine_s=1.0)


def no_bytes(settings: Settings, description: ModelDescription, operators: Sequence[Operator]) -> int:
    """Memory beside the weights."""
    return 0


BACKEND = Backend("rehearsal", "tests.toys:rehearse", "tests.toys:no_bytes", ("kl",), formats=())


# A cost: how many choices are not the usual ones.
def exotic(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """1 for an operator in a scheme that is not w8a8_int."""
    return float(scheme is not None and scheme.name != "w8a8_int")


COST = Cost("exotic", "tests.toys:exotic", unit="operators in other schemes than w8a8_int")


# A consumer: a tool that reads one line an operator.
def lines(profile: Profile, operators: Sequence[Operator]) -> Rendered:
    """Path and scheme of every operator."""
    told: Mapping[str, str] = {op.path: profile.scheme_of(op).name for op in profile.low}
    return Rendered({"plan.txt": "".join(f"{op.path} {told.get(op.path, 'high')}\n" for op in operators)})


CONSUMER = Consumer("lines", "a pager", None, "tests.toys:lines", numbers=("int", "halves"), mixed=True)


def tiny_mistral() -> Any:
    """A random model of the family."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
