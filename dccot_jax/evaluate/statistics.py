"""Intervals and paired tests. What one sample cannot tell is None, never 0.

Shapes: S seeds, N items, R resamples. Arms are compared on the same items and the same seeds, so differences are paired
and both levels are resampled together: items stand for the questions that could have been asked, seeds for the trainings
that could have been run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

# Resamples evaluated at a time: bounds memory at _BLOCK * N floats.
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Interval:
    """A confidence interval and how it was made: ``wilson``, ``bootstrap`` (items x seeds), ``t`` (over seeds)."""

    low: float
    high: float
    method: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A paired difference, first minus second.

    Attributes:
      difference: mean of a - b over seeds and items. low, high: its percentile bootstrap interval, None where undefined.
      p_value: two-sided bootstrap p, None where undefined. per_seed: the difference of every seed.
      n_items, n_seeds: sizes of the two levels; with one seed only items are resampled and training noise is not in the interval.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    per_seed: tuple[float, ...]
    n_items: int
    n_seeds: int


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Wilson score interval of a proportion (Wilson 1927); None for n = 0. Raises ValueError unless 0 <= successes <= n."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n}")
    if n == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    denominator = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / denominator
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / denominator
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high, "wilson")


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student t interval of a mean, e.g. over seeds; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # light, unlike scipy.stats

    x = np.asarray(values, np.float64)
    half = float(stdtrit(len(x) - 1, 0.5 + confidence / 2)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(float(x.mean()) - half, float(x.mean()) + half, "t")


def ratio_mean(sums: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> tuple[float, float | None] | None:
    """Mean per unit of weight, sum(sums) / sum(weights), and its linearised standard error (None for one item).

    Args:
      sums: [N] total per item, e.g. nats. weights: [N] size per item, e.g. tokens.
    Returns None without any weight.
    """
    s, w = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    total = float(w.sum())
    if not len(s) or total <= 0:
        return None
    mean = float(s.sum()) / total
    n = len(s)
    if n < 2:
        return mean, None
    return mean, math.sqrt(float(((s - mean * w) ** 2).sum()) * n / (n - 1)) / total


def bootstrap_interval(
    values: np.ndarray, *, weights: np.ndarray | None = None, resamples: int, seed: int, confidence: float = 0.95
) -> Interval | None:
    """Percentile interval of the weighted mean of `values` [S, N] over seeds and items, both resampled.

    Returns None where nothing can be said: fewer than two items, no resamples, or every resample equal (all right or all
    wrong), where a percentile interval of zero width would claim certainty.
    """
    means = _resampled_means(_matrix(values), weights, resamples, seed)
    if means is None or np.ptp(means) == 0:
        return None
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high), "bootstrap")


def accuracy_interval(correct: np.ndarray, *, resamples: int, seed: int) -> Interval | None:
    """Interval of a mean accuracy over seeds: Wilson for one seed, else bootstrap over items x seeds.

    Args:
      correct: [S, N] booleans. Where the bootstrap degenerates, Wilson over the N items (never S * N: seeds share them).
    """
    matrix = _matrix(correct)
    n = matrix.shape[1]
    if matrix.shape[0] > 1:
        found = bootstrap_interval(matrix, resamples=resamples, seed=seed)
        if found is not None:
            return found
    return wilson(round(float(matrix.mean()) * n), n) if n else None


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, weights: np.ndarray | None = None, resamples: int, seed: int, confidence: float = 0.95
) -> Comparison:
    """Compare two arms on the same items and seeds by a two-level bootstrap.

    Args:
      a, b: [S, N] values per seed and item (correctness, or nats per token). Row s of both comes from the same seed.
      weights: [N] weight of each item in the mean (e.g. tokens); None weighs items equally.
      resamples: R. seed: of the resampling; the same seed gives the same interval.
    The p-value is 2 min(P(d* <= 0), P(d* >= 0)) with one added to each count, so it is never below 2 / (R + 1).
    Raises ValueError when shapes differ or nothing is compared.
    """
    first, second = _matrix(a), _matrix(b)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"paired comparison of shapes {first.shape} and {second.shape}")
    delta = first - second
    w = np.ones(delta.shape[1]) if weights is None else np.asarray(weights, np.float64)
    per_seed = delta @ w / w.sum()
    means = _resampled_means(delta, weights, resamples, seed)
    low = high = p_value = None
    if means is not None:
        if np.ptp(means) > 0:
            low, high = (float(x) for x in np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2]))
        p_value = _two_sided(means)
    return Comparison(float(per_seed.mean()), low, high, p_value, tuple(float(x) for x in per_seed), delta.shape[1], delta.shape[0])


def mcnemar_exact(a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray) -> float | None:
    """Exact two-sided McNemar test of two arms on the same items (one seed); None for no items, 1 for no disagreement.

    Source: the binomial test with p = 1/2 on the discordant pairs (McNemar 1947, exact form).
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.shape != second.shape:
        raise ValueError(f"McNemar on {first.shape} and {second.shape} items")
    if not first.size:
        return None
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**n)) if n < 1000 else min(1.0, 2.0 ** (1 + _log2(tail) - n))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment for several tests; undefined entries stay undefined and are not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, (p, index) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - rank)))
        adjusted[index] = worst
    return adjusted


def _resampled_means(values: np.ndarray, weights: np.ndarray | None, resamples: int, seed: int) -> np.ndarray | None:
    """[R] weighted means of `values` [S, N] with rows and columns drawn with replacement; None if that says nothing."""
    n_seeds, n_items = values.shape
    if n_items < 2 or resamples < 1:
        return None
    w = np.ones(n_items) if weights is None else np.asarray(weights, np.float64)
    item_draws, seed_draws = _draws(n_seeds, n_items, resamples, seed)
    means = []
    for start in range(0, resamples, _BLOCK):
        item_weights = item_draws[start : start + _BLOCK] * w  # [block, N]
        seed_means = (seed_draws[start : start + _BLOCK] / n_seeds) @ values  # [block, N]
        means.append((seed_means * item_weights).sum(1) / item_weights.sum(1))
    return np.concatenate(means)


@functools.lru_cache(maxsize=4)
def _draws(n_seeds: int, n_items: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each item [R, N] and each seed [R, S] is drawn per resample. Cached: many cells of a report share them."""
    rng = np.random.default_rng(seed)
    items = rng.multinomial(n_items, np.full(n_items, 1 / n_items), size=resamples).astype(np.int16)
    return items, rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples).astype(np.int16)


def _two_sided(means: np.ndarray) -> float:
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (len(means) + 1))


def _matrix(values: np.ndarray) -> np.ndarray:
    matrix = np.atleast_2d(np.asarray(values, np.float64))
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError("expected finite values of shape [seeds, items]")
    return matrix


def _log2(value: int) -> float:
    """log2 of a positive integer of any size."""
    shift = max(0, value.bit_length() - 60)
    return math.log2(value >> shift) + shift
