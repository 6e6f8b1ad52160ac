"""Mixtures of experts: what only they have. Every family's tests run on them, too (`test_families.py`)."""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch.nn import functional

from benchmarks.jobs import SCHEMES, Silent, make_job
from qvl_hydra.backends import torch as native
from qvl_hydra.blockwise.census import OperatorCensus, warnings
from qvl_hydra.blockwise.ranges import walk
from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.estimators.sketch_run import of_expert
from qvl_hydra.families.experts import ExpertProduct
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator, find_operators
from qvl_hydra.profiles.agreement import compare
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.checkpoint import write_checkpoint
from qvl_hydra.profiles.costs import COSTS
from qvl_hydra.profiles.formats.compressed_tensors import quantization_config
from qvl_hydra.profiles.formats.table import FORMATS
from qvl_hydra.profiles.formats.written import paste, write_formats
from qvl_hydra.profiles.prices import Terms, used
from qvl_hydra.profiles.profile import Profile, weight_values
from qvl_hydra.profiles.storable import not_storable
from qvl_hydra.profiles.units import units_from_scores
from qvl_hydra.quantization.apply import make_quantizer, quantized
from qvl_hydra.quantization.qdq import weight_change
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme, WeightFormat, scheme_from_settings
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.table import Scored, score_table
from qvl_hydra.screen import Screen
from qvl_hydra.settings import ProfileSettings
from qvl_hydra.tasks import quantize
from qvl_hydra.tasks.quantize import forward
from qvl_hydra.tasks.sweep import _write_experts
from tests.estimators.test_exact import wavefront_scores
from tests.estimators.test_gauss_newton import exact_trace
from tests.families.shapes import load_made_up, made_up_checkpoint, samples_of
from tests.program import composed

