"""Rows that two runs of a recipe treat differently, and how many of them lie so near a cut that the last bits of a score decide.

Scores agree within `BAND` (relative, plus as much absolute: nats for log-likelihoods) over devices, processes and layouts; a kept set
may differ only where a value lies as near as that to the value at which its selector cuts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence

from dccot_jax.records import Dropped
from dccot_jax.select.candidates import Candidate, Step, question_key

BAND = 1e-5
_RANKED = ("top", "bottom", "middle", "quantile")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a recipe made of candidates: each by the ids of its rows, and the number of the step at which a dropped row left."""

    candidates: Mapping[str, Candidate]
    left: Mapping[str, int]


def make_run(candidates: Iterable[Candidate], dropped: Iterable[Dropped]) -> Run:
    """From `selectors.apply_steps`, which begins the detail of a dropped row with "step <number>"."""
    return Run({i: c for c in candidates for i in c.ids}, {row.id: int(row.detail.split()[1]) for row in dropped})


def in_band(value: float, cut: float) -> bool:
    """Whether |value - cut| <= BAND |cut| + BAND."""
    return abs(value - cut) <= BAND * abs(cut) + BAND


def moved(steps: Sequence[Step], first: Run, other: Run) -> dict[str, int]:
    """Rows kept in one run only, and those of them in the band of the cut.

    A row is in the band if its value of the step's signal is, in the run and at the step where it was lost. The cut is a limit of
    `threshold`, the lowest or highest value kept by `top`, `bottom`, `middle` and `quantile`, and for `per_question_best` that of the
    question. Other steps cut no single signal, so what they lose is outside; so is a row that goes because another one came.

    Returns {"moved": rows, "moved_in_band": rows}.
    """
    kept = [run.candidates.keys() - run.left.keys() for run in (first, other)]
    found: dict[tuple[bool, int], Mapping[Hashable, list[float]]] = {}
    near, changed = 0, kept[0] ^ kept[1]
    for i in changed:
        run = first if i in first.left else other
        number, candidate = run.left[i], run.candidates[i]
        step, side = steps[number], (run is first, number)
        if side not in found:
            found[side] = _cuts(step, [c for row, c in run.candidates.items() if run.left.get(row, len(steps)) > number])
        value = candidate.values.get(step.get("signal", ""))
        near += value is not None and any(in_band(value, cut) for cut in found[side].get(_pool(step, candidate), ()))
    return {"moved": len(changed), "moved_in_band": near}


def _cuts(step: Step, survivors: Iterable[Candidate]) -> dict[Hashable, list[float]]:
    """{pool: values of the step's signal at which it cuts}, from what it kept."""
    if step["name"] == "threshold":
        return {None: [limit for limit in (step.get("min"), step.get("max")) if limit is not None]}
    found: dict[Hashable, list[float]] = {}
    if step["name"] in (*_RANKED, "per_question_best"):
        for c in survivors:
            value, pool = c.values[step["signal"]], _pool(step, c)
            low, high = found.get(pool, (value, value))
            found[pool] = [min(low, value), max(high, value)]
    return found


def _pool(step: Step, candidate: Candidate) -> Hashable:
    """What a candidate is compared within: its question, or everything."""
    return question_key(candidate) if step["name"] == "per_question_best" else None
