"""Functions that rows of tables name, so that reading a table imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load(reference: str) -> Callable[..., Any]:
    """The function that a row names as `module:function`, imported now.

    Raises:
        MissingExtraError: a package it needs is not installed (raised by its module).
    """
    module, _, function = reference.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
