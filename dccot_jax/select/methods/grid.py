"""Vectors on an integer grid, where dot products are exact.

A float dot product changes in its last bits with the block it is computed in, and a greedy selection turns such a bit into
another choice between equal candidates. Here vectors of length at most 1 are rounded to multiples of 2^-24 and kept as
integers: a product is below 2^48, so is every partial sum of a dot product (Cauchy-Schwarz), and float64 holds integers up
to 2^53. So any order of summation, any block size and any BLAS gives the same number, and equal vectors are equal in every
comparison. The rounding moves a cosine by at most about sqrt(D) * 2^-24.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ONE = 1 << 24
SQUARE = float(ONE) * ONE  # the dot product of a unit vector with itself
BLOCK_ELEMENTS = 1 << 24  # float64 numbers of one block of products: 128 MiB


def unit_grid(vectors: np.ndarray) -> np.ndarray:
    """Directions of [N, D] vectors, as int32 multiples of 2^-24; a zero vector stays zero."""
    wide = np.asarray(vectors, np.float64)
    norms = np.sqrt(np.sum(wide * wide, axis=1, keepdims=True))
    return np.rint(ONE * np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)).astype(np.int32)


def scaled_grid(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """([N, D] int32, scale): vectors divided by a power of two that brings the longest to at most 1; vector = grid / 2^24 * scale."""
    wide = np.asarray(vectors, np.float64)
    longest = float(np.sqrt(np.max(np.sum(wide * wide, axis=1), initial=0.0)))
    scale = 2.0 ** np.ceil(np.log2(longest)) if longest > 0 else 1.0
    return np.rint(wide * (ONE / scale)).astype(np.int32), float(scale)


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact dot products [n, m] float64 (integer-valued) of grid vectors a [n, D], b [m, D]."""
    return a.astype(np.float64) @ b.astype(np.float64).T


def squared_norms(a: np.ndarray) -> np.ndarray:
    """Exact squared norms [n] float64 of grid vectors [n, D]."""
    wide = a.astype(np.float64)
    return np.sum(wide * wide, axis=1)


def blocks(count: int, width: int, block: int | None = None) -> Iterator[slice]:
    """Slices that cover `count` rows; `block` rows each, or as many as keep [rows, width] within `BLOCK_ELEMENTS`."""
    size = block or max(1, BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
