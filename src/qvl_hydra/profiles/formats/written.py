"""Writes a profile for some consumers, and `exports.json` about all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats.rendered import misaligned
from qvl_hydra.profiles.formats.table import FORMATS, Consumer
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.runs.files import write_atomically, write_json


def _require_able(profile: Profile, row: Consumer) -> None:
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


def write_formats(
    profile: Profile, operators: Sequence[Operator], names: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Write a profile for several consumers, each in its own folder, and `exports.json` about all of them.

    Args:
        operators: every operator of the model, decided on or not.
        names: keys of `FORMATS`; none asks for all of them, and then one that cannot express the profile is reported
            instead of written.

    Returns:
        The content of `exports.json`: one record a consumer with its files, notes, or the error.

    Raises:
        ProfileError: a consumer that was asked for by name cannot express the profile.
    """
    records: list[dict[str, Any]] = []
    for name in names or FORMATS:
        row = FORMATS[name]
        record: dict[str, Any] = {"format": name, "consumer": row.tool, "loaded_with": row.loaded}
        try:
            _require_able(profile, row)
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
        records.append(record | {"files": files, "notes": list(rendered.notes)})
    content = {"formats": records, "misaligned": misaligned(profile)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "exports.json", content)
    return records
