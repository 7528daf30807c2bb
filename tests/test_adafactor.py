"""Adafactor against optax's implementation layer by layer, against transformers', and on eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import TINY, mesh, params_on, run_config

from dccot_jax.train.adafactor import scale_by_adafactor
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import abstract_state, init_state

SHAPES = {"embed": (20, 6), "final_norm": (6,), "layers": {"w": (3, 6, 10), "norm": (3, 6)}}


def _draw(seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def _layers(tree):
    """One leaf per layer: [{...}, ...] beside the rest."""
    return {**{k: v for k, v in tree.items() if k != "layers"}, "each": [{k: v[i] for k, v in tree["layers"].items()} for i in range(3)]}


def test_updates_equal_those_of_optax_on_every_layer_by_itself():
    peer = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    ours = scale_by_adafactor()
    params = _draw(0)
    theirs, state = peer.init(_layers(params)), ours.init(params)
    for step in range(4):
        grads = jax.tree.map(jnp.multiply, _draw(step + 1), jax.tree.map(lambda g, size=3.0**step: size, params))
        expected, theirs = peer.update(_layers(grads), theirs, _layers(params))
        found, state = ours.update(grads, state)
        for a, b in zip(jax.tree.leaves(_layers(found)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parity
def test_updates_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import Adafactor

    rng = np.random.default_rng(2)
    start = rng.standard_normal((6, 10)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    peer = Adafactor([weight], lr=0.01, scale_parameter=False, relative_step=False)
    ours, params = scale_by_adafactor(), {"w": jnp.asarray(start)}
    state = ours.init(params)
    for _ in range(3):
        grad = rng.standard_normal((6, 10)).astype(np.float32)
        weight.grad = torch.tensor(grad)
        peer.step()
        updates, state = ours.update({"w": jnp.asarray(grad)}, state)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
    np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_moments_are_factored_sharded_and_the_same_on_eight_devices():
    train = run_config(optimizer="adafactor").train
    optimizer = make_optimizer(train)
    found = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        on = mesh(*sizes)
        with jax.set_mesh(on):
            params = params_on(TINY, on)
            state = init_state(params, optimizer, on)
            expected = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer, on)["opt"])
            grads = jax.tree.map(lambda p: p * p - 0.01, params)
            updates, opt = jax.jit(optimizer.update)(grads, state["opt"], params)
            updates, opt = jax.jit(optimizer.update)(updates, opt, params)
        for leaf, sharding in zip(jax.tree.leaves(opt), jax.tree.leaves(expected), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        found[sizes] = jax.device_get(updates)
    sizes = {path[-1].name: x.size for path, x in jax.tree_util.tree_leaves_with_path(opt[0].moments["layers"]["w_up"])}
    d, f = TINY.hidden_size, TINY.intermediate_size
    assert sizes == {"rows": TINY.num_layers * d, "columns": TINY.num_layers * f, "full": 1}
    assert not opt[0].moments["layers"]["w_up"].rows.is_fully_replicated
    for a, b in zip(jax.tree.leaves(found[(2, 2, 2)]), jax.tree.leaves(found[(1, 1, 1)]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
