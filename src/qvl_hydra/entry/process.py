"""How the program behaves as a process: exit statuses, signals, and how errors are told.

Nothing here takes time to import: help, and the answer to a wrong option, need no more.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
import types
import warnings

from qvl_hydra.errors import QvlHydraError

_COMMANDS: set[int] = set()  # this process, where it is the command's own
STOPPED, WRONG_INPUT, BROKEN = 130, 2, 1  # exit statuses
AGAIN_S = 0.05


def note_command() -> None:
    """Note that this process is the one that the user has started."""
    _COMMANDS.add(os.getpid())


def elsewhere() -> bool:
    """Whether this is another process: a launcher's worker, whichever way it was made."""
    return os.getpid() not in _COMMANDS


def have_streams() -> None:
    """Where the program was started with a closed stdin, stdout or stderr, nothing else may be opened in its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def be_quiet() -> None:
    """A full disk is told once, and not again for each line that run.log lacks."""
    logging.raiseExceptions = False
    # Launchers have YAMLs here.
    warnings.filterwarnings("ignore", message=r"\s*.*is validated against ConfigStore schema")


def stop_politely() -> None:
    """Let a polite kill and a terminal that goes away end a run as Ctrl-C does, whatever is being done when they come.

    What is raised while Python clears something away is printed and lost; a stop is raised again, a moment later.
    """

    def stop(signum: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    def again(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(AGAIN_S, _thread.interrupt_main, [signal.SIGTERM]).start()
        else:
            sys.__unraisablehook__(lost)

    with contextlib.suppress(ValueError):  # a launcher may run jobs in threads, which have no signals
        signal.signal(signal.SIGTERM, stop)
        sys.unraisablehook = again
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, stop)


def keep_to_own_cores() -> None:
    """Have torch take no more threads than this process has cores: it does not know of a container's quota."""
    import joblib
    import torch

    if torch.get_num_threads() > (cores := joblib.cpu_count()):
        torch.set_num_threads(cores)


def said(error: Exception) -> str:
    """An error in one text for the user."""
    return str(error) if isinstance(error, QvlHydraError) else f"{type(error).__name__}: {error}"


def show_traceback() -> None:
    """Within an `except`: where it happened, for those who asked by HYDRA_FULL_ERROR=1."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()
