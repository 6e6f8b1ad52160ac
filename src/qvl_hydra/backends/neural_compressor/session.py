"""Neural Compressor as a guest: imported on demand, kept quiet, and leaving nothing behind.

It logs to the screen, writes a workspace folder, seeds torch's generator and keeps state in module globals. Within
`guest` all of this is turned away or put back. Both of its adaptors are called inside it.
"""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qvl_hydra.errors import MissingExtraError

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports use pkg_resources and other names on their way out
        import neural_compressor
        import neural_compressor.strategy  # the 2.x API, gone in 3.8
        from neural_compressor.config import options
except ImportError as missing:
    raise MissingExtraError(
        "neural-compressor 3.7 (with numpy 1 and setuptools below 81)", "inc", "a backend.name of inc_fx or inc_onnxrt"
    ) from missing

VERSION: str = neural_compressor.__version__
_ABSENT = object()


@contextmanager
def replaced_globals(module: ModuleType, **values: Any) -> Iterator[None]:
    """Let a module see other globals for a while; names it does not have are removed again."""
    before = {name: module.__dict__.get(name, _ABSENT) for name in values}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


@contextmanager
def guest() -> Iterator[None]:
    """Neural Compressor works within: errors only on screen, droppings in a temporary folder, generators as before."""
    logger = logging.getLogger("neural_compressor")
    level, workspace = logger.level, options.workspace
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="qvl_hydra_inc_") as folder,
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            logger.setLevel(logging.ERROR)
            options.workspace = folder
            yield
    finally:
        logger.setLevel(level)
        options.workspace = workspace
        np.random.set_state(numpy_state)
        random.setstate(python_state)
