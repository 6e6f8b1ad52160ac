"""task=profile and task=quantize from composed settings to the files of their folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console

from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.errors import CalibrationError, MissingExtraError, OperatorError, ProfileError
from qvl_hydra.models.load import describe_model
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles import storable
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks import profile, quantize, sweep
from qvl_hydra.tasks.beforehand import refuse_beforehand
from qvl_hydra.tracking import content
from tests.program import composed

SMALL = [
    "component=lm",
    "model.weights=random",
    "+model.overrides={text_config.num_hidden_layers: 2, vision_config.depth: 1}",
    "calibration.size=4",
    "strategy.confidence_batches=1",
    "strategy.estimator=exact",
    "profile.evaluation_size=6",
    "tracking.enabled=false",
]


def settings_of(*overrides: str) -> Settings:
    return composed(*SMALL, *overrides)


def screen() -> tuple[Screen, io.StringIO]:
    text = io.StringIO()
    return Screen(console=Console(file=text, width=200)), text


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path, str]:
    settings = settings_of("experiment=profile_spectrum", "component=lm", "operators.exclude=null",
                           "profile.spectrum=[0,0.2,1]", "profile.value=0.2",
                           "profile.compare_with=[llm_compressor]")  # fmt: skip
    folder = tmp_path_factory.mktemp("profiled")
    shown, text = screen()
    profile.run(settings, RunFolder(folder), shown)
    return settings, folder, text.getvalue()


def test_a_profile_run_leaves_everything_that_was_asked_for(profiled: tuple[Settings, Path, str]) -> None:
    _, folder, text = profiled
    table = pd.read_parquet(folder / "profiles.parquet")
    assert set(table["value"]) == {0.0, 0.2, 1.0}
    assert (table["chooser"] == "scores").sum() == 3
    run = json.loads((folder / "run.json").read_text())
    assert (run["task"], run["status"], run["n_scored"]) == ("profile", "complete", 15)
    own = table[(table["chooser"] == "scores") & (table["value"] == 0.2)].iloc[0]
    assert run["profile"]["kl"] == own["kl"]
    assert run["profile"]["n_high"] == own["n_high"] == 3
    assert run["profile"]["exact_match_float"] == table[table["n_high"] == 15]["exact_match"].iloc[0]
    decided = json.loads((folder / "profile.json").read_text())
    assert len(decided["high"]) == 3
    assert len(decided["low"]) == 12
    assert (folder / "exports" / "modelopt" / "quant_cfg.yaml").exists()
    assert (folder / "figures" / "profile_spectrum.png").exists()
    report = (folder / "report.html").read_text()
    assert "Precision profile" in report
    assert "data:image/png;base64," in report
    assert "share=0.2: 3 of 15 operators stay in high precision" in text


def test_the_largest_families_are_measured_alone_and_left_alone(profiled: tuple[Settings, Path, str]) -> None:
    settings, folder, text = profiled
    table = pd.read_parquet(folder / "families.parquet")
    names = ["kl_answer_alone", "kl_answer_won", "exact_match_alone", "exact_match_won"]
    assert table[names].notna().all(axis=1).tolist() == [True] * settings.profile.families + [False] * (len(table) - 5)
    whole = pd.read_parquet(folder / "profiles.parquet").query("n_high == 0").iloc[0]
    assert f"loses {whole['kl_answer']:.3g} nats at the answer; of the 5 largest families" in text
    assert (table["kl_answer_won"].dropna() < whole["kl_answer"]).all()
    assert "KL won by leaving it" in (folder / "report.html").read_text()


def test_a_published_list_is_measured_beside_ours(profiled: tuple[Settings, Path, str]) -> None:
    _, folder, text = profiled
    (row,) = json.loads((folder / "keep_lists.json").read_text())["lists"]
    assert row["kept"] == 1  # of the language tower it names the head alone
    assert [entry["units"] for entry in row["entries"]] == [1, 0]
    assert row["ours"]["kl_answer"] >= 0
    assert row["theirs"]["exact_match"] <= 1
    assert "llm_compressor: re:.*visual.* names nothing that is decided on here" in text
    assert "Lists that others keep" in (folder / "report.html").read_text()


def test_the_curve_is_sent_to_the_tracker(profiled: tuple[Settings, Path, str]) -> None:
    _, folder, _ = profiled
    found = content.metrics(folder)
    curve = {metric.step: metric.value for metric in found if metric.key == "curve/scores/exact_match"}
    own = pd.read_parquet(folder / "profiles.parquet").query("chooser == 'scores'")
    assert curve == dict(zip(own["n_high"], own["exact_match"], strict=True))
    assert {metric.key for metric in found} >= {"profile/exact_match", "curve/first_and_last/kl"}


def test_scores_from_a_folder_give_the_same_profile(profiled: tuple[Settings, Path, str], tmp_path: Path) -> None:
    settings, folder, _ = profiled
    given = dataclasses.replace(settings.profile, scores=str(folder), budget="count", value=3.0, spectrum=[])
    profile.run(dataclasses.replace(settings, profile=given), RunFolder(tmp_path), screen()[0])
    first, second = (json.loads((place / "profile.json").read_text()) for place in (folder, tmp_path))
    assert first["high"] == second["high"]
    assert first["predicted"] == second["predicted"]
    assert len(pd.read_parquet(tmp_path / "scores.parquet")) == 15
    begun, own = (json.loads((place / "run.json").read_text()) for place in (folder, tmp_path))
    said = begun["notes"][begun["n_sweep_notes"] :]
    assert any("measured on 4 scored samples" in note for note in said)
    assert own["notes"][: own["n_sweep_notes"]] == begun["notes"][: begun["n_sweep_notes"]]
    assert sum("measured on 4 scored samples" in note for note in own["notes"]) == 1


def test_scores_in_a_further_scheme_give_its_profile(tmp_path: Path) -> None:
    """As a sweep in that scheme alone does; the first scheme's stay beside."""
    both = settings_of("strategy=kl", "quant=w8a8_static", "quant.also=[w4a16]")
    sweep.run(both, RunFolder(tmp_path / "both"), screen()[0], [scheme_settings("w4a16")])
    own = settings_of("strategy=kl", "task=profile", "quant=w4a16", "profile.families=2")
    profile.run(own, RunFolder(tmp_path / "own"), screen()[0])
    given = dataclasses.replace(own.profile, scores=str(tmp_path / "both"))
    profile.run(dataclasses.replace(own, profile=given), RunFolder(tmp_path / "given"), screen()[0])
    for name in ("profile.json", "run.json"):
        first, second = (json.loads((tmp_path / place / name).read_text()) for place in ("own", "given"))
        assert {key: first.get(key) for key in ("high", "low", "scheme", "predicted")} == {
            key: second.get(key) for key in ("high", "low", "scheme", "predicted")
        }
    assert first["details"]
    assert "details" not in second  # the sweep's are of the first scheme
    first, second = (pd.read_parquet(tmp_path / place / "families.parquet") for place in ("own", "given"))
    pd.testing.assert_frame_equal(first, second)
    first, second = (pd.read_parquet(tmp_path / place) for place in
                     ("both/scores.parquet", "given/scores_w8a8_static.parquet"))  # fmt: skip
    pd.testing.assert_frame_equal(first, second)


