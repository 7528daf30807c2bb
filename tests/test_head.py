"""The chunked head equals the full head, in values and gradients, tied and untied, soft-capped or not, sharded and not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import TIED, UNTIED, random_params

from dccot_jax.model.config import ModelConfig
from dccot_jax.model.head import gather_positions, token_stats, weighted_nll
from dccot_jax.model.sharding import make_mesh, param_shardings

CAPPED = ModelConfig("gemma2", 90, 24, 40, 2, 4, 2, 6, final_softcap=1.5)  # most logits lie beyond


def full_head(params: dict, mc: ModelConfig, hidden: jax.Array, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    table = params["embed"].T if mc.tie_embeddings else params["head"]
    z = hidden @ table
    z = mc.final_softcap * jnp.tanh(z / mc.final_softcap) if mc.final_softcap else z
    logp = jax.nn.log_softmax(z, axis=-1)
    return jnp.take_along_axis(logp, labels[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)


def inputs(mc: ModelConfig) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((4, 37, mc.hidden_size)), jnp.float32)
    weights = rng.random((4, 37)).astype(np.float32) * (rng.random((4, 37)) < 0.6)
    return hidden, rng.integers(0, mc.vocab_size, (4, 37)), weights


@pytest.mark.parametrize("mc", [TIED, UNTIED, CAPPED], ids=["tied", "untied", "capped"])
def test_chunked_equals_full(mc: ModelConfig):
    params = random_params(mc)
    hidden, labels, weights = inputs(mc)
    stats = jax.jit(lambda p, h: token_stats(p, mc, h, labels, chunk=8))(params, hidden)
    logp, entropy = full_head(params, mc, hidden, labels)
    np.testing.assert_allclose(stats["label_logp"], logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["entropy"], entropy, rtol=1e-4, atol=1e-5)

    def chunked(p, h, chunk):
        return weighted_nll(p, mc, h, labels, weights, chunk=chunk)[0]

    def full(p, h):
        return -jnp.sum(full_head(p, mc, h, labels)[0] * weights)

    value, grads = jax.jit(jax.value_and_grad(lambda p, h: chunked(p, h, 8), argnums=(0, 1)))(params, hidden)
    expected, expected_grads = jax.jit(jax.value_and_grad(full, argnums=(0, 1)))(params, hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)
    assert weighted_nll(params, mc, hidden, labels, weights)[1] == pytest.approx(weights.sum(), rel=1e-6)
    assert chunked(params, hidden, None) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("mc", [TIED, UNTIED, CAPPED], ids=["tied", "untied", "capped"])
def test_sharded_vocabulary_and_gathered_positions(mc: ModelConfig):
    params = random_params(mc)
    hidden, labels, _ = inputs(mc)
    logp, entropy = full_head(params, mc, hidden, labels)
    index = np.array([[3, 5, 36], [0, 1, 2], [7, 7, 99], [30, 31, 35]])
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, param_shardings(mc, mesh))
        assert "tensor" in spread["embed"].sharding.spec
        stats = jax.jit(lambda p, h: token_stats(p, mc, h, labels, chunk=8))(spread, hidden)
        rows = jax.jit(gather_positions)(jax.device_put(hidden, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, None))), index)
        np.testing.assert_allclose(stats["label_logp"], logp, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats["entropy"], entropy, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows, np.take_along_axis(np.asarray(hidden), np.minimum(index, 36)[..., None], 1))


def test_no_array_of_batch_by_time_by_vocabulary():
    """The compiled loss and gradient need far less memory than one [B, T, V] array would."""
    mc = ModelConfig("llama", 4096, 16, 16, 1, 2, 1, 8)
    shape = (2, 1024)
    args = (
        {"embed": jax.ShapeDtypeStruct((4096, 16), jnp.float32)},
        jax.ShapeDtypeStruct((*shape, 16), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    step = jax.jit(jax.value_and_grad(lambda p, h, y, w: weighted_nll(p, mc, h, y, w, chunk=64)[0]))
    used = step.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert used < 0.3 * 4 * shape[0] * shape[1] * 4096


def test_unknown_statistic_is_named():
    hidden, labels, _ = inputs(TIED)
    with pytest.raises(ValueError, match="perplexity"):
        token_stats(random_params(TIED), TIED, hidden, labels, want=("perplexity",))
