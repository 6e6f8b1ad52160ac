"""task=sweep on the bundled model: what it writes, how every operator ends, what an interruption leaves."""

from __future__ import annotations

import io
import json
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from qvl_hydra.entry.compose import scheme_settings
from qvl_hydra.errors import EngineError, RunFolderError, SettingsError
from qvl_hydra.estimators import exact_run
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import find_operators
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.scores.shrink import ORIGINS
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks import prepare, sweep
from tests.program import composed

SMALL = ("operators.max_ops=5", "calibration.size=4", "strategy.confidence_batches=1")
TEXT = {"op", "component", "role", "group", "status", "reason", "metric", "unit", "estimator"}
NUMBERS = {"score", "score_low", "score_high"}
RECORD = {
    "task", "status", "backend", "device", "strategy", "estimator", "scheme", "component", "model", "n_ops", "n_scored",
    "n_skipped", "n_failed", "n_samples", "calibration_size", "calibration_seed", "wall_s", "engine_s", "forward_s",
    "forward_equivalents", "peak_memory_bytes", "versions", "model_sha", "calibration_sha", "notes", "details",
    "fingerprint",
}  # fmt: skip


def settings_of(*overrides: str) -> Settings:
    return composed(*SMALL, *overrides)


def run(path: Path, *overrides: str) -> tuple[pd.DataFrame, dict[str, object]]:
    """Run a sweep: its table and its record."""
    settings = settings_of(*overrides)
    sweep.run(settings, RunFolder(path), Screen(), [scheme_settings(name) for name in settings.quant.also])
    return pd.read_parquet(path / "scores.parquet"), json.loads((path / "run.json").read_text())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # resume=auto looks below the working folder