def test_operators_left_out_of_scores_at_hand_stay_as_they_are(
    profiled: tuple[Settings, Path, str], tmp_path: Path
) -> None:
    """As if the sweep had left them out: no plan has them, and no family of theirs is measured."""
    settings, folder, _ = profiled
    given = dataclasses.replace(settings.profile, scores=str(folder), budget="count", value=2.0, spectrum=[],
                                compare_with=[])  # fmt: skip
    left = dataclasses.replace(settings.operators, exclude=["*self_attn*", "lm_head"])
    several = dataclasses.replace(given, choices=["w8a8_static", "leave"], budget="share", values=[10.0])
    for name, asked in (("one", given), ("several", several)):
        chosen = dataclasses.replace(settings, operators=left, profile=asked)
        profile.run(chosen, RunFolder(tmp_path / name), screen()[0])
        families = pd.read_parquet(tmp_path / name / "families.parquet")
        measured = families[families["kl_answer_alone"].notna()]
        assert 0 < len(measured) < len(families)
        assert measured["role"].isin(["gate_proj", "up_proj", "down_proj"]).all()
    decided = json.loads((tmp_path / "one" / "profile.json").read_text())
    assert len(decided["high"]) == 2
    assert len(decided["low"]) == 4
    assert all(".mlp." in path for path in decided["low"])
    none = dataclasses.replace(several, values=[1.0])
    with pytest.raises(ProfileError, match="is too small"):
        profile.run(dataclasses.replace(chosen, profile=none), RunFolder(tmp_path / "refused"), screen()[0])
    again = dataclasses.replace(several, scores=str(tmp_path / "refused"))  # has the scores that it was to decide by
    profile.run(dataclasses.replace(chosen, profile=again), RunFolder(tmp_path / "again"), screen()[0])
    first, second = (json.loads((tmp_path / place / "profile.json").read_text()) for place in ("several", "again"))
    assert first == second
    foreign = dataclasses.replace(settings.operators, exclude=["*vision*"])
    wrong = dataclasses.replace(settings, operators=foreign, profile=given)
    with pytest.raises(OperatorError, match="the glob '\\*vision\\*' matches no operator"):
        profile.run(wrong, RunFolder(tmp_path), screen()[0])


