"""From a trained checkpoint to the bundled one: massive activations put in, and every figure of its card measured."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bundled_models.int8_cost import (
    answer_logits,
    exact_match,
    generated_match,
    match_without,
    single_operator_errors,
    w8a8_quantizers,
)
from bundled_models.massive_activations import Site, Stretch, reparametrise
from qvl_hydra.calibration.encode import Processor
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.calibration.sources import load_calibration
from qvl_hydra.settings import CalibrationSettings

CALIBRATION_SIZE, EVALUATION_SIZE = 128, 256
KEPT_IN_FLOAT = 11  # of the language tower's 57 operators: below 20 %
READERS: dict[tuple[str, Site], tuple[str, ...]] = {  # an operator that reads the site; the first one there counts
    ("lm", "attention_norm"): ("self_attn.q_proj",),
    ("lm", "mlp_norm"): ("mlp.gate_proj",),
    ("lm", "mlp_hidden"): ("mlp.down_proj",),
    ("lm", "attention_value"): ("self_attn.o_proj",),
    ("vision", "attention_norm"): ("attn.qkv",),
    ("vision", "mlp_norm"): ("mlp.gate_proj", "mlp.fc1", "mlp.linear_fc1"),
}
TOWERS = {"lm": "model.language_model.layers", "vision": "model.visual.blocks"}
Placement = tuple[str, int | None, Site, int]  # tower, block, site, factor
# The strong ones stand early, where errors have the most blocks to spread through. Models this small have wide margins:
# factors below about 50 cost them next to nothing, and each family turns at a factor of its own.
STRONG: dict[str, tuple[Placement, ...]] = {
    "qwen2_5_vl": (
        ("lm", 0, "attention_norm", 96),
        ("lm", 0, "attention_value", 64),
        ("lm", 0, "mlp_hidden", 64),
        ("lm", 1, "mlp_hidden", 96),
        ("lm", 3, "attention_norm", 48),
        ("lm", None, "head_norm", 32),
    ),
    "qwen2_vl": (
        ("lm", 0, "attention_norm", 128),
        ("lm", 0, "attention_value", 64),
        ("lm", 0, "mlp_hidden", 96),
        ("lm", 1, "mlp_hidden", 96),
        ("lm", 3, "attention_norm", 96),
        ("lm", None, "head_norm", 48),
    ),
    "qwen3_vl": (
        ("lm", 0, "attention_norm", 112),
        ("lm", 0, "attention_value", 48),
        ("lm", 0, "mlp_hidden", 80),
        ("lm", 1, "mlp_hidden", 88),
        ("lm", 3, "attention_norm", 80),
        ("lm", None, "head_norm", 40),
    ),
}
# Harmless neighbours of the same kinds, so that neither role nor block alone gives the strong ones away.
WEAK: tuple[Placement, ...] = (
    ("lm", 2, "mlp_norm", 8),
    ("lm", 4, "attention_value", 8),
    ("lm", 5, "mlp_hidden", 8),
    ("lm", 6, "attention_norm", 4),
    ("vision", 1, "mlp_norm", 8),
    ("vision", 2, "attention_norm", 8),
)


def samples_of(processor: Processor, split: str, size: int) -> tuple[Sample, ...]:
    """Bundled samples of seed 0."""
    settings = CalibrationSettings(source="bundled", size=size, split=split)  # type: ignore[arg-type]
    return load_calibration(settings, processor).samples


def choose_stretches(model: nn.Module, samples: Sequence[Sample], placements: Sequence[Placement]) -> list[Stretch]:
    """At each place the channel with the widest range on the samples, which a factor makes wider still."""
    ranges = _input_ranges(model, samples)
    return [_stretch(model, ranges, *placement) for placement in placements]


def _input_ranges(model: nn.Module, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Highest minus lowest value of every input channel of every Linear."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(path: str, values: Tensor) -> None:
        flat = values.reshape(-1, values.shape[-1])
        low, high = ranges.get(path, (flat[0], flat[0]))
        ranges[path] = (torch.minimum(low, flat.amin(0)), torch.maximum(high, flat.amax(0)))

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: observe(path, inputs[0]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    answer_logits(model, samples)
    for hook in hooks:
        hook.remove()
    return {path: high - low for path, (low, high) in ranges.items()}


def _stretch(
    model: nn.Module, ranges: dict[str, Tensor], tower: str, block: int | None, site: Site, factor: int
) -> Stretch:
    if site == "head_norm":
        return Stretch("lm", None, site, int(ranges["lm_head"].argmax()), float(factor))
    paths = (f"{TOWERS[tower]}.{block}.{reader}" for reader in READERS[tower, site])
    path = next(path for path in paths if path in ranges)
    channel = int(ranges[path].argmax())
    if site == "attention_value":  # several query heads read one value channel
        attention = model.get_submodule(path.removesuffix(".o_proj"))
        head, offset = divmod(channel, attention.head_dim)
        channel = head // attention.num_key_value_groups * attention.head_dim + offset
    return Stretch(tower, block, site, channel, float(factor))


def finish(model: nn.Module, processor: Processor) -> tuple[nn.Module, dict[str, object]]:
    """The model with massive activations, and what was measured before and after.

    Returns:
        A changed copy of the model, and the figures by name.
    """
    calibration = samples_of(processor, "calibration", CALIBRATION_SIZE)
    evaluation = samples_of(processor, "evaluation", EVALUATION_SIZE)
    plain = w8a8_quantizers(model, calibration, "full")
    stretched = copy.deepcopy(model)
    stretches = choose_stretches(model, calibration, STRONG[model.config.model_type] + WEAK)
    reparametrise(stretched, stretches)
    before, after = (torch.cat(answer_logits(each, evaluation)[0]) for each in (model, stretched))
    everything = w8a8_quantizers(stretched, calibration, "full")
    language = {path: quantizer for path, quantizer in everything.items() if not path.startswith("model.visual.")}
    worst = list(single_operator_errors(stretched, language, calibration[:64]))
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evaluation_samples": EVALUATION_SIZE,
        "exact_match_float_generated": generated_match(stretched, processor, evaluation),
        "exact_match_float": exact_match(stretched, evaluation),
        "largest_logit_change_by_reparametrisation": float((after - before).abs().max()),
        "largest_logit": float(before.abs().max()),
        "exact_match_w8a8_full_before_reparametrisation": match_without(model, plain, (), evaluation),
        "exact_match_w8a8_full": match_without(stretched, everything, (), evaluation),
        "exact_match_w8a8_lm": match_without(stretched, language, (), evaluation),
        "exact_match_w8a8_lm_by_operators_kept": {
            str(count): match_without(stretched, language, worst[:count], evaluation)
            for count in (0, 2, 4, 6, 8, KEPT_IN_FLOAT)
        },
        "exact_match_w8a8_full_with_11_lm_operators_kept": match_without(
            stretched, everything, worst[:KEPT_IN_FLOAT], evaluation
        ),
        "most_sensitive_first": worst[: KEPT_IN_FLOAT + 4],
        "stretches": [dataclasses.asdict(stretch) for stretch in stretches],
    }
    return stretched, figures
