"""A precision profile: the scheme of the quantized operators, and the operators that stay in high precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.quantization.formats.table import weight_bits
from qvl_hydra.quantization.scheme import Scheme


@dataclass(frozen=True)
class Profile:
    """A decision about the operators of a sweep; every other operator of the model stays as it is.

    Attributes:
        scheme: what the quantized operators are put into.
        operators: the operators decided on, in data order.
        high: paths of those that stay in high precision.
        high_bits: width that their weights count with.
        chooser: what decided: `scores`, or the name of a baseline.
        predicted: sum of the scores of the quantized operators; None where no score exists.
        others: schemes of quantized operators that are put into another than `scheme`, by path.
    """

    scheme: Scheme
    operators: tuple[Operator, ...]
    high: frozenset[str]
    high_bits: int
    chooser: str
    predicted: float | None = None
    others: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def low(self) -> tuple[Operator, ...]:
        """The quantized operators, in data order."""
        return tuple(op for op in self.operators if op.path not in self.high)

    def scheme_of(self, op: Operator) -> Scheme:
        """The scheme of a quantized operator."""
        return self.others.get(op.path, self.scheme)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Schemes that some operator is put into, by name, the first one first."""
        return {scheme.name: scheme for scheme in (self.scheme, *self.others.values())}

    def by_scheme(self) -> list[Profile]:
        """The quantized operators of each scheme, as a profile that keeps nothing in high precision."""
        return [
            Profile(
                scheme,
                tuple(op for op in self.low if self.scheme_of(op).name == name),
                frozenset(),
                self.high_bits,
                self.chooser,
            )
            for name, scheme in self.schemes.items()
        ]

    @property
    def key(self) -> frozenset[tuple[str, str]]:
        """What of a profile a measurement depends on: quantized operators and their schemes."""
        return frozenset((op.path, self.scheme_of(op).name) for op in self.low)

    @property
    def share_high(self) -> float:
        return len(self.high) / len(self.operators)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights decided on, with their scales; biases are not counted."""
        return sum(bits_of(op, self) for op in self.operators) / 8

    @property
    def average_bits(self) -> float:
        """Bits a weight, over all weights decided on."""
        return self.weight_bytes * 8 / sum(weight_values(op) for op in self.operators)


def require_modules(operators: Sequence[Operator], tool: str) -> None:
    """Refuse a model whose experts are one weight for a tool that quantizes modules.

    Raises:
        ProfileError: there are such experts.
    """
    mixture = next((op for op in operators if op.experts > 1), None)
    if mixture is not None:
        raise ProfileError(
            f"{tool} quantizes linear modules, and the experts of this model are weights of their own, first "
            f"{mixture.path}; what task=profile measures and lists holds for them as well"
        )


def weight_values(op: Operator) -> int:
    """Numbers in an operator's weight, without its bias."""
    return op.in_features * op.out_features * op.experts


def low_bits(op: Operator, scheme: Scheme, high_bits: int) -> float:
    """Bits of an operator's whole weight in the scheme, scales included; a scheme that leaves weights saves none."""
    return weight_bits(scheme, op.in_features, high_bits) * weight_values(op)


def bits_of(op: Operator, profile: Profile) -> float:
    """Bits of an operator's whole weight under a profile."""
    if op.path in profile.high:
        return float(profile.high_bits * weight_values(op))
    return low_bits(op, profile.scheme_of(op), profile.high_bits)


def describe(profile: Profile) -> dict[str, Any]:
    """The profile as plain values, for `profile.json`."""
    return {
        "chooser": profile.chooser,
        "scheme": profile.scheme.name,
        "n_operators": len(profile.operators),
        "n_high": len(profile.high),
        "share_high": profile.share_high,
        "average_bits": profile.average_bits,
        "weight_bytes": profile.weight_bytes,
        "predicted": profile.predicted,
        "high": in_order(profile.operators, profile.high),
        "low": [op.path for op in profile.low],
        "choices": {
            name: [op.path for op in profile.low if profile.scheme_of(op).name == name] for name in profile.schemes
        },
    }


def in_order(operators: Iterable[Operator], paths: Iterable[str]) -> list[str]:
    """The paths in data order."""
    wanted = set(paths)
    return [op.path for op in operators if op.path in wanted]