FP8 = Scheme(
    "fp8_dynamic", WeightFormat(8, number="float8_e4m3"),
    ActivationFormat(8, dynamic=True, symmetric=True, number="float8_e4m3"),
)  # fmt: skip
EXPERTS = "model.language_model.layers.{}.mlp.experts"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_checkpoint("experts", tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_made_up(checkpoint)


@pytest.fixture(scope="module")
def operators(model: LoadedModel) -> list[Operator]:
    return find_operators(model.module, "full")


def profile_with(operators: list[Operator], *high: str, scheme: Scheme = FP8) -> Profile:
    """Everything but convolutions quantized, and what the globs name left."""
    kept = {op.path for op in operators if any(fnmatch.fnmatch(op.path, glob) for glob in high)}
    decided = tuple(op for op in operators if not op.kind.startswith("Conv"))
    return Profile(scheme, decided, frozenset(kept), 16, "test")


def test_a_product_is_each_tokens_own_experts() -> None:
    torch.manual_seed(0)
    product = ExpertProduct(torch.randn(4, 5, 3), active=2)
    x, g = torch.randn(12, 3), torch.randn(12, 5)
    product.chosen = torch.randint(0, 3, (12,))  # one expert is given nothing
    weights = product.weight.view(4, 5, 3)
    for slot, expert in enumerate(product.chosen.tolist()):
        torch.testing.assert_close(product(x)[slot], functional.linear(x[slot], weights[expert]))
        torch.testing.assert_close(product.back(g, product.weight)[slot], g[slot] @ weights[expert])


def test_published_checkpoints_have_the_transposed_layout(
    checkpoint: Path, model: LoadedModel, tmp_path: Path
) -> None:
    """Transformers turns it round when it loads, and so does the reader of streamed models."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    stored = load_file(checkpoint / "model.safetensors")
    turned = {key: value.mT.contiguous() if ".mlp.experts." in key else value for key, value in stored.items()}
    save_file(turned, tmp_path / "model.safetensors", {"format": "pt"})
    path = f"{EXPERTS.format(0)}.gate_up_proj"
    held = model.module.get_submodule(path).weight
    assert {stored[path].shape, turned[path].shape} == {(5, 40, 32), (5, 32, 40)}
    for placement in ("resident", "streamed"):
        other = load_made_up(tmp_path, placement=placement)
        with other.weights([path]):
            assert torch.equal(other.module.get_submodule(path).weight, held)


def test_a_block_has_two_operators_and_one_unit(operators: list[Operator]) -> None:
    own = [op for op in operators if op.experts > 1]
    assert [op.path for op in own] == [
        f"{EXPERTS.format(block)}.{name}" for block in (0, 2) for name in ("gate_up_proj", "down_proj")
    ]
    assert {op.group for op in own} == {EXPERTS.format(0), EXPERTS.format(2)}
    shapes = [(op.in_features, op.out_features, op.experts, op.active) for op in own[:2]]
    assert shapes == [(32, 40, 5, 2), (20, 32, 5, 2)]
    assert weight_values(own[0]) == own[0].n_params == 5 * 40 * 32
    dense = [op.role for op in operators if op.path.startswith("model.language_model.layers.1.mlp")]
    assert dense == ["gate_proj", "up_proj", "down_proj"]
    assert not any("mlp.gate." in op.path or op.path.endswith("mlp.gate") for op in operators)


def test_curvature_adds_up_over_experts(model: LoadedModel, checkpoint: Path, tmp_path: Path) -> None:
    sample = samples_of(checkpoint)[0]
    job = make_job(model, (sample,), SCHEMES["w8a16"], "lm", name="hawq_v2", positions="answer", probes=32)
    job = dataclasses.replace(job, operators=tuple(op for op in job.operators if op.experts > 1))
    native.run(job, RunFolder(tmp_path), Silent())
    frame = RunFolder(tmp_path).frame()
    for op in job.operators:
        values = frame[(frame["metric"] == "trace") & (frame["op"] == op.path)]["value"]
        expected = exact_trace(model, sample, op.path, leading=447)
        assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5 + 0.02 * expected, op.path


def test_bytes_and_time_count_the_experts_that_are_used(operators: list[Operator]) -> None:
    op = next(op for op in operators if op.experts > 1)
    one, many = (Terms({}, lengths=ProfileSettings(requests=count)) for count in (1, 1000))
    whole = COSTS["weight_bytes"].load()(op, None, one)
    assert whole == 2 * op.n_params
    assert COSTS["bytes_per_token"].load()(op, None, one) == pytest.approx(whole * 2 / 5)
    assert COSTS["bytes_per_token"].load()(op, None, many) == pytest.approx(whole / 1000)  # some token goes to each
    draws = torch.stack([torch.stack([torch.randperm(5)[:2] for _ in range(3)]).flatten() for _ in range(4000)])
    touched = torch.tensor([len(set(row.tolist())) for row in draws]).double().mean() / 5
    assert used(op, 3) == pytest.approx(float(touched), abs=0.01)


def names_in_vllm(operators: list[Operator], convention: str) -> dict[str, Operator | None]:
    """Every linear module that a runtime has, unfused, with the operator it belongs to; routers belong to none."""
    found: dict[str, Operator | None] = {}
    family = FAMILIES["qwen3_vl_moe"]
    for op in operators:
        if op.experts == 1:
            found |= {family.renamed(op.path, convention): op} if op.kind == "Linear" else {}
            continue
        parent, _, product = op.path.rpartition(".")
        parts = ("gate_proj", "up_proj") if product == "gate_up_proj" else ("down_proj",)
        for expert in range(op.experts):
            found |= {family.renamed(f"{parent}.{expert}.{part}", convention): op for part in parts}
        found[family.renamed(parent.removesuffix("experts") + "gate", convention)] = None
    return found


def matched(entries: list[str], name: str) -> bool:
    return any(re.match(e[3:], name) if e.startswith("re:") else e == name for e in entries)


@pytest.mark.parametrize("convention", ["hugging_face", "vllm"])
@pytest.mark.parametrize("high", [(), ("*layers.2.mlp.experts*", "lm_head"), ("*experts*",)])
def test_lists_for_runtimes_mean_the_profile(
    operators: list[Operator], convention: str, high: tuple[str, ...]
) -> None:
    profile = profile_with(operators, *high)
    low = {op.path for op in profile.low}
    config = quantization_config(profile, operators, convention)
    pasted = paste(profile, operators, FORMATS["compressed_tensors"])["leave"]
    for name, op in names_in_vllm(operators, convention).items():
        left = op is None or op.path not in low
        assert matched(config["ignore"], name) == left, name
        assert matched(pasted, name) == left, name


def test_several_formats_name_the_experts_of_each(operators: list[Operator]) -> None:
    int8 = Scheme("w8a8_int", WeightFormat(8), ActivationFormat(8, dynamic=True, symmetric=True))
    others = {op.path: int8 for op in operators if op.path.startswith(EXPERTS.format(2))}
    profile = dataclasses.replace(profile_with(operators, "lm_head"), others=others)
    groups = quantization_config(profile, operators, "vllm")["config_groups"].values()
    targets = {group["weights"]["type"]: group["targets"] for group in groups}
    for name, op in names_in_vllm(operators, "vllm").items():
        if op is not None and op.path != "lm_head":
            mine, other = ("int", "float") if op.path in others else ("float", "int")
            assert matched(targets[mine], name), name
            assert not matched(targets[other], name), name
        else:
            assert not any(matched(entries, name) for entries in targets.values()), name


def test_what_has_no_names_for_experts_says_so(operators: list[Operator], tmp_path: Path) -> None:
    profile = profile_with(operators, scheme=Scheme("w8a8_static", WeightFormat(8), ActivationFormat(8)))
    records = {record["format"]: record for record in write_formats(profile, operators, (), tmp_path)}
    assert "paste" in records["compressed_tensors"]
    assert "paste" in records["llm_compressor"]
    for name in ("auto_round", "tensorrt_llm"):
        assert "experts.gate_up_proj (Experts)" in records[name]["error"], records[name]
        assert "operators.exclude=['*experts*']" in records[name]["error"]


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("name", ["w8a8_int", "fp8_dynamic", "fp8"])
def test_quantized_experts_are_stored_one_by_one(
    checkpoint: Path, operators: list[Operator], name: str, tmp_path: Path
) -> None:
    """With the numbers of QDQ; those left as published checkpoints have them; all of it from a streamed model, too."""
    pytest.importorskip("compressed_tensors")
    scheme = scheme_from_settings(scheme_settings(name))
    profile = profile_with(operators, "*layers.2.mlp.experts*", scheme=scheme)
    found = []
    for placement in ("resident", "streamed"):
        model = load_made_up(checkpoint, placement=placement)
        quantizers = Quantizers(model, profile.operators, samples_of(checkpoint), "full", [scheme])
        write_checkpoint(model, profile, quantizers, tmp_path / placement)
        found.append(load_file(tmp_path / placement / "model.safetensors"))
    stored, again = found
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in stored.items())
    for op in (op for op in operators if op.experts > 1):
        parent, _, product = op.path.rpartition(".")
        if op.path in profile.high:
            weight = load_made_up(checkpoint).module.get_submodule(op.path).weight
            assert torch.equal(stored[op.path].mT.reshape_as(weight), weight)
            continue
        parts = ("gate_proj", "up_proj") if product == "gate_up_proj" else ("down_proj",)
        names = [f"{parent}.{expert}.{part}" for expert in range(op.experts) for part in parts]
        ours = quantizers[op.path]
        theirs = torch.cat([stored[f"{key}.weight"].float() * stored[f"{key}.weight_scale"] for key in names])
        assert torch.allclose(theirs, ours.weight, rtol=1e-6, atol=0)
        if ours.input is not None:
            scales = torch.cat([stored[f"{key}.input_scale"] for key in names])
            assert torch.allclose(scales, torch.tensor(ours.input.scale))


@pytest.mark.compressed_tensors
def test_a_mixture_whose_experts_are_left_is_read_by_transformers(
    model: LoadedModel, checkpoint: Path, operators: list[Operator], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    profile, samples = profile_with(operators, "*experts*"), samples_of(checkpoint)
    quantizers = Quantizers(model, profile.operators, samples, "full", [FP8])
    write_checkpoint(model, profile, quantizers, tmp_path)
    loaded, info = model.family.load_class().from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    forward(loaded.eval(), samples[2])  # decompresses
    text = [sample for sample in samples if sample.pixel_values is None]  # a vision token's scale is another
    found = compare(lambda sample: forward(loaded, sample), model, profile, quantizers, text, "full")
    assert found.relative_difference < 0.2, found


@pytest.mark.compressed_tensors
def test_task_quantize_says_what_reads_quantized_experts(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    text = io.StringIO()
    settings = composed(
        "experiment=quantize_mixed", "model=qwen3_vl_30b_a3b", f"model.path={checkpoint}", "model.dtype=float32",
        "model.placement=streamed", "profile.choices=[w8a8_int,leave]", "profile.values=[9]", "calibration.size=2",
        "profile.evaluation_size=2", "profile.candidates=1", "strategy.estimator=sketch", "tracking.enabled=false",
    )  # fmt: skip
    quantize.run(settings, RunFolder(tmp_path), Screen(console=Console(file=text, width=300)))
    assert "quantized experts are stored one by one, as vLLM reads them" in text.getvalue()
    stored = load_file(tmp_path / "compressed_tensors" / "model.safetensors")
    assert f"{EXPERTS.format(0)}.4.up_proj.weight_scale" in stored


@pytest.mark.parametrize(("name", "stored"), [("w8a8_static", False), ("w8a8_int", True), ("fp8", True)])
def test_experts_that_nobody_would_load_are_not_stored(operators: list[Operator], name: str, stored: bool) -> None:
    scheme = scheme_from_settings(scheme_settings(name))
    for op in operators:
        if not op.kind.startswith("Conv"):
            assert (not_storable(op, scheme) is None) == (stored or op.experts == 1)


def test_blocks_of_two_products_are_not_stored(operators: list[Operator]) -> None:
    """128 rows may hold the last of gate_proj and the first of up_proj."""
    scheme = scheme_from_settings(scheme_settings("fp8_block"))
    (op, *_) = [op for op in operators if op.experts > 1]
    even, odd = (dataclasses.replace(op, out_features=2 * rows, in_features=128) for rows in (256, 192))
    assert not_storable(even, scheme) is None
    assert "whole blocks of 128 rows, and it has 192" in (not_storable(odd, scheme) or "")


def test_a_units_score_is_that_of_both_products(operators: list[Operator]) -> None:
    table = pd.DataFrame([{"op": op.path, "status": "scored", "reason": "", "score": 1.0} for op in operators])
    units = {unit.name: unit for unit in units_from_scores(operators, {"fp8_dynamic": table}, ["fp8_dynamic", "leave"])}
    assert units[EXPERTS.format(0)].scores == {"fp8_dynamic": 2.0, "leave": 0.0}


def test_experts_of_every_token_are_counted(model: LoadedModel, checkpoint: Path) -> None:
    samples = samples_of(checkpoint)
    walker = Walker(model, "lm")
    contexts = walker.contexts(samples)
    ranges, _ = walk(walker, contexts, walker.starts(contexts), walker.operators, (), lambda: None)
    chosen: list[torch.Tensor] = []
    mixture = model.module.get_submodule("model.language_model.layers.2.mlp")
    hook = mixture.gate.register_forward_hook(lambda module, given, result: chosen.append(result[2].flatten()))
    for sample in samples:
        reference_output(model.module, sample, "lm")
    hook.remove()
    expected = torch.cat(chosen).bincount(minlength=5).tolist()
    for product in ("gate_up_proj", "down_proj"):
        assert ranges.census.found[f"{EXPERTS.format(2)}.{product}"].tokens == expected
    assert sum(expected) == 2 * sum(len(sample.input_ids) for sample in samples)


def test_single_experts_are_scored_as_if_each_alone_were_rounded(
    model: LoadedModel, checkpoint: Path, tmp_path: Path
) -> None:
    """Against the whole model with one expert's weight rounded at a time; experts without a token score zero."""
    sample, scheme = samples_of(checkpoint)[0], SCHEMES["w8a16"]
    assert scheme.weight is not None
    job = make_job(model, (sample,), scheme, "lm", estimator="sketch", probes=256, reduction="sequence")
    job = dataclasses.replace(
        job, operators=tuple(op for op in job.operators if op.experts > 1), single_experts=True,
        strategy=dataclasses.replace(job.strategy, metric="squared_error", positions="all"),
    )  # fmt: skip
    native.run(job, RunFolder(tmp_path), Silent())
    frame = RunFolder(tmp_path).frame()
    table, _ = score_table(Scored(job.operators, frame, {}, "squared_error", "u", scheme.name))
    assert table["op"].tolist() == [op.path for op in job.operators]
    found = frame[frame["metric"] == of_expert("squared_error")].groupby("op")["value"].mean()
    reference = reference_output(model.module, sample, "lm")
    expected: dict[str, float] = {}
    for op in job.operators:
        weight = model.module.get_submodule(op.path).weight
        change, rows = weight_change(weight, scheme.weight), op.out_features
        for expert in range(op.experts):
            own = slice(expert * rows, (expert + 1) * rows)
            before = weight[own].clone()
            with torch.no_grad():
                weight[own] += change[own]
                output = reference_output(model.module, sample, "lm")
                weight[own] = before
            expected[f"{op.path}.{expert}"] = float((output.double() - reference.double()).square().sum())
    assert set(found.index) == set(expected)
    assert sum(value == 0 for value in expected.values()) == (found == 0).sum()
    names = [name for name, value in expected.items() if value > 0]
    assert len(names) > 10
    ratios = [found[name] / expected[name] for name in names]
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1, abs=0.1)
    assert sum(abs(ratio - 1) < 0.35 for ratio in ratios) >= len(ratios) - 1  # a change can reroute a token
    assert spearmanr(found[names], [expected[name] for name in names]).statistic > 0.95
    _write_experts(RunFolder(tmp_path), frame, "squared_error", scheme.name)
    written = pd.read_parquet(tmp_path / "experts.parquet")
    by_name = {f"{row['op']}.{row['expert']}": row["score"] for row in written.to_dict("records")}
    assert by_name == pytest.approx(found.to_dict())