def test_files_and_their_schema(tmp_path: Path, tiny_model: LoadedModel) -> None:
    table, record = run(tmp_path, "operators.max_ops=12")
    assert TEXT | NUMBERS | {"block", "n_params", "rank"} <= set(table.columns)
    assert str(table["block"].dtype) == str(table["rank"].dtype) == "Int64"
    assert {str(table[name].dtype) for name in NUMBERS} == {"float64"}
    assert set(table["status"]) == {"scored"}
    assert sorted(table["rank"]) == list(range(1, 13))
    assert (table.sort_values("rank")["score"].diff().dropna() <= 0).all()
    assert (table["score_low"] <= table["score"]).all()
    assert (table["score"] <= table["score_high"]).all()
    everything = {op.path: op for op in find_operators(tiny_model.module, "lm")}
    for row in table.to_dict("records"):
        op = everything[row["op"]]
        assert (row["component"], row["role"], row["group"], row["n_params"]) == ("lm", op.role, op.group, op.n_params)

    samples = pd.read_parquet(tmp_path / "sample_scores.parquet")
    expected = {"op", "sample", "probe", "value", "metric", "estimator", "scheme", "signed", *ORIGINS}
    assert expected == set(samples.columns)
    for estimator, part in samples[samples["metric"] == "kl"].groupby("estimator"):
        per_op = part.groupby("op")["sample"].nunique()
        assert set(per_op) == {4}
        assert part["probe"].isna().all() == (estimator == "exact")
    measured = samples[(samples["estimator"] == "exact") & (samples["metric"] == "kl")]
    means = measured.groupby("op")["value"].mean()
    exact = table[table["estimator"] == "exact"].set_index("op")["score"]
    assert len(exact) > 0
    pd.testing.assert_series_equal(exact.sort_index(), means.sort_index(), check_names=False, rtol=1e-12)

    assert set(record) >= RECORD
    assert (record["task"], record["status"], record["n_ops"], record["n_scored"]) == ("sweep", "complete", 12, 12)
    assert record["forward_equivalents"] == pytest.approx(float(record["engine_s"]) / float(record["forward_s"]))  # type: ignore[arg-type]
    calibration = json.loads((tmp_path / "calibration.json").read_text())
    assert len(set(calibration["samples"])) == calibration["size"] == record["calibration_size"] == 4
    assert set(calibration["scored"]) == set(samples["sample"])
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_model_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile loads it once more, and there may not be room for two."""
    loaded, there = [], []

    def watched(*args: object) -> prepare.Prepared:
        found = prepare.prepare(*args)  # type: ignore[arg-type]
        loaded.append(weakref.ref(found.model.module))
        return found

    monkeypatch.setattr(sweep, "prepare", watched)
    folder = RunFolder(tmp_path)
    settings = settings_of("strategy.estimator=exact")
    sweep.run(settings, folder, Screen())
    monkeypatch.setattr(prepare, "require_memory", lambda *_: there.append(loaded[0]() is not None))
    prepare.prepare(settings)
    assert there == [False]


def test_further_schemes_have_tables_of_their_own(tmp_path: Path) -> None:
    both, record = run(tmp_path / "both", "quant.also=[w8a16,w4a16]", "strategy.estimator=exact")
    assert record["scheme"] == "w8a8_static"
    for scheme in ("w8a16", "w4a16"):
        beside = pd.read_parquet(tmp_path / "both" / f"scores_{scheme}.parquet")
        alone, _ = run(tmp_path / scheme, f"quant={scheme}", "strategy.estimator=exact")
        pd.testing.assert_frame_equal(beside, alone, check_exact=False, rtol=1e-5)
        assert not np.allclose(beside["score"], both["score"])


def test_a_scheme_that_no_operator_can_have_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """As the first of several it ended the run, and as another one it was missed when plans were made."""
    settings = settings_of("component=vision", "model=tiny_qwen3_vl", "operators.include=['*blocks.1.*']")
    with pytest.raises(SettingsError, match="no operator can be in fp8_block: model.visual.blocks.1.mlp.linear_fc2 is"):
        sweep.run(settings, RunFolder(tmp_path), Screen(), [scheme_settings("fp8_block")])
    assert not (tmp_path / "calibration.json").exists()


def test_fused_groups_are_rows(tmp_path: Path) -> None:
    table, record = run(tmp_path, "operators.fuse=true", "operators.blocks=2", "operators.max_ops=null")
    assert table["role"].tolist() == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert record["n_ops"] == 4
    assert (table["score"] > 0).all()


def test_operators_that_no_sample_reaches_are_skipped(tmp_path: Path) -> None:
    """Text-only samples pass the vision tower by."""
    lines = [{"prompt": f"how many of {n}?", "answer": "two"} for n in range(4)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table, record = run(
        tmp_path / "run", "component=full", "operators.max_ops=10", "calibration=jsonl",
        f"calibration.path={tmp_path / 'text.jsonl'}",
    )  # fmt: skip
    vision = table["component"] == "vision"
    assert 0 < vision.sum() < 10
    assert set(table[vision]["status"]) == {"skipped"}
    assert set(table[vision]["reason"]) == {"no scored sample has an image"}
    assert set(table[~vision]["status"]) == {"scored"}
    assert record["n_skipped"] == vision.sum()
    assert record["n_scored"] == (~vision).sum()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_stop_leaves_what_was_measured(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stops the engine between two samples."""
    measure, seen = exact_run.score_samples, []

    def stop_at_the_third(*arguments: object) -> object:
        seen.append(1)
        if len(seen) == 3:
            raise error
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(exact_run, "GROUP_BYTES", 1)  # one sample after the other
    monkeypatch.setattr(exact_run, "score_samples", stop_at_the_third)
    with pytest.raises(error):
        run(tmp_path / "run", "strategy.estimator=exact")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    table = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert (record["status"], record["n_scored"]) == ("partial", 5)
    assert set(table["n_samples"]) == {2}
    assert (tmp_path / "run" / "report.html").exists()
    whole, record = run(tmp_path / "run", "strategy.estimator=exact")
    assert len(seen) == 5  # two samples were there, the third was begun twice
    assert record["status"] == "complete"
    assert set(whole["n_samples"]) == {4}


def test_a_model_whose_weights_are_not_finite(
    tmp_path: Path, tiny_model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model.description.folder, broken)
    (weights,) = broken.glob("*.safetensors")
    tensors = load_file(weights)
    next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight")).fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EngineError, match="no operator could be scored"):
        run(tmp_path / "run", f"model.path={broken}")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["n_scored"], record["n_failed"]) == ("failed", 0, 5)
    printed = capsys.readouterr().out
    assert printed.count("activation range is not finite") == 3
    assert "failed: 2 more" in printed
    assert (tmp_path / "run" / "report.html").exists()


