"""What every format gives, and what several formats cannot express."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from qvl_hydra.errors import ProfileError
from qvl_hydra.profiles.profile import Profile

KERNEL_MULTIPLE = 64  # widths that INT8 kernels tile by; vLLM's CUTLASS and Marlin refuse or pad others


@dataclass(frozen=True)
class Rendered:
    """The files of one format.

    Attributes:
        files: name and text of each.
        notes: where the consumer computes something else than the profile's scheme, one sentence each.
    """

    files: Mapping[str, str]
    notes: tuple[str, ...] = ()


def require_linear(profile: Profile, format_name: str, experts: bool = False) -> None:
    """Refuse a quantized convolution, and experts where the format has no names for them.

    Raises:
        ProfileError: naming each.
    """
    known = ("Linear", "Experts") if experts else ("Linear",)
    others = [f"{op.path} ({op.kind})" for op in profile.low if op.kind not in known]
    if others:
        globs = [glob for glob in ("*patch_embed*", "*experts*") if fnmatch.filter(others, glob)]
        raise ProfileError(
            f"{format_name} quantizes Linear modules only and cannot express {', '.join(others)}; "
            f"leave them as they are with operators.exclude={globs} (with this run's folder as profile.scores nothing "
            "is scored again)"
        )


def refuse(profile: Profile, format_name: str, what: str, remedy: str) -> ProfileError:
    """The error for a scheme that a format cannot express, naming the operators it is for."""
    low = [op.path for op in profile.low]
    return ProfileError(
        f"{format_name} cannot express {what} (scheme {profile.scheme.name}), asked for {len(low)} operators, "
        f"first {low[0] if low else 'none'}; {remedy}"
    )


def misaligned(profile: Profile) -> list[str]:
    """Quantized operators whose width no common INT8 kernel takes as it is, one sentence each."""
    found = []
    for op in profile.low:
        widths = {"input": op.in_features, "output": op.out_features}
        odd = [f"{side} width {width}" for side, width in widths.items() if width % KERNEL_MULTIPLE]
        if odd:
            found.append(f"{op.path}: {' and '.join(odd)} not divisible by {KERNEL_MULTIPLE}")
    return found
