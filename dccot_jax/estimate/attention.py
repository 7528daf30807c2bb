"""Working memory of attention on one device, of the backend that writes its scores down (`model/attention.py: attend`)."""

from __future__ import annotations

FLOAT32 = 4


def forward_bytes(positions: int, keys: int, heads: int, size: int) -> int:
    """Per head and pair: float32 scores and probabilities, and these in the compute dtype of `size` bytes."""
    return positions * keys * heads * (2 * FLOAT32 + size)


def backward_bytes(positions: int, keys: int, heads: int, size: int) -> int:
    """Per head and pair: the recomputed probabilities and their gradient, each in float32 and in the compute dtype of `size` bytes.

    Compilers that are short of memory do with less: one float32 array in the place of the other.
    """
    return positions * keys * heads * 2 * (FLOAT32 + size)
