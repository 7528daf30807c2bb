"""Low-rank adapters: against merged weights, PEFT, one and eight devices; nothing but adapters moves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import TINY, UNTIED, host_params, mesh, pack, params_on, place, run_config, sequences

from dccot_jax.model import decoder
from dccot_jax.model.config import ModelError
from dccot_jax.model.lora import adapter_names, init_adapters, join, merge, split, with_adapters
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import abstract_state, init_state, make_train_step

ADAPTED = with_adapters(TINY, 3, 6.0, 0.0, ("all-linear",))


def _forward(params, mc, batch, key=None):
    run = jax.jit(lambda p: decoder.forward(p, mc, batch["tokens"], batch["segment_ids"], batch["positions"], dropout_key=key))
    return np.asarray(run(params))


def _batch(seed: int = 1):
    rng = np.random.default_rng(seed)
    return pack([sequences(rng, 1 + g % 3) for g in range(8)], 48)


@pytest.mark.parametrize("mc", [TINY, UNTIED], ids=["tied", "untied"])
def test_adapters_equal_the_weights_they_merge_into(mc):
    adapted = with_adapters(mc, 3, 6.0, 0.0, ("all-linear",))
    params = jax.tree.map(jnp.asarray, host_params(adapted))
    merged, plain = merge(params, adapted)
    assert plain == mc and merged["layers"].keys() == host_params(mc)["layers"].keys()
    expected = _forward(merged, mc, _batch())
    np.testing.assert_allclose(_forward(params, adapted, _batch()), expected, rtol=2e-5, atol=2e-5)
    base = _forward({**params, "layers": {name: leaf for name, leaf in params["layers"].items() if name in merged["layers"]}}, mc, _batch())
    assert np.abs(base - expected).max() > 0.1  # the adapters do something


def test_a_merged_matrix_is_w_plus_scaled_a_times_b():
    params = host_params(ADAPTED)
    merged, _ = merge(jax.tree.map(jnp.asarray, params), ADAPTED)
    layers = {name: leaf.astype(np.float64) for name, leaf in params["layers"].items()}
    for name in ADAPTED.lora.targets:
        expected = layers[name] + 2.0 * layers[name + "_a"] @ layers[name + "_b"]
        np.testing.assert_allclose(merged["layers"][name], expected, rtol=1e-5, atol=1e-6)


def test_fresh_adapters_change_nothing_and_do_not_depend_on_the_mesh():
    made = init_adapters(ADAPTED, jax.random.key(5))
    assert tuple(sorted(made["layers"])) == tuple(sorted(adapter_names(ADAPTED)))
    bound = TINY.hidden_size**-0.5
    a = np.asarray(made["layers"]["wq_a"])
    assert 0.8 * bound < np.abs(a).max() <= bound and abs(a.mean()) < 0.1 * bound
    base = jax.tree.map(jnp.asarray, host_params(TINY))
    np.testing.assert_array_equal(_forward(join(made, base), ADAPTED, _batch()), _forward(base, TINY, _batch()))
    on = mesh(2, 2, 2)
    with jax.set_mesh(on):
        sharded = jax.jit(lambda key: init_adapters(ADAPTED, key))(jax.random.key(5))
    for x, y in zip(jax.tree.leaves(sharded), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not sharded["layers"]["wq_a"].is_fully_replicated and not sharded["layers"]["wo_b"].is_fully_replicated


def test_training_moves_adapters_alone_and_is_the_same_on_eight_devices():
    train = run_config(steps=4, microbatches=2, weight_decay=0.1).train
    batch, found = _batch(), {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        on = mesh(*sizes)
        optimizer = make_optimizer(train)
        with jax.set_mesh(on):
            adapters, frozen = split(ADAPTED, params_on(ADAPTED, on))
            frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
            before = jax.device_get(frozen)
            state = init_state(adapters, optimizer, on, {"frozen": frozen})
            shapes = abstract_state(adapters, optimizer, on, {"frozen": frozen})
            assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
                lambda x: (x.shape, x.dtype, x.sharding), shapes
            )
            step = make_train_step(ADAPTED, on, train, jnp.float32, steps=4)
            for _ in range(3):
                state, metrics = step(state, place(batch, on))
        assert metrics["skipped"][0] == 0
        for x, y in zip(jax.tree.leaves(jax.device_get(state["frozen"])), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(x, y)
        assert len(jax.tree.leaves(state["opt"][0].mu)) == len(adapter_names(ADAPTED))
        found[sizes] = jax.device_get(state["params"])
        start = host_params(ADAPTED)["layers"]
        assert all(np.abs(leaf - start[name]).max() > 1e-3 for name, leaf in found[sizes]["layers"].items())
    for x, y in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_dropout_is_a_function_of_the_key_keeps_the_mean_and_is_the_same_on_eight_devices():
    mc = dataclasses.replace(ADAPTED, lora=dataclasses.replace(ADAPTED.lora, dropout=0.5))
    params, batch = jax.tree.map(jnp.asarray, host_params(mc)), _batch()
    plain = _forward(params, mc, batch)
    first, again, other = (_forward(params, mc, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1 and np.abs(first - plain).max() > 0.1
    on = mesh(2, 2, 2)
    with jax.set_mesh(on):
        sharded = _forward(params_on(mc, on), mc, place(batch, on), jax.random.key(0))
    np.testing.assert_allclose(sharded, first, rtol=1e-4, atol=1e-4)
    from dccot_jax.model.lora import DROPOUT, delta

    x = jax.random.normal(jax.random.key(2), (2, 4, TINY.hidden_size))
    layer = {name: leaf[0] for name, leaf in params["layers"].items()}
    drawn = jax.vmap(lambda key: delta({**layer, DROPOUT: key}, mc, "wq", x))(jax.random.split(jax.random.key(3), 4000))
    spread = np.asarray(drawn).std(axis=0) / 4000**0.5
    assert np.all(np.abs(np.asarray(drawn).mean(axis=0) - delta(layer, mc, "wq", x)) < 5 * spread + 1e-6)


def test_bad_settings_are_named():
    with pytest.raises(ModelError, match="lora targets q_prj: name some of"):
        with_adapters(TINY, 4, 8.0, 0.0, ("q_proj", "q_prj"))
    with pytest.raises(ModelError, match="rank must be at least 1"):
        with_adapters(TINY, 0, 8.0, 0.0, ("q_proj",))
    again = type(ADAPTED).from_dict(ADAPTED.to_dict())
    assert again == ADAPTED and "lora" not in TINY.to_dict()
