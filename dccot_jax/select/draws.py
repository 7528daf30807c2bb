"""Random numbers that belong to a name: the same whatever else is in the pool, and in whatever order it comes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dccot_jax.records import derive_seed
from dccot_jax.select.candidates import Candidate


def uniform(seed: int, *names: str) -> float:
    """A number in (0, 1) for `names`."""
    return ((derive_seed(seed, *names) >> 11) + 0.5) / 2.0**52  # 52 bits, so that neither 0 nor 1 can be rounded to


def gumbel(seed: int, *names: str) -> float:
    """A standard Gumbel number for `names`; the largest of log w + Gumbel is a draw with probability proportional to w."""
    return -math.log(-math.log(uniform(seed, *names)))


def shuffled(candidates: Iterable[Candidate], seed: int, *names: str) -> list[Candidate]:
    """A seeded order in which any subset stands as it would alone."""
    return sorted(candidates, key=lambda c: (derive_seed(seed, *names, c.group_id), c.group_id))
