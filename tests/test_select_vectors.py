"""Selectors over vectors against brute force in Python integers, and independent of order and block size."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from select_cases import pool, select, singles

from dccot_jax.config import ConfigError
from dccot_jax.select.budget import Budget
from dccot_jax.select.candidates import Candidate, SelectionError
from dccot_jax.select.methods import semdedup as semdedup_module
from dccot_jax.select.methods.deita import novel
from dccot_jax.select.methods.facility_location import greedy
from dccot_jax.select.methods.grid import ONE, SQUARE, dots, scaled_grid, unit_grid
from dccot_jax.select.methods.kcenter import Farthest
from dccot_jax.select.methods.kmeans import first_centroids, kmeans
from dccot_jax.select.methods.s2l import even_sample
from dccot_jax.select.selectors import check_steps

# Small whole numbers in few dimensions: many equal points, equal distances and zero vectors.
points = st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=14).map(lambda rows: np.array(rows, np.float32))
BLOCKS = (1, 3, None)


def python_dots(a: np.ndarray, b: np.ndarray) -> list[list[int]]:
    return [[sum(int(x) * int(y) for x, y in zip(u, v)) for v in b] for u in a]


@given(points, points)
@settings(max_examples=40, deadline=None)
def test_dot_products_on_the_grid_are_exact(a, b):
    u, v = unit_grid(a), unit_grid(b)
    assert dots(u, v).tolist() == python_dots(u, v)
    lengths = np.linalg.norm(a, axis=1, keepdims=True) * np.linalg.norm(b, axis=1)
    cosines = np.divide(a @ b.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    np.testing.assert_allclose(dots(u, v) / SQUARE, cosines, atol=4 / ONE)


def test_the_largest_dot_products_stay_exact():
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((3, 8192)).astype(np.float32)
    spiky = np.zeros((2, 8192), np.float32)
    spiky[:, 0] = 1e30, -1e-30
    for rows in (wide, spiky, np.ones((2, 8192), np.float32)):
        grid = unit_grid(rows)
        assert dots(grid, grid).tolist() == python_dots(grid, grid) and abs(dots(grid, grid)).max() < 2**52
        raw, scale = scaled_grid(rows)
        assert dots(raw, raw).tolist() == python_dots(raw, raw)
        np.testing.assert_allclose(raw / ONE * scale, rows, atol=scale / ONE)


# --- k-center ------------------------------------------------------------------------------------------------------------


@given(points, st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_kcenter_is_plain_farthest_first(rows, start):
    start %= len(rows)
    expected = [start]
    while len(expected) < len(rows):
        left = [i for i in range(len(rows)) if i not in expected]
        expected.append(max(left, key=lambda i: (min(((rows[i] - rows[s]) ** 2).sum() for s in expected), -i)))
    grid, _ = scaled_grid(rows)
    for block in BLOCKS:
        assert list(Farthest(grid, start, block)) == expected


def test_kcenter_covers_within_twice_the_optimum():
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 20, (9, 2)).astype(np.float32)
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    best = min(distance[:, list(chosen)].min(1).max() for chosen in itertools.combinations(range(9), 3))
    candidates = singles(9, embedding=lambda i: rows[i])
    kept, dropped, _ = select(candidates, {"name": "kcenter", "vector": "embedding", "rows": 3})
    chosen = [int(c.group_id[1:]) for c in kept]
    assert len(chosen) == 3 and distance[:, chosen].min(1).max() <= 2 * best
    for row in dropped:  # the detail is the true distance to the nearest kept one
        stated = float(row.detail.split(": ")[1].split()[0])
        assert stated == pytest.approx(distance[int(row.id[1:]), chosen].min(), rel=1e-4)


# --- facility location -----------------------------------------------------------------------------------------------------


def brute_greedy(grid: np.ndarray) -> list[int]:
    similar = np.array([[max(0, d // ONE + ONE) for d in row] for row in python_dots(grid, grid)])
    chosen: list[int] = []
    while len(chosen) < len(grid):
        covered = similar[:, chosen].max(1) if chosen else np.zeros(len(grid), np.int64)
        gain = {j: int(np.maximum(similar[:, j] - covered, 0).sum()) for j in range(len(grid)) if j not in chosen}
        chosen.append(max(gain, key=lambda j: (gain[j], -j)))
    return chosen


@given(points)
@settings(max_examples=60, deadline=None)
def test_lazy_greedy_is_plain_greedy(rows):
    grid = unit_grid(rows)
    expected = brute_greedy(grid)
    for block in BLOCKS:
        assert [i for i, _ in greedy(grid, block)] == expected


def test_facility_location_is_near_the_best_subset():
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((10, 4)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = 1 + unit @ unit.T
    best = max(similar[:, list(chosen)].max(1).sum() for chosen in itertools.combinations(range(10), 3))
    kept, _, _ = select(singles(10, embedding=lambda i: rows[i]), {"name": "facility_location", "vector": "embedding", "rows": 3})
    value = similar[:, [int(c.group_id[1:]) for c in kept]].max(1).sum()
    assert (1 - 1 / math.e) * best <= value <= best * (1 + 1e-6)
    gains = [gain / ONE for _, gain in greedy(unit_grid(rows))]
    assert gains == sorted(gains, reverse=True) and sum(gains[:3]) == pytest.approx(value, abs=1e-4)


# --- DEITA ---------------------------------------------------------------------------------------------------------------


@given(points, st.sampled_from([-0.3, 0.0, 0.5, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_novel_compares_with_every_kept_one_whatever_the_batch(rows, tau):
    grid = unit_grid(rows)
    products = python_dots(grid, grid)
    expected: list[int] = []
    for i in range(len(rows)):
        if all(products[i][j] <= tau * SQUARE for j in expected):
            expected.append(i)
    reports = []
    for ahead in (1, 2, 5, 64):
        similar: dict[int, tuple[int, float]] = {}
        assert list(novel(grid, range(len(rows)), tau, similar, ahead)) == expected
        reports.append(similar)
    assert all(report == reports[0] for report in reports) and set(reports[0]) == set(range(len(rows))) - set(expected)
    for i, (j, cosine) in reports[0].items():
        assert j in expected and j < i and cosine == max(products[i][k] for k in expected if k < i) / SQUARE


def test_deita_sorts_by_the_product_and_says_what_it_resembles():
    rows = [(1, 0), (1, 0.01), (0, 1), (-1, 0), (0.7, 0.7)]
    candidates = singles(5, embedding=lambda i: rows[i], nll=lambda i: [1, 3, 2, 1, 9][i], entropy=lambda i: [1, 1, 1, 1, 0.1][i])
    step = {"name": "deita", "signals": ("nll", "entropy"), "vector": "embedding", "tau": 0.9}
    kept, dropped, _ = select(candidates, step)
    assert [c.group_id for c in kept] == ["g001", "g002", "g003", "g004"]
    assert dropped[0].id == "g000" and dropped[0].reason == "too_similar" and dropped[0].detail.endswith("> 0.9 to g001")
    kept, dropped, _ = select(candidates, {**step, "rows": 2})
    assert [c.group_id for c in kept] == ["g001", "g002"]  # products 3, 2, 1, 1, 0.9
    assert {d.id: d.reason for d in dropped} == {"g000": "not_in_deita", "g003": "not_in_deita", "g004": "not_in_deita"}


def test_deita_multiplies_no_negative_values():
    values = {"nll": [2.0, -3.0, 0.0], "entropy": [2.0, -3.0, 1.0]}  # (-3)(-3) would be the best
    candidates = singles(3, embedding=lambda i: np.eye(3)[i], **{name: column.__getitem__ for name, column in values.items()})
    step = {"name": "deita", "signals": ("entropy", "nll"), "vector": "embedding"}
    for order in (candidates, candidates[::-1]):
        with pytest.raises(SelectionError, match=r"deita\(.*: entropy of g001 is -3; values to multiply must be at least 0"):
            select(order, step)
    assert len(select([candidates[0], candidates[2]], step)[0]) == 2  # zero is none
    kept, _, _ = select(candidates, {**step, "signals": ("nll",), "rows": 2})  # nothing is multiplied: the rank alone counts
    assert [c.group_id for c in kept] == ["g000", "g002"]


# --- k-means, SemDeDup, S2L ------------------------------------------------------------------------------------------------


@given(points, st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_kmeans_reaches_a_fixed_point_whatever_order_and_block(rows, k, spherical):
    grid = unit_grid(rows) if spherical else scaled_grid(rows)[0]
    start = first_centroids(grid, range(len(rows)), k)
    assert len(start) == min(k, len(np.unique(grid, axis=0)))
    assigned, centroids = kmeans(grid, start, spherical=spherical, iterations=50)
    order = np.random.default_rng(0).permutation(len(rows))
    for block in BLOCKS:
        again, moved = kmeans(grid[order], start, spherical=spherical, iterations=50, block=block)
        assert np.array_equal(again, assigned[order]) and np.array_equal(moved, centroids)
    for i, own in enumerate(assigned):  # nearest centroid, ties to the lower one
        if spherical:
            best = [sum(int(x) * int(c) for x, c in zip(grid[i], centroid)) for centroid in centroids]
        else:
            best = [-sum((int(x) - int(c)) ** 2 for x, c in zip(grid[i], centroid)) for centroid in centroids]
        assert own == best.index(max(best))


def test_kmeans_finds_separated_groups():
    rng = np.random.default_rng(3)
    rows = np.concatenate([rng.normal(centre, 0.1, (20, 2)) for centre in ((0, 0), (5, 5), (0, 9))]).astype(np.float32)
    grid, scale = scaled_grid(rows)
    assigned, centroids = kmeans(grid, grid[[0, 20, 40]], spherical=False)
    assert assigned.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    np.testing.assert_allclose(centroids / ONE * scale, rows.reshape(3, 20, 2).mean(1), atol=1e-5)


@given(points, st.sampled_from([0.01, 0.2, 1.0]))
@settings(max_examples=60, deadline=None)
def test_semdedup_matches_the_published_rule(rows, epsilon):
    grid = unit_grid(rows)
    assigned, centroids = kmeans(grid, first_centroids(grid, range(len(rows)), 3), spherical=True)
    products = python_dots(grid, grid)
    expected = set()
    for k in range(len(centroids)):
        near = {int(i): sum(int(x) * int(c) for x, c in zip(grid[i], centroids[k])) for i in np.flatnonzero(assigned == k)}
        order = sorted(near, key=lambda i: (near[i], i))
        expected |= {j for place, j in enumerate(order) if any(products[i][j] / SQUARE > 1 - epsilon for i in order[:place])}
    found = [semdedup_module.duplicates(grid, assigned, centroids, epsilon, block) for block in BLOCKS]
    assert set(found[0]) == expected and all(other == found[0] for other in found)


def test_semdedup_removes_exact_copies_and_keeps_one():
    candidates = singles(30, embedding=lambda i: [[3, 1, 0], [0, 2, 1], [1, 0, 5]][i % 3])
    kept, dropped, _ = select(candidates, {"name": "semdedup", "vector": "embedding", "clusters": 2})
    assert sorted(int(c.group_id[1:]) % 3 for c in kept) == [0, 1, 2] and {d.reason for d in dropped} == {"semantic_duplicate"}


def test_s2l_quotas_by_hand():
    def cluster(name: str, n: int) -> list[Candidate]:
        return [Candidate(f"{name}{i}", (f"{name}{i}",), 10, True, "", {}) for i in range(n)]

    clusters = [cluster("a", 10), cluster("b", 3), cluster("c", 2), cluster("d", 20)]
    # 12 rows over b, a, d (c is too small): 4 -> all 3 of b; 9 // 2 = 4 of a; 5 of d
    kept = even_sample(clusters, Budget("rows", 12))
    assert [c.group_id for c in kept] == ["b0", "b1", "b2", "a0", "a1", "a2", "a3", "d0", "d1", "d2", "d3", "d4"]
    assert len(even_sample(clusters, Budget("rows", 34))) == 34  # c fills what the three leave
    assert {c.group_id for c in even_sample(clusters, Budget("rows", 100))} == {c.group_id for group in clusters for c in group}
    assert len(even_sample(clusters, Budget("tokens", 125))) == 12
    for n in range(1, 36):
        assert len(even_sample(clusters, Budget("rows", n))) == n


def test_s2l_takes_evenly_from_rare_and_common_trajectories():
    rng = random.Random(0)
    curves = [(3, 2, 1), (3, 3, 3), (1, 3, 1)]
    kind = [0] * 80 + [1] * 15 + [2] * 5
    candidates = singles(100, trajectory=lambda i: [v + rng.random() * 0.01 for v in curves[kind[i]]])
    kept, _, _ = select(candidates, {"name": "s2l", "vector": "trajectory", "clusters": 3, "rows": 24})
    counts = [sum(kind[int(c.group_id[1:])] == k for c in kept) for k in range(3)]
    assert counts == [10, 9, 5]  # 24 // 3 = 8: all 5; 19 // 2 = 9 of 15; the last 10 of 80


def test_vectors_that_are_missing_or_not_finite_are_reported():
    candidates = pool(60, seed=1)
    _, dropped, _ = select(candidates, {"name": "kcenter", "vector": "embedding", "rows": 10_000})
    bad = {i for c in candidates if not np.isfinite(c.vectors["embedding"]).all() for i in c.ids}
    assert bad and {d.id for d in dropped} == bad and {d.reason for d in dropped} == {"no_score_embedding"}


@pytest.mark.parametrize(
    "step, message",
    [
        ({"name": "kcenter", "rows": 3}, r"vector: missing"),
        ({"name": "kcenter", "vector": "nll", "rows": 3}, r"'nll' is a number, not a vector; vectors: embedding"),
        ({"name": "kcenter", "vector": "embeding", "rows": 3}, r"'embeding' is not at hand; vectors: embedding"),
        ({"name": "kcenter", "vector": "embedding"}, "exactly one of rows, tokens, share"),
        ({"name": "top", "signal": "embedding", "rows": 3}, r"'embedding' is a vector; a number is needed"),
        ({"name": "deita", "signals": (), "vector": "embedding"}, "one or more signals"),
        ({"name": "deita", "signals": "nll", "vector": "embedding", "tau": 2}, r"must be a finite number in \[-1, 1\]"),
        ({"name": "semdedup", "vector": "embedding", "epsilon": 0}, r"epsilon: 0 must be a finite number in \[1e-06, 1\]"),
        ({"name": "semdedup", "vector": "embedding", "rows": 4}, "semdedup takes vector, epsilon, clusters"),
        ({"name": "s2l", "vector": "trajectory", "rows": 4, "clusters": 0}, "clusters: 0 must be a whole number of at least 1"),
    ],
)
def test_malformed_vector_steps(step, message):
    with pytest.raises(ConfigError, match=message):
        check_steps([step], ("nll",), ("embedding", "trajectory"))


def test_no_square_matrix_is_held():
    rows = np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float32)
    grid = unit_grid(rows)
    everyone = np.zeros(3000, np.int64)
    for work in (
        lambda: next(greedy(grid, block=50)),
        lambda: list(itertools.islice(Farthest(grid, 0, block=50), 3)),
        lambda: semdedup_module.duplicates(grid, everyone, grid[:1], 0.05, block=50),
        lambda: list(itertools.islice(novel(grid, range(3000), 0.9, {}), 20)),
    ):
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 0.1 * 8 * 3000 * 3000
