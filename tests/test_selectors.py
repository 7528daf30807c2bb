"""Selectors against brute force, and the stage's grouping, on hand-made candidates."""

from __future__ import annotations

import itertools
import random

import pytest
from select_cases import ids, pool, select, size

from dccot_jax.config import ConfigError
from dccot_jax.records import make_trace
from dccot_jax.select.candidates import Candidate, SelectionError
from dccot_jax.select.columns import ScoreColumns
from dccot_jax.select.selectors import apply_steps, check_steps, required_signals
from dccot_jax.select.stage import make_candidates

STEPS = [
    {"name": "none"},
    {"name": "teacher_correct"},
    {"name": "student_error"},
    {"name": "threshold", "signal": "nll", "min": 1.0, "max": 1.5},
    {"name": "top", "signal": "nll", "rows": 12},
    {"name": "bottom", "signal": "nll", "tokens": 300},
    {"name": "middle", "signal": "nll", "share": 0.3},
    {"name": "random", "rows": 9},
    {"name": "random", "match": {"name": "teacher_correct"}},
    {"name": "quantile", "signal": "nll", "low": 0.2, "high": 0.7},
    {"name": "gumbel_topk", "signal": "nll", "tokens": 300},
    {"name": "stratified", "by": "teacher", "rows": 15},
    {"name": "stratified", "by": "nll", "bins": 3, "tokens": 400, "allocation": "equal"},
    {"name": "per_question_best", "signal": "nll"},
    {"name": "pareto", "signals": ("nll", "entropy"), "rows": 20},
    {"name": "deita", "signals": "nll", "vector": "embedding", "tau": 0.5},
    {"name": "kcenter", "vector": "embedding", "tokens": 300},
    {"name": "facility_location", "vector": "embedding", "rows": 11},
    {"name": "semdedup", "vector": "embedding", "epsilon": 0.1},
    {"name": "minhash", "text": "question", "ngram": 1, "threshold": 0.5},
    {"name": "dsir", "target": "synth_arithmetic", "rows": 12},
    {"name": "s1k", "by": "teacher", "rows": 12},
    {"name": "limo", "tokens": 250},
    {"name": "s2l", "vector": "trajectory", "clusters": 5, "rows": 14},
]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s["name"])
def test_every_row_is_kept_or_dropped_with_a_reason_and_order_does_not_matter(step):
    candidates = pool()
    corpora = {"synth_arithmetic:question": ["apples and pens", "seven red apples"]}
    kept, dropped, reports = select(candidates, step, corpora=corpora)
    assert 0 < len(kept) < len(candidates) or step["name"] == "none"
    assert ids(kept) | {d.id for d in dropped} == ids(candidates)
    assert not ids(kept) & {d.id for d in dropped}
    assert all(d.reason and d.detail for d in dropped)
    assert len({d.id for d in dropped}) == len(dropped)
    (report,) = reports
    assert (report.rows_in, report.rows_out) == (size(candidates), size(kept))
    assert report.tokens_out == sum(c.completion_tokens for c in kept)
    assert sum(report.dropped.values()) == len(dropped) == report.rows_in - report.rows_out
    shuffled = list(candidates)
    random.Random(5).shuffle(shuffled)
    assert select(shuffled, step, corpora=corpora)[:2] == (kept, dropped)


@pytest.mark.parametrize("name", ["top", "bottom"])
@pytest.mark.parametrize("budget", [{"rows": 1}, {"rows": 17}, {"tokens": 400}, {"share": 0.5}, {"rows": 10_000}])
def test_top_and_bottom_match_brute_force(name, budget):
    candidates = pool(seed=4)
    kept, dropped, _ = select(candidates, {"name": name, "signal": "nll", **budget})
    scored = [c for c in candidates if "nll" in c.values]
    sign = -1 if name == "top" else 1
    expected = []
    for c in sorted(scored, key=lambda c: (sign * c.values["nll"], c.group_id)):
        trial = [*expected, c]
        limit = budget.get("rows", budget.get("share", 0) * size(candidates))
        over = sum(x.completion_tokens for x in trial) > budget["tokens"] if "tokens" in budget else size(trial) > limit
        if over:
            break
        expected = trial
    assert {c.group_id for c in kept} == {c.group_id for c in expected}
    reasons = {d.id: d.reason for d in dropped}
    for c in candidates:
        if "nll" not in c.values:
            assert {reasons[i] for i in c.ids} == {"no_score_nll"}


