"""The program as a process: a stop is not lost, wherever it comes."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from qvl_hydra.entry.process import stop_politely


def test_a_stop_that_comes_while_something_is_cleared_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints what a finalizer raises and goes on: the run went to its end."""

    class Stopped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    polite = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    stop_politely()
    try:
        item = Stopped()
        del item
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
    finally:
        signal.signal(signal.SIGTERM, polite[0])
        signal.signal(signal.SIGHUP, polite[1])
