"""Neural Compressor 3.7: `op_name_dict` of `PostTrainingQuantConfig` (static, PyTorch FX).

Keys are regular expressions matched in full, one an operator of the model; the token embedding, which Neural
Compressor counts as an operator, stays in float.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qvl_hydra.families.table import FAMILIES
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.rendered import Rendered, refuse
from qvl_hydra.profiles.names import neural_compressor_pattern
from qvl_hydra.profiles.profile import Profile

FLOAT = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}


def render(profile: Profile, operators: Sequence[Operator]) -> Rendered:
    """`op_name_dict.json` for every operator of the model."""
    text = json.dumps(op_name_dict(profile, operators), indent=2)
    notes = ["an operator's output is quantized too, to 8 bits (quant=inc_static measures that)"]
    if profile.scheme.observer == "percentile":
        notes.append("activation ranges come from Neural Compressor's histogram observer, not from percentiles")
    return Rendered({"op_name_dict.json": text + "\n"}, tuple(notes))


def op_name_dict(profile: Profile, operators: Sequence[Operator]) -> dict[str, Any]:
    """The dictionary itself.

    Raises:
        ProfileError: the scheme is not static W8A8 with symmetric weights.
    """
    scheme = profile.scheme
    weight, inputs = scheme.weight, scheme.input
    if weight is None or weight.bits != 8 or weight.group_size is not None or not weight.symmetric:
        raise refuse(profile, "neural_compressor", "this weight format", "it takes symmetric INT8 per output channel")
    if inputs is None or inputs.bits != 8 or inputs.dynamic:
        raise refuse(profile, "neural_compressor", "this input format", "it takes static 8-bit inputs; try w8a8_static")
    algorithm = "minmax" if scheme.observer == "minmax" else "kl"
    low = {
        "weight": {"dtype": ["int8"], "scheme": ["sym"], "granularity": ["per_channel"], "algorithm": ["minmax"]},
        "activation": {
            "dtype": ["uint8"],
            "scheme": ["sym" if inputs.symmetric else "asym"],
            "granularity": ["per_tensor"],
            "algorithm": [algorithm],
        },
    }
    quantized = {op.path for op in profile.low}
    found = {neural_compressor_pattern(op.path): low if op.path in quantized else FLOAT for op in operators}
    language = FAMILIES[operators[0].family].language
    return {neural_compressor_pattern(f"{language}.embed_tokens"): FLOAT, **found}
