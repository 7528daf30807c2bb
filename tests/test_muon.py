"""Muon against optax's implementation, and between 1 and 8 devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from training_cases import TINY, mesh, params_on, run_config

from dccot_jax.train.muon import orthogonalize, scale_by_muon
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import abstract_state, init_state

SHAPES = {"wide": (3, 6, 20), "tall": (3, 20, 6), "square": (3, 8, 8)}


def _stacks(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def test_updates_equal_those_of_optax():
    peer = optax.contrib.scale_by_muon(
        weight_dimension_numbers=jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), _stacks(0))
    )
    ours = scale_by_muon(0.95)
    expected_state, state = peer.init(_stacks(0)), ours.init(_stacks(0))
    for step in range(4):
        grads = _stacks(step + 1)
        theirs, expected_state = peer.update(grads, expected_state)
        updates, state = ours.update(grads, state)
        for update, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(update / (0.2 * max(update.shape[1:]) ** 0.5), expected, rtol=2e-4, atol=2e-5)


def test_a_rounded_momentum_is_rounded_between_updates_alone():
    exact, rounded = scale_by_muon(0.95), scale_by_muon(0.95, mu_dtype=jnp.bfloat16)
    state: Any = rounded.init(_stacks(0))
    for step in range(3):
        grads = _stacks(step + 1)
        same = state._replace(mu=jax.tree.map(lambda m: m.astype(jnp.float32), state.mu))
        expected, after = exact.update(grads, same)
        updates, state = rounded.update(grads, state)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, after)
        jax.tree.map(np.testing.assert_array_equal, state, stored)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_end_near_one_and_singular_vectors_stay(shape):
    x = np.asarray(jax.random.normal(jax.random.key(5), shape), np.float64)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    along = np.einsum("lik,lij,lkj->lk", u, np.asarray(orthogonalize(jnp.asarray(x, jnp.float32)), np.float64), vt)
    assert along.min() > 0.6 and along.max() < 1.3


def test_a_matrix_without_gradient_is_not_moved_and_gives_no_nan():
    assert not np.asarray(orthogonalize(jnp.zeros((2, 4, 4)))).any()


def test_layers_that_the_devices_do_not_divide_are_the_same_on_eight_devices():
    on = mesh(2, 2, 2)
    x = jax.random.normal(jax.random.key(1), (3, 8, 16))
    spec = P(None, "fsdp", "tensor")
    with jax.set_mesh(on):
        placed = jax.device_put(x, jax.NamedSharding(on, spec))
        sharded = jax.jit(orthogonalize)(placed)
    assert sharded.sharding.is_equivalent_to(placed.sharding, 3)
    np.testing.assert_allclose(np.asarray(sharded), orthogonalize(x), rtol=1e-5, atol=1e-6)


def test_matrices_of_the_layers_get_muon_and_all_else_adamw():
    on = mesh(2, 2, 2)
    train = run_config(optimizer="muon", weight_decay=0.0).train
    optimizer = make_optimizer(train)
    with jax.set_mesh(on):
        params = params_on(TINY, on)
        state = init_state(params, optimizer, on)
        updates, opt = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state["opt"], params)
        assert jax.tree.structure(opt) == jax.tree.structure(abstract_state(params, optimizer, on)["opt"])
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        if update.ndim == 3:  # a constant gradient has rank one: one singular value
            size = np.linalg.norm(np.asarray(update), axis=(1, 2)) / (0.2 * max(update.shape[1:]) ** 0.5)
            assert np.all((size > 0.6) & (size < 1.3)), path
        else:
            np.testing.assert_allclose(np.asarray(update), 1.0, rtol=1e-5)
