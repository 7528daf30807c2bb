"""The chunked head equals the full head, in values and gradients, tied and untied, soft-capped or not, sharded and not."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import TIED, UNTIED, random_params

from dccot_jax.model import compact_head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.head import STATS, gather_positions, nll_error, token_stats, weighted_nll
from dccot_jax.model.sharding import activation_spec, make_mesh, param_shardings

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
    stats = jax.jit(lambda p, h: token_stats(p, mc, h, labels, chunk=8, block=5))(params, hidden)
    logp, entropy = full_head(params, mc, hidden, labels)
    np.testing.assert_allclose(stats["label_logp"], logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["entropy"], entropy, rtol=1e-4, atol=1e-5)

    def chunked(p, h, chunk):
        return weighted_nll(p, mc, h, labels, weights, chunk=chunk)[0]

    def full(p, h):
        return -jnp.sum(full_head(p, mc, h, labels)[0] * weights)

    expected, expected_grads = jax.jit(jax.value_and_grad(full, argnums=(0, 1)))(params, hidden)
    for chunk in (8, None):
        value, grads = jax.jit(jax.value_and_grad(lambda p, h, chunk=chunk: chunked(p, h, chunk), argnums=(0, 1)))(params, hidden)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)
    assert weighted_nll(params, mc, hidden, labels, weights)[1] == pytest.approx(weights.sum(), rel=1e-6)


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2}], ids=["one", "sharded"])
@pytest.mark.parametrize("mc", [TIED, UNTIED, CAPPED], ids=["tied", "untied", "capped"])
def test_error_is_the_gradient_of_the_full_head(mc: ModelConfig, sizes: dict | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dccot_jax.model.head._BLOCKS", {"cpu": (1 << 7, 8)})  # several blocks, several chunks
    params = random_params(mc)
    hidden, labels, weights = inputs(mc)
    expected = jax.grad(lambda h: -jnp.sum(full_head(params, mc, h, labels)[0] * weights))(hidden)
    with contextlib.ExitStack() as stack:
        if sizes is not None:
            mesh = make_mesh(sizes, jax.devices()[:4])
            stack.enter_context(jax.set_mesh(mesh))
            params = jax.device_put(params, param_shardings(mc, mesh))
        error = jax.jit(lambda p, h: nll_error(p, mc, h, jnp.asarray(labels), jnp.asarray(weights)))(params, hidden)
    np.testing.assert_allclose(error, expected, rtol=1e-4, atol=1e-6)


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
        stats = jax.jit(lambda p, h: token_stats(p, mc, h, labels, chunk=8, block=5))(spread, hidden)
        rows = jax.jit(gather_positions)(jax.device_put(hidden, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, None))), index)
        np.testing.assert_allclose(stats["label_logp"], logp, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats["entropy"], entropy, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows, np.take_along_axis(np.asarray(hidden), np.minimum(index, 36)[..., None], 1))


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("mc", [TIED, UNTIED], ids=["tied", "untied"])
def test_gradient_where_the_rows_lie_over_data_or_fsdp_alone(mc: ModelConfig, rows: int):
    """Two rows on (data 2, fsdp 3) lie over data, three over fsdp; the head is stored over fsdp all the same."""
    params = random_params(mc)
    hidden, labels, weights = (x[:rows] for x in inputs(mc))

    def loss(p, h):
        return weighted_nll(p, mc, h, labels, weights, chunk=2)[0]

    expected, wanted = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden)
    mesh = make_mesh({"data": 2, "fsdp": 3}, jax.devices()[:6])
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, param_shardings(mc, mesh))
        laid_out = jax.device_put(hidden, jax.NamedSharding(mesh, activation_spec(rows, None, None)))
        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(spread, laid_out)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, wanted)
    name = "embed" if mc.tie_embeddings else "head"
    assert grads[0][name].sharding.is_equivalent_to(spread[name].sharding, 2)


@pytest.mark.parametrize("block", [7, None])
def test_margin_error_norm_and_rank_equal_float64(block: int | None):
    """Also where the closed form with sum p^2 - 2 p_y + 1 cancels: a label of probability near one."""
    rng = np.random.default_rng(1)
    mc = ModelConfig("llama", 133, 8, 8, 1, 1, 1, 8)
    table = rng.standard_normal((133, 8)).astype(np.float32)
    hidden = (rng.standard_normal((3, 21, 8)) * rng.choice([0.1, 1.0, 8.0], (3, 21, 1))).astype(np.float32)
    z = hidden.astype(np.float64) @ table.T.astype(np.float64)
    labels = np.where(rng.random((3, 21)) < 0.5, z.argmax(-1), rng.integers(0, 133, (3, 21)))
    stats = jax.jit(lambda h: token_stats({"embed": table}, mc, h, labels, chunk=8, block=block))(hidden)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(133)[labels]
    assert (p.max(-1) > 1 - 1e-6).any()
    np.testing.assert_allclose(stats["error_norm"], np.sqrt(((p - one_hot) ** 2).sum(-1)), rtol=2e-4, atol=1e-9)
    ordered = np.sort(p, -1)
    np.testing.assert_allclose(stats["margin"], ordered[..., -1] - ordered[..., -2], atol=2e-6)
    own = np.take_along_axis(z, labels[..., None], -1)
    np.testing.assert_array_equal(stats["label_rank"], 1 + (z > own).sum(-1))


@pytest.mark.parametrize("block", [1, 2, 4])
def test_ties_have_no_margin_and_share_their_rank(block: int):
    mc = ModelConfig("llama", 4, 2, 4, 1, 1, 1, 2)
    table = np.array([[1, 0], [1, 0], [0, 1], [-1, 0]], np.float32)
    hidden = np.array([[[1, 0], [0, 3]]], np.float32)
    stats = token_stats({"embed": table}, mc, jnp.asarray(hidden), np.array([[1, 0]]), block=block)
    assert stats["margin"][0, 0] == 0 and stats["margin"][0, 1] > 0.8
    assert stats["label_rank"].tolist() == [[1.0, 2.0]]


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


@pytest.mark.parametrize("want, chunks", [(("error_norm",), 2), (STATS, 8)], ids=["el2n", "all"])
def test_statistics_hold_no_vocabulary_beyond_the_chunk(want, chunks: int):
    mc = ModelConfig("llama", 4096, 16, 16, 1, 2, 1, 8)
    shape, chunk = (2, 4096), 64
    args = (
        {"embed": jax.ShapeDtypeStruct((4096, 16), jnp.float32)},
        jax.ShapeDtypeStruct((*shape, 16), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
    )
    score = jax.jit(lambda p, h, y: token_stats(p, mc, h, y, want=want, chunk=chunk))
    used = score.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert used < chunks * 4 * shape[0] * chunk * 4096


def test_unknown_statistic_is_named():
    hidden, labels, _ = inputs(TIED)
    with pytest.raises(ValueError, match="perplexity"):
        token_stats(random_params(TIED), TIED, hidden, labels, want=("perplexity",))


@pytest.mark.parametrize("tied, cap, trained", [(True, 0.0, 0.6), (False, 2.0, 0.3), (True, 0.0, 0.0), (True, 0.0, 1.0)])
def test_compact_head_over_several_blocks_and_chunks(tied: bool, cap: float, trained: float):
    """The vocabulary in three blocks, 262 positions in chunks of 128, none to all of them trained."""
    rng = np.random.default_rng(2)
    table = rng.standard_normal((90, 8) if tied else (8, 90)).astype(np.float32)
    hidden = rng.standard_normal((2, 131, 8)).astype(np.float32)
    labels, drawn = rng.integers(0, 90, (2, 131)), rng.random((2, 131))
    weights = (rng.uniform(0.5, 2.0, (2, 131)) * (drawn < trained)).astype(np.float32)

    def full(table, hidden):
        z = hidden @ (table.T if tied else table)
        logp = jax.nn.log_softmax(cap * jnp.tanh(z / cap) if cap else z)
        return -jnp.sum(jnp.take_along_axis(logp, labels[..., None], -1)[..., 0] * weights)

    about = compact_head.Head(tied, cap, 30)
    found = jax.jit(jax.value_and_grad(lambda t, h: 3.0 * compact_head.nll_sum(about, t, h, labels, weights), (0, 1)))(table, hidden)
    expected = jax.jit(jax.value_and_grad(lambda t, h: 3.0 * full(t, h), (0, 1)))(table, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)