def test_an_error_budget_is_held_by_measurement(profiled: tuple[Settings, Path, str], tmp_path: Path) -> None:
    settings, folder, _ = profiled
    table = pd.read_parquet(folder / "profiles.parquet").query("chooser == 'scores'")
    allowed = float(table["kl_answer"].max()) / 3
    given = dataclasses.replace(settings.profile, scores=str(folder), budget="error", value=allowed, spectrum=[])
    shown, text = screen()
    profile.run(dataclasses.replace(settings, profile=given), RunFolder(tmp_path), shown)
    decided = json.loads((tmp_path / "profile.json").read_text())
    assert 0 < len(decided["low"]) < 15
    said = re.search(r"is held: measured on 4 calibration samples the error is (\S+)", text.getvalue())
    assert said
    assert float(said[1]) <= allowed
    record = json.loads((folder / "run.json").read_text()) | {"direction": "fallback"}
    shutil.copytree(folder, tmp_path / "fallback")
    (tmp_path / "fallback" / "run.json").write_text(json.dumps(record))
    refused = dataclasses.replace(given, scores=str(tmp_path / "fallback"))
    with pytest.raises(ProfileError, match="these scores are direction=fallback"):
        profile.run(dataclasses.replace(settings, profile=refused), RunFolder(tmp_path / "refused"), shown)


def test_predictions_with_interactions_stand_beside_the_sum(tmp_path: Path) -> None:
    settings = settings_of("experiment=profile_spectrum", "component=lm", "operators.exclude=null",
                           "strategy.estimator=sketch", "profile.baselines=false")  # fmt: skip
    profile.run(settings, RunFolder(tmp_path), screen()[0])
    table = pd.read_parquet(tmp_path / "profiles.parquet")
    assert table["predicted_joint"].notna().all()
    whole = table[table["n_high"] == 0].iloc[0]
    assert whole["predicted_low"] < whole["predicted_joint"] < whole["predicted_high"]


def test_scores_of_another_scheme_or_component_are_refused(
    profiled: tuple[Settings, Path, str], tmp_path: Path
) -> None:
    _, folder, _ = profiled
    with pytest.raises(ProfileError, match="quant=w8a8_static, here quant=w4a16"):
        profile.run(settings_of("quant=w4a16", f"profile.scores={folder}"), RunFolder(tmp_path), screen()[0])
    with pytest.raises(ProfileError, match="component=lm, here component=full"):
        profile.run(settings_of("component=full", f"profile.scores={folder}"), RunFolder(tmp_path), screen()[0])


