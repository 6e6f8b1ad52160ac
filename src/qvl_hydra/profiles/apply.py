"""Puts a profile on a model by QDQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.apply import make_quantizer, observe_ranges, quantized
from qvl_hydra.quantization.qdq import OperatorQuantizer
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
    return {path: make_quantizer(module, path, scheme, ranges) for path in paths}


@contextmanager
def applied(module: nn.Module, profile: Profile, quantizers: Mapping[str, OperatorQuantizer]) -> Iterator[None]:
    """Within the context the profile's low operators compute in its scheme; the model itself is not changed."""
    with quantized(module, {op.path: quantizers[op.path] for op in profile.low}):
        yield
