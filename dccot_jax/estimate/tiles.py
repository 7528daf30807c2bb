"""How a TPU lays arrays out: in tiles of 8 rows (sublanes) × 128 elements (lanes) of 32 bits, padded to whole tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

LANES, SUBLANES = 128, 8


def up(size: int, multiple: int) -> int:
    """`size`, rounded up to a multiple."""
    return -(-size // multiple) * multiple


def tiled_elements(shape: Sequence[int]) -> int:
    """Elements of a program's argument of this shape with its padding: the tiles lie along those two of its dimensions that pad least.

    Fewer than 8 rows take tiles of 1, 2 or 4; vectors come 1,024 at a time (layouts of libtpu 0.0.50's compiled programs).
    """
    if len(shape) < 2:
        return up(math.prod(shape), SUBLANES * LANES)
    pairs = itertools.permutations(range(len(shape)), 2)
    return min(
        math.prod(_rows(size) if axis == rows else up(size, LANES) if axis == lanes else size for axis, size in enumerate(shape))
        for rows, lanes in pairs
    )


def _rows(size: int) -> int:
    return size if size in (1, 2, 4) else up(size, SUBLANES)