def test_top_of_singles_beats_every_other_subset():
    candidates = [c for c in pool(12, seed=1) if len(c.ids) == 1 and "nll" in c.values][:8]
    kept, _, _ = select(candidates, {"name": "top", "signal": "nll", "rows": 3})
    best = max(sum(c.values["nll"] for c in subset) for subset in itertools.combinations(candidates, 3))
    assert sum(c.values["nll"] for c in kept) == best


@pytest.mark.parametrize("n, rows", [(9, 3), (10, 4), (10, 3), (9, 4), (7, 7)])
def test_middle_is_the_centred_window(n, rows):
    candidates = [Candidate(f"g{i}", (f"g{i}",), 1, True, "", {"nll": float(i)}) for i in range(n)]
    kept, _, _ = select(candidates, {"name": "middle", "signal": "nll", "rows": rows})
    values = sorted(c.values["nll"] for c in kept)
    start = (n - rows) // 2
    assert values == list(range(start, start + rows))


def test_larger_budgets_keep_supersets_and_random_differs_by_seed_only():
    candidates = pool(60)
    for name, extra in (("top", {"signal": "nll"}), ("middle", {"signal": "nll"}), ("random", {})):
        small, large = (ids(select(candidates, {"name": name, "rows": rows, **extra})[0]) for rows in (8, 30))
        assert small < large
    draws = [frozenset(ids(select(candidates, {"name": "random", "rows": 20}, seed=seed)[0])) for seed in range(6)]
    assert len(set(draws)) == 6
    assert select(candidates, {"name": "random", "rows": 20}, seed=1) == select(candidates, {"name": "random", "rows": 20}, seed=1)


def test_random_is_uniform():
    candidates = [Candidate(f"g{i}", (f"g{i}",), 1, True, "", {}) for i in range(20)]
    counts = dict.fromkeys((c.group_id for c in candidates), 0)
    for seed in range(400):
        for c in select(candidates, {"name": "random", "rows": 5}, seed=seed)[0]:
            counts[c.group_id] += 1
    # Binomial(400, 1/4): mean 100, sd 8.7; 20 of them within 5 sd.
    assert all(abs(n - 100) < 44 for n in counts.values())


def test_random_at_another_selectors_size():
    candidates = [c for c in pool(200, seed=2) if len(c.ids) == 1]
    correct, _, _ = select(candidates, {"name": "teacher_correct"})
    matched, _, _ = select(candidates, {"name": "random", "match": {"name": "teacher_correct"}})
    assert len(matched) == len(correct)
    assert ids(matched) != ids(correct)
    by_tokens, _, _ = select(candidates, {"name": "random", "match": {"name": "teacher_correct"}, "by": "tokens"})
    limit = sum(c.completion_tokens for c in correct)
    assert limit - 60 < sum(c.completion_tokens for c in by_tokens) <= limit


def test_steps_compose_in_order_with_a_funnel():
    candidates = pool(80, seed=4)
    steps = ({"name": "teacher_correct"}, {"name": "top", "signal": "nll", "share": 0.5}, {"name": "random", "rows": 5})
    kept, dropped, reports = select(candidates, *steps)
    first, _, _ = select(candidates, steps[0])
    second, _, _ = select(first, steps[1])
    third, _, _ = select(second, steps[2])
    assert kept == third
    assert [r.rows_out for r in reports[:-1]] == [r.rows_in for r in reports[1:]]
    assert {d.detail.split()[1] for d in dropped} == {"0", "1", "2"}


