"""One optimizer step: gradients, AdamW against its formula, skipped updates, shardings, schedules."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import TINY, Sequence_, host_params, mesh, pack, params_on, place, run_config, sequences

from dccot_jax.config import ConfigError
from dccot_jax.train.optimizer import clip_scale, decay_mask, make_optimizer, make_schedule
from dccot_jax.train.step import abstract_state, init_state, loss_and_grads, make_train_step

STEPS = 10
TRAIN = run_config(steps=STEPS, microbatches=2, weight_decay=0.3, clip_norm=0.05, schedule="linear", remat="nothing_saveable").train


@pytest.fixture(scope="module")
def batch():
    """Eight rows with very different numbers of trained tokens, so that a mean of micro-batch means would be wrong."""
    rng = np.random.default_rng(4)
    rows = [sequences(rng, 1 + g % 3) for g in range(8)]
    rows[1] = [Sequence_(s.ids, s.prompt, 3.5) for s in rows[1]]
    return pack(rows, 48)


@pytest.fixture(scope="module")
def reference(batch):
    """Loss and gradients of the whole batch at once on one device."""
    one = mesh(1, 1, 1)
    with jax.set_mesh(one):
        run = jax.jit(functools.partial(loss_and_grads, mc=TINY, microbatches=1, remat="none"))
        total, weight, grads = run(params_on(TINY, one), batch=place(batch, one))
        return float(total), float(weight), jax.tree.map(lambda g: np.asarray(g) / float(weight), grads)


@pytest.fixture(scope="module")
def eight():
    """The compiled step on a (2, 2, 2) mesh with two micro-batches, and a maker of fresh states."""
    on = mesh(2, 2, 2)
    optimizer = make_optimizer(TRAIN)
    step = make_train_step(TINY, on, TRAIN, jnp.float32, steps=STEPS)
    return on, step, lambda: init_state(params_on(TINY, on), optimizer, on)


def _run(eight, batch, state=None):
    on, step, fresh = eight
    with jax.set_mesh(on):
        return step(fresh() if state is None else state, place(batch, on))


def test_sharded_and_accumulated_gradients_equal_one_large_batch_on_one_device(eight, batch, reference):
    total, weight, grads = reference
    state, metrics = _run(eight, batch)
    assert float(metrics["loss"][1]) == pytest.approx(weight, rel=1e-5)
    assert float(metrics["loss"][0]) / float(metrics["loss"][1]) == pytest.approx(total / weight, rel=1e-5)
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-5)
    assert norm > TRAIN.clip_norm  # the clip is at work
    # After one step Adam's first moment is (1 - b1) · clip · gradient.
    mu = jax.device_get(state["opt"][0].mu)
    scale = (1 - TRAIN.b1) * TRAIN.clip_norm / norm
    for found, expected in zip(jax.tree.leaves(mu), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found / scale, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_adamw_equals_its_formula(eight, batch, reference):
    _, _, grads = reference
    state, metrics = _run(eight, batch)
    state, _ = _run(eight, {**batch, "weights": batch["weights"] * 0}, state)  # nothing to train on: nothing moves
    rate = TRAIN.learning_rate / TRAIN.warmup_steps  # step 0 of a warm-up
    assert float(metrics["learning_rate"][0]) == pytest.approx(rate, rel=1e-6)
    norm = float(metrics["grad_norm"][0])

    def expected(path, p, g):
        g = np.asarray(g, np.float64) * TRAIN.clip_norm / norm
        decay = 0.0 if path[-1].key in ("embed", "final_norm", "attn_norm", "mlp_norm") else TRAIN.weight_decay
        return p - rate * (g / (np.abs(g) + TRAIN.eps) + decay * p)  # bias correction makes m/√v the sign of g at step 0

    # Where a gradient is within rounding of 0, its sign is not defined.
    moved = jax.tree_util.tree_map_with_path(expected, host_params(TINY), grads)
    after = jax.device_get(state["params"])
    for found, value, g in zip(*map(jax.tree.leaves, (after, moved, grads)), strict=True):
        sure = np.abs(g) > 1e-4 * np.abs(g).max()
        assert sure.mean() > 0.5
        np.testing.assert_allclose(found[sure], value[sure], rtol=0, atol=2e-5)


@pytest.mark.parametrize("weight", [np.inf, np.nan, 0.0])
def test_an_update_that_cannot_be_trusted_is_skipped_and_counted(eight, batch, weight):
    _, _, fresh = eight
    bad = {**batch, "weights": batch["weights"].copy()}
    if weight == 0.0:
        bad["weights"][:] = 0.0
    else:
        bad["weights"][3, int(np.flatnonzero(batch["weights"][3])[0])] = weight
    before = jax.device_get(fresh())
    state, metrics = _run(eight, bad)
    assert float(metrics["skipped"][0]) == 1.0 and float(metrics["empty"][0]) == (weight == 0.0)
    assert [float(x) for x in metrics["loss"]] == [0.0, 0.0]
    after = jax.device_get(state)
    assert int(after.pop("step")) == 1 and int(before.pop("step")) == 0
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)
    state, metrics = _run(eight, batch, state)
    assert float(metrics["skipped"][0]) == float(metrics["empty"][0]) == 0.0 and np.isfinite(float(metrics["loss"][0]))


def test_state_keeps_its_shardings_and_is_donated(eight, batch):
    on, _, fresh = eight
    state = fresh()
    target = abstract_state(state["params"], make_optimizer(TRAIN), on)
    wq = state["params"]["layers"]["wq"]
    assert wq.addressable_shards[0].data.shape == (2, 8, 12)  # of (2, 16, 24), split by fsdp and tensor
    new, metrics = _run(eight, batch, state)
    assert wq.is_deleted()
    for leaf, expected in zip(jax.tree.leaves(new), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == expected.sharding and leaf.dtype == expected.dtype
    assert float(metrics["tokens"][0]) == (batch["segment_ids"] > 0).sum()
    assert float(metrics["trained_tokens"][0]) == (batch["weights"] > 0).sum()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_moments_stay_in_their_dtype_from_step_to_step(batch, optimizer):
    """Through compiled steps with donation, one of them skipped; everything else stays float32."""
    on = mesh(2, 2, 2)
    train = run_config(steps=STEPS, microbatches=2, moment_dtype="bfloat16", optimizer=optimizer).train
    with jax.set_mesh(on):
        state = init_state(params_on(TINY, on), make_optimizer(train), on)
        step = make_train_step(TINY, on, train, jnp.float32, steps=STEPS)
        target = abstract_state(state["params"], make_optimizer(train), on)
        for weight in (1, 0, 1):
            state, metrics = step(state, place({**batch, "weights": batch["weights"] * weight}, on))
            assert float(metrics["skipped"][0]) == 1 - weight
        assert step._cache_size() == 1  # nothing was promoted, so nothing was compiled again
    found = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), expected in zip(found, jax.tree.leaves(target), strict=True):
        assert leaf.sharding == expected.sharding and leaf.dtype == expected.dtype
        kept = any(getattr(part, "name", "") == "mu" for part in path)
        assert leaf.ndim == 0 or leaf.dtype == (jnp.bfloat16 if kept else jnp.float32), path


def test_updates_with_rounded_first_moments_equal_those_of_optax():
    train = run_config(moment_dtype="bfloat16", weight_decay=0.3).train
    params: Any = host_params(TINY)
    rate, ours = train.learning_rate, make_optimizer(train)
    peer = optax.adamw(
        rate, b1=train.b1, b2=train.b2, eps=train.eps, mu_dtype=jnp.bfloat16, weight_decay=train.weight_decay, mask=decay_mask
    )
    exact = make_optimizer(run_config(weight_decay=0.3).train)
    state: Any = ours.init(params)
    expected_state, exact_state = peer.init(params), exact.init(params)
    updates: Any = None
    unrounded: Any = None
    for seed in range(3):
        grads = host_params(TINY, seed + 1)
        updates, state = ours.update(grads, state, params)
        expected, expected_state = peer.update(grads, expected_state, params)
        unrounded, exact_state = exact.update(grads, exact_state, params)
        jax.tree.map(lambda u, e: np.testing.assert_allclose(-rate * u, e, rtol=1e-6, atol=1e-12), updates, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].nu)} == {jnp.dtype(jnp.float32)}
    assert np.abs(updates["embed"] - unrounded["embed"]).max() > 1e-4  # the rounding is at work


def test_schedules():
    def rates(**changes):
        train = run_config(learning_rate=2.0, final_lr_share=0.1, **changes).train
        schedule = make_schedule(train, 10)
        return [float(schedule(jnp.int32(n))) for n in range(11)]

    assert rates(schedule="constant", warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 8)
    assert rates(schedule="linear", warmup_steps=0) == pytest.approx([2.0 * (1 - 0.9 * n / 10) for n in range(11)])
    wsd = rates(schedule="wsd", warmup_steps=2, decay_share=0.4)  # the last four of ten steps fall
    assert wsd == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0 * 0.775, 2.0 * 0.55, 2.0 * 0.325, 0.2])
    assert rates(schedule="wsd", warmup_steps=8, decay_share=0.9)[7:] == pytest.approx([2.0, 2.0, 1.1, 0.2])  # never into the warm-up
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert cosine[6] == pytest.approx(2.0 * 0.55) and cosine[10] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="'cos' is not one of"):
        rates(schedule="cos", warmup_steps=0)


def test_clip_and_decay_mask():
    assert float(clip_scale(jnp.float32(4.0), 1.0)) == 0.25
    assert float(clip_scale(jnp.float32(0.5), 1.0)) == 1.0
    assert float(clip_scale(jnp.float32(0.0), 1.0)) == 1.0
    assert float(clip_scale(jnp.float32(4.0), 0.0)) == 1.0
    mask = decay_mask({"embed": 0, "final_norm": 0, "head": 0, "layers": {"attn_norm": 0, "bq": 0, "wq": 0, "w_down": 0}})
    assert mask == {
        "embed": False,
        "final_norm": False,
        "head": True,
        "layers": {"attn_norm": False, "bq": False, "wq": True, "w_down": True},
    }


def test_rows_that_do_not_split_are_refused():
    with pytest.raises(ConfigError, match=r"rows_per_step: 12 is not a multiple .* = 2 × 4"):
        make_train_step(TINY, mesh(2, 2, 2), run_config(rows_per_step=12, microbatches=2).train, jnp.float32, steps=1)
