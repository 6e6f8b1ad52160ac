"""The order that Neural Compressor itself returns, remade from its own numbers and its own rule.

Its call (`calculate_op_sensitivity`) would cost the whole measurement once more. Its scores follow from its scales,
zero points and int8 weights to five digits at the price of one plain forward each, and its rule over batches is its own
function, `get_fallback_order`. Tests compare the result with the real call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from neural_compressor.adaptor.torch_utils import util

from qvl_hydra.backends.neural_compressor.adaptor import Batches, FxSession
from qvl_hydra.backends.neural_compressor.quantizers import read_quantizers
from qvl_hydra.backends.neural_compressor.session import replaced_globals
from qvl_hydra.backends.neural_compressor.wrapper import WrapperBatch
from qvl_hydra.quantization.apply import quantized

ErrorOf = Callable[[Iterable[str]], float]  # operators quantized -> squared error of the output

FAULTS = {
    "fallback": [
        "get_fallback_order gives every operator of the first batch rank weight 0 (the weights are taken while the "
        "table of ranks still grows): with two batches only the second decides",
        "when the smallest score is at least 0.8 of the largest, get_mse_order_per_fp32 returns at most five operators",
        "activation ranges come from the one batch that is scored, whatever the calibration size",
        "most sensitive first: the operators whose return to float leaves the smallest error",
    ],
    "requantize": [
        "get_mse_order_per_int8 leaves quantized what its loop has visited: the score of the n-th operator is that of "
        "the first n together, and the order is close to the order in which they stand in the model",
        "get_fallback_order lets only the last batch decide",
        "it knows only operators that a fallback stage of the same process has met (op_cfg_mapping)",
        "activation ranges come from the one batch that is scored, whatever the calibration size",
        "least sensitive first: the operators whose quantization costs least",
    ],
}


def inc_order(session: FxSession, batches: Sequence[WrapperBatch], direction: str) -> list[str]:
    """Operator paths in the order in which Neural Compressor returns them.

    Args:
        batches: the scored samples, batch by batch, as `confidence_batches` counts them.
        direction: `fallback` or `requantize`.
    """
    rank = _fallback_ranking if direction == "fallback" else _requantize_ranking

    def ranked(adaptor: Any, model: Any, batch: WrapperBatch, tune_cfg: Mapping[str, Any]) -> list[str]:
        if direction == "requantize" and batch is not batches[-1]:
            return []  # what the other batches say is thrown away
        return rank(list(session.names), _error_of(session, batch))

    loader = Batches([(batch, 0) for batch in batches], 1)
    with replaced_globals(util, get_mse_order_per_fp32=ranked, get_mse_order_per_int8=ranked):
        order: list[str] = util.get_fallback_order(
            session.adaptor, session.wrapper, loader, session.tune_cfg, len(batches), direction == "fallback"
        )
    return order


def _error_of(session: FxSession, batch: WrapperBatch) -> ErrorOf:
    quantizers = read_quantizers(session, [batch])
    with torch.no_grad():
        reference = session.wrapper(batch)

    @torch.no_grad()
    def error_of(paths: Iterable[str]) -> float:
        with quantized(session.wrapper, {path: quantizers[path] for path in paths}):
            return float((session.wrapper(batch) - reference).pow(2).sum())

    return error_of


def _fallback_ranking(paths: list[str], error_of: ErrorOf) -> list[str]:
    """As `get_mse_order_per_fp32`: each operator in float among quantized ones, smallest error first."""
    scores = {path: error_of(other for other in paths if other != path) for path in paths}
    order = sorted(scores, key=scores.__getitem__)
    if not order or scores[order[0]] < 0.8 * scores[order[-1]]:
        return order
    worst = order[-1]
    few = order[: min(len(order) // 10 + 1, 5)]
    again = {path: error_of(other for other in paths if other not in (path, worst)) for path in few}
    return sorted(again, key=again.__getitem__)


def _requantize_ranking(paths: list[str], error_of: ErrorOf) -> list[str]:
    """As `get_mse_order_per_int8`: the first n operators quantized together, smallest error first."""
    scores = {path: error_of(paths[: index + 1]) for index, path in enumerate(paths)}
    return sorted(scores, key=scores.__getitem__)
