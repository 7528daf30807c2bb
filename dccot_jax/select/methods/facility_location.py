"""Facility location: a subset that represents the whole pool, chosen by lazy greedy search."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from dccot_jax.select.budget import budget_of, prefix, rest
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, describe, with_vectors
from dccot_jax.select.methods.grid import ONE, blocks, dots, unit_grid

_AHEAD = 32  # stale bounds recomputed together: one product of matrices instead of many of vectors


def facility_location(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Maximise sum_i max_{s kept} (1 + cos(i, s)) over the `vector`s, greedily, within the budget.

    The function is monotone submodular, so greedy keeps at least 1 - 1/e of the optimum (Nemhauser et al. 1978) and stale
    gains are upper bounds (Minoux 1978). Used after IFD by Superfiltering (arXiv 2402.00530). Cost O(N^2 D) for the first
    gains, computed in blocks: no [N, N] array; memory O(N D). Ties go by id on a grid of 2^-24: gains equal only in exact
    arithmetic may differ there.
    """
    found, matrix, reasons = with_vectors(candidates, step["vector"])
    kept = prefix((found[i] for i, _ in greedy(unit_grid(matrix))), budget_of(step, candidates))
    return kept, reasons | rest(found, kept, "not_in_facility_location", describe(step))


def greedy(points: np.ndarray, block: int | None = None) -> Iterator[tuple[int, float]]:
    """Yield (index, gain) of unit grid points [N, D], largest gain first (ties: the lower index), as plain greedy would.

    Similarities are integers of 25 bits, so a gain is an exact integer (in units of 2^-24) for up to 2^28 points.
    """
    covered = np.zeros(len(points))
    everyone = np.arange(len(points))
    gains = _gains(points, covered, everyone, block)
    heap = [(-gain, i, 0) for i, gain in zip(everyone.tolist(), gains.tolist())]  # the last entry: at which size it was computed
    heapq.heapify(heap)
    size = 0
    while heap:
        gain, i, seen = heap[0]
        if seen == size:
            heapq.heappop(heap)
            yield i, -gain
            size += 1
            covered = np.maximum(covered, _similarity(points, points[i : i + 1], block)[:, 0])
        else:
            stale = [heapq.heappop(heap)]
            while heap and len(stale) < _AHEAD and heap[0][2] != size:
                stale.append(heapq.heappop(heap))
            index = np.array([entry[1] for entry in stale])
            for j, fresh in zip(index.tolist(), _gains(points, covered, index, block).tolist()):
                heapq.heappush(heap, (-fresh, j, size))


def _gains(points: np.ndarray, covered: np.ndarray, chosen: np.ndarray, block: int | None) -> np.ndarray:
    """What each of `chosen` would add: sum_i max(0, similarity(i, j) - covered_i), [len(chosen)]."""
    found = np.zeros(len(chosen))
    for columns in blocks(len(chosen), points.shape[1], block):
        picked = points[chosen[columns]]
        for part in blocks(len(points), max(len(picked), points.shape[1]), block):
            found[columns] += np.sum(np.maximum(_similar(points[part], picked) - covered[part, None], 0.0), axis=0)
    return found


def _similarity(points: np.ndarray, picked: np.ndarray, block: int | None) -> np.ndarray:
    return np.concatenate([_similar(points[part], picked) for part in blocks(len(points), points.shape[1], block)])


def _similar(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 + cosine in units of 2^-24, rounded down."""
    return np.maximum(np.floor(dots(a, b) / ONE) + ONE, 0.0)