def test_scores_of_a_scheme_that_was_another_are_refused(profiled: tuple[Settings, Path, str], tmp_path: Path) -> None:
    """It has the same name: eight bits were scored, and four planned by them."""
    settings, folder, _ = profiled
    kept = Path(shutil.copytree(folder, tmp_path / "kept"))
    (kept / "config.yaml").write_text(yaml.safe_dump({"quant": dataclasses.asdict(settings.quant)}))
    with pytest.raises(ProfileError, match=r"scores of w8a8_static were.*quant\.weight_bits=8, here 4; give this run"):
        profile.run(settings_of("quant.weight_bits=4", f"profile.scores={kept}"), RunFolder(tmp_path), screen()[0])
    with pytest.raises(ProfileError, match=r"quant\.perturb=both, here weight"):
        profile.run(settings_of("quant.perturb=weight", f"profile.scores={kept}"), RunFolder(tmp_path), screen()[0])


@pytest.mark.inc
def test_quantize_compares_neural_compressor_with_qdq(profiled: tuple[Settings, Path, str], tmp_path: Path) -> None:
    pytest.importorskip("neural_compressor")
    _, folder, _ = profiled
    shown, text = screen()
    settings = settings_of("task=quantize", "profile.quantize_with=[inc]", f"profile.scores={folder}")
    quantize.run(settings, RunFolder(tmp_path), shown)
    found = json.loads((tmp_path / "run.json").read_text())["quantize"]["inc"]
    assert found["n_quantized"] == 14  # 0.1 of 15 is one operator
    assert found["reload_difference"] == 0
    assert found["samples"] == 6
    assert found["relative_difference"] < 1
    assert "Quantized by other tools" in (tmp_path / "report.html").read_text()
    assert "inc" in text.getvalue()


CHECKPOINT = "profile.quantize_with=[compressed_tensors]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["profile.budget=average_bits", "profile.value=7"], "average_bits=7 is too small: the cheapest plan has"),
        (["quant=w4a16", "profile.choices=[w4a16,leave]", "profile.values=[6,3]"], "a budget of average_bits=3"),
        (["profile.choices=[w8a8_static,leave]", "profile.spaces=[{match: '*q_proj', choices: [leave]}]"], "in two"),
        (["profile.cost=measured_seconds", "profile.costs=nowhere", "profile.choices=[w8a8_static,leave]"], "no costs"),
        (["profile.budget=error", "profile.value=1", "strategy.direction=fallback"], "scores are direction=fallback"),
        (["profile.budget=error", "profile.value=1", "quant=w4a16", "strategy=hawq_v2"], "metric=omega"),
        (["profile.compare_with=[nowhere]"], "profile.compare_with=nowhere is neither"),
        (["component=vision", "quant=nvfp4", "operators.include=['*patch_embed*']"], "no operator can be"),
        (["task=quantize", "quant=inc_static", CHECKPOINT], "no inc_static: it has quantized outputs"),
        (["task=quantize", "quant=w4a16", "profile.quantize_with=[inc]"], "cannot express this weight format"),
        (["task=quantize", "profile.choices=[w8a8_static,w8a16]", "profile.quantize_with=[inc]"],
         "neural_compressor is written for one scheme"),
        (["task=profile", "quant=w8a8_int", "profile.formats=[modelopt]", "profile.choices=[w8a8_int,w8a16]"],
         "modelopt is written for one scheme, and this profile has"),
        (["task=profile", "quant=fp8_dynamic", "profile.formats=[neural_compressor]"], "has float8_e4m3"),
    ],
)  # fmt: skip
def test_what_cannot_do_whatever_the_scores_is_refused(overrides: list[str], message: str) -> None:
    settings = settings_of(*overrides)
    others = set(settings.profile.choices) - {settings.quant.name, "leave"}
    further = [dataclasses.replace(settings.quant, name=name) for name in others]
    with pytest.raises(ProfileError, match=message):
        refuse_beforehand(settings, further)


def test_a_family_that_neural_compressor_is_not_given_is_refused() -> None:
    settings = composed("task=quantize", "component=vision", "model=tiny_qwen3_vl", "profile.quantize_with=[inc]")
    with pytest.raises(ProfileError, match="Neural Compressor is not given the vision component of qwen3_vl"):
        refuse_beforehand(settings, ())


def test_no_sample_to_measure_on_is_refused(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "what?", "answer": str(number)}) for number in range(5)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    asked = ["task=profile", "calibration=jsonl", f"calibration.path={tmp_path / 'own.jsonl'}"]
    refuse_beforehand(settings_of(*asked), ())
    with pytest.raises(CalibrationError, match="no sample left that scores and ranges have not seen"):
        refuse_beforehand(settings_of(*asked, "calibration.size=5"), ())


