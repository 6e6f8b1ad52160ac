"""Bad input at the command line: one message, status 2, no traceback, nothing loaded, nothing written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from PIL import Image

from qvl_hydra import __main__
from qvl_hydra.entry import app
from qvl_hydra.entry.command_line import as_typed, check_command_line, quoted
from qvl_hydra.entry.compose import config_folder, take_saved_settings
from qvl_hydra.errors import RunFolderError, SettingsError
from qvl_hydra.tasks import prepare
from tests.program import SMALL


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        loads: times a model's weights were asked for.
    """

    status: int
    text: str
    errors: str
    loads: int


Call = Callable[[str], Outcome]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The program in this process, in an empty folder, with a count of models loaded in place of loading."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setenv("COLUMNS", "500")  # messages on one line each

    def run(line: str) -> Outcome:
        loads = 0

        def load(*_: object) -> None:
            nonlocal loads
            loads += 1
            raise AssertionError("a model was loaded")

        GlobalHydra.instance().clear()
        monkeypatch.setattr(prepare, "load_model", load)
        monkeypatch.setattr(sys, "argv", ["qvl-hydra", *shlex.split(line)])
        with pytest.raises(SystemExit) as end:
            app.main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, captured.out, captured.err, loads)

    return run


def refused(outcome: Outcome, *messages: str) -> None:
    """Check that a call was refused before any model was loaded, with these words and no traceback."""
    assert outcome.status == 2, outcome.text
    assert outcome.text.count("error:") == 1, outcome.text
    for message in messages:
        assert message in outcome.text
    assert "Traceback" not in outcome.text + outcome.errors
    assert outcome.loads == 0


BEFORE_ANYTHING: list[tuple[str, list[str]]] = [
    ("model=qwen3", ["model=qwen3; allowed: qwen2_5_vl_3b", "tiny_qwen2_vl"]),
    ("strategy=mse", ["strategy=mse; allowed: hawq_v2, kl, mse_v2"]),
    ("experiment=lm", ["experiment=lm; allowed:", "lm_mse_v2"]),
    ("strategy.prbes=3", ["unknown key strategy.prbes; did you mean strategy.probes?"]),
    ("+strategy.prbes=3", ["unknown key strategy.prbes; did you mean strategy.probes?"]),
    ("++strategy.prbes=3", ["unknown key strategy.prbes; did you mean strategy.probes?"]),
    ("+xyzzy=3", ["unknown key xyzzy; python -m qvl_hydra --cfg job shows all keys"]),
    ("~seed", ["~seed: keys cannot be taken out"]),
    ("~model", ["~model: model cannot be left out"]),
    ("strategy.probes", ["'strategy.probes' is no override; expected key=value"]),
    ("operators.include=[", ["'operators.include=[' is no override"]),
    ("profile.scores=a{b", ["such a value needs quotes of its own: \"key='value'\""]),
    ("operators.include='*.mlp.*'", ["expected a list such as [a,b]"]),
    ("operators.max_ops=0", ["operators.max_ops=0; must be 1 or more, or null for no cap"]),
    ("calibration.size=0", ["calibration.size=0; must be 1 or more"]),
    ("seed=1,2", ["seed=1,2 names several values, which needs -m"]),
    ("-m seed=interval(0,1)", ["seed=interval(0,1) has no end of values"]),
    ("-m model=glob(gpt*)", ["model=glob(gpt*); allowed: qwen2_5_vl_3b"]),
    ("model.path=bundled:nothing", ["the package bundles tiny_qwen2_5_vl, tiny_qwen2_vl"]),
    ("model.path=./nowhere", ["model.path=./nowhere: no such folder; give a checkpoint's folder or a hub id"]),
    ("model.path='${oc.env:NOT_SET_ANYWHERE}'", ["Environment variable 'NOT_SET_ANYWHERE' not found"]),
    ("calibration=jsonl", ["calibration=jsonl needs calibration.path"]),
    ("calibration=jsonl calibration.path=/nowhere.jsonl", ["calibration.path=/nowhere.jsonl: no such file"]),
    ("calibration=imagefolder calibration.path=/nowhere", ["calibration.path=/nowhere: no such folder"]),
    ("calibration=imagefolder calibration.path=~/ü#=(1)", ["calibration.path=~/ü#=(1): no such folder"]),
    ("quant.also=[w2a2]", ["quant.also or profile.choices names 'w2a2'; allowed: fp8"]),
    ("resume=/nowhere", ["resume=/nowhere: no unfinished run there"]),
    ("hydra.nonsense=1", ["hydra.nonsense"]),
    ("model.overrides='{text_config.num_hidden_layers:2}'", ["+model.overrides="]),
]


