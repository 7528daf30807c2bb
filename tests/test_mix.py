"""Mixes: sizes, ratios, reasons, groups."""

from __future__ import annotations

import collections

import pytest
from plan_cases import case, groups_of

from dccot_jax.mix.groups import PlanError, build_groups, seeded_order
from dccot_jax.mix.mixing import Total, domain_mix, is_long, is_strong, quotas, subset, two_part_mix
from dccot_jax.records import traces_to_table

LABELS = ("strong", "other")


@pytest.fixture(scope="module")
def two_teachers():
    return groups_of(*case(60, teachers=("big", "small")))


def mix(groups, alpha, total=None, mode="pooled", seed=0):
    return two_part_mix(groups, is_strong(groups, ("big",)), alpha, total or Total(), mode=mode, seed=seed, labels=LABELS)


def complete(mixed, groups):
    """Every row is either kept or dropped with a reason, once."""
    kept = [row.id for group in mixed.groups for row in group.rows]
    lost = [row.id for row in mixed.dropped]
    assert sorted(kept + lost) == sorted(row.id for group in groups for row in group.rows)
    assert all(row.reason for row in mixed.dropped)


@pytest.mark.parametrize("mode", ["pooled", "per_question"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("examples", [0, 1, 23, 50])
def test_ratio_within_one_item(two_teachers, mode, alpha, examples):
    mixed = mix(two_teachers, alpha, Total(examples), mode)
    strong = sum(group.teacher == "big" for group in mixed.groups)
    n = len(mixed.groups)
    if examples:
        assert n == examples
    assert abs(strong - alpha * n) <= 1
    assert len({group.id for group in mixed.groups}) == n
    complete(mixed, two_teachers)


def test_size_without_a_total_is_as_large_as_both_parts_allow(two_teachers):
    assert len(mix(two_teachers, 0.5).groups) == 120
    assert len(mix(two_teachers, 0.2).groups) == 75  # 15 strong : 60 other
    assert len(mix(two_teachers, 0.2, mode="per_question").groups) == 60


def test_per_question_uses_each_question_once(two_teachers):
    mixed = mix(two_teachers, 0.5, mode="per_question")
    assert max(collections.Counter(group.question for group in mixed.groups).values()) == 1


def test_per_question_needs_both_sources(two_teachers):
    groups = [group for group in two_teachers if group.teacher == "small" or int(group.question.split()[-1]) < 10]
    mixed = mix(groups, 0.5, mode="per_question")
    assert len(mixed.groups) == 10
    assert sum(row.reason == "mix_one_source" for row in mixed.dropped) == 50
    complete(mixed, groups)


def test_totals_in_tokens(two_teachers):
    for mode in ("pooled", "per_question"):
        mixed = mix(two_teachers, 0.3, Total(tokens=600), mode)
        used = sum(group.completion_tokens for group in mixed.groups)
        longest = max(group.completion_tokens for group in two_teachers)
        assert 600 - 2 * longest < used <= 600
        complete(mixed, two_teachers)
    strong = sum(group.completion_tokens for group in mix(two_teachers, 0.3, Total(tokens=600)).groups if group.teacher == "big")
    assert 180 - longest < strong <= 180


def test_seeds(two_teachers):
    def ids(seed):
        return [group.id for group in mix(two_teachers, 0.5, Total(40), seed=seed).groups]

    assert ids(1) == ids(1) and ids(1) != ids(2)
    assert ids(1) == [group.id for group in mix(two_teachers[::-1], 0.5, Total(40), seed=1).groups]


def test_seeded_order_of_the_rest_does_not_change_when_a_group_leaves(two_teachers):
    order = seeded_order(two_teachers, 3)
    assert order != two_teachers
    assert seeded_order(two_teachers[1:], 3) == [group for group in order if group != two_teachers[0]]


def test_impossible_mixes_are_refused(two_teachers):
    with pytest.raises(PlanError, match=r"config\.mix\.total_examples: 100 needs 80 groups of part 'strong', and there are 60"):
        mix(two_teachers, 0.8, Total(100))
    with pytest.raises(PlanError, match=r"config\.mix\.total_tokens"):
        mix(two_teachers, 0.5, Total(tokens=10**6))
    with pytest.raises(PlanError, match=r"config\.mix\.total_examples: 61 questions wanted, and 60"):
        mix(two_teachers, 0.5, Total(61), "per_question")
    with pytest.raises(PlanError, match="no group of part 'strong'"):
        mix([group for group in two_teachers if group.teacher == "small"], 0.5)
    with pytest.raises(PlanError, match=r"config\.mix\.strong: empty"):
        is_strong(two_teachers, ())
    with pytest.raises(PlanError, match="both set"):
        Total(1, 1)


def test_long_is_above_the_median_of_its_task():
    groups = groups_of(*case(40, tasks=("a", "b")))
    long = is_long(groups)
    for task in ("a", "b"):
        lengths = {flag: [g.lead.completion_tokens for g in groups if g.task == task and long[g.id] == flag] for flag in (True, False)}
        assert max(lengths[False]) < min(lengths[True])
        assert abs(len(lengths[True]) - 10) <= 3
    named = is_long(groups, ("t",))
    assert all(named.values())


def test_groups_move_together():
    traces, tokens = case(30, reverse=True)
    groups = groups_of(traces, tokens)
    assert all(len(group.rows) == 3 and group.lead.part == "forward" for group in groups)
    mixed = subset(groups, Total(12), seed=0)
    assert len(mixed.groups) == 12 and len(mixed.dropped) == 54
    complete(mixed, groups)


def test_half_kept_groups_are_dropped_whole():
    traces, tokens = case(4, reverse=True)
    kept = [trace.id for trace in traces]
    groups, dropped = build_groups([*kept[1:], "unknown"], traces_to_table(traces).to_batches(), tokens.to_batches(5))
    assert len(groups) == 3
    assert collections.Counter(row.reason for row in dropped) == {"group_incomplete": 2, "no_tokens": 1}


def test_quotas_are_whole_and_within_one():
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    for total in range(50):
        found = quotas(total, shares)
        assert sum(found.values()) == total
        assert all(abs(found[name] - total * share) < 1 for name, share in shares.items())


@pytest.mark.parametrize(
    ("temperature", "weights", "total", "expected"),
    [
        (1.0, {}, 0, {"a": 60, "b": 30, "c": 10}),
        (2.0, {}, 40, {"a": 18, "b": 13, "c": 8}),  # 7.75 : 5.48 : 3.16, exactly 18.9, 13.4, 7.7
        (1e9, {}, 30, {"a": 10, "b": 10, "c": 10}),
        (1.0, {"a": 1.0, "b": 3.0}, 0, {"a": 10, "b": 30, "c": 0}),
    ],
)
def test_domain_mix(temperature, weights, total, expected):
    groups = groups_of(*case(100, tasks=["a"] * 6 + ["b"] * 3 + ["c"]))
    mixed = domain_mix(groups, weights, temperature, Total(total), mode="pooled", seed=0)
    counts = collections.Counter(group.task for group in mixed.groups)
    assert all(abs(counts[task] - count) <= 1 for task, count in expected.items())
    assert len(mixed.groups) == (total or sum(expected.values()))
    complete(mixed, groups)


def test_domain_mix_refuses_unknown_tasks_and_keeps_one_group_per_question():
    groups = groups_of(*case(20, tasks=("a", "b"), teachers=("x", "y")))
    with pytest.raises(PlanError, match=r"config\.mix\.weights"):
        domain_mix(groups, {"z": 1.0}, 1.0, Total(), mode="pooled", seed=0)
    mixed = domain_mix(groups, {}, 1.0, Total(), mode="per_question", seed=0)
    assert len(mixed.groups) == 20
    complete(mixed, groups)
