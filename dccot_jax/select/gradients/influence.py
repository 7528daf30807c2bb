"""Influence of training rows on sub-tasks, from projected gradients (LESS, arXiv 2402.04333, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of [n, dim] at length 1, float64; a row that is all zero has no direction and becomes NaN."""
    wide = features.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))


def subtask_directions(features: np.ndarray, subtasks: Sequence[str]) -> dict[str, np.ndarray]:
    """{sub-task: mean of its rows' unit features [dim]}: the mean cosine with a sub-task's rows is one inner product.

    Args:
      features: validation rows [n, dim], SGD form. subtasks: the sub-task of each.
    """
    units = unit(features)
    names = np.asarray(subtasks)
    return {str(name): units[names == name].mean(axis=0) for name in sorted(set(subtasks))}


def influence(
    features: Sequence[np.ndarray], directions: Sequence[Mapping[str, np.ndarray]], learning_rates: Sequence[float]
) -> dict[str, np.ndarray]:
    """{sub-task: influence [n]}, sum_c eta_c · mean over the sub-task's rows z' of cos(Gamma_c(z), g_c(z')), eta summing to 1.

    Args:
      features: per checkpoint, training rows [n, dim], Adam form. directions: per checkpoint, `subtask_directions`.
      learning_rates: per checkpoint, the mean learning rate of the steps that led to it.
    """
    shares = np.asarray(learning_rates, np.float64) / np.sum(learning_rates)
    total = {name: np.zeros(len(features[0])) for name in directions[0]}
    for own, known, share in zip(features, directions, shares, strict=True):
        units = unit(own)
        for name, direction in known.items():
            total[name] += share * (units * direction).sum(axis=1)  # a row's sum does not depend on the other rows
    return total


def most_influenced(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The largest influence over the sub-tasks, [n]."""
    return np.max(np.stack([values[name] for name in sorted(values)]), axis=0)
