"""Prices: what one operator in one scheme costs, in each of the table's costs.

Times are those of a roofline: a product of `t` tokens takes as long as its arithmetic at the device's peak rate or as
its memory traffic at the device's bandwidth, whichever is longer (Williams, Waterman and Patterson, CACM 2009). They
order plans; they leave out attention itself, launches and everything that is no operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qvl_hydra.operators.discover import Operator
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
        lengths: of a request: `prompt_tokens`, `image_tokens`, `answer_tokens` and how many are served at once.
    """

    schemes: Mapping[str, Scheme]
    high_bits: int = 16
    device: DeviceSettings | None = None
    lengths: ProfileSettings = field(default_factory=ProfileSettings)

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

    The language tower is read for every token, and the vision tower once an image, which the answer's tokens share;
    `profile.requests` that are served together share what is read.
    """
    lengths = terms.lengths
    share = 1 / lengths.requests if op.component == "lm" else 1 / lengths.answer_tokens
    return weight_bytes(op, scheme, terms) * share


def seconds(op: Operator, scheme: Scheme | None, terms: Terms) -> float:
    """Seconds that the operator takes of one request, by the roofline of `device`.

    The vision tower runs once, over all patches; the language tower over prompt and image tokens, and then once a token
    of the answer, for all requests that are served at once; the head over one token each time.
    """
    lengths = terms.lengths
    if op.component == "vision":
        patches = lengths.image_tokens * MERGED
        tokens = lengths.image_tokens if "merger" in op.role or op.role.startswith("deepstack") else patches
        return _product(op, scheme, terms, tokens)
    head = op.path == "lm_head"
    first = 1 if head else lengths.prompt_tokens + lengths.image_tokens
    decode = lengths.answer_tokens * _product(op, scheme, terms, lengths.requests) / lengths.requests
    return _product(op, scheme, terms, first) + decode


def _product(op: Operator, scheme: Scheme | None, terms: Terms, tokens: int) -> float:
    """Seconds of one product of so many tokens."""
    device = terms.device
    assert device is not None, "a timed cost was priced without a device"
    arithmetic = 2.0 * tokens * weight_values(op) / (device.tera_ops[_rate(scheme, device)] * 1e12)
    moved = weight_bytes(op, scheme, terms) + HALF_BYTES * tokens * (op.in_features + op.out_features)
    return max(arithmetic, moved / (device.bandwidth_gb_s * 1e9))


def _rate(scheme: Scheme | None, device: DeviceSettings) -> str:
    """What the product computes in: the format of weight and input where the device multiplies it, else half."""
    if scheme is None or scheme.weight is None or scheme.input is None:
        return HIGH_RATE
    rates = {FORMATS[part.number].rate for part in (scheme.weight, scheme.input)}
    rate = rates.pop()
    return rate if not rates and rate in device.tera_ops else HIGH_RATE
