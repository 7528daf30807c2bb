"""Curricula: pool sizes, orders, controls with the same size curve, missing difficulty."""

from __future__ import annotations

import math

import pytest
from plan_cases import case, config, groups_of

from dccot_jax.mix.curriculum import Pacing, build_curriculum, difficulties, stage_ends
from dccot_jax.mix.groups import PlanError


@pytest.fixture(scope="module")
def groups():
    return groups_of(*case(50))


def build(groups, scores=None, **changes):
    return build_curriculum(
        config(**{f"curriculum__{key}": value for key, value in changes.items()}).curriculum, groups, scores or {}, seed=7
    )


def sizes(curriculum, total=100):
    return [curriculum.pool_size(step, total) for step in range(total)]


def test_none_uses_everything_in_the_given_order(groups):
    curriculum, dropped = build(groups, kind="none")
    assert list(curriculum.order) == groups and not dropped
    assert set(sizes(curriculum)) == {50}


def test_staged_sizes_by_hand(groups):
    curriculum, _ = build(groups, kind="staged", stages=3, stage_shares=(0.2, 0.2, 0.6))
    assert sizes(curriculum) == [17] * 20 + [34] * 20 + [50] * 60
    assert stage_ends((1.0, 1.0, 1.0), 10) == [3, 7, 10]


def test_competence_formula():
    pacing = Pacing("competence", c0=0.1, full_at=0.5)
    for step in range(100):
        c = min(1.0, math.sqrt(step * (1 - 0.1**2) / 50 + 0.1**2))
        assert pacing.size(step, 100, 1000) == math.ceil(1000 * c - 1e-9)
    assert pacing.size(0, 100, 1000) == 100
    assert pacing.size(50, 100, 1000) == pacing.size(99, 100, 1000) == 1000
    assert pacing.size(0, 100, 3) == 1


@pytest.mark.parametrize("kind", ["staged", "competence"])
def test_controls_have_exactly_the_size_curve(groups, kind):
    real, _ = build(groups, kind=kind)
    grows = sizes(real)
    assert grows == sorted(grows) and grows[-1] == 50 and grows[0] < 20
    for control in ("anti", "random_growing"):
        other, _ = build(groups, kind=control, pacing=kind)
        assert sizes(other) == grows
        assert sorted(group.id for group in other.order) == sorted(group.id for group in real.order)
        assert other.order != real.order
    anti, _ = build(groups, kind="anti", pacing=kind)
    assert anti.order == real.order[::-1]


def test_order_is_by_difficulty_then_id(groups):
    curriculum, _ = build(groups, kind="staged")
    keys = [(group.n_steps, group.id) for group in curriculum.order]
    assert keys == sorted(keys)
    shuffled, _ = build(groups[::-1], kind="staged")
    assert shuffled.order == curriculum.order


def test_every_difficulty(groups):
    assert difficulties(groups, "completion_tokens", {}) == {group.id: group.lead.completion_tokens for group in groups}
    assert difficulties(groups, "question_tokens", {}) == {group.id: group.lead.prompt_tokens for group in groups}
    scores: dict[str, float | None] = {group.lead.id: float(number) for number, group in enumerate(groups)}
    scores[groups[0].lead.id], scores[groups[1].lead.id] = None, float("nan")
    assert difficulties(groups, "ifd_loss", scores) == {group.id: float(number) for number, group in enumerate(groups) if number > 1}


def test_missing_difficulty_is_counted_under_controls_too(groups):
    scores: dict[str, float | None] = {group.lead.id: 1.0 for group in groups[5:]}
    for kind in ("staged", "anti", "random_growing"):
        curriculum, dropped = build(groups, scores, kind=kind, difficulty="nll")
        assert len(curriculum.order) == 45
        assert [row.reason for row in dropped] == ["missing_difficulty"] * 5


def test_no_difficulty_at_all_names_the_field():
    groups = groups_of(*case(10, n_steps=False))
    with pytest.raises(PlanError, match=r"config\.curriculum\.difficulty: no row has a value for 'n_steps'"):
        build(groups, kind="competence")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "staged", "stages": 1},
        {"kind": "staged", "stage_shares": (0.5, 0.5)},
        {"kind": "staged", "stage_shares": (0.5, 0.0, 0.5)},
        {"kind": "competence", "c0": 0.0},
        {"kind": "competence", "full_at": 1.5},
        {"kind": "anti", "pacing": "linear"},
    ],
)
def test_impossible_settings_name_their_field(groups, changes):
    with pytest.raises(PlanError, match=r"config\.curriculum\.(stages|stage_shares|c0|full_at|pacing)"):
        build(groups, **changes)
