"""Steps that are not finite: borne up to a limit, then the sequences behind them are named."""

from __future__ import annotations

import itertools
import math
import random

import jax
import numpy as np
import pytest
from training_cases import TINY, run_config, write_training

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.train.logs import SmoothedLoss, read_log
from dccot_jax.train.loop import run
from dccot_jax.train.skips import NAMED, NonFiniteError, Skips, culprits, only, sequences_of, skipped_line

POISON = [(3, 2, 0), (4, 0, 0), (4, 7, 0), (5, 5, 0)]  # steps 4, 5 and 6


def _train(inputs, out, cfg, on_step=None):
    return run(cfg, inputs, ArtifactWriter(out), Context(out.parent), devices=jax.devices()[:1], on_step=on_step)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    inputs = write_training(tmp_path_factory.mktemp("inputs"), TINY, run_config(), poison=POISON)
    rows = inputs["plan"].table("plan").to_pylist()
    ids = {(row["step"], row["row"], row["slot"]): row["id"] for row in rows}
    return inputs, [ids[place] for place in POISON]


def test_a_limit_that_is_not_passed_is_no_matter(poisoned, tmp_path):
    inputs, _ = poisoned
    result = _train(inputs, tmp_path / "train", run_config())  # ten in a row are borne
    assert result.facts["skipped_steps"] == 3 and math.isfinite(result.facts["loss"])
    assert [line["skipped"] for line in read_log(tmp_path / "train")] == [0, 3, 0, 0]


@pytest.mark.parametrize("resumed", [False, True])
def test_past_the_limit_the_traces_are_named(poisoned, tmp_path, resumed):
    """Counted over a restart too: the checkpoint after step 5 lies inside the row of skips."""
    inputs, (first, second, third, fourth) = poisoned
    cfg = run_config(max_skipped=2, checkpoint_every=5)
    if resumed:
        with pytest.raises(KeyError):
            _train(inputs, tmp_path / "train", cfg, on_step=lambda step: {}[step] if step == 6 else None)
    with pytest.raises(NonFiniteError) as stopped:
        _train(inputs, tmp_path / "train", cfg)
    text = str(stopped.value)
    assert "3 steps in a row, 4 to 6 (config.train.max_skipped = 2)" in text
    assert text.endswith(f"Traces that cause it: step 6: {fourth}; step 5: {second}, {third}; step 4: {first}")


def test_a_step_with_nothing_to_train_on_is_not_called_one_that_is_not_finite(tmp_path):
    """Over a restart too: the checkpoint after step 5 lies inside the row of skips."""
    inputs = write_training(tmp_path / "inputs", TINY, run_config(), poison=[(4, 2, 0)], empty=[3, 5, 8, 9])  # steps 4, 6, 9 and 10; 5
    ids = {(row["step"], row["row"], row["slot"]): row["id"] for row in inputs["plan"].table("plan").to_pylist()}
    cfg = run_config(max_skipped=2, checkpoint_every=5)
    with pytest.raises(KeyError):
        _train(inputs, tmp_path / "train", cfg, on_step=lambda step: {}[step] if step == 6 else None)
    with pytest.raises(NonFiniteError) as stopped:
        _train(inputs, tmp_path / "train", cfg)
    row = "3 steps in a row, 4 to 6 (config.train.max_skipped = 2)"
    why = f"the loss or gradient was not finite in 1 of {row}; in the others no position had a weight to train on. Traces that cause it:"
    assert str(stopped.value) == f"training stopped: {why} step 5: {ids[4, 2, 0]}"

    cfg.train.max_skipped = 3
    result = _train(inputs, tmp_path / "train", cfg)
    assert result.facts["skipped_steps"] == 5
    assert [(line["skipped"], line["empty"]) for line in read_log(tmp_path / "train")] == [(0, 0), (3, 2), (1, 1), (1, 1)]


