"""The command line's edge: one progress bar, short messages, a table. Nothing else prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

WHOLE = 22  # letters of a cell that stay on one line as long as the screen has room


class Screen:
    """Where a run speaks to its user; also the engines' `Progress`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def total(self, steps: float, label: str) -> None:
        """Start the bar, or give it new work."""
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
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None

    def say(self, text: str) -> None:
        """Print a line, above the bar while there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose first column is text and whose others are numbers; on a narrow screen a row a line."""
        self.say(title)
        widths = [max(len(name), *(len(row[place]) for row in rows), 0) for place, name in enumerate(columns)]
        if sum(min(width, WHOLE) + 3 for width in widths) > self.console.width:
            for name, *cells in rows:
                self.say(
                    f"{name}: " + ", ".join(f"{cell} ({label})" for label, cell in zip(columns[1:], cells, strict=True))
                )
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
        self.console.print(shown)
