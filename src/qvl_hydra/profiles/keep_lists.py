"""Lists of operators to keep in high precision, as they are published: read, matched, and judged by scores.

An entry is read as its consumer reads it: `re:` and a regular expression matched from the start (compressed-tensors,
llm-compressor, vLLM), a shell pattern (ModelOpt, TensorRT-LLM), a part of a name (transformers'
`modules_to_not_convert`), or a whole name. Any of an operator's names may match: module, checkpoint, vLLM.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.costs import LEAVE
from qvl_hydra.profiles.names import rename
from qvl_hydra.profiles.prices import Terms
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.profiles.select import Budget, plan_profile, select
from qvl_hydra.profiles.units import Unit

CONVENTIONS = ("hugging_face", "checkpoint", "vllm")
PARTS = "modules_to_not_convert"  # entries are parts of names
KEYS = (PARTS, "ignore", "exclude_modules", "ignore_layers")
BITS = "average_bits"
FORGOTTEN = 5  # units named


@dataclass(frozen=True)
class KeepList:
    """A list that somebody keeps in high precision.

    Attributes:
        source: where it was found.
        parts: its entries are parts of names.
    """

    name: str
    entries: tuple[str, ...]
    source: str
    parts: bool = False


PRESETS = {
    row.name: row
    for row in (
        KeepList(
            "llm_compressor", ("re:.*lm_head", "re:.*visual.*"),
            "llm-compressor, examples/multimodal_vision: the whole vision tower and the head",
        ),
        KeepList(
            "msmodelslim_mxfp8", ("*merger*", "*visual*down*", "*visual*linear_fc2"),
            "Ascend msModelSlim, MXFP8 recipes of Qwen-VL: mergers and the vision tower's down projections",
        ),
        KeepList(
            "msmodelslim_w8a8", ("*merger*", "*visual*down*", "*visual*linear_fc2", "*language_model*mlp.down_proj"),
            "Ascend msModelSlim, static W8A8 of Qwen-VL: as its MXFP8, and every down projection of the language tower",
        ),
        KeepList(
            "unsloth_dynamic_4bit", ("*visual.blocks.[0-3].*", "*visual.blocks.31.mlp.down_proj"),
            "unsloth, dynamic 4-bit of Qwen2.5-VL: early vision blocks and one down projection",
        ),
    )
}  # fmt: skip


def read_keep_list(reference: str) -> KeepList:
    """A preset by name, or a file: a checkpoint's config.json, a recipe, a list in JSON or YAML, or a name a line.

    Raises:
        ProfileError: there is no such preset or file, or no list is in it.
    """
    if reference in PRESETS:
        return PRESETS[reference]
    path = Path(reference).expanduser()
    try:
        text = path.read_text()
        if path.suffix == ".json":
            content: Any = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            content = yaml.safe_load(text)
        else:
            content = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ProfileError(
            f"profile.compare_with={reference} is neither a preset ({', '.join(PRESETS)}) nor a file that can be read "
            f"({error})"
        ) from error
    key, entries = ("", content) if isinstance(content, list) else _find(content)
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise ProfileError(
            f"profile.compare_with={reference}: no list of names in it; looked for a list, or one under "
            f"{', '.join(KEYS)}"
        )
    return KeepList(path.stem if path.stem != "config" else path.parent.name, tuple(entries), str(path), key == PARTS)


def _find(content: Any) -> tuple[str, list[Any]]:
    """The first list under a key of `KEYS`, at any depth."""
    waiting = [content]
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, Mapping):
            for key in KEYS:
                if isinstance(item.get(key), list):
                    return key, item[key]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return "", []


def kept_by(entry: str, operators: Iterable[Operator], parts: bool = False) -> set[str]:
    """Paths of the operators that an entry keeps."""
    return {op.path for op in operators if any(_matches(entry, rename(op, c), parts) for c in CONVENTIONS)}


def _matches(entry: str, name: str, parts: bool) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry.removeprefix("re:"), name) is not None
        except re.error as error:
            raise ProfileError(f"profile.compare_with: {entry} is no regular expression ({error})") from error
    if any(letter in entry for letter in "*?["):
        return fnmatch.fnmatchcase(name, entry)
    return name == entry or (parts and re.search(rf"(^|\.){re.escape(entry)}(\.|$)", name) is not None)


@dataclass(frozen=True)
class Judged:
    """A list on a model, beside what scores choose at its cost.

    Attributes:
        theirs: the list's profile; what is not kept goes into `scheme`.
        ours: the profile of the same average bits by the lowest sum of scores, among all choices.
        entries: of each entry what it keeps, what dropping it alone would lose and save, and whether it earns its
            place: dropping it loses at least what ours would lose with as many bits less.
        forgotten: units that ours keeps and the list does not, worst first, with what quantizing each loses.
        split: fused units of which it names a part; they are kept whole.
    """

    keep_list: KeepList
    theirs: Profile
    ours: Profile
    entries: tuple[dict[str, Any], ...]
    forgotten: dict[str, float]
    split: tuple[str, ...]


def judge(keep_list: KeepList, units: Sequence[Unit], scheme: str, terms: Terms) -> Judged:
    """Judge a list by scores.

    Args:
        units: from `units_from_scores`.
        scheme: what the list's users put the rest into.
    """
    caught = {entry: _units_of(entry, units, keep_list.parts) for entry in keep_list.entries}
    split = sorted({name for _, halves in caught.values() for name in halves})
    keeps = {entry: own | set(halves) for entry, (own, halves) in caught.items()}
    theirs = _keeping(units, set().union(*keeps.values()), scheme, terms, keep_list.name)
    cost = theirs.average_bits
    ours = select(units, Budget(BITS, cost), terms)
    entries = []
    for entry, own in keeps.items():
        others: set[str] = set().union(*(names for other, names in keeps.items() if other != entry), set())
        without = _keeping(units, others, scheme, terms, keep_list.name)
        loses, saves = _sum(without) - _sum(theirs), cost - without.average_bits
        ours_less = _sum(select(units, Budget(BITS, without.average_bits), terms)) - _sum(ours) if saves > 0 else 0.0
        entries.append(
            {"entry": entry, "units": len(own), "alone": len(own - others), "loses": loses, "saves_bits": saves,
             "earns": bool(saves > 0 and loses >= ours_less)}
        )  # fmt: skip
    kept = {name for names in keeps.values() for name in names}
    forgotten = {
        unit.name: unit.scores[scheme]
        for unit in units
        if unit.name not in kept and scheme in unit.scores and unit.members[0].path in ours.high
    }
    worst = dict(sorted(forgotten.items(), key=lambda item: -item[1])[:FORGOTTEN])
    return Judged(keep_list, theirs, ours, tuple(entries), worst, tuple(split))


def _sum(profile: Profile) -> float:
    return profile.predicted or 0.0


def _units_of(entry: str, units: Sequence[Unit], parts: bool) -> tuple[set[str], list[str]]:
    """Units that an entry keeps whole, and those of which it names a part."""
    whole, halves = set(), []
    for unit in units:
        names = kept_by(entry, unit.members, parts) | (
            {op.path for op in unit.members} if _matches(entry, unit.name, parts) else set()
        )
        if len(names) == len(unit.members):
            whole.add(unit.name)
        elif names:
            halves.append(unit.name)
    return whole, halves


def _keeping(units: Sequence[Unit], kept: set[str], scheme: str, terms: Terms, chooser: str) -> Profile:
    plan = {unit.name: LEAVE if unit.name in kept or scheme not in unit.scores else scheme for unit in units}
    return plan_profile(units, plan, terms.schemes, terms.high_bits, chooser)
