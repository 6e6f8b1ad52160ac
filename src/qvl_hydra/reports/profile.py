"""The part of a report that is about precision profiles, made from the files of the run folder."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.reports.chart import Point, Series, chart
from qvl_hydra.reports.page import Column, Section, facts, notes, number, table, text
from qvl_hydra.runs.files import read_json, read_table, read_value
from qvl_hydra.runs.record import record_of

PLANS = "plans.json"  # every plan measured: figures, and the choice of each operator
LEAST_DRAWN = 1e-8  # nats, drawn for what rounding alone makes
SHOWN = {
    "chooser": "chosen by",
    "n_high": "in high precision",
    "share_high": "share",
    "average_bits": "bits a weight",
    "weight_bytes": "weight bytes",
    "predicted": "sum of scores",
    "predicted_joint": "predicted with interactions",
    "measured": "measured error",
    "kl_answer": "KL (nats an answer token)",
    "kl": "KL (nats a token)",
    "loss": "task loss",
    "exact_match": "exact match",
    "recovered": "recovered",
}


def profile_sections(folder: Path) -> list[Section]:
    """Sections for `write_sweep_report(extra=...)`: the profile with its curve, every profile measured, the exports.

    Args:
        folder: with `run.json`, `profiles.parquet`, `profile.json`, `exports/exports.json` and the figure.
    """
    record = record_of(folder).further["profile"]
    profile = read_json(folder / "profile.json")
    profiles = read_table(folder / "profiles.parquet")
    picture = base64.b64encode((folder / "figures" / "profile_spectrum.png").read_bytes()).decode()
    source = f"data:image/png;base64,{picture}"
    figure = f'<img style="max-width:100%" alt="exact match, KL and additivity of profiles" src="{source}">'
    listed = _listed(f"{len(profile['high'])} operators stay in high precision", profile["high"])
    listed += "".join(_listed(f"{len(own)} operators go to {name}", own) for name, own in profile["choices"].items())
    rows = [[_value(row[name]) for name in SHOWN] for row in profiles.to_dict("records")]
    columns = [Column(title, number=name != "chooser") for name, title in SHOWN.items()]
    return [
        Section("Precision profile", _summary(record) + figure + listed),
        *plans_section(folder),
        Section("Profiles measured", table(columns, rows, identity="profiles")),
        *_lists_section(folder),
        exports_section(folder),
    ]


def plans_section(folder: Path) -> list[Section]:
    """The plans over what they cost: one chosen by a click, a second one beside it, and where they differ."""
    content = read_value(folder / PLANS)
    if content is None or len(content["plans"]) < 2:
        return []
    plans = sorted(content["plans"], key=lambda plan: plan["average_bits"])
    config = f"python -m qvl_hydra --config-dir {shlex.quote(str(folder.absolute()))} --config-name config"
    for plan in plans:
        kind, value = plan["budget"]["kind"], plan["budget"]["value"]
        # The saved settings have choices where there are values.
        own = f"profile.values=[{value!r}]" if "cost" in plan else f"profile.budget={kind} profile.value={value!r}"
        plan["command"] = f"{config} {own} profile.spectrum=[]"
        plan["title"] = f"{kind} {value:.4g}"
    points = [
        Point(plan["average_bits"], max(plan["kl_answer"], LEAST_DRAWN), plan=index,
              tip=f"{plan['title']}: {number(plan['average_bits'])} bits, KL {number(plan['kl_answer'])}, exact match "
              f"{number(plan['exact_match'])}")
        for index, plan in enumerate(plans)
    ]  # fmt: skip
    drawn = chart([Series("plans", points)], "bits a weight", "KL at the answer (nats)", log_y=True)
    data = json.dumps({**content, "plans": plans}).replace("<", "\\u003c")
    return [
        Section(
            "Compare plans",
            '<p class="note">Click a point, with the shift key for the second plan: what each costs and leaves, where '
            "they differ, and the command that exports it. KL and exact match are of held-out samples.</p>"
            f'<div class="row"><div>{drawn}</div><div id="plans-shown" class="plans"></div></div>'
            f'<script type="application/json" id="plans">{data}</script>',
        )
    ]


def _lists_section(folder: Path) -> list[Section]:
    """Lists that others keep, where some were compared with."""
    content = read_value(folder / "keep_lists.json")
    if content is None:
        return []
    names = ("kl_answer", "exact_match")
    columns = [Column("list"), Column("kept", number=True), Column("bits a weight", number=True)]
    columns += [Column(f"{SHOWN[name]}, {who}", number=True) for name in names for who in ("list", "ours")]
    rows = [
        [row["name"], row["kept"], row["average_bits"]]
        + [row[who][name] for name in names for who in ("theirs", "ours")]
        for row in content["lists"]
    ]
    entries = [
        [row["name"], entry["entry"], entry["units"], entry["loses"], entry["saves_bits"],
         "yes" if entry["earns"] else "no"]
        for row in content["lists"]
        for entry in row["entries"]
    ]  # fmt: skip
    of_entry = [Column("list"), Column("entry", code=True), Column("units", number=True),
                Column("dropping it loses", number=True), Column("and saves, bits a weight", number=True),
                Column("earns its place")]  # fmt: skip
    said = "".join(
        _listed(f"{row['name']} forgets what ours of equal bits keeps", list(row["forgotten"]))
        for row in content["lists"]
        if row["forgotten"]
    )
    text_above = f"<p>Everything else in {text(content['scheme'])}, beside ours of equal bits a weight.</p>"
    return [
        Section("Lists that others keep", text_above + table(columns, rows) + said + table(of_entry, entries))
    ]


def _listed(said: str, paths: Sequence[str]) -> str:
    items = "".join(f"<li><code>{text(path)}</code></li>" for path in paths)
    return f"<details><summary>{text(said)}</summary><ul>{items}</ul></details>"


def _summary(record: dict[str, object]) -> str:
    tiles = {
        "budget": record["budget"],
        "in high precision": f"{record['n_high']} ({number(record['share_high'])})",
        "bits a weight": number(record["average_bits"]),
        "exact match": number(record["exact_match"]),
        "everything quantized": number(record["exact_match_quantized"]),
        "float": number(record["exact_match_float"]),
        "recovered": number(record["recovered"]),
        "best baseline": number(record.get("best_baseline_exact_match")),
        "held-out samples": record["evaluation_samples"],
    }
    return facts(tiles)


def exports_section(folder: Path) -> Section:
    """The files written for other tools, and what is to know about each."""
    content = read_value(folder / "exports" / "exports.json")
    columns = [Column("format"), Column("for"), Column("files", code=True), Column("remarks")]
    rows = [
        [
            item["format"],
            item["consumer"],
            ", ".join(item.get("files", [])),
            item.get("error") or "; ".join(item["notes"]),
        ]
        for item in content["formats"]
    ]
    pastes = "".join(_pasted(item) for item in content["formats"] if item.get("paste"))
    return Section("Exports", table(columns, rows) + notes(content["misaligned"]) + pastes)


def _pasted(item: dict[str, Any]) -> str:
    """The lists of a consumer, to copy."""
    lists = "".join(
        f"<p>{text('left in high precision' if choice == LEAVE else choice)}</p>"
        f"<pre><code>{text(json.dumps(patterns, indent=1))}</code></pre>"
        for choice, patterns in item["paste"].items()
    )
    return f"<details><summary>ready to paste: {text(item['consumer'])}</summary>{lists}</details>"


def _value(value: object) -> object:
    return None if value is None or value != value else value  # NaN is the only value unequal to itself
