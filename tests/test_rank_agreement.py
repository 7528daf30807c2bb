"""Rank correlations against their definitions over all pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dccot_jax.standalone.rank_agreement import kendall, spearman


def pairwise_kendall(a, b):
    """tau-b over all pairs."""
    found = np.array([(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in itertools.combinations(range(len(a)), 2)])
    x, y = found[:, 0], found[:, 1]
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


def mean_ranks(values):
    return np.array([np.mean([sorted(values).index(v), len(values) - 1 - sorted(values)[::-1].index(v)]) for v in values])


@pytest.mark.parametrize("seed", range(4))
def test_against_the_definitions(seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 9, 30).astype(float).tolist()  # with ties
    b = (np.array(a) + rng.integers(0, 4, 30)).tolist()
    assert spearman(a, b) == pytest.approx(np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1], abs=1e-12)
    assert kendall(a, b) == pytest.approx(pairwise_kendall(a, b), abs=1e-12)
    assert spearman(a, [-x for x in a]) == pytest.approx(-1.0) and kendall(a, [-x for x in a]) == pytest.approx(-1.0)


@pytest.mark.parametrize("n", [2, 3, 7, 101, 1000])
def test_equal_rankings_are_exactly_one(n):
    a = np.random.default_rng(n).normal(size=n)
    for b in (a, np.exp(a)):
        assert spearman(a, b) == 1.0 and kendall(a, b) == 1.0
    assert spearman([3.0] * n, [3.0] * n) == 1.0


def test_where_nothing_can_be_said():
    for measure in (spearman, kendall):
        assert measure([1.0], [2.0]) is None and measure([], []) is None
        assert measure([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
        with pytest.raises(ValueError, match="2 and 1 values"):
            measure([1.0, 2.0], [1.0])