def test_experts_that_saw_no_token_are_told() -> None:
    used_all = {"b.experts.down_proj": OperatorCensus(tokens=[1, 2])}
    (said,) = warnings({"a.experts.down_proj": OperatorCensus(tokens=[3, 0, 1, 0])} | used_all)
    assert "a.experts.down_proj has 2 of 4, the most of 1 operators" in said
    assert not warnings(used_all)


def test_flips_are_the_choices_that_change(model: LoadedModel, checkpoint: Path) -> None:
    """Against the routers' own choices, with one operator at a time quantized coarsely."""
    coarse = Scheme("w2a16", WeightFormat(2), None)
    sample = samples_of(checkpoint)[0]
    found = wavefront_scores(model, (sample,), "lm", coarse)[0]

    def choices() -> dict[int, torch.Tensor]:
        seen: dict[int, torch.Tensor] = {}
        hooks = [
            model.module.get_submodule(f"model.language_model.layers.{block}.mlp.gate").register_forward_hook(
                lambda module, given, result, block=block: seen.update({block: result[2]})
            )
            for block in (0, 2)
        ]
        reference_output(model.module, sample, "lm")
        for hook in hooks:
            hook.remove()
        return seen

    before = choices()
    flipped = 0.0
    for op in find_operators(model.module, "lm"):
        with quantized(model.module, {op.path: make_quantizer(model.module, op.path, coarse, {})}):
            after = choices()
        behind = [block for block in (0, 2) if op.block is not None and op.block <= block]
        others = [
            len(set(one.tolist()) - set(other.tolist()))
            for block in behind
            for one, other in zip(after[block], before[block], strict=True)
        ]
        expected = sum(others) / (2 * len(others)) if others else 0.0
        assert found[op.path]["routing_flips"] == pytest.approx(expected), op.path
        flipped += expected
    assert flipped > 0
