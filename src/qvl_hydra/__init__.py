"""qvl_hydra: which parts of a vision-language model can go to which number format, and what that costs the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qvl_hydra.version import __version__

if TYPE_CHECKING:
    from qvl_hydra.notebook import Run, read

__all__ = ["Run", "read", "__version__"]


def __getattr__(name: str) -> Any:
    """`read` and `Run`, imported when they are asked for: the command line needs neither."""
    if name in ("Run", "read"):
        from qvl_hydra import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
