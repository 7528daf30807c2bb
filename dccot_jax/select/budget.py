"""Budgets: how much a step may keep, in rows, completion tokens or a share of the rows that enter it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from dccot_jax.select.candidates import Candidate, Selected, Step, Verdicts, describe, rows

BUDGETS = ("rows", "tokens", "share")


@dataclasses.dataclass(frozen=True)
class Budget:
    """At most `limit` of `by` ("rows" or "tokens")."""

    by: str
    limit: float

    def cost(self, candidate: Candidate) -> int:
        return len(candidate.ids) if self.by == "rows" else candidate.completion_tokens


def budget_of(step: Step, candidates: Sequence[Candidate]) -> Budget:
    """The step's budget; without one there is no limit. A share is rounded down; the tolerance keeps 0.29 x 100 at 29."""
    if "share" in step:
        return Budget("rows", math.floor(step["share"] * rows(candidates) + 1e-9))
    for by in ("rows", "tokens"):
        if by in step:
            return Budget(by, step[by])
    return Budget("rows", math.inf)


def prefix(ordered: Iterable[Candidate], budget: Budget) -> list[Candidate]:
    """Longest prefix within the budget; draws no more of `ordered` than it needs, so a greedy search stops early."""
    kept, used = [], 0
    for candidate in ordered if budget.limit > 0 else ():
        used += budget.cost(candidate)
        if used > budget.limit:
            break
        kept.append(candidate)
        if used == budget.limit:
            break
    return kept


def take(
    ordered: Sequence[Candidate], step: Step, budget: Budget, reason: str, note: Callable[[Candidate], str] = lambda c: ""
) -> Selected:
    """Longest prefix of a ranking within the budget; the detail of a dropped group is its rank, and `note` of it."""
    kept = prefix(ordered, budget)
    detail, total = describe(step), len(ordered)
    reasons: Verdicts = {
        c.group_id: (reason, f"{detail}: rank {rank + 1} of {total}{note(c)}")
        for rank, c in enumerate(ordered[len(kept) :], start=len(kept))
    }
    return kept, reasons


def rest(candidates: Sequence[Candidate], kept: Iterable[Candidate], reason: str, detail: str) -> Verdicts:
    """The same reason for every candidate that is not kept."""
    chosen = {c.group_id for c in kept}
    return {c.group_id: (reason, detail) for c in candidates if c.group_id not in chosen}
