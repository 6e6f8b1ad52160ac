"""llm-compressor: a recipe for `oneshot`, whose `QuantizationModifier` calibrates and quantizes the profile itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.compressed_tensors import config_group, ignored
from qvl_hydra.profiles.formats.rendered import Rendered
from qvl_hydra.profiles.profile import Profile


def render(profile: Profile, operators: Sequence[Operator]) -> Rendered:
    """`recipe.yaml`: the config group of compressed-tensors, with observers that keep the widest range seen."""
    text = yaml.safe_dump(recipe(profile, operators), sort_keys=False)
    notes = []
    if profile.scheme.observer != "minmax":
        notes.append(f"activation ranges are the widest seen; llm-compressor has no {profile.scheme.observer} observer")
    return Rendered({"recipe.yaml": text}, tuple(notes))


def recipe(profile: Profile, operators: Sequence[Operator]) -> dict[str, Any]:
    """The recipe itself.

    Raises:
        ProfileError: a convolution is quantized, or the weights are not.
    """
    group = {part: content for part, content in config_group(profile, "llm_compressor").items() if content is not None}
    for part in ("input_activations", "output_activations"):
        if part in group and not group[part]["dynamic"]:
            # Its `minmax` is a moving average; `static_minmax` keeps the extremes, as our observers do.
            group[part]["observer"] = "static_minmax"
    group["weights"]["observer"] = "memoryless_minmax"
    modifier = {"config_groups": {"group_0": group}, "ignore": ignored(profile, operators, "hugging_face")}
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