def test_steps_with_nothing_to_train_on_say_so(poisoned):
    plan = poisoned[0]["plan"].table("plan")
    skips = Skips(1)
    assert [skips.add(step, True, True) for step in (4, 5)] == [False, True] and skips.empty == [4, 5]
    text = str(skips.error(plan, lambda step, part: pytest.fail("there is nothing to look for")))
    row = "2 steps in a row, 4 to 5 (config.train.max_skipped = 1)"
    names = ", ".join(list(dict.fromkeys(sequences_of(plan, 5).values()))[:NAMED])
    assert text == f"training stopped: no position had a weight to train on in {row}. Traces of step 5: {names}, …"
    assert not skips.add(6, False) and skips.steps == skips.empty == []
    assert skipped_line(3, 0, 9) == "3 of 9 steps were skipped: 3 with a gradient that was not finite"
    assert skipped_line(3, 2, 9) == "3 of 9 steps were skipped: 1 with a gradient that was not finite, 2 with nothing to train on"


def test_the_row_of_skips_is_broken_by_a_good_step():
    skips = Skips(2, (3,))
    assert [skips.add(step, bad) for step, bad in enumerate((True, False, True, True, True), 4)] == [False, False, False, False, True]
    assert skips.steps == [6, 7, 8]


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_culprits_are_found_by_few_calls(n):
    rng = random.Random(n)
    for count in range(min(n, 4) + 1):
        bad = set(rng.sample(range(n), count))
        calls: list[int] = []

        def fails(part, bad=bad, calls=calls):
            calls.append(1)
            return bool(bad & set(part))

        assert set(culprits(fails, range(n), most=10)) == bad
        assert len(calls) <= 1 + 2 * count * math.ceil(math.log2(n) or 1)
    assert len(culprits(lambda part: True, range(n), most=3)) == min(n, 3)
    assert list(culprits(lambda part: len(part) == n, range(n), most=3)) == list(range(n))  # only together


def test_many_names_are_cut(poisoned):
    plan = poisoned[0]["plan"].table("plan")
    text = str(Skips(0, [4]).error(plan, lambda step, part: True))
    names = list(sequences_of(plan, 4).values())[:NAMED]
    assert text.endswith(f"step 4: {', '.join(dict.fromkeys(names))}, perhaps more")
    everything = len(sequences_of(plan, 4))
    text = str(Skips(0, [4]).error(plan, lambda step, part: len(part) == everything))
    assert "more, together" in text
    assert "none, it is finite when run again" in str(Skips(0, [4]).error(plan, lambda step, part: False))


def test_what_is_not_asked_for_is_padding(poisoned):
    from dccot_jax.data.loader import PlanSource

    inputs, _ = poisoned
    whole = PlanSource.from_artifacts(inputs["plan"], inputs["tokenize"])
    rows = [1, 4]
    mine = PlanSource.from_artifacts(inputs["plan"], inputs["tokenize"], rows=rows)
    units = frozenset(itertools.islice(sequences_of(inputs["plan"].table("plan"), 9), 2, 12, 3))
    part = only(whole[8], range(8), units)
    for row, segment in sequences_of(inputs["plan"].table("plan"), 9):
        here = whole[8]["segment_ids"][row] == segment
        assert here.any()
        for name, x in part.items():
            expected = whole[8][name][row][here] if (row, segment) in units else 0
            np.testing.assert_array_equal(x[row][here], np.broadcast_to(expected, here.sum()))
    for name, x in only(mine[8], rows, units).items():
        np.testing.assert_array_equal(x, part[name][rows])


def test_smoothed_loss_is_a_weighted_mean_that_forgets():
    rng = np.random.default_rng(0)
    totals, weights = rng.uniform(1, 9, 200), rng.uniform(1, 5, 200)
    smoothed = SmoothedLoss()
    assert smoothed.value() is None
    for place, pair in enumerate(zip(totals, weights)):
        smoothed.add(*pair)
        if place == 120:
            smoothed = SmoothedLoss(smoothed.state())
    fading = SmoothedLoss.DECAY ** np.arange(199, -1, -1.0)
    assert smoothed.value() == pytest.approx((fading @ totals) / (fading @ weights), rel=1e-12)
