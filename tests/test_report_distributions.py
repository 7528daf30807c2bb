"""Histograms, rank correlations and overlaps of kept sets against hand counts and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dccot_jax.report.distributions import bin_edges, distribution, distributions, overlaps, ranks, spearman


def test_ranks_share_the_mean_of_their_places():
    assert ranks(np.asarray([30.0, 10.0, 20.0, 20.0, 20.0])).tolist() == [5, 1, 3, 3, 3]
    assert ranks(np.asarray([])).tolist() == []


def test_spearman_with_ties_by_hand():
    # ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5, variances 4.5 and 5
    x, y = np.asarray([1.0, 2.0, 2.0, 3.0]), np.asarray([1.0, 3.0, 2.0, 4.0])
    rho, n = spearman([x, y, -(x**3), np.ones(4)])
    assert rho[0][1] == rho[1][0] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rho[0][0] == pytest.approx(1) and rho[0][2] == pytest.approx(-1)
    assert [row[3] for row in rho] == [None] * 4  # a constant has no rank correlation, not one of 0
    assert n == [[4] * 4] * 4


def test_spearman_equals_scipys_over_the_rows_that_have_both():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    columns = [np.round(rng.normal(size=300) + 0.5 * k, 1) for k in range(4)]
    columns[2] = columns[2] + columns[0]
    columns[1][::7] = np.nan
    columns[3][:40] = np.nan
    rho, n = spearman(columns)
    for i, j in itertools.product(range(4), repeat=2):
        both = np.isfinite(columns[i]) & np.isfinite(columns[j])
        assert n[i][j] == both.sum()
        assert rho[i][j] == pytest.approx(stats.spearmanr(columns[i][both], columns[j][both]).statistic, abs=1e-12)
    few, counts = spearman([np.asarray([1.0, 2.0, np.nan]), np.asarray([1.0, 2.0, 3.0])])
    assert few[0] == [None, None] and counts[0] == [2, 2]


def test_overlaps_by_hand():
    n = 15
    kept, pools = np.zeros((4, n), bool), np.zeros((4, n), bool)
    pools[:2, :10] = True
    pools[2, 5:] = True
    kept[0, :5], kept[1, 3:7], kept[2, 5:8] = True, True, True
    found = overlaps(kept, pools)
    assert found["shared"][0] == [5, 2, 0, 0] and found["jaccard"][0][:3] == [1.0, 2 / 7, 0.0]
    assert found["expected"][0][1] == pytest.approx(5 * 4 / 10) and found["jaccard_expected"][0][1] == pytest.approx(2 / 7)
    assert found["expected"][0][2] == pytest.approx(5 * (5 / 10) * (3 / 10))  # five rows in both pools
    assert found["expected"][0][0] == 5 and found["jaccard_expected"][0][0] == 1
    assert found["jaccard"][3][3] is None and found["expected"][3] == [0.0] * 4  # an empty set of an empty pool


def test_expected_overlap_is_the_mean_over_all_draws():
    first, second = range(6), range(2, 9)
    draws = [len(set(a) & set(b)) for a, b in itertools.product(itertools.combinations(first, 3), itertools.combinations(second, 2))]
    kept, pools = np.zeros((2, 9), bool), np.zeros((2, 9), bool)
    pools[0, :6], pools[1, 2:] = True, True
    kept[0, :3], kept[1, 2:4] = True, True
    assert overlaps(kept, pools)["expected"][0][1] == pytest.approx(np.mean(draws))


def test_bins_fit_what_is_counted():
    assert bin_edges(np.asarray([0.0, 1.0, 1.0])).tolist() == [-0.5, 0.5, 1.5]  # pyright: ignore[reportOptionalMemberAccess]
    assert bin_edges(np.full(5, 0.25)).tolist() == [-0.25, 0.75]  # pyright: ignore[reportOptionalMemberAccess]
    assert bin_edges(np.asarray([1.0])) is None
    lengths = bin_edges(np.arange(100.0))
    assert lengths is not None and lengths[0] == -0.5 and set(np.diff(lengths)) == {3.0} and lengths[-1] >= 99
    values = np.append(np.linspace(0, 1, 999), 1e6)
    edges = bin_edges(values)
    assert edges is not None and len(edges) == 41 and edges[-1] < 1.1
    found = distribution(values, edges)
    assert sum(found["counts"]) + found["outside"] == found["n"] == 1000 and found["outside"] >= 1


def test_distributions_count_every_group_on_the_same_edges():
    values = np.asarray([1.0, 2.0, np.nan, 2.0, 3.0, np.nan])
    found = distributions(values, {"teacher": {"a": np.asarray([0, 1, 2]), "b": np.asarray([3, 4]), "c": np.asarray([5])}})
    assert found is not None and found["n"] == 4 and found["missing"] == 2 and found["edges"] == [0.5, 1.5, 2.5, 3.5]
    assert found["all"]["counts"] == [1, 2, 1] and found["all"]["mean"] == 2 and found["all"]["quantiles"][2] == 2
    groups = found["by"]["teacher"]
    assert groups["a"]["counts"] == [1, 1, 0] and groups["b"]["counts"] == [0, 1, 1]
    assert groups["c"] == {"n": 0, "mean": None, "quantiles": None, "counts": [0, 0, 0], "outside": 0}
    assert distributions(np.asarray([np.nan, 1.0]), {}) is None
