"""Rows that two runs of a recipe treat differently: which of them lie at the cut."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pytest
from kept_cases import assert_kept_agree
from select_cases import select, singles, with_text

from dccot_jax.select.cuts import in_band, make_run, moved

N = 12


def table(values: dict[int, float]) -> pa.Table:
    return pa.table({"id": [f"{i:02d}" for i in range(N)], "nll": [values.get(i, 1.0 + i / 10) for i in range(N)]})


def run(values: dict[int, float], *steps):
    candidates = [
        dataclasses.replace(c, record=with_text(f"q{n // 3}"))
        for n, c in enumerate(singles(N, nll=lambda i: values.get(i, 1.0 + i / 10), entropy=lambda i: i))
    ]
    return make_run(candidates, select(candidates, *steps)[1])


def test_the_band_is_relative_and_absolute():
    assert in_band(1.0 + 1.9e-5, 1.0) and not in_band(1.0 + 2.1e-5, 1.0)
    assert in_band(9e-6, 0.0) and not in_band(1.1e-5, 0.0) and in_band(-1000.009, -1000.0)


def test_tables_may_differ_at_the_cut_only():
    near = table({5: 1.6 + 1e-7, 6: 1.6})  # ranks five and six change places between the halves
    assert assert_kept_agree(near, table({5: 1.6, 6: 1.6 + 1e-7}), ["nll"]) == 4  # best half and median, two rows each
    with pytest.raises(AssertionError, match=r"'top'.*has 1.5"):
        assert_kept_agree(table({5: 1.61, 6: 1.6}), table({}), ["nll"])
    with pytest.raises(AssertionError, match=r"'threshold'.*05 has 1.5"):
        assert_kept_agree(table({5: 1.62, 6: 1.65}), table({}), ["nll"])
    with pytest.raises(AssertionError, match=r"'per_question_best'.*has 1.2"):
        assert_kept_agree(table({2: 1.31}), table({}), ["nll"])


@pytest.mark.parametrize(
    ("step", "first", "other", "expected"),
    [
        ({"name": "top", "rows": 6}, {5: 1.6 - 1e-6}, {5: 1.6 + 1e-6}, (2, 2)),
        ({"name": "top", "rows": 6}, {}, {5: 1.65}, (2, 0)),
        ({"name": "bottom", "rows": 6}, {5: 1.6 - 1e-6}, {5: 1.6 + 1e-6}, (2, 2)),
        ({"name": "quantile", "low": 0.25, "high": 0.75}, {2: 1.3 - 1e-6}, {2: 1.3 + 1e-6}, (2, 2)),
        ({"name": "threshold", "min": 1.5, "max": 1.8}, {5: 1.5, 8: 1.8}, {5: 1.499999, 8: 1.9}, (2, 1)),
        ({"name": "per_question_best"}, {4: 1.5 + 1e-6}, {4: 1.5 - 1e-6}, (2, 2)),
        ({"name": "per_question_best"}, {}, {4: 1.51}, (2, 0)),
        ({"name": "per_question_best", "prefer": "low", "count": 2}, {4: 1.5 + 1e-6}, {4: 1.5 - 1e-6}, (2, 2)),
    ],
)
def test_moved_rows_at_the_cut_are_counted(step, first, other, expected):
    step = step | {"signal": "nll"}
    runs = run(first, step), run(other, step)
    assert moved([step], *runs) == moved([step], *runs[::-1]) == dict(zip(("moved", "moved_in_band"), expected))
    assert moved([step], runs[0], runs[0]) == {"moved": 0, "moved_in_band": 0}


def test_every_step_of_a_chain_has_its_own_cut():
    steps = [{"name": "threshold", "signal": "nll", "min": 1.2}, {"name": "top", "signal": "entropy", "rows": 9}, {"name": "none"}]
    assert moved(steps, run({2: 1.2}, *steps), run({2: 1.199999}, *steps)) == {"moved": 0, "moved_in_band": 0}  # the next step drops it
    steps[1] = {"name": "bottom", "signal": "entropy", "rows": 9}
    found = moved(steps, run({2: 1.2}, *steps), run({2: 1.199999}, *steps))
    assert found == {"moved": 2, "moved_in_band": 1}  # row 11 takes its place: outside, no last bit of its own decided that
    drawn = [{"name": "random", "rows": 6}]
    runs = [make_run(c := singles(N), select(c, *drawn, seed=seed)[1]) for seed in (0, 1)]
    found = moved(drawn, runs[0], runs[1])
    assert found["moved"] > 0 and found["moved_in_band"] == 0