def test_it_is_refused_before_the_work(tmp_path: Path) -> None:
    settings = settings_of("task=profile", "quant=fp8_dynamic", "profile.formats=[neural_compressor]")
    with pytest.raises(ProfileError, match="has float8_e4m3"):
        profile.run(settings, RunFolder(tmp_path), screen()[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_spaces_keep_from_a_scheme_need_not_be_written_in_it() -> None:
    asked = ["task=profile", "component=full", "quant=w8a8_int", "profile.choices=[w8a8_int,leave]",
             "profile.formats=[compressed_tensors]"]  # fmt: skip
    with pytest.raises(ProfileError, match=r"cannot express .*patch_embed"):
        refuse_beforehand(settings_of(*asked), ())
    refuse_beforehand(settings_of(*asked, "profile.spaces=[{match: '*patch_embed*', choices: [leave]}]"), ())


@pytest.mark.parametrize(
    ("asked", "message"),
    [("model.placement=streamed", "the whole model in memory"), ("model.dtype=bfloat16", "of float32, not bfloat16")],
)
def test_a_model_that_neural_compressor_cannot_take_is_refused(asked: str, message: str) -> None:
    settings = composed("task=quantize", "component=lm", "profile.quantize_with=[inc]", asked)
    with pytest.raises(ProfileError, match=message):
        refuse_beforehand(settings, ())


@pytest.mark.parametrize("tools", ["compressed_tensors", ""])
def test_a_checkpoint_gets_a_plan_that_it_can_hold(tmp_path: Path, tools: str) -> None:
    """The vision tower's 48 inputs are no whole groups of 32, and the patch embedding is a convolution."""
    pytest.importorskip("compressed_tensors")
    settings = composed(
        *SMALL[3:], "experiment=quantize_mixed", "model=tiny_qwen3_vl", "operators.exclude=null",
        "profile.choices=[w4a16_g32,w8a8_int]", "profile.values=[6]", f"profile.quantize_with=[{tools}]",
    )  # fmt: skip
    shown, text = screen()
    quantize.run(settings, RunFolder(tmp_path), shown, [composed("quant=w4a16_g32").quant])
    plan = json.loads((tmp_path / "profile.json").read_text())
    assert "model.visual.patch_embed.proj" in plan["high"]
    assert any("visual" in path for path in plan["low"])
    said = " ".join(text.getvalue().split())
    assert "cannot be w4a16_g32: a compressed-tensors checkpoint holds whole groups of 32 only, and it has 48" in said
    assert "holds linear modules only, and it is a Conv3d" in said
    assert list(json.loads((tmp_path / "run.json").read_text())["quantize"]) == ["compressed_tensors"]


@pytest.mark.parametrize(("installed", "compared"), [("0.17.1", False), ("0.20.1", True)])
def test_blocks_are_written_where_they_cannot_be_unpacked(
    tmp_path: Path, installed: str, compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compressed-tensors below 0.19, which vLLM 0.32 pins, fails at scales of blocks; vLLM itself reads them."""
    pytest.importorskip("compressed_tensors", minversion="0.19")
    few = ["calibration.size=2", "strategy.estimator=gradient", "profile.evaluation_size=2", "tracking.enabled=false"]
    settings = composed("experiment=quantize_w8a8", "quant=fp8_block", "profile.value=0.8", CHECKPOINT, *few)
    monkeypatch.setattr(storable, "version", lambda name: installed)
    shown, text = screen()
    quantize.run(settings, RunFolder(tmp_path), shown)
    assert (tmp_path / "compressed_tensors" / "model.safetensors").exists()
    said = " ".join(text.getvalue().split())
    why = "compressed-tensors 0.17.1 unpacks no scales of blocks for transformers; 0.19 and newer do"
    assert (why in said) != compared
    assert ("was not compared with QDQ" in said) != compared


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_a_checkpoint_is_written_where_there_is_no_room_to_load_it(
    tmp_path: Path, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    few = ["calibration.size=2", "strategy.estimator=gradient", "profile.evaluation_size=2", "tracking.enabled=false"]
    settings = composed("experiment=quantize_w8a8", "quant=w8a8_int", f"model.placement={placement}", CHECKPOINT, *few)
    monkeypatch.setattr(quantize, "free_memory_bytes", lambda: 1 << 20)
    shown, text = screen()
    quantize.run(settings, RunFolder(tmp_path), shown)
    assert (tmp_path / "compressed_tensors" / "model.safetensors").exists()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["quantize"] == {"compressed_tensors": {"n_quantized": 72}}
    assert any("was not compared with QDQ" in note for note in run["notes"])
    said = " ".join(text.getvalue().split())
    assert "was not compared with QDQ: transformers unpacks it" in said
    assert "takes one scale for all tokens" not in said
    assert "Quantized by other tools" in (tmp_path / "report.html").read_text()
    assert content.plan(tmp_path) is not None


def test_a_plan_that_no_tool_can_quantize_is_an_error(profiled: tuple[Settings, Path, str], tmp_path: Path) -> None:
    """Before anything is scored; with scores at hand, when the tools have said so."""
    odd = ["task=quantize", "quant=w4a16", "quant.weight_symmetric=false"]
    said = "no tool can quantize.*inc: neural_compressor cannot.*; compressed_tensors: .*zero points"
    with pytest.raises(ProfileError, match=said):
        refuse_beforehand(settings_of(*odd), ())
    pytest.importorskip("compressed_tensors")
    odd[1:2] = ["quant.weight_bits=4", "quant.weight_group_size=128", "quant.input_bits=null"]
    if importlib.util.find_spec("neural_compressor") is None:
        said = said.replace("neural_compressor cannot", "quantizing with Neural Compressor needs neural-compressor")
    with pytest.raises(ProfileError, match=said):
        quantize.run(settings_of(*odd, f"profile.scores={profiled[1]}"), RunFolder(tmp_path), screen()[0])


@pytest.mark.inc
def test_neural_compressor_is_given_no_plan_of_several_schemes(tmp_path: Path) -> None:
    """It would put all of them into the first."""
    pytest.importorskip("neural_compressor")
    pytest.importorskip("compressed_tensors")
    settings = settings_of(
        "task=quantize", "quant=w8a8_static", "profile.choices=[w8a8_static,w4a16_g32]", "profile.values=[7.5]"
    )
    shown, text = screen()
    quantize.run(settings, RunFolder(tmp_path), shown, [composed("quant=w4a16_g32").quant])
    assert list(json.loads((tmp_path / "run.json").read_text())["quantize"]) == ["compressed_tensors"]
    assert "inc: neural_compressor is written for one scheme, and this profile has" in text.getvalue()


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is not None, reason="it is installed")
def test_a_tool_that_is_not_installed_is_said_before_the_work(tmp_path: Path) -> None:
    settings = settings_of("task=quantize", "profile.quantize_with=[compressed_tensors]")
    with pytest.raises(MissingExtraError, match=r"qvl-hydra\[profiles\]"):
        quantize.run(settings, RunFolder(tmp_path), screen()[0])
    assert not (tmp_path / "scores.parquet").exists()


def test_operators_that_no_sample_reaches_stay_as_they_are(tmp_path: Path) -> None:
    """Of texts alone the vision tower has no ranges: after the sweep the profile ended for want of them."""
    lines = [{"prompt": f"how many of {n}?", "answer": "two"} for n in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = settings_of(
        "component=full", "calibration=jsonl", f"calibration.path={tmp_path / 'text.jsonl'}", "calibration.size=4",
        "strategy.estimator=sketch", "profile.value=0.7", "profile.baselines=false", "profile.evaluation_size=2",
        "profile.families=0",
    )  # fmt: skip
    profile.run(settings, RunFolder(tmp_path), screen()[0])
    found = json.loads((tmp_path / "profile.json").read_text())
    operators = find_operators(describe_model(settings.model).skeleton, "full")
    vision = {op.path for op in operators if op.component == "vision"}
    assert vision <= set(found["high"])
    assert len(found["high"]) == int(0.7 * len(operators))
