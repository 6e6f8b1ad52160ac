"""Writes a profile for some consumers, and `exports.json` about all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.formats.rendered import misaligned
from qvl_hydra.profiles.formats.table import FORMATS, Consumer
from qvl_hydra.profiles.names import modules_of_experts, rename, router_of
from qvl_hydra.profiles.patterns import DIALECTS, shortest
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.runs.files import write_atomically, write_json


def require_able(profile: Profile, row: Consumer) -> None:
    """Refuse schemes that a consumer has no words for.

    Raises:
        ProfileError: naming them, and who has.
    """
    if profile.others and not row.mixed:
        able = ",".join(other.name for other in FORMATS.values() if other.mixed)
        raise ProfileError(
            f"{row.name} is written for one scheme, and this profile has {', '.join(profile.schemes)}; "
            f"take profile.formats=[{able}]"
        )
    for scheme in profile.schemes.values():
        numbers = {part.number for part in (scheme.weight, scheme.input) if part is not None}
        if foreign := sorted(numbers - set(row.numbers)):
            able = ",".join(other.name for other in FORMATS.values() if numbers <= set(other.numbers))
            raise ProfileError(
                f"{row.name} is written for {', '.join(row.numbers)}, and quant={scheme.name} has "
                f"{', '.join(foreign)}; take profile.formats=[{able}]"
            )


def paste(profile: Profile, operators: Sequence[Operator], row: Consumer) -> dict[str, list[str]]:
    """The profile as the shortest lists of patterns in a consumer's dialect, which mean exactly the profile.

    Args:
        operators: every operator of the model; the lists are read back against the names of all Linear ones, of experts
            and of routers, which stay as they are.

    Returns:
        For `leave`, and for each scheme where there are several, its patterns.
    """
    low = {op.path: profile.scheme_of(op).name for op in profile.low}
    of_path: dict[str, Operator] = {}
    by_choice: dict[str, list[str]] = {LEAVE: [], **{name: [] for name in profile.schemes if profile.others}}
    for op in operators:
        choice, experts = low.get(op.path, LEAVE), op.experts > 1 and row.dialect == "re"
        names = [op.path] if op.kind == "Linear" or op.path in low else []
        if experts:
            names = modules_of_experts(op, (0, op.experts - 1))
        of_path |= dict.fromkeys(names, op)
        by_choice.get(choice, []).extend(names)
        if experts and router_of(op) not in of_path:
            of_path[router_of(op)] = op
            by_choice[LEAVE].append(router_of(op))
    return {
        choice: shortest(
            paths,
            [path for path in of_path if path not in set(paths)],
            DIALECTS[row.dialect],
            lambda path: [rename(of_path[path], convention, path) for convention in row.names],
        )
        for choice, paths in by_choice.items()
    }


def pasted(records: Sequence[dict[str, Any]], consumer: str = "compressed_tensors") -> list[str]:
    """The lists of one consumer in lines that can be copied: what it leaves alone, and the targets of each scheme."""
    for record in records:
        if record["format"] == consumer:
            return [
                f"{'ignore' if choice == LEAVE else f'targets of {choice}'}: {json.dumps(patterns)}"
                for choice, patterns in record.get("paste", {}).items()
            ]
    return []


def write_formats(
    profile: Profile, operators: Sequence[Operator], names: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Write a profile for several consumers, each in its own folder, and `exports.json` about all of them.

    Args:
        operators: every operator of the model, decided on or not.
        names: keys of `FORMATS`; none asks for all of them, and then one that cannot express the profile is reported
            instead of written.

    Returns:
        The records of `exports.json`: one a consumer with its files, notes and lists to paste, or the error.

    Raises:
        ProfileError: a consumer that was asked for by name cannot express the profile.
    """
    records: list[dict[str, Any]] = []
    for name in names or FORMATS:
        row = FORMATS[name]
        record: dict[str, Any] = {"format": name, "consumer": row.tool, "loaded_with": row.loaded}
        try:
            require_able(profile, row)
            rendered = row.load()(profile, operators)
        except ProfileError as error:
            if names:
                raise
            records.append(record | {"error": str(error)})
            continue
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for file, text in rendered.files.items():
            write_atomically(target / file, text.encode())
        files = [f"{name}/{file}" for file in rendered.files]
        record |= {"files": files, "notes": list(rendered.notes)}
        records.append(record | ({"paste": paste(profile, operators, row)} if row.dialect else {}))
    content = {"formats": records, "misaligned": misaligned(profile)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "exports.json", content)
    return records


def not_exported(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """For whom a profile could not be written, a sentence a reason."""
    names: dict[str, list[str]] = {}
    for record in records:
        if "error" in record:
            reason = record["error"].removeprefix(f"{record['format']} ")
            names.setdefault(reason, []).append(record["format"])
    return [
        f"not exported: {', '.join(own)}{', each of which' if len(own) > 1 else ''} {reason}"
        for reason, own in names.items()
    ]
