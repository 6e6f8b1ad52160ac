"""The shortest list of patterns that names some operators and no others, in the dialect of whoever reads it.

Patterns are made of a name's parts: what stands before the number of a block, the numbers, and what stands behind. The
longest reach is taken first (greedy set cover), and the list is read back against every name of the model before it is
given away, so that it means exactly what was asked.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """Operators in a few words: those of some blocks whose further path is one of some.

    Attributes:
        before: what the name has before the number.
        numbers: of the blocks; None for all of them, and empty where the name has no number.
        behind: paths behind the number; with `below`, whatever stands below them.
        below: everything below `behind` is meant.
    """

    before: str
    numbers: tuple[str, ...] | None
    behind: tuple[str, ...]
    below: bool = False


@dataclass(frozen=True)
class Dialect:
    """How a consumer writes and reads patterns.

    Attributes:
        write: a reach as patterns.
        matches: whether the consumer takes a pattern for a name.
        exact: a name as a pattern.
    """

    write: Callable[[Reach], list[str]]
    matches: Callable[[str, str], bool]
    exact: Callable[[str], str]


def shortest(
    wanted: Iterable[str],
    others: Iterable[str],
    dialect: Dialect,
    aliases: Callable[[str], Sequence[str]] = lambda name: (name,),
) -> list[str]:
    """Patterns that match all wanted names and no other.

    Args:
        wanted, others: names of operators, together all that the patterns will be read against.
        aliases: all names that an operator goes by where the patterns are read; each must match, or none.

    Returns:
        In the order of the first name that each matches. An operator that no pattern can name by all its aliases is
        named by each of them.
    """
    left, foreign = dict.fromkeys(wanted), [alias for name in others for alias in aliases(name)]
    names = list(left)
    own_names = {name: tuple(aliases(name)) for name in names}
    pool = dict.fromkeys(p for reach in _reaches(names, list(others)) for p in dialect.write(reach))
    covers = {
        pattern: {name for name, own in own_names.items() if all(dialect.matches(pattern, alias) for alias in own)}
        for pattern in pool
        if not any(dialect.matches(pattern, name) for name in foreign)
    }
    place: dict[str, int] = {}
    while left:
        best = max(covers, key=lambda p: (len(covers[p] & left.keys()), -p.count("\\"), -len(p)), default=None)
        taken = [] if best is None else [name for name in left if name in covers[best]]
        if best is None or not taken:
            place |= {dialect.exact(alias): names.index(name) for name in left for alias in own_names[name]}
            break
        place[best] = names.index(taken[0])
        for name in taken:
            del left[name]
    found = sorted(place, key=lambda pattern: place[pattern])
    every = [alias for own in own_names.values() for alias in own]
    missed = [name for name in every if not any(dialect.matches(p, name) for p in found)]
    caught = [name for name in foreign if any(dialect.matches(p, name) for p in found)]
    assert not missed, f"patterns miss {missed[:3]}"
    assert not caught, f"patterns catch {caught[:3]}"
    return found


def _split(name: str) -> tuple[str, str, str]:
    """What a name has before its first number, the number, and behind it."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return name, "", ""
    return ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])


def _reaches(wanted: Sequence[str], others: Sequence[str]) -> Iterator[Reach]:
    """Whatever may be said about the wanted names in one pattern; some of it catches others, too."""
    for prefix in dict.fromkeys(head for name in wanted for head in _heads(name)):
        yield Reach(prefix, (), ("",), below=True)
    by_place: dict[str, dict[str, list[str]]] = {}
    everything: dict[str, dict[str, list[str]]] = {}
    for names, table in ((wanted, by_place), ([*wanted, *others], everything)):
        for name in names:
            before, number, behind = _split(name)
            table.setdefault(before, {}).setdefault(number, []).append(behind)
    for before, blocks in by_place.items():
        whole = everything[before]
        if set(blocks) == {""}:
            yield Reach(before, (), ("",))
            continue
        for group in _groups(blocks):
            numbers = tuple(n for n, own in blocks.items() if set(group) <= set(own))
            every = all(n in numbers for n, own in whole.items() if set(group) & set(own))
            yield Reach(before, None if every else numbers, group)
        for head in dict.fromkeys(head for own in blocks.values() for path in own for head in ["", *_heads(path)]):
            full = tuple(
                n for n, own in blocks.items()
                if {p for p in whole[n] if _below(p, head)} and {p for p in whole[n] if _below(p, head)} <= set(own)
            )  # fmt: skip
            if full:
                every = all(n in full for n, own in whole.items() if any(_below(p, head) for p in own))
                yield Reach(before, None if every else full, (head,), below=True)


