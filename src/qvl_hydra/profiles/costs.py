"""The table of costs: what a plan can be told to save. Nothing here needs torch.

One addition is a function of an operator, its scheme (None: high precision) and the `Terms`, and a row here
(docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qvl_hydra.reference import load

LEAVE = "leave"  # the choice of high precision
ERROR = "error"  # the budget that is no cost: it bounds the error, and keeps as few operators as possible

MEASURED_SECONDS = "measured_seconds"  # needs the table of task=measure_costs


@dataclass(frozen=True)
class Cost:
    """What one choice costs, and how a budget bounds the sum.

    Attributes:
        name: `profile.budget`, `profile.cost`.
        price: `module:function`, of one operator in one scheme.
        per: what a budget's value is multiplied with: nothing, the number of operators or that of their weights.
        unit: of a value.
        timed: it depends on the lengths of `profile`, and on a device.
    """

    name: str
    price: str
    per: Literal["", "operators", "weights"] = ""
    unit: str = ""
    timed: bool = False

    def load(self) -> Callable[..., float]:
        """The price's function, imported now."""
        return load(self.price)


_OWN = "qvl_hydra.profiles.prices"
COSTS = {
    row.name: row
    for row in (
        Cost("count", f"{_OWN}:operators", unit="operators in high precision"),
        Cost("share", f"{_OWN}:operators", per="operators", unit="of the operators in high precision"),
        Cost("average_bits", f"{_OWN}:weight_bits", per="weights", unit="bits a weight"),
        Cost("weight_bytes", f"{_OWN}:weight_bytes", unit="bytes of weights"),
        Cost("bytes_per_token", f"{_OWN}:bytes_per_token", unit="bytes read for a token of the answer", timed=True),
        Cost("seconds", f"{_OWN}:seconds", unit="seconds a request", timed=True),
        Cost(MEASURED_SECONDS, f"{_OWN}:measured_seconds", unit="measured seconds a request", timed=True),
    )
}
