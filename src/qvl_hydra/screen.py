"""The command line's edge: one progress bar, short messages, a table. Nothing else prints."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

WHOLE = 22  # letters of a cell that stay on one line as long as the screen has room
LINE_S = 10.0  # between two lines of progress, where no bar can be drawn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Where rich would end the program, the pipe is told to `Screen`, and the run goes on."""
        raise BrokenPipeError


class Screen:
    """Where a run speaks to its user; also the engines' `Progress`.

    Where no bar can be drawn (a log file, a job in another process), progress is a line now and then. A screen that is
    gone (a closed pipe, a full device) is spoken to no more: the run's files are its result.

    Args:
        name: said before each line by a job in another process than the command's.
    """

    def __init__(self, name: str = "", console: Console | None = None) -> None:
        self.console = console or _Console(highlight=False)
        if console is None and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding has no letter for is spelled out
        self._before = f"{name}: " if name else ""
        self._draws = self.console.is_terminal and not name
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._gone = False
        self._label, self._steps, self._done = "", 0.0, 0.0
        self._began = self._told = time.monotonic()

    def total(self, steps: float, label: str) -> None:
        """Start the bar, or give it new work."""
        self._label, self._steps, self._done = label, steps, 0.0
        self._began = self._told = time.monotonic()
        if not self._draws:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(label, total=steps)
        else:
            assert self._task is not None
            self._bar.reset(self._task, total=steps, description=label)

    def step(self, steps: float = 1) -> None:
        """Advance the bar."""
        self._done += steps
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)
        elif not self._draws and self._done and time.monotonic() - self._told > LINE_S:
            self._told = time.monotonic()
            left = (self._told - self._began) * max(self._steps - self._done, 0.0) / self._done
            self.say(f"{self._label}: {min(self._done / max(self._steps, 1e-9), 1.0):.0%}, about {left:.0f} s left")

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._try(self._bar.stop)
            self._bar, self._task = None, None

    @contextmanager
    def working(self, steps: float, label: str) -> Iterator[None]:
        """The bar for the time of some work, however it ends."""
        self.total(steps, label)
        try:
            yield
        finally:
            self.finish()

    def say(self, text: str) -> None:
        """Print a line, above the bar while there is one."""
        self._print(f"{self._before}{text}", markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose first column is text and whose others are numbers; on a narrow screen a row a line."""
        if self._before:
            return  # of many jobs at once; each has its report
        self.say(title)
        widths = [max(len(name), *(len(row[place]) for row in rows), 0) for place, name in enumerate(columns)]
        if sum(min(width, WHOLE) + 3 for width in widths) > self.console.width:
            for name, *cells in rows:
                labelled = [(cell, label) for label, cell in zip(columns[1:], cells, strict=True) if cell]
                self.say(f"{name}: " + ", ".join(f"{cell} ({label})" for cell, label in labelled))
            return
        shown = Table(box=box.SIMPLE, pad_edge=False)
        for index, column in enumerate(columns):
            shown.add_column(
                column,
                justify="right" if index else "left",
                overflow="fold",
                no_wrap=index > 0 and widths[index] <= WHOLE,  # numbers are not broken, names and paths may be
                min_width=min(widths[index], WHOLE),
            )
        for row in rows:
            shown.add_row(*row)
        self._print(shown)

    def _print(self, content: Any, **how: Any) -> None:
        self._try(lambda: self.console.print(content, **how))

    def _try(self, speak: Callable[[], None]) -> None:
        if not self._gone:
            try:
                speak()
                self.console.file.flush()
            except (OSError, ValueError):
                self._gone = True
