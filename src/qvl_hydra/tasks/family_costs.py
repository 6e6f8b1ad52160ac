"""`profile.families`: what the largest families of modules cost, quantized alone and left alone, as measured."""

from __future__ import annotations

from qvl_hydra.operators.discover import find_operators
from qvl_hydra.profiles.families import families, family_plans, name_of
from qvl_hydra.profiles.measure import measure_profiles, steps
from qvl_hydra.profiles.select import left_alone
from qvl_hydra.runs.files import read_table, write_parquet
from qvl_hydra.runs.folder import RunFolder
from qvl_hydra.screen import Screen
from qvl_hydra.settings import Settings
from qvl_hydra.tasks.keep_lists import Lists
from qvl_hydra.tasks.scored import FAMILIES, SCORES, of_selected

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
    found = find_operators(lists.prepared.model.module, settings.component.name)
    scores = of_selected(settings, found, read_table(folder.path / SCORES))
    scheme = lists.prepared.schemes[0]
    table = families(scores, read_table(folder.path / "sample_scores.parquet"), scheme.name, shared)
    write_parquet(folder.path / FAMILIES, table)
    count = min(settings.profile.families, len(table))
    if not count:
        return []
    kept = left_alone(lists.units, scheme, settings.profile.high_bits)
    plans = family_plans(scores, table.head(count), kept, shared)
    model, component = lists.prepared.model, settings.component.name
    with screen.working(steps(model, plans, lists.samples, component), f"measuring {count} families"):
        every, *others = measure_profiles(
            model, plans, lists.quantizers, lists.samples, component, screen.step, folder
        )
    for row, (alone, left) in enumerate(zip(others[::2], others[1::2], strict=True)):
        table.loc[row, list(MEASURED)] = (
            alone.kl_answer,
            every.kl_answer - left.kl_answer,
            alone.exact_match,
            left.exact_match - every.exact_match,
        )
    write_parquet(folder.path / FAMILIES, table)
    measured = table.head(count).to_dict("records")
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
        f"everything in {scheme.name} loses {every.kl_answer:.3g} nats at the answer; of the {count} largest "
        f"families leaving {name_of(best)} wins most of it: {best['kl_answer_won']:.3g}"
    ]