@pytest.mark.parametrize(("line", "messages"), BEFORE_ANYTHING, ids=[line for line, _ in BEFORE_ANYTHING])
def test_refused_before_anything_is_written(line: str, messages: list[str], call: Call, tmp_path: Path) -> None:
    refused(call(line), *messages)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("typed", "read"), [
    ("k=~/a,/b (1),4,null", "k='~/a','/b (1)',4,null"),
    ("+k.p=[~/a[1], 3,b]", "+k.p=['~/a[1]',3,b]"),
    ("k=sqlite:////tmp/ü\\", r"k='sqlite:////tmp/ü\\'"),
    *((same, same) for same in ("--cfg", "--config-dir=~/ü", "k=", "k=a b", "k=[a", "k=range(1,~", "k='ü'", "~k=ü")),
    *((same, same) for same in ("k={ü:1}", "k=a,b")),
])  # fmt: skip
def test_values_that_hydra_cannot_read_are_texts_as_typed(typed: str, read: str) -> None:
    assert as_typed([typed]) == [read]


def test_ctrl_c_while_modules_are_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside what a run itself handles: it ended in a traceback."""

    def stopped(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "_run", stopped)
    monkeypatch.setattr(sys, "argv", ["qvl_hydra", "--help"])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert (end.value.code, capsys.readouterr()) == (130, ("stopped\n", ""))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(call: Call, tmp_path: Path) -> None:
    refused(call("backend.device=cuda"), "backend.device=cuda, but torch", "0 CUDA devices", "take backend.device=auto")
    assert list(tmp_path.iterdir()) == []


def test_all_faults_together(call: Call, tmp_path: Path) -> None:
    outcome = call(
        "model.path=./nowhere strategy=best +xyzzy=1 operators.max_ops=0 calibration.size=-1 "
        "strategy.direction=fallback strategy.estimator=sketch calibration=jsonl "
        "calibration.path=/nowhere.jsonl resume=/nowhere a=b=c"
    )
    refused(
        outcome, "faults:", "model.path=./nowhere", "strategy=best", "xyzzy", "operators.max_ops=0",
        "calibration.size=-1", "direction=requantize", "resume=/nowhere", "unknown key a;",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_one_bad_value_does_not_begin(call: Call, tmp_path: Path) -> None:
    refused(call("-m operators.max_ops=2,1,0 calibration.size=4,0"), "2 faults", "max_ops=0", "size=0")
    refused(call("-m model=tiny_qwen2_vl,qwen9"), "model=qwen9; allowed:")
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_that_an_experiment_holds_is_checked_too() -> None:
    with pytest.raises(SettingsError, match="max_length=0"):
        check_command_line(["-m", "experiment=calibration_sizes", "calibration.max_length=null,0"])
    GlobalHydra.instance().clear()
    with pytest.raises(SettingsError) as caught:  # seeds come from the experiment: a fault of every job is told once
        check_command_line(["-m", "experiment=calibration_sizes", "strategy.probes=0"])
    assert len(caught.value.faults) == 1


def test_an_unknown_option_of_the_program(call: Call) -> None:
    outcome = call("--frobnicate")
    assert outcome.status == 2
    assert "unrecognized arguments: --frobnicate" in outcome.errors
    assert "Traceback" not in outcome.text + outcome.errors


def test_a_glob_that_matches_nothing(call: Call) -> None:
    refused(
        call("operators.include=['*.mpl.*'] operators.exclude=['*.nose'] operators.blocks=99 tracking.enabled=false"),
        "'*.mpl.*' matches no operator; a path looks like model.language_model.layers.",
        "'*.nose' matches no operator",
        "no block [99]",
    )


def test_a_model_that_does_not_fit(call: Call) -> None:
    refused(
        call(
            "model=qwen2_5_vl_7b model.weights=random model.dtype=float32 model.memory_limit_gib=8 operators.max_ops=4 "
            "tracking.enabled=false"
        ),
        "needs 3",  # 8.3 billion parameters of 4 bytes: 31 GiB, and a margin
        "8.0 GiB are free",
        "model.placement=streamed",
    )


def test_a_hub_that_cannot_be_reached(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    outcome = call("model=qwen2_5_vl_3b model.path=nobody/nothing tracking.enabled=false")
    refused(outcome, "model.path=nobody/nothing: neither a local folder nor a hub model", "model.weights=random")


def bad_samples(folder: Path) -> Path:
    """A jsonl of three: a sound image, one that is no image, one that is not there."""
    Image.new("RGB", (56, 56), "red").save(folder / "good.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    rows = [{"image": name, "prompt": "colour?", "answer": "red"} for name in ("good.png", "broken.png", "missing.png")]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_unreadable_image(call: Call, tmp_path: Path) -> None:
    path = bad_samples(tmp_path)
    outcome = call(
        f"calibration=jsonl calibration.path={path} calibration.size=3 calibration.on_bad=fail tracking.enabled=false"
    )
    refused(outcome, "2 bad samples", "broken.png", "missing.png", "calibration.on_bad=skip")


def test_too_few_good_samples(call: Call, tmp_path: Path) -> None:
    path = bad_samples(tmp_path)
    outcome = call(f"calibration=jsonl calibration.path={path} calibration.size=3 tracking.enabled=false")
    refused(outcome, "only 1 good samples", "calibration.size=1", "broken.png", "missing.png")


@pytest.mark.parametrize("source", ["jsonl", "imagefolder"])
def test_an_empty_calibration_set(source: str, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if source == "jsonl":
        path.write_text("")
    else:
        path.mkdir()
    outcome = call(f"calibration={source} calibration.path={path} tracking.enabled=false")
    refused(outcome, "no good sample", "calibration.size=32")


def test_hydra_full_error_shows_where(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for line in ("operators.max_ops=0", "operators.blocks=99 tracking.enabled=false"):
        outcome = call(line)
        assert outcome.status == 2
        assert "Traceback (most recent call last)" in outcome.errors
        assert "error:" in outcome.text


def test_a_fault_of_the_program_is_told_apart(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(prepare, "describe_model", broken)
    outcome = call("tracking.enabled=false hydra.run.dir=run")
    assert outcome.status == 1
    assert "error: ZeroDivisionError: a bug" in outcome.text
    assert "Traceback" not in outcome.text + outcome.errors
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["task"], record["status"], record["error"]) == ("sweep", "failed", "ZeroDivisionError: a bug")


def test_help_and_cfg(call: Call, tmp_path: Path) -> None:
    shown = call("--help")
    assert shown.status == 0
    for text in ("model: ", "tiny_qwen2_5_vl", "experiment: ", "lm_mse_v2"):
        assert text in shown.text
    first = shown.text.splitlines()[:6]
    assert first[0].startswith("qvl_hydra measures which parts of a vision-language model")
    assert sum("python -m qvl_hydra " in line for line in first) == 3
    config = call("experiment=lm_hawq_v2 --cfg job")
    assert config.status == 0
    assert "name: hawq_v2" in config.text
    assert list(tmp_path.iterdir()) == []


def test_help_that_nobody_reads_on_is_no_failure() -> None:
    """As piped into `head`; and help needs none of the libraries that take seconds to import."""
    code = "import sys; sys.argv[1:] = ['--help']; from qvl_hydra.entry.app import main\ntry: main()\nfinally: "
    code += "print([name for name in ('torch', 'transformers', 'mlflow') if name in sys.modules], file=sys.stderr)"
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "[]\n")


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "<&- >/dev/full 2>&-"])
def test_a_run_that_nobody_can_be_told_of_ends_as_any_other(streams: str, tmp_path: Path) -> None:
    """A closed stdout ended it in a traceback; and what is opened next would take its place, a store among it."""
    line = f"task=profile profile.value=1 profile.evaluation_size=2 tracking.enabled=false hydra.run.dir=run {SMALL}"
    shell = f"exec {shlex.quote(sys.executable)} -m qvl_hydra {line} {streams}"
    ended = subprocess.run(["bash", "-c", shell], cwd=tmp_path, timeout=120, check=False)
    assert ended.returncode == 0
    assert json.loads((tmp_path / "run" / "end.json").read_text()) == {"end": "FINISHED"}
    assert (tmp_path / "run" / "profiles.parquet").exists()


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\\'\"$ ={,"), min_size=1))
def test_a_folder_is_read_back_as_it_is_called(name: str) -> None:
    """A quote in the working folder's name ended every run before it began."""
    (override,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={quoted(name)}"])
    assert str(override.value()) == name


def test_a_folder_that_hydra_reads_as_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "${oc.env:HOME}"
    place.mkdir()
    monkeypatch.chdir(place)
    with pytest.raises(SettingsError, match=r"a folder's name must not hold \$\{"):
        check_command_line(["experiment=lm_mse_v2"])


def test_saved_settings_are_taken_from_the_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    line = ["--config-dir", str(tmp_path), "seed=3", "--config-name=config", "-m"]
    assert take_saved_settings(line) == (["seed=3", "-m"], "saved_settings")
    assert take_saved_settings(["-cd", str(tmp_path), "-cn", "config.yaml"]) == ([], "saved_settings")
    assert take_saved_settings(["seed=3"]) == (["seed=3"], "config")
    with pytest.raises(SettingsError, match=r"nothing\.yaml, which is not there"):
        take_saved_settings(["--config-dir", str(tmp_path), "--config-name", "nothing"])
    (tmp_path / "config.yaml").write_text("just text")
    with pytest.raises(RunFolderError, match="is damaged"):
        take_saved_settings(["--config-dir", str(tmp_path), "--config-name", "config"])


def test_saved_settings_stand_over_the_defaults_and_under_overrides(call: Call, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.yaml").write_text("seed: 7\nstrategy: {probes: 0}\noperators: {max_ops: 0}\n")
    outcome = call(f"--config-dir {saved} --config-name config strategy.probes=2")
    refused(outcome, "1 fault", "operators.max_ops=0")
    (saved / "config.yaml").write_text("seed: 7\nxyzzy: 1\n")
    refused(call(f"--config-dir {saved} --config-name config"), "holds 'xyzzy', which is no setting")


HOSTILE = [  # what a folder from a stranger may try; each would create the file `ran` or read what is not its own
    "hydra: {callbacks: {x: {_target_: pathlib.Path.touch, self: ran}}}",
    "hydra: {job_logging: {handlers: {x: {'()': pathlib.Path.touch, self: ran}}}}",
    "hydra: {launcher: {_target_: pathlib.Path.touch}}",
    "defaults: [{override /hydra/launcher: joblib}]",
    "model: {path: '${oc.env:HOME}'}",
    "seed: '${oc.decode:[1]}'",
    "model: !!python/object/apply:pathlib.Path.touch [ran]",
    "model: !!python/name:os.system",
    "seed: 1\n_target_: pathlib.Path.touch",
    "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nseed: [*b, *b, *b]",
    "seed: 1\n'${oc.env:HOME}': 2",
]


@pytest.mark.parametrize("content", HOSTILE)
def test_a_saved_config_sets_settings_and_nothing_else(
    content: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.yaml").write_text(content + "\n")
    monkeypatch.chdir(tmp_path)
    outcome = call(f"--config-dir {saved} --config-name config")
    assert outcome.status == 2
    assert outcome.loads == 0
    assert "Traceback" not in outcome.text + outcome.errors
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("option", ["--config-dir {}", "--config-path {}", "--config-name config", "-cp {} -cn config"])
def test_folders_of_configs_are_refused(option: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("hydra: {callbacks: {x: {_target_: pathlib.Path.touch, self: ran}}}\n")
    outcome = call(option.format(tmp_path))
    assert outcome.status == 2
    assert "configs of this program are its own" in outcome.text
    assert not list(tmp_path.rglob("ran"))


def test_the_config_folder_is_the_checkouts() -> None:
    assert config_folder() == Path(__file__).parents[2] / "conf"


@pytest.mark.slow
def test_wheel_and_command_work_away_from_the_checkout(tmp_path: Path) -> None:
    """The built wheel carries configs and assets; installed beside the dependencies, its command composes from them."""
    root = Path(__file__).parents[2]
    pytest.importorskip("hatchling")  # the build backend, so that nothing is fetched
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."], cwd=root, check=True)
    (wheel,) = tmp_path.glob("qvl_hydra-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    carried = {path.relative_to(site / "qvl_hydra" / "conf") for path in (site / "qvl_hydra" / "conf").rglob("*.yaml")}
    assert carried == {path.relative_to(root / "conf") for path in (root / "conf").rglob("*.yaml")}
    for name in ("tiny_qwen2_5_vl/model.safetensors", "tiny_qwen2_vl/tokenizer.json", "configs/qwen2_vl_2b/config.json"):  # noqa: E501
        assert (site / "qvl_hydra" / "assets" / name).is_file()
    assert (site / "qvl_hydra" / "reports" / "page.css").is_file()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = "import qvl_hydra.entry.command_line as c; print(c.config_folder())"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(site / "qvl_hydra" / "conf")
    for program in ([sys.executable, "-m", "qvl_hydra"], [sys.executable, str(site / "bin" / "qvl-hydra")]):
        refusal = subprocess.run(
            [*program, "operators.max_ops=0"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (refusal.returncode, "max_ops=0" in refusal.stdout) == (2, True), refusal.stderr
