"""The best candidates of every question: GRAPE's rule (arXiv 2502.04194), and any other signal's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, by_value, question_key, with_values


def per_question_best(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Keep the `count` (default 1) best groups of every question by `signal`; `prefer` "high" (default) or "low"."""
    name, count = step["signal"], step.get("count", 1)
    scored, reasons = with_values(candidates, name)
    questions: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    for c in scored:
        questions[question_key(c)].append(c)
    kept = []
    for members in questions.values():
        ordered = by_value(members, name, step.get("prefer", "high"))
        kept += ordered[:count]
        for rank, c in enumerate(ordered[count:], start=count + 1):
            best = ordered[0]
            detail = (
                f"{name} = {c.values[name]:.6g}, rank {rank} of {len(ordered)}; the best is {best.group_id} with {best.values[name]:.6g}"
            )
            reasons[c.group_id] = (f"not_best_{name}", f"per_question_best: {detail}")
    return kept, reasons