def test_teacher_correct_and_threshold_reasons():
    candidates = [
        Candidate("a", ("a",), 1, True, "correct", {"nll": 1.0}),
        Candidate("b", ("b",), 1, False, "wrong", {"nll": 0.5}),
        Candidate("c", ("c",), 1, None, "bad_gold", {"nll": 3.0}),
        Candidate("d", ("d",), 1, True, "correct", {"nll": float("nan")}),
    ]
    kept, dropped, _ = select(candidates, {"name": "teacher_correct"})
    assert ids(kept) == {"a", "d"}
    assert {d.id: d.reason for d in dropped} == {"b": "teacher_wrong", "c": "not_verified"}
    kept, dropped, _ = select(candidates, {"name": "threshold", "signal": "nll", "min": 0.6, "max": 2.0})
    assert ids(kept) == {"a"}
    assert {d.id: d.reason for d in dropped} == {"b": "nll_below_min", "c": "nll_above_max", "d": "no_score_nll"}


@pytest.mark.parametrize(
    "step",
    [
        {"name": "top", "signal": "nll"},
        {"name": "random"},
        {"name": "kcenter", "vector": "embedding"},
        {"name": "facility_location", "vector": "embedding"},
        {"name": "stratified", "by": "teacher"},
    ],
    ids=lambda step: step["name"],
)
def test_a_budget_too_small_for_anything_is_told_with_both_numbers(step):
    candidates = pool()
    least = next(n for n in range(1, 1000) if _keeps(candidates, step | {"tokens": n}))
    assert least in [c.completion_tokens for c in candidates]
    with pytest.raises(SelectionError, match=rf"\): the first group alone has {least} completion tokens, the budget is {least - 1}$"):
        select(candidates, step | {"tokens": least - 1})
    share = 0.5 / size(candidates)
    with pytest.raises(SelectionError, match=rf"\): a share of {share} of {size(candidates)} rows is 0 rows, rounded down$"):
        select(candidates, step | {"share": share})


def _keeps(candidates, step):
    try:
        return bool(select(candidates, step)[0])
    except SelectionError:
        return False


def test_a_budget_is_not_blamed_for_missing_scores():
    candidates = [Candidate("a", ("a",), 3, True, "correct", {"nll": float("nan")})]
    with pytest.raises(SelectionError, match=r"kept 0 of 1 rows \(no_score_nll 1\)$"):
        select(candidates, {"name": "top", "signal": "nll", "tokens": 2})


def test_empty_selections_say_which_step_and_how_many():
    with pytest.raises(SelectionError, match=r"steps\[1\] \(threshold.*kept 0 of \d+ rows \(nll_above_max \d+"):
        select(pool(), {"name": "none"}, {"name": "threshold", "signal": "nll", "max": -1.0})
    with pytest.raises(SelectionError, match="no rows"):
        select([], {"name": "none"})


@pytest.mark.parametrize(
    "step, message",
    [
        ({"name": "tops", "signal": "nll", "rows": 1}, r"steps\[0\]\.name: 'tops'.*did you mean 'top'"),
        ({"name": "top", "signal": "ifd_loss", "rows": 1}, r"signal 'ifd_loss' has no scores; scored: nll, student_error"),
        ({"name": "top", "rows": 1}, r"steps\[0\]\.signal: missing"),
        ({"name": "top", "signal": "nll"}, "exactly one of rows, tokens, share, got none"),
        ({"name": "top", "signal": "nll", "rows": 1, "share": 0.5}, "exactly one"),
        ({"name": "top", "signal": "nll", "rows": 0}, "whole number of at least 1"),
        ({"name": "top", "signal": "nll", "share": 1.5}, r"must lie in \(0, 1\]"),
        ({"name": "top", "signal": "nll", "row": 5}, r"top takes .*did you mean 'rows'"),
        ({"name": "threshold", "signal": "nll"}, "'min', 'max' or both"),
        ({"name": "threshold", "signal": "nll", "min": float("nan")}, "finite"),
        ({"name": "random", "match": {"name": "topp"}}, r"match\.name: 'topp'"),
        ({"name": "random", "rows": 4, "by": "tokens"}, "only together with 'match'"),
        ({"name": "teacher_correct", "rows": 4}, "takes no options"),
        ("top", "is not a step"),
    ],
)
def test_malformed_steps_fail_before_any_work(step, message):
    with pytest.raises(ConfigError, match=message):
        check_steps([step], ("nll", "student_error"))


