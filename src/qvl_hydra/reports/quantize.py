"""The part of a report that is about models quantized by other tools, made from the files of the run folder."""

from __future__ import annotations

from pathlib import Path

from qvl_hydra.reports.page import Column, Section, table
from qvl_hydra.reports.profile import exports_section
from qvl_hydra.runs.record import record_of

SHOWN = {
    "n_quantized": "quantized",
    "largest_difference": "largest difference to QDQ",
    "relative_difference": "relative to the quantization's effect",
    "identical": "samples equal bit for bit",
    "samples": "of samples",
    "reload_difference": "difference after saving and loading",
}


def quantize_sections(folder: Path) -> list[Section]:
    """Sections for `write_sweep_report(extra=...)`: how far each tool's outputs are from QDQ, and the exports.

    Args:
        folder: with `run.json` and `exports/exports.json`.
    """
    results = record_of(folder).further["quantize"]
    columns = [Column("tool"), *(Column(title, number=True) for title in SHOWN.values())]
    rows = [[name, *(item.get(key) for key in SHOWN)] for name, item in results.items()]  # few of what is not compared
    return [Section("Quantized by other tools", table(columns, rows)), exports_section(folder)]
