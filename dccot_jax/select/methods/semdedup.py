"""SemDeDup (arXiv 2303.09540): semantic near-duplicates inside clusters of embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, Verdicts, with_vectors
from dccot_jax.select.draws import shuffled
from dccot_jax.select.methods.grid import SQUARE, blocks, dots, unit_grid
from dccot_jax.select.methods.kmeans import first_centroids, kmeans

EPSILON = 0.05


def semdedup(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Cluster the `vector`s (spherical k-means, `clusters`, default sqrt(N)); inside a cluster order the hard ones first, those
    far from the centroid; drop what has a cosine above 1 - `epsilon` (default 0.05) to any one before it.

    As published, a dropped group still counts against those after it, and duplicates in different clusters stay. Start
    centroids are drawn by a seeded hash. Cost O(N K D) for clustering plus the sum of squared cluster sizes times D.
    """
    found, matrix, reasons = with_vectors(candidates, step["vector"])
    if not found:
        return [], reasons
    points = unit_grid(matrix)
    place = {c.group_id: i for i, c in enumerate(found)}
    start = [place[c.group_id] for c in shuffled(found, setting.seed, "select/semdedup")]
    count = step.get("clusters") or max(1, round(math.sqrt(len(found))))
    assigned, centroids = kmeans(points, first_centroids(points, start, count), spherical=True)
    similar = duplicates(points, assigned, centroids, step.get("epsilon", EPSILON))
    lost: Verdicts = {
        found[i].group_id: ("semantic_duplicate", f"semdedup: cosine {cosine:.6g} to {found[j].group_id}")
        for i, (j, cosine) in similar.items()
    }
    return [c for c in found if c.group_id not in lost], reasons | lost


def duplicates(
    points: np.ndarray, assigned: np.ndarray, centroids: np.ndarray, epsilon: float, block: int | None = None
) -> dict[int, tuple[int, float]]:
    """{index: (the most similar one before it in its cluster, cosine)} of unit grid points to drop."""
    found: dict[int, tuple[int, float]] = {}
    order = np.argsort(assigned, kind="stable")
    starts = np.searchsorted(assigned[order], np.arange(len(centroids) + 1))
    for k in range(len(centroids)):
        members = order[starts[k] : starts[k + 1]]
        near = dots(points[members], centroids[k : k + 1])[:, 0]
        members = members[np.lexsort((members, near))]  # least similar to the centroid first
        for part in blocks(len(members), max(len(members), points.shape[1]), block):
            # Columns: the members of this part; rows: everything up to and including it.
            products = dots(points[members[: part.stop]], points[members[part]])
            products[np.arange(part.stop)[:, None] >= np.arange(part.start, part.stop)[None, :]] = -np.inf
            nearest = np.argmax(products, axis=0)
            cosine = products[nearest, np.arange(products.shape[1])] / SQUARE
            for column in np.flatnonzero(cosine > 1.0 - epsilon):
                found[int(members[part.start + column])] = (int(members[nearest[column]]), float(cosine[column]))
    return found
