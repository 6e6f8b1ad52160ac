"""What is said on a screen."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from qvl_hydra.screen import Screen


def test_on_a_narrow_screen_a_row_is_a_line_without_its_empty_cells() -> None:
    text = StringIO()
    screen = Screen(console=Console(file=text, width=40))
    columns = ["plan", "KL at the answer", "exact match", "best baseline"]
    screen.table("profiles", columns, [["0 of 79", "0.587", "0.758", ""], ["7 of 79", "0.0003", "0.984", "random"]])
    assert text.getvalue().splitlines() == [
        "profiles",
        "0 of 79: 0.587 (KL at the answer), 0.758 (exact match)",
        "7 of 79: 0.0003 (KL at the answer), 0.984 (exact match), random (best baseline)",
    ]
