"""Kept sets of two score tables that agree within 1e-5: they may differ only in rows at the cut."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from select_cases import ids, select, with_text

from dccot_jax.select.candidates import Candidate

QUESTION_ROWS = 4


def assert_kept_agree(found: pa.Table, expected: pa.Table, names: Sequence[str]) -> int:
    """Keep the best half, all from the median up (some row's own value, so that a last bit decides), and the best row of each
    question by every signal of both tables. A row kept in one alone must lie within 1e-5 relative + 1e-5 of the cut in `expected`:
    the lowest value of the half, the median, the question's best. Prints and returns how many such rows there were."""
    order = sorted(expected["id"].to_pylist())
    question = {i: f"question {n // QUESTION_ROWS}" for n, i in enumerate(order)}
    count = 0
    for name in names:
        values, others = (dict(zip(table["id"].to_pylist(), table[name].to_pylist(), strict=True)) for table in (expected, found))
        median = sorted(values.values())[len(order) // 2]
        best = {asked: max(values[i] for i in order if question[i] == asked) for asked in question.values()}
        steps = (
            {"name": "top", "signal": name, "share": 0.5},
            {"name": "threshold", "signal": name, "min": median},
            {"name": "per_question_best", "signal": name},
        )
        for step in steps:
            kept, again = (
                ids(
                    select(
                        [Candidate(i, (i,), 1, True, "", {name: side[i]}, {}, with_text(question[i])) for i in order],
                        step,
                        available=[name],
                    )[0]
                )
                for side in (values, others)
            )
            half = min(values[i] for i in kept)
            for i in kept ^ again:
                cut = {"top": half, "threshold": median, "per_question_best": best[question[i]]}[step["name"]]
                assert abs(values[i] - cut) <= 1e-5 * abs(cut) + 1e-5, f"{step}: {i} has {values[i]}, the cut is {cut}"
                count += 1
    print(f"kept sets: {count} rows differ, all in the band of the cut ({len(order)} rows, {len(names)} signals, 3 selectors)")
    return count
