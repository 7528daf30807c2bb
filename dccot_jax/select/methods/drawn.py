"""Selection by chance: uniform, or in proportion to the exponential of a signal."""

from __future__ import annotations

from collections.abc import Sequence

from dccot_jax.select.budget import Budget, budget_of, take
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, rows, tokens, with_values
from dccot_jax.select.draws import gumbel, shuffled


def random(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Order by a seeded hash of the group id: smaller samples are subsets of larger ones, whatever else is in the pool.

    Two samples of one seed and `stream` overlap as much as they can; samples of different streams overlap by chance.
    With `match` the budget is what that step keeps of the same candidates, `by` rows or tokens.
    """
    names = ("select/random", *filter(None, [step.get("stream", "")]))
    if "match" in step:
        kept, _ = setting.run(candidates, step["match"])
        by = step.get("by", "rows")
        budget = Budget(by, rows(kept) if by == "rows" else tokens(kept))
    else:
        budget = budget_of(step, candidates)
    return take(shuffled(candidates, setting.seed, *names), step, budget, "not_sampled")


def gumbel_topk(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Sample without replacement with probabilities proportional to exp(signal / temperature) (Kool et al., arXiv 1903.06059).

    The keys signal / temperature + Gumbel noise are ranked; the noise hangs on the group's id and the seed. With
    `prefer` "low" the signal counts with the opposite sign.
    """
    name, temperature = step["signal"], step.get("temperature", 1.0)
    sign = 1.0 if step.get("prefer", "high") == "high" else -1.0
    scored, missing = with_values(candidates, name)
    keys = {c.group_id: sign * c.values[name] / temperature + gumbel(setting.seed, "select/gumbel_topk", c.group_id) for c in scored}
    ordered = sorted(scored, key=lambda c: (-keys[c.group_id], c.group_id))
    kept, reasons = take(
        ordered, step, budget_of(step, candidates), f"not_in_gumbel_topk_{name}", lambda c: f", {name} = {c.values[name]:.6g}"
    )
    return kept, missing | reasons
