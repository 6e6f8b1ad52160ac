"""`profile.compare_with`: lists that others keep in high precision, beside what scores choose at the same cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.profiles.keep_lists import BITS, Judged, judge, read_keep_list
from qvl_hydra.profiles.measure import Measurement, measure_profiles, steps
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.select import Budget, several
from qvl_hydra.profiles.units import Unit
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.runs.files import write_json
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks.candidates import MEASURED, best_measured
from qvl_hydra.tasks.prepare import Prepared

FILE = "keep_lists.json"


@dataclass(frozen=True)
class Lists:
    """What the lists are judged by.

    Attributes:
        metric: of the scores, named as a measurement names it.
        quantizers: of every operator in every scheme that it can have.
        samples: held out.
    """

    prepared: Prepared
    units: Sequence[Unit]
    terms: Terms
    metric: str
    quantizers: Mapping[str, OperatorQuantizer]
    samples: Sequence[Sample]


def compare_lists(settings: Settings, lists: Lists, folder: RunFolder, screen: Screen) -> list[str]:
    """Judge every list of `profile.compare_with`, measure it beside ours, write `keep_lists.json`, and show.

    Returns:
        Sentences for the user.

    Raises:
        ProfileError: a list that is not there or cannot be read.
    """
    scheme = lists.prepared.schemes[0].name
    found = [
        judge(read_keep_list(reference), lists.units, scheme, lists.terms)
        for reference in settings.profile.compare_with
    ]
    if settings.profile.candidates > 1 and lists.metric in MEASURED:
        pools = [
            several(lists.units, Budget(BITS, own.theirs.average_bits), lists.terms, settings.profile.candidates)
            for own in found
        ]
        best, _ = best_measured(settings, lists.prepared, pools, lists.metric, lists.quantizers, folder, screen)
        found = [dataclasses.replace(own, ours=ours) for own, ours in zip(found, best, strict=True)]
    profiles = [profile for own in found for profile in (own.theirs, own.ours)]
    model, component = lists.prepared.model, settings.component.name
    label = f"measuring {len(found)} list{'s' * (len(found) > 1)} and ours"
    with screen.working(steps(model, profiles, lists.samples, component), label):
        measured = measure_profiles(
            model, profiles, lists.quantizers, lists.samples, component, screen.step, folder
        )
    rows = [_row(own, *pair) for own, pair in zip(found, zip(measured[::2], measured[1::2], strict=True), strict=True)]
    write_json(folder.path / FILE, {"scheme": scheme, "samples": len(lists.samples), "lists": rows})
    screen.table(
        f"lists that others keep in high precision, the rest {scheme}, beside ours of equal bits",
        ["list", "kept", "bits", "KL at the answer", "ours", "exact match", "ours "],
        [
            [
                row["name"],
                f"{row['kept']} of {row['of']}",
                f"{row['average_bits']:.3f}",
                f"{row['theirs']['kl_answer']:.3g}",
                f"{row['ours']['kl_answer']:.3g}",
                f"{row['theirs']['exact_match']:.3f}",
                f"{row['ours']['exact_match']:.3f}",
            ]
            for row in rows
        ],
    )
    return [sentence for row in rows for sentence in _said(row)]


def _row(own: Judged, theirs: Measurement, ours: Measurement) -> dict[str, Any]:
    return {
        "name": own.keep_list.name,
        "source": own.keep_list.source,
        "kept": len(own.theirs.high),
        "of": len(own.theirs.operators),
        "average_bits": own.theirs.average_bits,
        "theirs": {"predicted": own.theirs.predicted, **dataclasses.asdict(theirs)},
        "ours": {"predicted": own.ours.predicted, "kept": len(own.ours.high), **dataclasses.asdict(ours)},
        "entries": list(own.entries),
        "forgotten": own.forgotten,
        "split": list(own.split),
    }


def _said(row: Mapping[str, Any]) -> list[str]:
    """What a list costs, saves and lacks, in sentences."""
    name, entries = row["name"], row["entries"]
    found = []
    if none := [entry["entry"] for entry in entries if not entry["units"]]:
        found.append(f"{name}: {', '.join(none)} names nothing that is decided on here")
    if idle := [entry["entry"] for entry in entries if entry["units"] and not entry["earns"]]:
        found.append(f"{name}: {', '.join(idle)} does not earn its place: the same bits win more elsewhere")
    if row["forgotten"]:
        found.append(f"{name} forgets {', '.join(row['forgotten'])}, which ours of equal bits keeps")
    if row["split"]:
        found.append(f"{name} names a part of {', '.join(row['split'])}, which runtimes fuse: kept whole here")
    return found
