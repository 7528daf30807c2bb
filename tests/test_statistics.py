"""Intervals and paired tests against closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dccot_jax.evaluate import statistics as st


def test_wilson_against_its_defining_equation():
    # The bounds are the two roots p of (phat - p)^2 = z^2 p (1 - p) / n.
    z = 1.959963984540054
    for k, n in [(1, 10), (5, 10), (37, 200), (499, 500), (250, 1000)]:
        found = st.wilson(k, n)
        assert found is not None
        for p in (found.low, found.high):
            assert (k / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, rel=1e-9)
        assert found.low < k / n < found.high


def test_wilson_at_the_edges():
    none, every = st.wilson(0, 50), st.wilson(50, 50)
    assert none is not None and every is not None
    assert none.low == 0.0 and none.high == pytest.approx(0.0713476, abs=1e-6)
    assert every.high == 1.0 and every.low == pytest.approx(1 - none.high)
    assert st.wilson(0, 0) is None
    with pytest.raises(ValueError):
        st.wilson(3, 2)


def test_t_interval_uses_the_tabled_quantiles():
    for n, t in [(2, 12.706), (3, 4.303), (5, 2.776)]:
        values = list(range(n))
        found = st.t_interval(values)
        assert found is not None
        half = t * np.std(values, ddof=1) / math.sqrt(n)
        assert found.high - np.mean(values) == pytest.approx(half, rel=2e-4)


def test_one_sample_is_undefined_and_never_zero():
    assert st.t_interval([0.5]) is None
    assert st.ratio_mean([3.0], [2.0]) == (1.5, None)
    assert st.ratio_mean([], []) is None
    one = st.paired_bootstrap(np.array([[1.0]]), np.array([[0.0]]), resamples=100, seed=0)
    assert one.difference == 1.0 and one.low is None and one.high is None and one.p_value is None
    assert st.bootstrap_interval(np.ones((1, 1)), resamples=100, seed=0) is None


def test_all_right_gets_wilson_not_a_zero_width():
    found = st.accuracy_interval(np.ones((3, 200)), resamples=200, seed=0)
    assert found is not None and found.method == "wilson"
    assert found.high == 1.0 and 0.97 < found.low < 0.99  # 200 items, not 600


def test_ratio_mean_matches_the_plain_mean_for_equal_weights():
    x = np.random.default_rng(0).normal(size=50)
    found = st.ratio_mean(x * 3, [3.0] * 50)
    assert found is not None
    assert found[0] == pytest.approx(x.mean()) and found[1] == pytest.approx(x.std(ddof=1) / math.sqrt(len(x)))


def test_bootstrap_distribution_against_full_enumeration():
    # 2 seeds and 3 items: every resample of both levels can be listed.
    d = np.array([[0.9, -0.4, 0.1], [0.2, 0.3, -0.6]])
    w = np.array([1.0, 2.0, 5.0])
    exact = []
    for items in itertools.product(range(3), repeat=3):
        for seeds in itertools.product(range(2), repeat=2):
            picked = d[np.ix_(seeds, items)]
            exact.append((picked * w[list(items)]).sum() / (2 * w[list(items)].sum()))
    means = st._resampled_means(d, w, 40_000, seed=1)
    assert means is not None
    assert means.mean() == pytest.approx(np.mean(exact), abs=0.01)
    assert means.std() == pytest.approx(np.std(exact), rel=0.03)
    for x in (-0.31, -0.15, 0.0123, 0.2137):  # the distribution function, away from its atoms
        assert (means <= x).mean() == pytest.approx((np.array(exact) <= x).mean(), abs=0.01)


def test_bootstrap_standard_deviation_against_the_closed_form():
    # One seed, equal weights: the sd of the resampled mean is the population sd over sqrt(n).
    x = np.random.default_rng(3).random((1, 400)) < 0.7
    means = st._resampled_means(x.astype(float), None, 4000, seed=5)
    assert means is not None
    assert means.std() == pytest.approx(x.std() / 20, rel=0.05)


def test_paired_bootstrap_sees_a_paired_effect_and_reports_a_null_one():
    rng = np.random.default_rng(0)
    skill = rng.random(500)
    a = np.stack([skill > 0.3 + rng.normal(0, 0.05, 500) for _ in range(2)])
    b = np.stack([skill > 0.4 + rng.normal(0, 0.05, 500) for _ in range(2)])
    effect = st.paired_bootstrap(a, b, resamples=1000, seed=1)
    assert effect.low is not None and effect.low > 0 and effect.p_value is not None and effect.p_value < 0.01
    assert effect.difference == pytest.approx(a.mean() - b.mean()) == pytest.approx(np.mean(effect.per_seed))
    null = st.paired_bootstrap(a, a[::-1], resamples=1000, seed=1)
    assert null.low is not None and null.high is not None and null.low <= 0 <= null.high
    assert null.p_value is not None and null.p_value > 0.2


def test_identical_arms_have_p_one_and_no_interval():
    x = np.ones((2, 300))
    same = st.paired_bootstrap(x, x, resamples=100, seed=0)
    assert same.difference == 0.0 and same.p_value == 1.0 and same.low is None


def test_seed_spread_widens_the_interval():
    # The same item-level data; seeds that disagree by 0.2 must give a wider interval than seeds that agree.
    n = 2000
    base = np.zeros((2, n))
    agree, disagree = np.zeros((2, n)), np.zeros((2, n))
    agree[:, : n // 2] = 1
    disagree[0, : int(0.4 * n)], disagree[1, : int(0.6 * n)] = 1, 1
    narrow = st.paired_bootstrap(agree, base, resamples=1000, seed=0)
    wide = st.paired_bootstrap(disagree, base, resamples=1000, seed=0)
    assert narrow.low is not None and narrow.high is not None and wide.low is not None and wide.high is not None
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_bootstrap_is_seeded():
    x = np.random.default_rng(0).random((2, 50))
    runs = [st.bootstrap_interval(x, resamples=200, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_bootstrap_refuses_bad_shapes():
    with pytest.raises(ValueError):
        st.paired_bootstrap(np.ones((1, 3)), np.ones((1, 4)), resamples=10, seed=0)
    with pytest.raises(ValueError):
        st.paired_bootstrap(np.ones((1, 0)), np.ones((1, 0)), resamples=10, seed=0)
    with pytest.raises(ValueError):
        st.bootstrap_interval(np.array([[1.0, np.nan]]), resamples=10, seed=0)


def test_mcnemar_by_enumeration():
    # Brute force: all 2^n assignments of n discordant pairs, two-sided by doubling the smaller tail.
    for only_a, only_b in [(0, 0), (1, 0), (5, 1), (4, 4), (9, 2)]:
        n = only_a + only_b
        a = [True] * only_a + [False] * only_b + [True] * 7
        b = [False] * only_a + [True] * only_b + [True] * 7
        tail = sum(sum(bits) <= min(only_a, only_b) for bits in itertools.product((0, 1), repeat=n)) / 2**n
        assert st.mcnemar_exact(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert st.mcnemar_exact([], []) is None


def test_mcnemar_with_many_discordant_pairs():
    a, b = np.zeros(4000, bool), np.zeros(4000, bool)
    a[:2100], b[2100:] = True, True
    p = st.mcnemar_exact(a, b)
    z = (200 - 1) / math.sqrt(4000)  # normal approximation with continuity correction
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_holm_adjusts_in_order_and_keeps_undefined():
    assert st.holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert st.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert st.holm([]) == []
