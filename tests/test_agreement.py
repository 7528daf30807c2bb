"""Cohen's kappa against worked examples and the definition written out item by item."""

from __future__ import annotations

import numpy as np
import pytest

from dccot_jax.select.agreement import agreement, cohens_kappa


def by_definition(first, second, power):
    """1 - mean cost of the pairs / mean cost over all combinations of one judge's grades with the other's."""

    def cost(i, j):
        return float(i != j) if power == 0 else abs(i - j) ** power

    return 1 - np.mean([cost(i, j) for i, j in zip(first, second)]) / np.mean([cost(i, j) for i in first for j in second])


def test_a_two_by_two_table_by_hand():
    """20 times both yes, 5 and 10 times one of them, 15 times both no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohens_kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5), abs=1e-12)
    for weights in ("linear", "quadratic"):  # with two grades all weights are one
        assert cohens_kappa(first, second, weights=weights) == pytest.approx(0.4, abs=1e-12)


def test_three_grades_with_weights_by_hand():
    """Judges (1,2,3,3) and (1,3,3,2). In 2 of 4 pairs the grades lie one apart."""
    first, second = [1, 2, 3, 3], [1, 3, 3, 2]
    # marginals of both: one 1, one 2, two 3; combinations by |i - j|: 0 in 1+1+4 = 6, 1 in 1+1+2+2 = 6, 2 in 2+2 = 4
    assert cohens_kappa(first, second) == pytest.approx(1 - (2 / 4) / (10 / 16))
    assert cohens_kappa(first, second, weights="linear") == pytest.approx(1 - (2 / 4) / ((6 + 8) / 16))
    assert cohens_kappa(first, second, weights="quadratic") == pytest.approx(1 - (2 / 4) / ((6 + 16) / 16))


@pytest.mark.parametrize("weights, power", [("none", 0), ("linear", 1), ("quadratic", 2)])
def test_random_grades_equal_the_definition(weights, power):
    rng = np.random.default_rng(power)
    first = rng.integers(1, 11, 200).tolist()
    second = np.clip(np.array(first) + rng.integers(-2, 3, 200), 1, 10).tolist()
    assert cohens_kappa(first, second, weights=weights) == pytest.approx(by_definition(first, second, power), abs=1e-12)


def test_extremes():
    grades = [1, 5, 9, 9]
    assert cohens_kappa(grades, grades) == 1.0 and cohens_kappa([1, 2], [2, 1]) == -1.0
    assert cohens_kappa([], []) is None and cohens_kappa([7, 7], [7, 7]) is None
    assert cohens_kappa([7, 7, 7], [7, 8, 7]) == 0.0  # a judge without variation agrees by chance alone
    with pytest.raises(ValueError, match="same items"):
        cohens_kappa([1], [1, 2])
    with pytest.raises(ValueError, match="cubic"):
        cohens_kappa([1], [1], weights="cubic")


def test_agreement_takes_the_items_of_both_and_their_decisions():
    first = {"a": {"x": 8, "y": 8}, "b": {"x": 2, "y": 3}, "c": {"x": 9, "y": 7}, "only": {"x": 1, "y": 1}}
    second = {"a": {"x": 8, "y": 9}, "b": {"x": 3, "y": 8}, "c": {"x": 4, "y": 7}}
    found = agreement(first, second, criteria=("x", "y"), thresholds=(1, 8))
    assert found["rows"] == 3
    x = found["criteria"]["x"]
    assert x["kappa_quadratic"] == pytest.approx(by_definition([8, 2, 9], [8, 3, 4], 2), abs=1e-6)
    assert (x["equal"], x["within_one"]) == (round(1 / 3, 4), round(2 / 3, 4))
    # at 8: the first keeps a and c (16 and 16 of 16), the second a alone; at 1 both keep all, and kappa is not defined
    assert found["kept_at"] == {"1": None, "8": pytest.approx(by_definition([1, 0, 1], [1, 0, 0], 0), abs=1e-6)}
