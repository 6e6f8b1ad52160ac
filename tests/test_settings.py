"""The typed door: every fault, of every kind, in one message."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from qvl_hydra.errors import SettingsError
from qvl_hydra.settings import Settings, build_settings, parse_blocks

SMALLEST: dict[str, Any] = {
    "model": {"name": "m", "path": "some/folder", "family": "qwen2_vl"},
    "component": {"name": "lm"},
    "strategy": {"name": "mse_v2"},
    "quant": {"name": "w8a8_static"},
    "backend": {"name": "torch"},
    "calibration": {"source": "bundled"},
    "tracking": {"uri": None},
    "task": {"name": "sweep"},
}


def config(**changes: object) -> dict[str, Any]:
    """The smallest sound config with values set; `__` stands for the dot of a key."""
    made = copy.deepcopy(SMALLEST)
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            made.setdefault(group, {})[name] = value
        else:
            made[group] = value
    return made


def faults_of(given: Mapping[str, Any]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        build_settings(given)
    return caught.value.faults


def test_defaults_fill_what_is_not_given() -> None:
    settings = build_settings(SMALLEST)
    assert isinstance(settings, Settings)
    assert settings.model.path == "some/folder"
    assert settings.strategy.estimator == "auto"
    assert settings.operators.max_ops is None
    assert settings.resume == "auto"


def test_all_faults_are_reported_together() -> None:
    given = config(
        model__famly="qwen2_vl",  # unknown
        operators__max_ops=0,  # out of range
        strategy__probes="four",  # wrong type
        calibration__size=0,  # out of range, in a group of its own
        component="lm",  # no group
        model__placement="streamed",
    )
    del given["quant"]["name"]  # missing
    text = "\n".join(faults_of(given))
    for key in ("model.famly", "operators.max_ops=0", "strategy.probes='four'", "calibration.size=0", "component='lm'"):
        assert key in text
    assert "missing key quant.name" in text


def test_faults_between_groups_are_reported_beside_faults_of_values() -> None:
    found = faults_of(config(model__placement="streamed", backend__name="onnxrt", strategy__probes=0))
    assert any("strategy.probes=0" in fault for fault in found)
    assert any("model.placement=streamed" in fault for fault in found)


def test_a_message_counts_and_lists_the_faults() -> None:
    with pytest.raises(SettingsError, match="the configuration has 2 faults:\n  - .*\n  - ") as caught:
        build_settings(config(strategy__probes=0, quant__percentile=20))
    assert len(caught.value.faults) == 2
    with pytest.raises(SettingsError, match="has 1 fault:\n"):
        build_settings(config(strategy__probes=0))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (config(oprators={}), "unknown key oprators; did you mean operators?"),
        (config(strategy__prbes=3), "unknown key strategy.prbes; did you mean strategy.probes?"),
        (config(component__xyzzy=1), "unknown key component.xyzzy; known keys: name"),
        ({key: value for key, value in SMALLEST.items() if key != "task"}, "missing key task"),
    ],
)
def test_keys_that_are_unknown_or_missing(given: dict[str, Any], fault: str) -> None:
    assert faults_of(given) == (fault,)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("strategy__probes", 2.5, "a whole number"),
        ("strategy__probes", "4", "a whole number"),
        ("strategy__probes", True, "a whole number"),
        ("strategy__probes", None, "a whole number"),
        ("strategy__tolerance", "small", "a number"),
        ("strategy__tolerance", True, "a number"),
        ("strategy__tolerance", float("nan"), "a finite number"),
        ("strategy__tolerance", float("inf"), "a finite number"),
        ("backend__tf32", "yes", "true or false"),
        ("backend__tf32", 1, "true or false"),
        ("model__path", None, "a text"),
        ("model__path", ["a"], "a text"),
        ("operators__include", "*.mlp.*", "a list such as [a,b]"),
        ("operators__include", [["a"]], "a text"),
        ("compare__regret_shares", ["tenth"], "a number"),
        ("model__overrides", [1], "a mapping"),
        ("operators", None, "a group of keys"),
        ("model", "tiny", "a group of keys"),
        ("strategy__estimator", "fast", "allowed: auto, exact, sketch"),
        ("quant__observer", None, "allowed: minmax, percentile, histogram"),
        ("quant__observer", ["minmax"], "allowed: minmax, percentile, histogram"),
        ("profile__formats", ["gguf"], "allowed: neural_compressor"),
    ],
)
def test_types(key: str, value: object, expected: str) -> None:
    (fault,) = faults_of(config(**{key: value}))
    assert fault.startswith(key.replace("__", "."))
    assert expected in fault


def test_numbers_are_taken_where_they_lose_nothing() -> None:
    settings = build_settings(config(strategy__tolerance=1, operators__blocks=3, compare__regret_shares=[0.5]))
    assert settings.strategy.tolerance == 1.0
    assert isinstance(settings.strategy.tolerance, float)
    assert settings.operators.blocks == "3"  # YAML reads a lone index as a number


# Key, a value just outside the limit, a value just inside.
LIMITS: list[tuple[str, object, object]] = [
    ("seed", -1, 0),
    ("seed", 2**32, 2**32 - 1),
    ("model__path", "", "x"),
    ("model__memory_limit_gib", 0, 0.1),
    ("operators__max_ops", 0, 1),
    ("operators__blocks", "3-1", "1-3"),
    ("operators__blocks", "a", "0"),
    ("operators__blocks", "", "0,2-2"),
    ("strategy__confidence_batches", 0, 1),
    ("strategy__probes", 0, 1),
    ("strategy__max_probes", 0, 2),  # strategy.probes is 2
    ("strategy__top_k", 0, 1),
    ("strategy__top_k", 0, 1),
    ("strategy__missed", 0, 0.01),
    ("strategy__controls", -1, 0),
    ("strategy__tolerance", 0, 0.001),
    ("strategy__agreement_warn", 1.1, 1),
    ("quant__weight_bits", 1, 2),
    ("quant__weight_bits", 9, 8),
    ("quant__input_bits", 9, None),
    ("quant__output_bits", 1, 8),
    ("quant__weight_group_size", 0, 1),
    ("quant__percentile", 50, 50.1),
    ("quant__percentile", 100.1, 100),
    ("backend__device", "gpu", "cuda:1"),
    ("backend__device", "cuda:one", "cpu"),
    ("backend__threads", 0, 1),
    ("backend__row_chunk", 0, 1),
    ("calibration__size", 0, 1),
    ("calibration__batch_size", 0, 1),
    ("calibration__seed", -1, 0),
    ("calibration__min_pixels", 0, 1),
    ("calibration__max_pixels", 0, 1),
    ("calibration__max_length", 0, 1),
    ("compare__top_k", 0, 1),
    ("compare__confidence", 0.5, 0.51),
    ("compare__confidence", 1, 0.99),
    ("compare__overlap", 0, 1),
    ("compare__resamples", 99, 100),
    ("compare__regret_shares", [0.5, 1], [0.5]),
    ("compare__regret_samples", 0, 1),
    ("compare__random_draws", 0, 1),
    ("profile__spectrum", [1.1], [0, 1]),
    ("profile__value", -0.1, 0),
    ("profile__value", 1.1, 1),  # profile.budget=share
    ("profile__evaluation_size", 0, 1),
    ("profile__high_bits", 0, 1),
    ("export__check_samples", 0, 1),
    ("export__tolerance", 0, 1e-6),
]


@pytest.mark.parametrize(("key", "outside", "inside"), LIMITS)
def test_limits(key: str, outside: object, inside: object) -> None:
    (fault,) = faults_of(config(**{key: outside}))
    assert key.replace("__", ".") in fault
    build_settings(config(**{key: inside}))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model__overrides": {"text_config.num_hidden_layers": 2}}, "needs model.weights=random"),
        ({"quant__weight_bits": None, "quant__input_bits": None}, "nothing would be measured"),
        ({"quant__weight_bits": None, "quant__perturb": "weight"}, "quant.weight_bits is null"),
        ({"quant__input_bits": None, "quant__perturb": "activation"}, "neither quant.input_bits"),
        ({"calibration__source": "jsonl"}, "needs calibration.path"),
        ({"calibration__source": "imagefolder"}, "needs calibration.path"),
        ({"calibration__source": "coco_captions"}, "needs calibration.annotations"),
        ({"calibration__source": "coco_captions", "calibration__images": "x"}, "needs calibration.annotations"),
        ({"calibration__min_pixels": 9, "calibration__max_pixels": 8}, "above calibration.max_pixels"),
        ({"export__image_height": 56}, "given together"),
        ({"export__image_height": 56, "export__image_width": 0}, "image_width=0; must be 1 or more"),
        ({"strategy__name": "hawq_v2", "backend__name": "onnxrt"}, "but backend=onnxrt has kl, mse_v2"),
        ({"strategy__name": "hawq_v2", "quant__weight_bits": None}, "weighs by the weight error"),
        (
            {"strategy__name": "hawq_v2", "strategy__curvature": "hessian", "model__placement": "streamed"},
            "needs model.placement=resident",
        ),
        ({"model__placement": "streamed", "backend__name": "modelopt"}, "done by backend=torch"),
        ({"strategy__estimator": "sketch", "backend__name": "inc_fx"}, "done by backend=torch"),
        ({"strategy__estimator": "sketch", "strategy__direction": "fallback"}, "take exact for fallback"),
        ({"operators__fuse": True, "backend__name": "inc_fx"}, "done by backend=torch and onnxrt"),
        ({"backend__name": "inc_fx", "backend__device": "cuda"}, "runs on the CPU"),
        ({"backend__name": "inc_fx", "model__dtype": "bfloat16"}, "but backend=inc_fx has float32"),
        ({"strategy__metric": "kl", "component__name": "vision"}, "which component=vision has not"),
        ({"strategy__metric": "loss_change"}, "needs strategy.estimator=exact"),
        ({"model__placement": "streamed", "model__weights": "random"}, "model.weights=random has none"),
        ({"quant__name": "a/b"}, "quant.name='a/b'; must be of letters, digits, _ . + -, and not leave"),
        ({"quant__name": ""}, "quant.name=''; must be"),
        ({"quant__name": "leave"}, "quant.name='leave'; must be"),
        (
            {"strategy__name": "hawq_v2", "quant__perturb": "activation"},
            "weighs by the weight error, but quant.perturb is activation",
        ),
        (
            {"strategy__name": "hawq_v2", "strategy__curvature": "hessian", "task__name": "profile",
             "profile__choices": ["nvfp4", "w4a16", "leave"]},
            "profile.choices has 2 schemes, but hessian scores one in a run",
        ),
        (
            {"backend__name": "inc_fx", "task__name": "profile", "strategy__name": "mse_v2"},
            "backend=inc_fx scores inc_static alone; plans from its scores need quant=inc_static",
        ),
        ({"quant__also": ["nvfp4", "x", "nvfp4"]}, "quant and quant.also have nvfp4 twice"),
        ({"quant__name": "w4a16", "quant__also": ["w4a16"]}, "quant and quant.also have w4a16 twice"),
        ({"model__placement": "streamed", "task__name": "export_onnx"}, "is for task=sweep, profile, quantize, not"),
    ],
)
def test_values_that_do_not_go_together(changes: dict[str, object], fault: str) -> None:
    (found,) = faults_of(config(**changes))
    assert fault in found


@pytest.mark.parametrize(
    ("text", "blocks"), [("0", {0}), ("0-3,7", {0, 1, 2, 3, 7}), (" 2 , 4-4 ", {2, 4}), ("1,1-2", {1, 2})]
)
def test_blocks(text: str, blocks: set[int]) -> None:
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["", ",", "1-", "-1", "3-1", "x", "1..2"])
def test_blocks_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected indices|runs backwards"):
        parse_blocks(text)


def test_what_is_left_to_the_strategy_is_filled_in() -> None:
    def settled(**changes: object) -> tuple[str, str]:
        strategy = build_settings(config(strategy__name="kl", strategy__positions="answer", **changes)).strategy
        return strategy.metric, strategy.positions

    assert settled() == ("kl", "answer")
    assert settled(strategy__metric="squared_error") == ("squared_error", "answer")
    assert settled(component__name="vision") == ("squared_error", "all"), "features have no distribution"
    assert settled(component__name="vision", strategy__estimator="gradient")[1] == "answer"
