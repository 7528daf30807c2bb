"""Selection by rank of one signal: top, bottom, middle, and any window of quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dccot_jax.select.budget import budget_of, take
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, Verdicts, by_value, describe, with_values


def top(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Highest values first, within the budget."""
    return _ranked(candidates, step, lambda scored: by_value(scored, step["signal"]))


def bottom(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Lowest values first, within the budget."""
    return _ranked(candidates, step, lambda scored: by_value(scored, step["signal"], "low"))


def middle(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Nearest to the middle rank first, within the budget (Marion et al., arXiv 2309.04564, keep the middle of perplexity)."""

    def order(scored: Sequence[Candidate]) -> list[Candidate]:
        ranked = by_value(scored, step["signal"], "low")
        # Twice the distance to the middle rank, so that it is an integer; of two equally far, the lower rank first.
        return [c for _, _, c in sorted((abs(2 * rank - (len(ranked) - 1)), rank, c) for rank, c in enumerate(ranked))]

    return _ranked(candidates, step, order)


def quantile(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Keep ranks from `low` x n up to, not including, `high` x n of the scored groups, lowest value first.

    Windows that share a border share no group: [0, 0.25], [0.25, 0.5], ... cut a pool into quarters.
    """
    name, low, high = step["signal"], step.get("low", 0.0), step.get("high", 1.0)
    scored, reasons = with_values(candidates, name)
    ranked = by_value(scored, name, "low")
    first, last = (math.floor(bound * len(ranked) + 1e-9) for bound in (low, high))
    outside: Verdicts = {
        c.group_id: (f"not_in_quantile_{name}", f"{describe(step)}: rank {rank + 1} of {len(ranked)}, {name} = {c.values[name]:.6g}")
        for rank, c in enumerate(ranked)
        if not first <= rank < last
    }
    return ranked[first:last], reasons | outside


def _ranked(candidates: Sequence[Candidate], step: Step, order: Callable[[Sequence[Candidate]], list[Candidate]]) -> Selected:
    name = step["signal"]
    scored, missing = with_values(candidates, name)
    kept, reasons = take(
        order(scored),
        step,
        budget_of(step, candidates),
        f"not_in_{step['name']}_{name}",
        lambda c: f", {name} = {c.values[name]:.6g}",
    )
    return kept, missing | reasons
