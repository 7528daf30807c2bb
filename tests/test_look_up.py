"""Tokens looked up where the table is stored, and a head gathered once: rows that spread over the mesh, and rows that do not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import TINY, UNTIED, mesh

from dccot_jax.model import decoder, head
from dccot_jax.model.sharding import param_shardings


@pytest.mark.parametrize(("sizes", "rows"), [((1, 8, 1), 8), ((1, 8, 1), 2), ((2, 2, 2), 4), ((2, 2, 2), 2), ((1, 2, 4), 1)])
@pytest.mark.parametrize("mc", [TINY, dataclasses.replace(UNTIED, hidden_size=12)], ids=["tied", "untied, fsdp does not divide D"])
def test_table_and_head_equal_those_of_one_device(sizes, rows, mc):
    rng = np.random.default_rng(rows)
    shapes = {"embed": (mc.vocab_size, mc.hidden_size), "head": (mc.hidden_size, mc.vocab_size)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name == "embed" or not mc.tie_embeddings}
    tokens = rng.integers(0, mc.vocab_size, (rows, 5)).astype(np.int32)
    weights = rng.random((rows, 5)).astype(np.float32)

    def loss(params, tokens, weights):
        x = decoder.embed(params, mc, tokens, jnp.float32)
        return head.weighted_nll(params, mc, jnp.sin(x), tokens, weights, chunk=2)[0], x

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, x), grads = run(params, tokens, weights)
    on = mesh(*sizes)
    shardings = param_shardings(mc, on)
    with jax.set_mesh(on):
        placed = {name: jax.device_put(leaf, shardings[name]) for name, leaf in params.items()}
        (found, rows_found), grads_found = run(placed, tokens, weights)
    np.testing.assert_array_equal(rows_found, x)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for name, leaf in grads.items():
        np.testing.assert_allclose(grads_found[name], leaf, rtol=1e-5, atol=1e-5)
        assert grads_found[name].sharding.is_equivalent_to(shardings[name], 2)
