"""How far two judges agree: Cohen's kappa, plain and weighted (Cohen 1960, 1968)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WEIGHTS = ("none", "linear", "quadratic")


def cohens_kappa(first: Sequence[int], second: Sequence[int], *, weights: str = "none") -> float | None:
    """kappa = 1 - sum_ij w_ij o_ij / sum_ij w_ij e_ij, o the share of items with grades (i, j), e the product of the marginal shares.

    w_ij is 0 for i = j and otherwise 1 ("none"), |i - j| ("linear") or (i - j)^2 ("quadratic"). 1: equal on every item; 0: no
    more than by chance. None where it is not defined: no items, or both judges give one and the same grade to all.

    Args:
      first, second: whole-number grades of the same items.

    Raises ValueError on lists of different lengths or unknown weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    a, b = np.asarray(first, np.int64), np.asarray(second, np.int64)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} grades; they must be of the same items")
    if not len(a):
        return None
    grades = np.unique(np.concatenate([a, b]))
    observed = np.zeros((len(grades), len(grades)), np.int64)
    np.add.at(observed, (np.searchsorted(grades, a), np.searchsorted(grades, b)), 1)
    expected = observed.sum(axis=1, keepdims=True) * observed.sum(axis=0, keepdims=True)  # times n^2; whole numbers are exact
    apart = np.abs(grades[:, None] - grades[None, :])
    cost = {"none": (apart > 0).astype(np.int64), "linear": apart, "quadratic": apart**2}[weights]
    chance = int((cost * expected).sum())
    return None if chance == 0 else 1.0 - len(a) * int((cost * observed).sum()) / chance


def agreement(
    first: Mapping[str, Mapping[str, int]], second: Mapping[str, Mapping[str, int]], *, criteria: Sequence[str], thresholds: Sequence[int]
) -> dict[str, Any]:
    """Kappas of two judges over the items that both have graded.

    Args:
      first, second: {item: {criterion: grade}}. criteria: the ones both grade.
      thresholds: means of the criteria at which an item is kept; for each, the plain kappa of the two judges' decisions.

    Returns:
      {"rows", "criteria": {name: {"kappa", "kappa_linear", "kappa_quadratic", "equal", "within_one"}}, "kept_at": {threshold: kappa}};
      a kappa that is not defined is None.
    """
    both = sorted(set(first) & set(second))
    found: dict[str, Any] = {}
    for name in criteria:
        a, b = ([grades[item][name] for item in both] for grades in (first, second))
        kappas = {("kappa" if w == "none" else f"kappa_{w}"): _rounded(cohens_kappa(a, b, weights=w)) for w in WEIGHTS}
        apart = np.abs(np.subtract(a, b))
        shares = {"equal": float(np.mean(apart == 0)), "within_one": float(np.mean(apart <= 1))} if both else {}
        found[name] = kappas | {key: round(share, 4) for key, share in shares.items()}
    kept = {}
    for threshold in thresholds:
        a, b = ([int(sum(grades[item].values()) >= threshold * len(criteria)) for item in both] for grades in (first, second))
        kept[str(threshold)] = _rounded(cohens_kappa(a, b))
    return {"rows": len(both), "criteria": found, "kept_at": kept}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
