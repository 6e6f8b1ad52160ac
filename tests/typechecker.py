"""What checks the shapes and types of calls while the tests run; an int passes for a float, as PEP 484 has it.

A check costs more than many of the functions that it checks: of each function the first calls are checked, then some.
Functions within functions are left alone: each would be made into a checked one anew at every call of the outer.
"""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
FIRST, THEN_EACH = 500, 20  # calls of a function
_checked = jaxtyping.jaxtyped


def _checked_at_times(*, typechecker: Any) -> Any:
    def decorate(item: Any) -> Any:
        if "<locals>" in item.__qualname__:
            return item
        checked = _checked(item, typechecker=typechecker)
        if not isinstance(item, types.FunctionType):
            return checked
        calls = itertools.count()

        @functools.wraps(checked)
        def called(*arguments: Any, **named: Any) -> Any:
            number = next(calls)
            function = checked if number < FIRST or number % THEN_EACH == 0 else item
            return function(*arguments, **named)

        return called

    return decorate


jaxtyping.jaxtyped = _checked_at_times  # what the import hook decorates with
