"""Streamed placement: a model whose weights stay in the checkpoint and are read one part at a time.

The module tree holds parameters on the meta device (no memory); buffers such as rotary frequencies are real. A part's
weights are there only within `weights_of`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qvl_hydra.errors import ModelError
from qvl_hydra.families.record import HEAD, Family


class Checkpoint:
    """Weights of a checkpoint folder by module path, read on demand.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        family: whose checkpoints may have names of their own.

    Attributes:
        places: file and key of each weight.
        shapes: of each weight, from the files' headers.

    Raises:
        ModelError: no safetensors there, a shard is missing, or a file is broken.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder = folder
        self.family = family
        self._renames = [(re.compile(pattern), replacement) for pattern, replacement in family.renames]
        self.places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _files(folder):
            try:
                with safe_open(path, "pt") as opened:
                    for key in opened.keys():  # noqa: SIM118  (no mapping)
                        self.places[self._renamed(key)] = path, key
                        self.shapes[self._renamed(key)] = tuple(opened.get_slice(key).get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({error}); download it again") from error

    def require(self, skeleton: nn.Module) -> None:
        """Refuse a checkpoint whose weights are not those of the model.

        Args:
            skeleton: the model without weights; tied weights are looked for once.

        Raises:
            ModelError: weights are missing, or have other shapes.
        """
        expected = {path: tuple(parameter.shape) for path, parameter in skeleton.named_parameters()}
        missing = sorted(set(expected) - set(self.shapes))
        if missing:
            raise ModelError(
                f"{self.folder}: {len(missing)} weights are missing, first {', '.join(missing[:3])}; download it "
                "again, or give a checkpoint of the whole model"
            )
        wrong = [path for path, shape in expected.items() if not _fits(self.shapes[path], shape)]
        if wrong:
            first = wrong[0]
            raise ModelError(
                f"{self.folder}: {len(wrong)} weights have other shapes than config.json says; first {first} is "
                f"{list(self.shapes[first])}, not {list(expected[first])}"
            )

    def read(self, path: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """One parameter of a shape; the head's of a model with tied embeddings is the embedding table."""
        if path == f"{HEAD}.weight" and path not in self.places:
            path = f"{self.family.language}.embed_tokens.weight"
        if path not in self.places:
            raise ModelError(f"the checkpoint has no weight {path}")
        file, key = self.places[path]
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return _in_shape(tensor, shape).to(device=device, dtype=dtype)

    def _renamed(self, key: str) -> str:
        """The module path of a key."""
        for pattern, replacement in self._renames:
            if pattern.search(key):
                return pattern.sub(replacement, key)
        return key


class Drawn:
    """Weights of no checkpoint, all alike, for what depends on shapes alone."""

    def read(self, path: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """One parameter of a shape; the values are small enough for any depth and none is subnormal."""
        return torch.full(tuple(shape), 1e-3, device=device, dtype=dtype)


def _fits(stored: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a stored weight is the parameter's, or that of all experts in either layout; see `_in_shape`."""
    if len(stored) == 3 and len(shape) == 2:
        experts, first, second = stored
        return (experts * first, second) == tuple(shape) or (experts * second, first) == tuple(shape)
    return tuple(stored) == tuple(shape)


def _in_shape(stored: Tensor, shape: Sequence[int]) -> Tensor:
    """All experts' weights, (expert, out, in) or, as published checkpoints have them, (expert, in, out), as rows.

    Where both would fit, it is the first, as transformers reads it.
    """
    if stored.dim() == 3 and len(shape) == 2:
        straight = (stored.shape[0] * stored.shape[1], stored.shape[2]) == tuple(shape)
        return (stored if straight else stored.mT).reshape(*shape)
    return stored


def _files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: the whole one before shards that lie beside it, as in transformers."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ModelError(f"{folder} has neither model.safetensors nor an index of shards; other formats are not read")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error}); download it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing[:3])}")
    return [folder / name for name in names]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within the context new modules get their parameters on the meta device and their buffers for real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def weights_of(
    module: nn.Module,
    roots: Sequence[str],
    checkpoint: Checkpoint | Drawn | None,
    device: torch.device,
    own: torch.dtype,
    dtype: torch.dtype,
    kept: Container[str],
) -> Iterator[None]:
    """Have the weights below `roots` in memory, in `dtype`, for a while.

    Args:
        module: the whole model.
        roots: module paths.
        checkpoint: where they are read; None for a resident model, whose own weights are converted.
        own: dtype of the model, to which weights on disk are rounded first.
        kept: names of parameters that stay in the model's dtype.
    """
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for root in roots:
            for path, owner in module.get_submodule(root).named_modules(prefix=root):
                for name, parameter in list(owner._parameters.items()):
                    if parameter is not None:
                        taken.append((owner, name, parameter))
                        weight: Tensor = parameter
                        if checkpoint is not None:
                            weight = checkpoint.read(f"{path}.{name}", parameter.shape, device, own)
                        weight = weight.to(own if f"{path}.{name}" in kept else dtype)
                        owner._parameters[name] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for owner, name, parameter in taken:
            owner._parameters[name] = parameter
