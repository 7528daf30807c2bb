"""Rank agreement of two scorings of the same rows. Equal rankings give exactly 1.0, whatever rounding would make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from dccot_jax.report import distributions


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank.

    None where nothing can be said: fewer than two rows; or rankings differ, and there are only two rows or one side is constant.
    """
    x, y = _columns(a, b)
    if _equal(x, y):
        return 1.0 if len(x) > 1 else None
    rho, _ = distributions.spearman([x, y])
    return rho[0][1]


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b. None where nothing can be said: fewer than two rows, or rankings differ and one side is constant."""
    x, y = _columns(a, b)
    if _equal(x, y):
        return 1.0 if len(x) > 1 else None
    found: Any = kendalltau(x, y)  # scipy's stubs do not know its type
    return None if math.isnan(found.statistic) else float(found.statistic)


def _columns(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values: the same rows are needed")
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    return np.array_equal(distributions.ranks(x), distributions.ranks(y))
