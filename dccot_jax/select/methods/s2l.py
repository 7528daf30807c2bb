"""S2L (arXiv 2403.07384): clusters of loss trajectories of a small model, sampled evenly."""

from __future__ import annotations

from collections.abc import Sequence

from dccot_jax.select.budget import Budget, budget_of, prefix
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, describe, with_vectors
from dccot_jax.select.draws import shuffled
from dccot_jax.select.methods.grid import scaled_grid
from dccot_jax.select.methods.kmeans import first_centroids, kmeans

CLUSTERS = 100
SMALL = 2


def s2l(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """k-means (`clusters`, default 100; 20 iterations) on the trajectories `vector` (losses at saved checkpoints); then, smallest
    cluster first, an equal part of what is left of the budget from every cluster.

    A cluster that is smaller than its part is kept whole, from a larger one members are drawn by a seeded hash. Clusters of
    one or two groups do not take part; they, and then the others, fill what rounding leaves of the budget.
    """
    found, matrix, reasons = with_vectors(candidates, step["vector"])
    if not found:
        return [], reasons
    points, _ = scaled_grid(matrix)
    place = {c.group_id: i for i, c in enumerate(found)}
    order = shuffled(found, setting.seed, "select/s2l")
    centroids = first_centroids(points, [place[c.group_id] for c in order], step.get("clusters", CLUSTERS))
    assigned, _ = kmeans(points, centroids, spherical=False)
    members: list[list[Candidate]] = [[] for _ in centroids]
    for c in order:
        members[assigned[place[c.group_id]]].append(c)
    kept = even_sample(members, budget_of(step, candidates))
    chosen = {c.group_id for c in kept}
    for k, group in enumerate(members):
        detail = f"{describe(step)}: in cluster {k} of {len(group)} groups"
        reasons |= {c.group_id: ("not_in_s2l", detail) for c in group if c.group_id not in chosen}
    return kept, reasons


def even_sample(clusters: Sequence[Sequence[Candidate]], budget: Budget) -> list[Candidate]:
    """S2L's quotas over clusters whose members stand in the order they are to be taken."""
    cost = [sum(budget.cost(c) for c in members) for members in clusters]
    order = sorted((k for k, members in enumerate(clusters) if len(members) > SMALL), key=lambda k: (cost[k], k))
    kept: list[Candidate] = []
    left = budget.limit
    for position, k in enumerate(order):
        part = prefix(clusters[k], Budget(budget.by, left // (len(order) - position)))
        kept += part
        left -= sum(budget.cost(c) for c in part)
    chosen = {c.group_id for c in kept}
    small_first = [*(k for k in range(len(clusters)) if len(clusters[k]) <= SMALL), *order]
    return kept + prefix((c for k in small_first for c in clusters[k] if c.group_id not in chosen), Budget(budget.by, left))
