"""k-means on grid vectors: independent of the order of the points and of the block size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dccot_jax.select.methods.grid import ONE, blocks, dots, squared_norms, unit_grid

ITERATIONS = 20


def first_centroids(points: np.ndarray, order: Sequence[int], count: int) -> np.ndarray:
    """The first `count` distinct points in `order`; fewer where there are no more distinct ones."""
    seen: set[bytes] = set()
    chosen = []
    for i in order:
        key = points[i].tobytes()
        if key not in seen:
            seen.add(key)
            chosen.append(i)
            if len(chosen) == count:
                break
    return points[chosen]


def kmeans(
    points: np.ndarray, centroids: np.ndarray, *, spherical: bool, iterations: int = ITERATIONS, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm from given centroids, until nothing moves or `iterations` updates are done.

    Args:
      points: int32 [N, D] on the grid (`unit_grid` if spherical). centroids: int32 [K, D], the start.
      spherical: nearest by dot product and centroids on the unit sphere; else by Euclidean distance and plain means.

    Returns:
      cluster of each point [N] (ties: the lower cluster), and the centroids [K, D] int32 they are assigned to. A cluster
      that loses all its points keeps its centroid.
    """
    assigned = assign(points, centroids, spherical=spherical, block=block)
    for _ in range(iterations):
        centroids = _means(points, assigned, centroids, spherical)
        again = assign(points, centroids, spherical=spherical, block=block)
        if np.array_equal(again, assigned):
            break
        assigned = again
    return assigned, centroids


def assign(points: np.ndarray, centroids: np.ndarray, *, spherical: bool, block: int | None = None) -> np.ndarray:
    """Nearest centroid of each point, [N] int64."""
    nearest = np.zeros(len(points), np.int64)
    # argmin |p - c|^2 = argmin |c|^2 - 2 p.c: exact integers below 2^51
    offset = 0.0 if spherical else squared_norms(centroids)
    for part in blocks(len(points), max(points.shape[1], len(centroids)), block):
        nearest[part] = np.argmin(offset - 2.0 * dots(points[part], centroids), axis=1)
    return nearest


def _means(points: np.ndarray, assigned: np.ndarray, centroids: np.ndarray, spherical: bool) -> np.ndarray:
    order = np.argsort(assigned, kind="stable")
    starts = np.searchsorted(assigned[order], np.arange(len(centroids) + 1))
    found = centroids.copy()
    for k in range(len(centroids)):
        members = order[starts[k] : starts[k + 1]]
        if len(members):
            total = np.sum(points[members], axis=0, dtype=np.int64)  # exact for up to 2^39 points
            found[k] = unit_grid(total[None] / ONE)[0] if spherical else np.rint(total / len(members)).astype(np.int32)
    return found
