"""Figures of columns of numbers: histograms per group, rank correlations, and how much kept sets share.

Shapes: N rows, S signals, M kept sets. NaN marks a row without a value. Memory is O(N S) or O(N M): nothing is compared row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40
_WHOLE_BINS = 60  # whole numbers on a range up to this have a bin each
_CLIP = (0.005, 0.995)


def bin_edges(values: np.ndarray, bins: int = BINS) -> np.ndarray | None:
    """Edges of a histogram of finite values [n], from the 0.5 % to the 99.5 % quantile; None for fewer than two values.

    Bins of whole numbers are whole too, so that none of them holds more numbers than its neighbour: one each over all of a short range.
    A constant gets one bin.
    """
    if len(values) < 2:
        return None
    low, high = float(values.min()), float(values.max())
    whole = bool(np.all(values == np.round(values)))
    if whole and high - low <= _WHOLE_BINS:
        return np.arange(low - 0.5, high + 1.0)
    low, high = np.quantile(values, _CLIP)
    if whole:
        low, high = np.floor(low), np.ceil(high)
        width = np.ceil((high - low + 1) / bins)
        return low - 0.5 + width * np.arange(np.ceil((high - low + 1) / width) + 1)
    if not high > low:
        return np.asarray([low - 0.5, low + 0.5])
    return np.linspace(low, high, bins + 1)


def distribution(values: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """{n, mean, quantiles (of `QUANTILES`), counts [bins], outside} of the finite ones of `values`; mean and quantiles None for n = 0."""
    finite = values[np.isfinite(values)]
    counts = np.histogram(finite, edges)[0]
    return {
        "n": len(finite),
        "mean": float(finite.mean()) if len(finite) else None,
        "quantiles": np.quantile(finite, QUANTILES).tolist() if len(finite) else None,
        "counts": counts.tolist(),
        "outside": int(len(finite) - counts.sum()),
    }


def distributions(values: np.ndarray, groups: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any] | None:
    """Distribution of one signal over all rows and over each group, on the same edges; None where fewer than two rows have a value.

    Args:
      values: [N]. groups: {label: {group name: indices of its rows}}.
    Returns {edges, n, missing, all: `distribution`, by: {label: {group: `distribution`}}}.
    """
    finite = values[np.isfinite(values)]
    edges = bin_edges(finite)
    if edges is None:
        return None
    return {
        "edges": edges.tolist(),
        "n": len(finite),
        "missing": int(len(values) - len(finite)),
        "all": distribution(values, edges),
        "by": {label: {name: distribution(values[rows], edges) for name, rows in found.items()} for label, found in groups.items()},
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n] from 1 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]


def spearman(columns: Sequence[np.ndarray]) -> tuple[list[list[float | None]], list[list[int]]]:
    """Spearman's rank correlation of every pair of columns [N], over the rows that have both values, ties at their mean rank.

    Returns (rho [S][S], n [S][S]); rho is None where a column is constant or fewer than three rows have both.
    """
    finite = [np.isfinite(column) for column in columns]
    whole = [_standardised(ranks(column[known])) for column, known in zip(columns, finite)]
    size = len(columns)
    rho: list[list[float | None]] = [[None] * size for _ in range(size)]
    n = [[0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i, size):
            both = finite[i] & finite[j]
            n[i][j] = n[j][i] = count = int(both.sum())
            pair = [
                whole[k] if count == int(finite[k].sum()) else _standardised(ranks(columns[k][both]))  # the same rows: ranked already
                for k in (i, j)
            ]
            if count >= 3 and pair[0] is not None and pair[1] is not None:
                rho[i][j] = rho[j][i] = float(np.clip(pair[0] @ pair[1], -1.0, 1.0))
    return rho, n


def _standardised(x: np.ndarray) -> np.ndarray | None:
    """Centred and of length one; None for a constant."""
    centred = x - x.mean() if len(x) else x
    length = float(np.sqrt(centred @ centred))
    return centred / length if length > 0 else None


def overlaps(kept: np.ndarray, pools: np.ndarray) -> dict[str, list[list[Any]]]:
    """What M kept sets share, and what they would share by chance.

    Args:
      kept: [M, N] bool, rows kept. pools: [M, N] bool, rows each had to choose from, a superset of those kept.
    Returns {shared, expected, jaccard, jaccard_expected}, each [M][M]. `expected` is the number of shared rows if every set of its size
    were drawn at random from its own pool, independently of the others: |P ∩ Q| a/|P| b/|Q| for a rows of P and b of Q (ab/N in one
    pool). `jaccard` is shared / (a + b - shared), None for two empty sets; `jaccard_expected` the same at the expected number.
    """
    sizes, of = kept.sum(axis=1), pools.sum(axis=1)
    found: dict[str, list[list[Any]]] = {name: [] for name in ("shared", "expected", "jaccard", "jaccard_expected")}
    for i in range(len(kept)):
        shared = [int(np.count_nonzero(kept[i] & other)) for other in kept]
        common = [int(np.count_nonzero(pools[i] & other)) for other in pools]
        expected = [
            float(sizes[i]) if i == j else (common[j] * (sizes[i] / of[i]) * (sizes[j] / of[j]) if of[i] and of[j] else 0.0)
            for j in range(len(kept))
        ]
        found["shared"].append(shared)
        found["expected"].append([float(value) for value in expected])
        found["jaccard"].append([_jaccard(value, sizes[i], sizes[j]) for j, value in enumerate(shared)])
        found["jaccard_expected"].append([_jaccard(value, sizes[i], sizes[j]) for j, value in enumerate(expected)])
    return found


def _jaccard(shared: float, first: int, second: int) -> float | None:
    union = float(first) + float(second) - shared
    return float(shared / union) if union > 0 else None
