"""Stratified selection: the same share of every stratum, or the same number from each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dccot_jax.select.budget import budget_of, take
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, Verdicts, by_value, label, with_values
from dccot_jax.select.draws import shuffled


def stratified(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Take from the strata of `by` in turn, within the budget.

    Strata: the values of a label, or with `bins` that many quantile bins of a signal (1 lowest). Inside a stratum the
    best of `signal` (see `prefer`) come first, or without one a seeded random order.
    `allocation` "proportional" (default): the r-th of n (from 0) stands at (r + 1/2) / n, which is Sainte-Laguë's
    apportionment of any budget; "equal": one of each stratum in turn, and small strata are used up.
    """
    strata, reasons = _strata(candidates, step)
    placed: list[tuple[float, str, Candidate]] = []
    for name, members in strata.items():
        if "signal" in step:
            members, missing = with_values(members, step["signal"])
            reasons |= missing
            ordered = by_value(members, step["signal"], step.get("prefer", "high"))
        else:
            ordered = shuffled(members, setting.seed, "select/stratified")
        equal = step.get("allocation", "proportional") == "equal"
        placed += [(float(rank) if equal else (rank + 0.5) / len(ordered), name, c) for rank, c in enumerate(ordered)]
    placed.sort(key=lambda entry: (entry[0], entry[1], entry[2].group_id))
    stratum = {c.group_id: name for _, name, c in placed}
    kept, lost = take(
        [c for _, _, c in placed],
        step,
        budget_of(step, candidates),
        "not_in_stratified",
        lambda c: f", {step['by']} = {stratum[c.group_id]}",
    )
    return kept, reasons | lost


def _strata(candidates: Sequence[Candidate], step: Step) -> tuple[dict[str, list[Candidate]], Verdicts]:
    found: dict[str, list[Candidate]] = defaultdict(list)
    if "bins" not in step:
        for c in candidates:
            found[label(c, step["by"])].append(c)
        return dict(sorted(found.items())), {}
    scored, missing = with_values(candidates, step["by"])
    width = len(str(step["bins"]))
    for rank, c in enumerate(by_value(scored, step["by"], "low")):
        found[f"bin {rank * step['bins'] // len(scored) + 1:0{width}d} of {step['bins']}"].append(c)
    return dict(sorted(found.items())), missing