def _groups(blocks: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Paths behind a number that stand together in some block: each alone, those of one parent, and all."""
    found: dict[tuple[str, ...], None] = {}
    for own in blocks.values():
        parents: dict[str, list[str]] = {}
        for path in own:
            found[(path,)] = None
            parents.setdefault(path.rpartition(".")[0], []).append(path)
        for paths in parents.values():
            found[tuple(paths)] = None
        found[tuple(own)] = None
    return list(found)


def _heads(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _ends(path: str) -> list[str]:
    """The last part of a path, the last two, and so on; none begins with a number."""
    parts = path.split(".")
    return [".".join(parts[at:]) for at in reversed(range(len(parts))) if not parts[at].isdigit()]


def _below(path: str, head: str) -> bool:
    return not head or path.startswith(f"{head}.")


def _regular(reach: Reach) -> list[str]:
    """Regular expressions without an anchor at the front, by the last part before the number and by more of it."""
    tail = _regular_tail(reach)
    return [rf".*\b{re.escape(before)}{tail}" for before in _ends(reach.before)]


def _regular_tail(reach: Reach) -> str:
    number = ""
    if reach.numbers is None:
        number = r"\.\d+"
    elif len(reach.numbers) == 1:
        number = rf"\.{reach.numbers[0]}"
    elif reach.numbers:
        number = rf"\.({'|'.join(reach.numbers)})"
    paths = [path for path in reach.behind if path]
    behind = rf"\.{_alternatives(paths)}" if paths else ""
    return number + behind + (r"\..*" if reach.below else "$")


def _alternatives(paths: Sequence[str]) -> str:
    """`a.x` and `a.y` as `a\\.(x|y)`."""
    if len(paths) == 1:
        return re.escape(paths[0])
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return f"({'|'.join(re.escape(path) for path in paths)})"
    (parent,) = parents
    leaves = [path.rpartition(".")[2] for path in paths]
    end = _common_end(leaves)
    inner = "|".join(re.escape(leaf[: len(leaf) - len(end)]) for leaf in leaves)
    front = re.escape(f"{parent}.") if parent else ""
    return f"{front}({inner}){re.escape(end)}"


def _common_end(leaves: Sequence[str]) -> str:
    """`_proj` of `q_proj` and `k_proj`: from an underscore on."""
    ends = {leaf[leaf.find("_") :] if "_" in leaf else "" for leaf in leaves}
    return ends.pop() if len(ends) == 1 else ""


def _globs(reach: Reach) -> list[str]:
    """Globs, one a number where not all are meant, by the last part before the number and by more of it."""
    numbers = [".*"] if reach.numbers is None else [f".{n}" for n in reach.numbers] or [""]
    below = ".*" if reach.below else ""
    behind = [f".{path}" if path else "" for path in _classed(reach.behind)]
    return [f"*{end}{number}{path}{below}" for end in _ends(reach.before) for number in numbers for path in behind]


def _classed(paths: Sequence[str]) -> list[str]:
    """`q_proj` and `k_proj` as `[qk]_proj`, where paths differ in one letter alone; else as they are."""
    if len(paths) < 2 or len({len(path) for path in paths}) != 1:
        return list(paths)
    places = [at for at, letters in enumerate(zip(*paths, strict=True)) if len(set(letters)) > 1]
    if len(places) != 1:
        return list(paths)
    at = places[0]
    return [f"{paths[0][:at]}[{''.join(path[at] for path in paths)}]{paths[0][at + 1 :]}"]


def _match_start(pattern: str, name: str) -> bool:
    return re.match(pattern.removeprefix("re:"), name) is not None


DIALECTS = {
    # compressed-tensors, llm-compressor and vLLM: `re:` and a regular expression that is matched from the start.
    "re": Dialect(lambda reach: [f"re:{p}" for p in _regular(reach)], _match_start, lambda n: f"re:{re.escape(n)}$"),
    # Neural Compressor: a regular expression that is matched in full.
    "regex": Dialect(
        lambda reach: [p.removesuffix("$") for p in _regular(reach)],
        lambda pattern, name: re.fullmatch(pattern, name) is not None,
        re.escape,
    ),
    # ModelOpt and TensorRT-LLM: shell patterns.
    "glob": Dialect(_globs, lambda pattern, name: fnmatch.fnmatchcase(name, pattern), lambda name: name),
}
