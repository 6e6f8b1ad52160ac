"""Prices: what one operator in one scheme costs, in each of the table's costs.

Times are those of a roofline: a product of `t` tokens takes as long as its arithmetic at the device's peak rate or as
its memory traffic at the device's bandwidth, whichever is longer (Williams, Waterman and Patterson, CACM 2009). They
order plans; they leave out attention itself, launches and everything that is no operator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qvl_hydra.errors import ProfileError
from qvl_hydra.families.record import HEAD, Family
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.profile import low_bits, weight_values
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.scheme import Scheme
from qvl_hydra.settings import DeviceSettings, ProfileSettings

HALF_BYTES = 2  # of an activation between operators
MERGED = 4  # patches of the vision tower that become one token of the language model
HIGH_RATE = "bf16"


@dataclass(frozen=True)
class Terms:
    """What prices depend on beside the operator and its scheme.

    Attributes:
        schemes: of each choice but `leave`.
        high_bits: width that the weights of a kept operator count with.
        device: whose peaks a roofline has.
        measured: seconds of products by what they take in, what they give, choice and tokens.
        lengths: of a request: `prompt_tokens`, `image_tokens`, `answer_tokens` and how many are served at once.
    """

    schemes: Mapping[str, Scheme]
    high_bits: int = 16
    device: DeviceSettings | None = None
    lengths: ProfileSettings = field(default_factory=ProfileSettings)
    measured: Mapping[tuple[int, int, str, int], float] = field(default_factory=dict)

    def of(self, choice: str) -> Scheme | None:
        """The scheme of a choice; None for high precision."""
        return self.schemes.get(choice)


def operators(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """1 for an operator in high precision, else 0."""
    return float(scheme is None)


def weight_bits(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """Bits of the weight with its scales."""
    if scheme is None:
        return float(terms.high_bits * weight_values(op))
    return low_bits(op, scheme, terms.high_bits)


def weight_bytes(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """Bytes of the weight with its scales."""
    return weight_bits(op, scheme, terms) / 8


def bytes_per_token(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """Bytes of weights that one token of the answer costs.

    The language tower is read for every token, of a mixture the experts that are used, and the vision tower once an
    image, which the answer's tokens share; `profile.requests` that are served together share what is read.
    """
    lengths = terms.lengths
    once = 1 / lengths.answer_tokens if lengths.image_tokens else 0.0
    share = used(op, lengths.requests) / lengths.requests if op.component == "lm" else once
    return weight_bytes(op, scheme, terms) * share


def lengths_of(lengths: ProfileSettings, family: Family) -> ProfileSettings:
    """Those of a request to a model of a family: one that is text alone is given no image."""
    return lengths if family.visual is not None else replace(lengths, image_tokens=0)


def used(op: Operator, tokens: int) -> float:
    """Share of an operator's weight that so many tokens read: all, or that of the experts that one of them goes to.

    Each token is taken to go to any of the experts alike, which is what they are trained for.
    """
    return 1.0 if op.active == op.experts else 1 - (1 - op.active / op.experts) ** tokens


def products(op: Operator, lengths: ProfileSettings) -> list[tuple[int, float]]:
    """The products of an operator that one request takes: tokens of each, and how often it comes.

    The vision tower runs once, over all patches; the language tower over prompt and image tokens, and then once a token
    of the answer, for all requests that are served at once; the head over one token each time.
    """
    if op.component == "vision":
        if not lengths.image_tokens:
            return []
        merged = "merger" in op.role or op.role.startswith("deepstack")
        return [(lengths.image_tokens * (1 if merged else MERGED), 1.0)]
    first = 1 if op.path == HEAD else lengths.prompt_tokens + lengths.image_tokens
    return [(first, 1.0), (lengths.requests, lengths.answer_tokens / lengths.requests)]


def seconds(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """Seconds that the operator takes of one request, by the roofline of `device`."""
    return math.fsum(times * roofline(op, scheme, terms, tokens) for tokens, times in products(op, terms.lengths))


def measured_seconds(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """The same, by what `task=measure_costs` timed on a machine.

    Raises:
        ProfileError: a product was not timed there.
    """
    choice = LEAVE if scheme is None else scheme.name
    found = []
    for tokens, times in products(op, terms.lengths):
        key = (op.in_features, op.out_features, choice, tokens)
        if op.experts > 1:
            raise ProfileError(f"products of {op.experts} experts are not timed ({op.path}); take profile.cost=seconds")
        if key not in terms.measured:
            raise ProfileError(
                f"profile.costs has no product of {op.in_features} to {op.out_features} values in {choice} for "
                f"{tokens} tokens ({op.path}); run task=measure_costs with this model, these choices and lengths, or "
                "leave out a choice that the machine has no product for"
            )
        found.append(times * terms.measured[key])
    return math.fsum(found)


def roofline(op: Operator, scheme: Scheme | None, terms: Terms, tokens: int) -> float:
    """Seconds of one product of so many tokens: of its arithmetic or of its traffic, whichever takes longer."""
    device = terms.device
    assert device is not None, "a timed cost was priced without a device"
    peak = device.tera_ops.get(rate_of(scheme), device.tera_ops[HIGH_RATE]) * 1e12
    arithmetic = 2.0 * tokens * op.active * op.in_features * op.out_features / peak
    return max(arithmetic, bytes_moved(op, scheme, terms, tokens) / (device.bandwidth_gb_s * 1e9))


def bytes_moved(op: Operator, scheme: Scheme | None, terms: Terms, tokens: int) -> float:
    """Bytes that one product reads and writes: what it uses of its weight, and activations in half precision."""
    activations = HALF_BYTES * tokens * op.active * (op.in_features + op.out_features)
    return weight_bytes(op, scheme, terms) * used(op, tokens) + activations


def rate_of(scheme: Scheme | None) -> str:
    """What a product computes in: the format of weight and input where they share one, else half precision.

    With weights alone it is `int4_weight` and the like, for devices that say how fast they unpack; half precision for
    others.
    """
    if scheme is None or scheme.weight is None:
        return HIGH_RATE
    if scheme.input is None:
        return f"{scheme.weight.number}{scheme.weight.bits}_weight"
    rates = {FORMATS[part.number].rate for part in (scheme.weight, scheme.input)}
    return rates.pop() if len(rates) == 1 else HIGH_RATE
