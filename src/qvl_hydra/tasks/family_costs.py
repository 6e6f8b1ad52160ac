"""`profile.families`: what the largest families of modules cost, quantized alone and left alone, as measured."""

from __future__ import annotations

from qvl_hydra.profiles.families import family_plans, name_of
from qvl_hydra.profiles.measure import measure_profiles, steps
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.runs.files import read_table, write_parquet
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks.keep_lists import Lists

FILE = "families.parquet"
MEASURED = ("kl_answer_alone", "kl_answer_won", "exact_match_alone", "exact_match_won")


def measure_families(settings: Settings, lists: Lists, folder: RunFolder, screen: Screen, shared: bool) -> list[str]:
    """Measure plans of the families whose scores are highest; add what was seen to `families.parquet`, and show.

    The columns: `kl_answer_alone` and `exact_match_alone` with the family quantized and nothing else; `kl_answer_won`
    and `exact_match_won` by leaving it where everything else is quantized.

    Args:
        shared: the score of an operator is that of its whole unit.

    Returns:
        Sentences for the user.
    """
    path = folder.path / FILE
    if not path.exists():  # scores of a run from before there were families
        return []
    table = read_table(path).drop(columns=list(MEASURED), errors="ignore")  # an earlier profile's
    write_parquet(path, table)
    if not settings.profile.families:
        return []
    operators = tuple(op for unit in lists.units for op in unit.members)
    scheme, high = lists.prepared.schemes[0], frozenset(op.path for op in operators)
    kept = Profile(scheme, operators, high, settings.profile.high_bits, "families")
    everything, *others = family_plans(read_table(folder.path / "scores.parquet"), table, kept, shared)
    pairs = list(zip(others[::2], others[1::2], strict=True))
    # Of scores of an earlier sweep this run may have left some operators out.
    chosen = [row for row, (alone, _) in enumerate(pairs) if alone.low][: settings.profile.families]
    if not chosen:
        return []
    plans = [everything, *(plan for row in chosen for plan in pairs[row])]
    model, component = lists.prepared.model, settings.component.name
    with screen.working(steps(model, plans, lists.samples, component), f"measuring {len(chosen)} families"):
        every, *found = measure_profiles(
            model, plans, lists.quantizers, lists.samples, component, screen.step, folder
        )
    for row, alone, left in zip(chosen, found[::2], found[1::2], strict=True):
        table.loc[row, list(MEASURED)] = (
            max(alone.kl_answer, 0.0),  # a KL of 0 is -1e-9
            every.kl_answer - left.kl_answer,
            alone.exact_match,
            left.exact_match - every.exact_match,
        )
    write_parquet(path, table)
    measured = table.loc[chosen].to_dict("records")
    rows = [
        [name_of(row), str(row["n_ops"]), f"{row['kl_answer_alone']:.3g}", f"{row['kl_answer_won']:.3g}",
         f"{row['exact_match_alone']:.3f}", f"{row['exact_match_won']:+.3f}"]
        for row in measured
    ]  # fmt: skip
    screen.table(
        f"families in {scheme.name}, measured: quantized alone, and what leaving each wins where all else is quantized",
        ["family", "operators", "KL alone", "KL won", "exact match alone", "won"],
        rows,
    )
    best = max(measured, key=lambda row: float(row["kl_answer_won"]))
    return [
        f"everything in {scheme.name} loses {every.kl_answer:.3g} nats at the answer; of the {len(chosen)} largest "
        f"families leaving {name_of(best)} wins most of it: {best['kl_answer_won']:.3g}"
    ]
