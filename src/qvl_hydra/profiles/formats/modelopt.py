"""NVIDIA ModelOpt: `quant_cfg` in its ordered list form, for `mtq.quantize`.

The first entry switches every quantizer off; then two entries an operator, by full module path. Later entries win, and
no pattern is left that could reach another operator. YAML, because block sizes are keyed by axis numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.rendered import Rendered, refuse
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.scheme import ActivationFormat, WeightFormat


def render(profile: Profile, operators: Sequence[Operator]) -> Rendered:
    """`quant_cfg.yaml`, the whole argument of `mtq.quantize`."""
    notes = []
    scheme = profile.scheme
    if scheme.input is not None and not scheme.input.symmetric:
        notes.append("inputs are quantized symmetrically: ModelOpt's integers have no zero point")
    if scheme.observer != "minmax" and scheme.needs_ranges:
        notes.append(f"activation ranges are the widest seen (algorithm `max`), not {scheme.observer}")
    return Rendered({"quant_cfg.yaml": yaml.safe_dump(quant_cfg(profile), sort_keys=False)}, tuple(notes))


def quant_cfg(profile: Profile) -> dict[str, Any]:
    """The dictionary itself.

    Raises:
        ProfileError: the weights have zero points.
    """
    scheme = profile.scheme
    if scheme.weight is not None and not scheme.weight.symmetric:
        raise refuse(profile, "modelopt", "weights with zero points", "take symmetric weights")
    parts = {
        "weight_quantizer": None if scheme.weight is None else _weight(scheme.weight),
        "input_quantizer": None if scheme.input is None else _activation(scheme.input),
        "output_quantizer": None if scheme.output is None else _activation(scheme.output),
    }
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for op in profile.low:
        for part, cfg in parts.items():
            if cfg is not None:
                entries.append({"quantizer_name": f"{op.path}.{part}", "cfg": dict(cfg)})
    return {"quant_cfg": entries, "algorithm": "max"}


def _weight(form: WeightFormat) -> dict[str, Any]:
    if form.group_size is None:
        return {"num_bits": form.bits, "axis": 0}
    return {"num_bits": form.bits, "block_sizes": {-1: form.group_size}}


def _activation(form: ActivationFormat) -> dict[str, Any]:
    if form.dynamic:
        return {"num_bits": form.bits, "type": "dynamic", "block_sizes": {-1: None}}
    return {"num_bits": form.bits, "axis": None}