def test_student_error_needs_its_column():
    with pytest.raises(ConfigError, match="'student_error' has no scores; scored: none"):
        check_steps([{"name": "student_error"}], ())
    steps = [
        {"name": "student_error"},
        {"name": "random", "match": {"name": "top", "signal": "ifd_ppl", "rows": 2}},
        {"name": "top", "signal": "n_steps", "rows": 1},
    ]
    assert required_signals(steps) == ("ifd_ppl", "student_error")


def test_groups_are_scored_by_their_forward_part_and_dropped_whole():
    def trace(question, part, group, verdict: bool | None = True):
        return make_trace(
            task="t", split="train", question=question, target="x", part=part, group_id=group, verdict=verdict, verdict_reason="r"
        )

    reverse = [trace("q1", "forward", "G"), trace("q1", "backward_question", "G", None), trace("q1b", "backward_reasoning", "G")]
    torn = [trace("q2", "forward", "H"), trace("q2", "backward_question", "H")]
    wrong = [trace("q3", "forward", "K"), trace("q3", "backward_question", "K", False)]
    single = [trace("q4", "forward", "")]
    rows = [*reverse, *torn, *wrong, *single]
    tokens = [{"id": t.id, "prompt_tokens": 3, "completion_tokens": 10 + i} for i, t in enumerate(rows) if t is not torn[1]]
    scores = ScoreColumns({"nll": {t.id: float(i) for i, t in enumerate(rows) if t is not reverse[1]}}, {})
    candidates = make_candidates(rows, tokens, scores)
    found = {c.group_id: c for c in candidates}
    assert found["G"].values["nll"] == 0.0 and found["G"].verdict is True
    assert found["G"].completion_tokens == 10 + 11 + 12 and len(found["G"].ids) == 3
    assert found["K"].verdict is False
    assert found[single[0].id].values["nll"] == float(len(rows) - 1)
    assert found["H"].ids == (torn[0].id,)  # a part without tokens (a format that does not train it) is not a row
    kept, dropped, _ = apply_steps(candidates, [{"name": "teacher_correct"}], seed=0, available=["nll"])
    assert ids(kept) == {t.id for t in (*reverse, torn[0], *single)}
    assert {d.id for d in dropped} == {t.id for t in wrong}
    with pytest.raises(ValueError, match="do not belong together"):
        make_candidates(rows[1:], tokens, scores)


def test_streams_draw_independently_and_the_default_one_is_nested():
    candidates = [Candidate(f"g{i}", (f"g{i}",), 10, True, "", {}) for i in range(400)]
    plain, small = (ids(select(candidates, {"name": "random", "rows": rows})[0]) for rows in (100, 50))
    assert small < plain == ids(select(candidates, {"name": "random", "rows": 100, "stream": ""})[0])
    other = ids(select(candidates, {"name": "random", "rows": 100, "stream": "warmup"})[0])
    assert other == ids(select(candidates[::-1], {"name": "random", "rows": 100, "stream": "warmup"})[0])
    assert 5 <= len(plain & other) <= 50  # 25 expected, standard deviation 3.8
    with pytest.raises(ConfigError, match=r"stream: 3 must be a string"):
        check_steps([{"name": "random", "rows": 1, "stream": 3}])
