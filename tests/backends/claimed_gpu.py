"""Tensors on the CPU that claim to be on a GPU: what would mix devices there is an error here too.

A function mode sees every call on a tensor that Python makes. What autograd calls by itself it does not see; there the
tensors of one graph are on one device anyhow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
_GETTERS = {torch.Tensor.device.__get__: GPU, torch.Tensor.is_cuda.__get__: True}  # type: ignore[attr-defined]


def claim(tensor: Tensor) -> Tensor:
    """Let a tensor claim from now on that it is on the GPU."""
    tensor.claims_gpu = True  # type: ignore[attr-defined]
    return tensor


def claims(tensor: Tensor) -> bool:
    return getattr(tensor, "claims_gpu", False)


def claimed_parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
    """`nn.Parameter`, which no function mode sees."""
    parameter = nn.Parameter(data, requires_grad=requires_grad)
    if claims(data):
        claim(parameter)
    return parameter


class ClaimedGpu(TorchFunctionMode):
    """Within it, tensors made or moved there claim to be on the GPU, and so does all that is computed from them.

    Raises:
        RuntimeError: tensors of both devices in one operation, but for numbers and what an index may be.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _GETTERS and claims(args[0]):
            return _GETTERS[func]
        name = getattr(func, "__name__", "")
        target, args, given = _here(args, dict(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        moves = name in ("to", "cpu")
        if name == "cpu":
            target = torch.device("cpu")
        if not moves and name != "copy_":
            _refuse_a_mix(name, args, tensors)
        there = target.type == "cuda" if target else any(map(claims, tensors))
        result = func(*args, **given)
        if moves and result is args[0] and claims(result) != there:
            result = result.detach().clone()
        return tree_map_only(Tensor, claim, result) if there else result


def _here(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, tuple[Any, ...], dict[str, Any]]:
    """Which device a call asks for, and its arguments with the CPU in that place."""
    asked = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.device)]
    cpu = torch.device("cpu")
    args = tuple(cpu if isinstance(arg, torch.device) else arg for arg in args)
    kwargs = {key: cpu if isinstance(value, torch.device) else value for key, value in kwargs.items()}
    return (asked[0] if asked else None), args, kwargs


def _refuse_a_mix(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    indexed = name in ("__getitem__", "__setitem__") and claims(args[0])
    stayed_behind = any(tensor.dim() > 0 and not claims(tensor) for tensor in tensors)
    if any(map(claims, tensors)) and stayed_behind and not indexed:
        raise RuntimeError(f"{name} mixes devices: {[(tuple(tensor.shape), claims(tensor)) for tensor in tensors]}")
