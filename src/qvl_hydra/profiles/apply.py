"""Puts a profile on a model by QDQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.qdq import OperatorQuantizer, largest_value
from qvl_hydra.quantization.scheme import Scheme


def make_quantizers(
    module: nn.Module, operators: Sequence[Operator], samples: Sequence[Sample], component: str, scheme: Scheme
) -> dict[str, OperatorQuantizer]:
    """Quantizers of all operators, so that any profile is a choice among them; holds one more copy of the weights.

    Args:
        samples: calibration samples that static activation ranges come from.

    Raises:
        ProfileError: an operator's range cannot be observed.
    """
    paths = [op.path for op in operators]
    try:
        ranges = observe_ranges(module, paths, samples, component, scheme) if scheme.needs_ranges else {}
    except ValueError as error:
        raise ProfileError(
            f"activation ranges cannot be calibrated ({error}); exclude the operator with operators.exclude, "
            "or give calibration samples that reach it"
        ) from error
    shared = shared_largest(module, operators, scheme)
    return {op.path: make_quantizer(module, op.path, scheme, ranges, shared.get(op.group)) for op in operators}


def shared_largest(module: nn.Module, operators: Sequence[Operator], scheme: Scheme) -> dict[str, Tensor]:
    """The largest |weight| of what a runtime fuses, where it gives that one tensor scale."""
    if scheme.weight is None or FORMATS[scheme.weight.number].tensor_scale is None:
        return {}
    groups: dict[str, list[Tensor]] = {}
    for op in operators:
        groups.setdefault(op.group, []).append(module.get_submodule(op.path).get_parameter("weight"))
    return {name: largest_value(weights) for name, weights in groups.items()}


@contextmanager
def applied(module: nn.Module, profile: Profile, quantizers: Mapping[str, OperatorQuantizer]) -> Iterator[None]:
    """Within the context the profile's low operators compute in its schemes; the model itself is not changed.

    Args:
        quantizers: by path; in another scheme than the profile's first by `quantizer_key`.
    """
    with quantized(module, {op.path: quantizers[quantizer_key(profile, op, quantizers)] for op in profile.low}):
        yield


def quantizer_key(profile: Profile, op: Operator, quantizers: Mapping[str, OperatorQuantizer]) -> str:
    """Where the quantizer of an operator in its scheme is found: `path#scheme`, or the path where there is one only."""
    named = f"{op.path}#{profile.scheme_of(op).name}"
    return named if named in quantizers else op.path
