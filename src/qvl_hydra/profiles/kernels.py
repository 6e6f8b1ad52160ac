"""Products as this machine's PyTorch computes them in a scheme: what `task=measure_costs` times.

Weights are random: only their format decides the time. Widths are padded to multiples of 64, as runtimes do, since
kernels for narrow formats refuse, or read past, others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qvl_hydra.quantization.scheme import Scheme

Product = Callable[[Tensor], Tensor]  # (token, in) to (token, out)
MULTIPLE = 64
MOST_INT8, MOST_FLOAT8 = 127.0, 448.0
HALF = torch.bfloat16


def padded(width: int) -> int:
    """The next multiple of what kernels take."""
    return -(-width // MULTIPLE) * MULTIPLE


def make_product(scheme: Scheme | None, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> Product:
    """A product in a scheme, with a weight of its own; inputs are quantized within it where the scheme does so.

    Args:
        scheme: None: the dtype as it is.
        inputs, outputs: multiples of `MULTIPLE`.

    Raises:
        NotImplementedError: this machine has no such product, with the reason.
    """
    if scheme is None:
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        return lambda x: functional.linear(x, weight)
    if scheme.weight is None or scheme.output is not None:
        raise NotImplementedError(f"{scheme.name} is not computed in low precision")
    kind = (scheme.weight.number, scheme.weight.bits, scheme.input and scheme.input.number)
    makers = {
        ("int", 8, "int"): _int8,
        ("int", 8, None): _int8_weight,
        ("int", 4, None): _int4_weight,
        ("float8_e4m3", 8, "float8_e4m3"): _float8,
    }
    if kind not in makers:
        raise NotImplementedError(f"PyTorch has no product of {scheme.name}")
    try:
        product = makers[kind](scheme, inputs, outputs, device)
        product(torch.randn(32, inputs, device=device, dtype=dtype))
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(str(error).splitlines()[0][:120]) from error
    return product


def _scaled(x: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each token by its own scale, in the narrow dtype, and the scales."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / largest
    scaled = x.float() / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def _int8(scheme: Scheme, inputs: int, outputs: int, device: torch.device) -> Product:
    weight = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8).t()
    scales = torch.rand(1, outputs, device=device)

    def product(x: Tensor) -> Tensor:
        count = len(x)
        if x.is_cuda and count < 32:  # its product wants more than 16 rows
            x = functional.pad(x, (0, 0, 0, 32 - count))
        narrow, scale = _scaled(x, MOST_INT8, torch.int8)
        return (torch._int_mm(narrow, weight).float() * scale * scales).to(x.dtype)[:count]

    return product


def _int8_weight(scheme: Scheme, inputs: int, outputs: int, device: torch.device) -> Product:
    weight = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
    scales = torch.rand(outputs, device=device, dtype=HALF)
    return lambda x: torch._weight_int8pack_mm(x.to(HALF), weight, scales)


def _int4_weight(scheme: Scheme, inputs: int, outputs: int, device: torch.device) -> Product:
    assert scheme.weight is not None
    group = scheme.weight.group_size or inputs
    if group not in (32, 64, 128, 256) or inputs % group:
        raise NotImplementedError(f"INT4 in groups of {group} over {inputs} inputs")
    values = torch.randint(0, 16, (outputs, inputs), device=device, dtype=torch.int32)
    scales = torch.rand(inputs // group, outputs, 2, device=device).to(HALF)
    if device.type == "cuda":
        packed = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8)
        weight = torch._convert_weight_to_int4pack(packed, 8)
        return lambda x: torch._weight_int4pack_mm(x.to(HALF), weight, group, scales)
    weight = torch._convert_weight_to_int4pack_for_cpu(values, 1)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x.to(HALF), weight, group, scales)


def _float8(scheme: Scheme, inputs: int, outputs: int, device: torch.device) -> Product:
    assert scheme.weight is not None
    weight = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)

    def product(x: Tensor) -> Tensor:
        narrow, scale = _scaled(x, MOST_FLOAT8, torch.float8_e4m3fn)
        y: Tensor = torch._scaled_mm(narrow, weight, one, one, out_dtype=HALF)
        return y * scale.to(HALF)

    return product
