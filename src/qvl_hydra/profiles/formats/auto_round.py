"""auto-round: `layer_config`, one entry an operator of the model, in Hugging Face names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.rendered import Rendered, refuse, require_linear
from qvl_hydra.profiles.profile import Profile

FLOAT = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
WHOLE_CHANNEL, WHOLE_TENSOR = -1, 0  # its group sizes for one scale a row, and one a tensor


def render(profile: Profile, operators: Sequence[Operator]) -> Rendered:
    """`layer_config.json`."""
    text = json.dumps(layer_config(profile, operators), indent=2)
    notes = ["weight scales are auto-round's own (full range, tuned when iters is above 0)"]
    if profile.scheme.needs_ranges and profile.scheme.observer != "minmax":
        notes.append(f"activation ranges are the widest seen, not {profile.scheme.observer}")
    return Rendered({"layer_config.json": text + "\n"}, tuple(notes))


def layer_config(profile: Profile, operators: Sequence[Operator]) -> dict[str, Any]:
    """The dictionary itself.

    Raises:
        ProfileError: a convolution is quantized, the weights are not, or outputs are.
    """
    require_linear(profile, "auto_round")
    weight, inputs = profile.scheme.weight, profile.scheme.input
    if weight is None or profile.scheme.output is not None:
        raise refuse(profile, "auto_round", "float weights or quantized outputs", "take w8a8_static or w8a8_dynamic")
    low: dict[str, Any] = {
        "bits": weight.bits,
        "group_size": weight.group_size or WHOLE_CHANNEL,
        "sym": weight.symmetric,
        "data_type": "int",
        "act_bits": 16,
    }
    if inputs is not None:
        low |= {
            "act_bits": inputs.bits,
            "act_group_size": WHOLE_CHANNEL if inputs.dynamic else WHOLE_TENSOR,
            "act_sym": inputs.symmetric,
            "act_data_type": "int",
            "act_dynamic": inputs.dynamic,
        }
    quantized = {op.path for op in profile.low}
    return {op.path: low if op.path in quantized else FLOAT for op in operators if op.kind == "Linear"}