def test_float16_is_named_where_nothing_is_finite(tmp_path: Path, tiny_model: LoadedModel) -> None:
    source = Path(shutil.copytree(tiny_model.description.folder, tmp_path / "weights"))
    (weights,) = source.glob("*.safetensors")
    tensors = load_file(weights)
    next(tensor for key, tensor in tensors.items() if key.endswith("layers.1.mlp.down_proj.weight")).mul_(1e5)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EngineError, match="float16 overflows beyond 65,504; take bfloat16 or float32"):
        run(tmp_path / "run", f"model.path={source}", "model.dtype=float16", "operators.max_ops=2")


def test_another_folder_by_name_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "first")
    with pytest.raises(RunFolderError, match="that run had other settings"):
        run(tmp_path / "second", f"resume={tmp_path / 'first'}", "seed=1")
    monkeypatch.setattr(exact_run, "score_samples", lambda *_: pytest.fail("a sample was measured again"))
    table, _ = run(tmp_path / "third", f"resume={tmp_path / 'first'}")
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "first" / "scores.parquet"), check_exact=True)


def test_other_samples_or_weights_are_another_result(tmp_path: Path) -> None:
    """What the settings do not show: the file they name has changed."""
    path = tmp_path / "text.jsonl"
    lines = [{"prompt": f"how many of {n}?", "answer": "two"} for n in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = ("calibration=jsonl", f"calibration.path={path}", "strategy.estimator=sketch")
    run(tmp_path / "run", *overrides)
    path.write_text(path.read_text().replace("two", "six"))
    with pytest.raises(RunFolderError, match="results of another model, other samples"):
        run(tmp_path / "run", *overrides)


def test_what_decides_nothing_leaves_the_fingerprint(tmp_path: Path) -> None:
    _, first = run(tmp_path / "a")
    _, second = run(tmp_path / "b", "tracking.experiment=other", "compare.top_k=3", "resume=never")
    _, third = run(tmp_path / "c", "strategy.probes=3")
    assert first["fingerprint"] == second["fingerprint"] != third["fingerprint"]


def test_a_table_can_be_read_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "REFRESH_S", 0.0)
    measure, counts = exact_run.score_samples, []

    def look(*arguments: object) -> object:
        path = tmp_path / "run" / "scores.parquet"
        if path.exists():
            counts.append(int(pd.read_parquet(path)["n_samples"].iloc[0]))
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(exact_run, "GROUP_BYTES", 1)  # one sample after the other
    monkeypatch.setattr(exact_run, "score_samples", look)
    run(tmp_path / "run", "strategy.estimator=exact")
    assert counts == [1, 2, 3]


def test_operators_and_memory_are_judged_before_samples_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(prepare, "load_model", too_late)
    monkeypatch.setattr(prepare, "load_calibration", too_late)
    for overrides, message in (
        (["operators.include=[nothing]"], "matches no operator"),
        (["model=qwen2_5_vl_7b", "model.weights=random", "model.memory_limit_gib=4"], "GiB are free"),
    ):
        with pytest.raises(Exception, match=message):
            run(tmp_path / "run", *overrides)


def test_kinds_of_token_that_do_not_occur_are_not_named(tmp_path: Path) -> None:
    text = io.StringIO()
    settings = settings_of("strategy.estimator=sketch")
    sweep.run(settings, RunFolder(tmp_path / "images"), Screen(console=Console(file=text, width=300)))
    assert re.search(r"loses, \d+% comes in at image tokens, \d+% at other .* and \d+% at the answer", text.getvalue())
    lines = [json.dumps({"prompt": "how many", "answer": str(number)}) for number in range(4)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    text.truncate(0)
    own = ("calibration=jsonl", f"calibration.path={tmp_path / 'own.jsonl'}", "strategy.estimator=sketch")
    sweep.run(settings_of(*own), RunFolder(tmp_path / "text"), Screen(console=Console(file=text, width=300)))
    assert re.search(r"loses, \d+% comes in at other tokens of the prompt and \d+% at the answer", text.getvalue())
