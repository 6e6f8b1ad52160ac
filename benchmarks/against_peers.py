"""Plans among several formats beside those of ModelOpt's search and of the formulas of others, at equal bits.

    python -m benchmarks.against_peers [--models ...] [--seeds 5] [--folder <checkpoint>] [--peers modelopt autoscheme]

Language tower and head, the same 32 calibration samples for all, three lists of choices. ModelOpt (extra `modelopt`)
scores and searches by itself (`auto_quantize`, gradient, given the component alone, since it turns image-text scoring
away); the bits of its plan, counted as ours are, are the budget of the others. Its NVFP4 needs a GPU: without one, that
list is without it. AutoRound's AutoScheme (extra `autoround`) scores and searches by itself, too, on the text of the
same samples: for a language tower it takes no images. The bits of its plans are a second budget of ours. The formulas
(`benchmarks.peers`) are ModelOpt's (squared gradient x change) and that of AutoScheme (L1 of the same), both in our
solver. Every plan is measured by QDQ on 128 held-out samples. Each way runs in a process of its own: seconds of scoring
and search, and the process's largest memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import queue
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.jobs import BUNDLED, Silent, bundled_model, make_job, save_results
from benchmarks.peers import peer_scores
from qvl_hydra.backends.torch import run
from qvl_hydra.calibration.encode import load_processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.estimators.auto import CONTROLS
from qvl_hydra.models.load import LoadedModel, describe_model, load_model
from qvl_hydra.profiles.apply import Quantizers
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.measure import measure_profiles
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import Budget, plan_profile, select, several
from qvl_hydra.profiles.units import Unit, units_from_scores, units_with_values
from qvl_hydra.quantization.scheme import Scheme, scheme_from_settings
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.table import Scored, score_table
from qvl_hydra.settings import CalibrationSettings, ModelSettings

CHOICES = (("w4a16", "w8a8_int"), ("w4a16", "fp8_dynamic"), ("nvfp4", "fp8_dynamic"))
ON_GPU = "nvfp4"  # what ModelOpt computes on a GPU alone
TARGETS = (4.75, 5.5, 6.5, 7.5, 9.0)  # ModelOpt's effective bits
PEERS = {
    "modelopt": "modelopt", "autoscheme": "AutoScheme", "elementwise": "ModelOpt's formula",
    "L1": "AutoRound's formula",
}  # fmt: skip
SEARCHES = ("modelopt", "autoscheme")  # of others, which find plans by themselves
BESIDE = {"autoscheme": "ours, AutoScheme's bits"}  # what a way is compared with, where it is not `ours`
SAMPLES, HELD_OUT, CANDIDATES = 32, 128, 8
TEXT_TOKENS = 256  # of AutoScheme's sequences, its default
Plan = dict[str, str]  # choice of each operator


def model_of(name: str) -> LoadedModel:
    """A bundled model by name, or a checkpoint folder."""
    if name in BUNDLED:
        return bundled_model(name)
    return load_model(describe_model(ModelSettings(Path(name).name, name, None)), torch.device("cpu"), 0)


def samples_of(model: LoadedModel, seed: int, split: str, count: int) -> tuple[Sample, ...]:
    settings = CalibrationSettings("bundled", size=count, seed=seed, split=split)  # type: ignore[arg-type]
    return load_calibration(settings, load_processor(model.description.folder)).samples


def schemes_of(names: tuple[str, ...]) -> dict[str, Scheme]:
    return {name: scheme_from_settings(scheme_settings(name)) for name in names}


def units_of(model: LoadedModel, samples: tuple[Sample, ...], names: tuple[str, ...]) -> list[Unit]:
    """Units with our scores by the default: KL at the answer, `auto`, one probe, every sample."""
    schemes = schemes_of(names)
    job = make_job(
        model, samples, schemes[names[0]], name="kl", metric="kl", positions="answer", estimator="auto", probes=1
    )
    job = dataclasses.replace(job, schemes=tuple(schemes.values()))
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        report = run(job, folder, Silent())
        frame, controls, endings = folder.frame(), folder.recall(CONTROLS, {}), folder.endings()
    tables = {}
    for name in names:
        own = frame[frame["scheme"] == name]
        scored = Scored(job.operators, own, endings, report.metric, report.unit, name, controls=controls.get(name, ()))
        tables[name], _ = score_table(scored)
    return units_from_scores(job.operators, tables, (*names, LEAVE))


def ours(name: str, seed: int, names: tuple[str, ...], bits: list[float]) -> list[Plan]:
    """What a run decides: the best measured on the calibration samples of the best by the sum of scores."""
    model = model_of(name)
    samples = samples_of(model, seed, "calibration", SAMPLES)
    units, terms = units_of(model, samples, names), Terms(schemes_of(names))
    pools = [several(units, Budget("average_bits", value), terms, CANDIDATES) for value in bits]
    operators = pools[0][0].operators
    quantizers = Quantizers(model, operators, samples, "lm", list(terms.schemes.values()))
    flat = [plan for pool in pools for plan in pool]
    errors = iter(measure_profiles(model, flat, quantizers, samples, "lm"))
    found = []
    for pool in pools:
        own = [next(errors).kl_typical for _ in pool]
        found.append(plan_of(pool[int(np.argmin(own))]))
    return found


def formula(name: str, seed: int, names: tuple[str, ...], bits: list[float], peer: str) -> list[Plan]:
    """A formula of `benchmarks.peers` in our solver."""
    model = model_of(name)
    samples = samples_of(model, seed, "calibration", SAMPLES)
    terms = Terms(schemes_of(names))
    job = make_job(model, samples, terms.schemes[names[0]])
    members: dict[str, list[Any]] = {}
    for op in job.operators:
        members.setdefault(op.group, []).append(op)
    units = [Unit(group, tuple(ops), {LEAVE: 0.0, **dict.fromkeys(names, 0.0)}) for group, ops in members.items()]
    for scheme in terms.schemes.values():
        values = peer_scores(dataclasses.replace(job, schemes=(scheme,)), samples)[peer]
        units = units_with_values(units, scheme.name, values)
    return [plan_of(select(units, Budget("average_bits", value), terms)) for value in bits]


def modelopt(name: str, seed: int, names: tuple[str, ...], targets: list[float]) -> list[Plan]:
    """ModelOpt's own scores and search; one scoring for all budgets, by its own checkpoint."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.algorithms import QuantRecipe

    from qvl_hydra.backends import modelopt as backend
    from qvl_hydra.backends.neural_compressor.wrapper import ComponentWrapper, WrapperBatch, wrapper_input

    presets = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
               "w4a16": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG}  # fmt: skip
    formats = []
    for scheme in names:
        preset = presets.get(scheme)
        # Of a preset its quantizers alone: what follows switches the head off, which is a candidate here.
        cut = backend.quant_format(schemes_of((scheme,))[scheme]) if preset is None else {
            "quant_cfg": [entry for entry in preset["quant_cfg"][:3] if entry.get("enable", True) or
                          entry["quantizer_name"] == "*"],
            "algorithm": "max",
        }  # fmt: skip
        formats.append(cut)
    signatures = [QuantRecipe(cut, name="own").checkpoint_signature for cut in formats]
    recipes = dict(zip(signatures, names, strict=True))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            model = model_of(name)
            samples = samples_of(model, seed, "calibration", SAMPLES)
            wrapper = ComponentWrapper(model.module, "lm")
            items = [wrapper_input(model.module, sample, "lm") for sample in samples]
            wanted = {op.path for op in make_job(model, samples, schemes_of(names)[names[0]]).operators}
            with backend._quiet():
                mtq.auto_quantize(
                    wrapper,
                    constraints={"effective_bits": target},
                    quantization_formats=formats,
                    data_loader=items,
                    forward_step=lambda module, item: module(WrapperBatch([item])),
                    loss_func=backend._loss,
                    disabled_layers=backend._others(wrapper, wanted),
                    num_calib_steps=len(items),
                    num_score_steps=len(items),
                    method="gradient",
                    checkpoint=f"{folder}/scores.pth",
                )
            plan = dict.fromkeys(wanted, LEAVE)
            for _, hparam in backend._hparams(wrapper):
                choice = recipes.get(hparam.active.checkpoint_signature, LEAVE)
                plan.update(dict.fromkeys(set(hparam.quant_module_names) & wanted, choice))
            found.append(plan)
    return found


