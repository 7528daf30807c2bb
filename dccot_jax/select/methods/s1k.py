"""s1K's sampling for diversity (arXiv 2501.19393): a domain by chance, in it a question that takes long reasoning."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from dccot_jax.records import derive_seed
from dccot_jax.select.budget import budget_of, prefix, rest
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, by_value, describe, label, with_values

UNIFORM_SHARE = 0.7


def s1k(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Until the budget is spent: draw a value of `by` (the paper: the question's domain, named by an LLM; here any label), then
    one of its groups with weight 2^-rank, longest first, and remove it.

    Domains are drawn uniformly; with `weights` ({value: weight}, the benchmark's own distribution) only the first 70 % of the
    budget are, as in the published code (700 of 1,000), the rest by weight. Length is `signal`, default completion_tokens.
    The paper's filters before it (quality, questions that small models solve) are steps of their own.
    """
    name = step.get("signal", "completion_tokens")
    scored, reasons = with_values(candidates, name)
    domains: dict[str, list[Candidate]] = defaultdict(list)
    for c in by_value(scored, name):
        domains[label(c, step["by"])].append(c)
    budget = budget_of(step, candidates)
    rng = np.random.Generator(np.random.PCG64(derive_seed(setting.seed, "select/s1k")))
    weights = step.get("weights")
    used = 0

    def draws() -> Iterator[Candidate]:
        nonlocal used
        while domains:
            names = sorted(domains)
            late = weights is not None and used >= UNIFORM_SHARE * budget.limit
            share = np.array([float(weights.get(n, 0.0)) if late and weights else 1.0 for n in names])
            if not share.sum():
                return
            domain = names[_draw(share / share.sum(), rng.random())]
            chosen = domains[domain].pop(_longest_first(len(domains[domain]), rng.random()))
            if not domains[domain]:
                del domains[domain]
            used += budget.cost(chosen)
            yield chosen

    kept = prefix(draws(), budget)
    return kept, reasons | rest(scored, kept, "not_in_s1k", describe(step))


def _draw(probabilities: np.ndarray, u: float) -> int:
    return min(int(np.searchsorted(np.cumsum(probabilities), u, side="right")), len(probabilities) - 1)


def _longest_first(count: int, u: float) -> int:
    """Rank (from 0) drawn with weights 2^-rank over `count` ranks, from u in [0, 1): the inverse of the distribution function."""
    total = 1.0 - 2.0**-count
    return min(int(-math.log2(1.0 - u * total)), count - 1)
