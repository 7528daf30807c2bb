"""LESS (arXiv 2402.04333): the groups that lower the loss of some sub-task most."""

from __future__ import annotations

from collections.abc import Sequence

from dccot_jax.select.budget import budget_of, take
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, with_values

PREFIX = "less_"  # of a sub-task's column


def less_topk(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Highest influence first, within the budget: the largest over the sub-tasks, or over those in `tasks`.

    A group's influence on one sub-task is the mean over its forward parts, and the maximum is taken of these means: a group
    whose parts serve different sub-tasks a little does not pass for one that serves one of them much.
    """
    known = sorted({name for c in candidates for name in c.values if name.startswith(PREFIX)})
    names = [PREFIX + name for name in step.get("tasks", ())] or known or ["less"]
    scored, missing = with_values(candidates, *names)
    best = {c.group_id: max(c.values[name] for name in names) for c in scored}
    order = sorted(scored, key=lambda c: (-best[c.group_id], c.group_id))
    kept, reasons = take(order, step, budget_of(step, candidates), "not_in_less_topk", lambda c: f", influence {best[c.group_id]:.6g}")
    return kept, missing | reasons
