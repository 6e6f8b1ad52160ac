"""Observers: static activation ranges from calibration samples.

`minmax` and `histogram` are PyTorch's own observers, the ones that Neural Compressor installs (`histogram` is what it
calls `kl`); `percentile` reads its range from the same histogram, leaving equal shares out at both ends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver

from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.formats.table import FORMATS
from qvl_hydra.quantization.scheme import ActivationFormat, Scheme


class RangeObserver:
    """Collects the range of one activation over any number of tensors.

    Args:
        form: the static format the range is for.
        scheme: gives the observer's kind and percentile.
    """

    def __init__(self, form: ActivationFormat, scheme: Scheme) -> None:
        self.form = form
        self.kind = scheme.observer
        self.percentile = scheme.percentile
        self.low = torch.tensor(float("inf"))
        self.high = torch.tensor(float("-inf"))
        self.histogram: HistogramObserver | None = None
        if self.kind != "minmax":
            qscheme = torch.per_tensor_symmetric if form.symmetric else torch.per_tensor_affine
            dtype = torch.qint8 if form.symmetric else torch.quint8
            self.histogram = HistogramObserver(
                dtype=dtype, qscheme=qscheme, quant_min=form.limits[0], quant_max=form.limits[1]
            )

    def observe(self, x: Tensor) -> None:
        """Take in one tensor of any shape; an empty one changes nothing."""
        if x.numel() == 0:
            return
        low, high = (limit.float().cpu() for limit in torch.aminmax(x.detach()))
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        # PyTorch's histogram passes over tensors with an infinity in silence; `params` must still see it.
        if self.histogram is not None and torch.isfinite(low) and torch.isfinite(high):
            self.histogram(x.detach().float().cpu())

    def params(self) -> QuantParams:
        """Scale and zero point from all that was observed.

        Raises:
            ValueError: nothing was observed, or a value was not finite.
        """
        low, high = self._range()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"the observed activation range is not finite: {low.item()} to {high.item()}")
        return FORMATS[self.form.number].static(low, high, self.form)

    def _range(self) -> tuple[Tensor, Tensor]:
        if self.histogram is None or not (torch.isfinite(self.low) and torch.isfinite(self.high)):
            return self.low, self.high
        if self.kind == "histogram":
            low, high = self.histogram._non_linear_param_search()
            return low.reshape(()), high.reshape(())
        counts = self.histogram.histogram.double()
        if float(counts.sum()) == 0:
            return self.low, self.high
        edges = torch.linspace(
            float(self.histogram.min_val), float(self.histogram.max_val), counts.numel() + 1, dtype=torch.float64
        )
        below = counts.cumsum(0) / counts.sum()
        outside = (1 - self.percentile / 100) / 2
        first = int((below <= outside).sum())
        last = int((below < 1 - outside).sum())
        return edges[first].float(), edges[min(last + 1, counts.numel())].float()