def autoscheme(name: str, seed: int, names: tuple[str, ...], targets: list[float]) -> list[Plan]:
    """AutoScheme's own scores and search; its sequences are the samples' texts, each filled up with those after it."""
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.schemes import FP8_STATIC, INT8, NVFP4, W4A16

    dynamic = {"act_group_size": -1, "act_dynamic": True}  # a scale a token
    options = {"w4a16": W4A16, "w8a8_int": INT8, "nvfp4": NVFP4,
               "fp8_dynamic": dataclasses.replace(FP8_STATIC, **dynamic)}  # fmt: skip
    model = model_of(name)
    samples = samples_of(model, seed, "calibration", SAMPLES)
    tokenizer: Any = load_processor(model.description.folder).tokenizer
    image = model.config.image_token_id
    texts = [tokenizer.decode([int(i) for i in sample.input_ids if int(i) != image]) for sample in samples]
    wanted = [op.path for op in make_job(model, samples, schemes_of(names)[names[0]]).operators]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        rows = [_filled(texts[place:] + texts[:place], tokenizer) for place in range(len(texts))]
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        asked = AutoScheme(
            avg_bits=list(targets), options=[*(options[scheme] for scheme in names), "BF16"], nsamples=len(rows),
            seqlen=TEXT_TOKENS, low_gpu_mem_usage=False, low_cpu_mem_usage=False,
        )  # fmt: skip
        made = GenScheme(
            asked, model.module, wanted, {}, dataset=str(path), tokenizer=tokenizer, device_map="cpu",
            enable_torch_compile=False,
        )  # fmt: skip
        found = made.get_layer_config()
    kinds = {(options[scheme].data_type, options[scheme].bits, options[scheme].act_bits): scheme for scheme in names}
    return [
        {
            path: kinds.get((own.get("data_type"), own.get("bits"), own.get("act_bits")), LEAVE)
            for path, own in found[target].items()
        }
        for target in targets
    ]


