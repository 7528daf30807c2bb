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
    found = np.zeros(vectors.shape, np.int32)
    for part in blocks(*vectors.shape):
        wide = vectors[part].astype(np.float64)
        norms = np.sqrt(np.sum(wide * wide, axis=1, keepdims=True))
        found[part] = np.rint(ONE * np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0))
    return found


def scaled_grid(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """([N, D] int32, scale): vectors divided by a power of two that brings the longest to at most 1; vector = grid / 2^24 * scale."""
    squares = (np.max(np.sum(vectors[part].astype(np.float64) ** 2, axis=1)) for part in blocks(*vectors.shape))
    longest = float(np.sqrt(max(squares, default=0.0)))
    scale = 2.0 ** float(np.ceil(np.log2(longest))) if longest > 0 else 1.0
    found = np.zeros(vectors.shape, np.int32)
    for part in blocks(*vectors.shape):
        found[part] = np.rint(vectors[part].astype(np.float64) * (ONE / scale))
    return found, scale


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact dot products [n, m] float64 (integer-valued) of grid vectors a [n, D], b [m, D]."""
    return a.astype(np.float64) @ b.astype(np.float64).T


def squared_norms(a: np.ndarray) -> np.ndarray:
    """Exact squared norms [n] float64 of grid vectors [n, D]."""
    return np.concatenate([np.sum(a[part].astype(np.float64) ** 2, axis=1) for part in blocks(*a.shape)] or [np.zeros(0)])


def blocks(count: int, width: int, block: int | None = None) -> Iterator[slice]:
    """Slices that cover `count` rows; `block` rows each, or as many as keep [rows, width] within `BLOCK_ELEMENTS`."""
    size = block or max(1, BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