def _filled(texts: list[str], tokenizer: Any) -> str:
    """As many of the texts as make one sequence."""
    row = ""
    for text in texts * TEXT_TOKENS:
        row += f"{text}\n"
        if len(tokenizer(row)["input_ids"]) > TEXT_TOKENS:
            return row
    return row


def plan_of(profile: Profile) -> Plan:
    return {
        op.path: LEAVE if op.path in profile.high else profile.scheme_of(op).name for op in profile.operators
    }


def profile_of(model: LoadedModel, plan: Plan, names: tuple[str, ...]) -> Profile:
    operators = make_job(model, (), schemes_of(names)[names[0]]).operators
    units = [Unit(op.path, (op,), {LEAVE: 0.0}) for op in operators]
    return plan_profile(units, plan, schemes_of(names), 16, "plan")


def _child(way: Callable[..., list[Plan]], arguments: tuple[Any, ...], answers: Any) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    plans = way(*arguments)
    answers.put((plans, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def in_a_process(way: Callable[..., list[Plan]], *arguments: Any) -> tuple[list[Plan], float, int]:
    """Plans, seconds (the model's loading included) and the largest memory of a fresh process."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_child, args=(way, arguments, answers))
    child.start()
    while True:
        try:
            found: tuple[list[Plan], float, int] = answers.get(timeout=1)
        except queue.Empty:
            if not child.is_alive():
                raise SystemExit(f"{way.__name__} ended without plans, exit status {child.exitcode}") from None
        else:
            child.join()
            return found


def compare(name: str, seed: int, names: tuple[str, ...], peers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of one model, seed and list of choices: one a budget and way."""
    model, plans = model_of(name), {}
    bits = list(TARGETS)
    if "autoscheme" in peers:
        plans["autoscheme"] = in_a_process(autoscheme, name, seed, names, bits)
        own = [profile_of(model, plan, names).average_bits for plan in plans["autoscheme"][0]]
        plans[BESIDE["autoscheme"]] = in_a_process(ours, name, seed, names, own)
    if "modelopt" in peers and (ON_GPU not in names or torch.cuda.is_available()):
        plans["modelopt"] = in_a_process(modelopt, name, seed, names, bits)
        bits = [profile_of(model, plan, names).average_bits for plan in plans["modelopt"][0]]
    plans["ours"] = in_a_process(ours, name, seed, names, bits)
    for peer in ("elementwise", "L1"):
        plans[peer] = in_a_process(formula, name, seed, names, bits, peer)
    plans["ours, one format"] = in_a_process(ours, name, seed, names[:1], bits)
    samples = samples_of(model, seed, "calibration", SAMPLES)
    held = samples_of(model, seed, "evaluation", HELD_OUT)
    profiles = {way: [profile_of(model, plan, names) for plan in own] for way, (own, *_) in plans.items()}
    flat = [profile for own in profiles.values() for profile in own]
    quantizers = Quantizers(model, flat[0].operators, samples, "lm", list(schemes_of(names).values()))
    measured = iter(measure_profiles(model, flat, quantizers, held, "lm"))
    rows = []
    for way, own in profiles.items():
        for target, profile in zip(TARGETS, own, strict=True):
            value = next(measured)
            rows.append(
                {"model": name, "seed": seed, "choices": list(names), "way": way, "target": target,
                 "bits": profile.average_bits, "kl_answer": value.kl_answer,
                 "exact_match": value.exact_match, "seconds": plans[way][1], "bytes": plans[way][2]}
            )  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> Table:
    """Ours against each peer: share of cases at or below it, and the geometric mean of the ratio."""
    table = Table("model", "choices", "beside", "cases", "at or below", "KL ratio, geometric mean", "seconds", "MiB")
    key = ("model", "seed", "target")
    for model in dict.fromkeys(row["model"] for row in rows):
        for names in dict.fromkeys(tuple(row["choices"]) for row in rows):
            own = [row for row in rows if row["model"] == model and tuple(row["choices"]) == names]
            by_way = {way: {tuple(r[k] for k in key): r for r in own if r["way"] == way} for way in
                      ("ours", "ours, one format", *PEERS, *BESIDE.values())}  # fmt: skip
            for way in ("ours, one format", *PEERS):
                if not by_way[way]:
                    continue
                mine_by_case = by_way[BESIDE.get(way, "ours")]
                pairs = [(row, mine_by_case[case]) for case, row in by_way[way].items()]
                below = np.mean([mine["kl_answer"] <= theirs["kl_answer"] + 1e-9 for theirs, mine in pairs])
                ratio = [np.log(max(m["kl_answer"], 1e-7) / max(t["kl_answer"], 1e-7)) for t, m in pairs]
                said = [
                    f"{np.mean([p[side][unit] for p in pairs]) / scale:.0f}"
                    for unit, scale in (("seconds", 1), ("bytes", 2**20))
                    for side in (0, 1)
                ]
                table.add_row(
                    model, "+".join(names), PEERS.get(way, way), str(len(pairs)), f"{below:.2f}",
                    f"{np.exp(np.mean(ratio)):.3f}",
                    f"{said[0]}, ours {said[1]}", f"{said[2]}, ours {said[3]}",
                )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(BUNDLED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", help="a checkpoint folder instead of the bundled models")
    parser.add_argument("--peers", nargs="*", default=list(SEARCHES), choices=SEARCHES)
    asked = parser.parse_args()
    console, rows = Console(width=130), []
    for name in [asked.folder] if asked.folder else asked.models:
        for names in CHOICES:
            for seed in range(asked.seeds):
                rows += compare(name, seed, names, tuple(asked.peers))
            path = save_results("against_peers", rows)
            console.print(summary(rows))
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
