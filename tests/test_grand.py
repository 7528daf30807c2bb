"""Gradient norms: every weight against float64, both forms, order and tiles, meshes, memory, subsets."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, tiny
from reference_gradient import row_gradient
from training_cases import TINY, UNTIED, host_params

from dccot_jax.config import ConfigError
from dccot_jax.model.lora import with_adapters
from dccot_jax.model.sharding import make_mesh, param_shardings
from dccot_jax.select.gradients import norms
from dccot_jax.select.gradients.layout import measure_streams, plan_streams, stream_arrays
from dccot_jax.select.gradients.rows import by_stream, remat_policy
from dccot_jax.select.gradients.subset import choose, weight_names
from dccot_jax.select.views import Row
from dccot_jax.train.checkpoint import abstract_params

# Every kind of weight: norms of heads and after blocks, scales 1 + w, scaled embeddings, a cap on the logits; biases, adapters.
TIED = CASES["gemma3-full"]
BIASED = with_adapters(tiny("llama", 2, qkv_bias=True, mlp_bias=True, tie_embeddings=False), 4, 6.0, 0.5, ("q_proj", "down_proj"))
MODELS = {"tied": TIED, "biased": BIASED}


def make_rows(n: int, vocab: int = 48, seed: int = 0) -> list[Row]:
    """Rows with repeated tokens, in the prompt and in the completion, of one bucket."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        prompt, completion = int(rng.integers(2, 12)), int(rng.integers(1, 20))
        found.append(Row(f"{i:03d}", rng.integers(0, vocab, prompt + completion).astype(np.int32), prompt))
    return found


def run_tiles(mc, program, rows, *, devices=1, mesh=None, tile_tokens=256, in_flight=1) -> np.ndarray:
    """[N, K] in the order of `rows`."""
    on = make_mesh(mesh or {"fsdp": -1}, jax.devices()[:devices])
    placed = jax.device_put(host_params(mc), param_shardings(mc, on))
    tiles = plan_streams(rows, shards=on.shape["data"] * on.shape["fsdp"], tile_tokens=tile_tokens)
    found: dict[int, np.ndarray] = {}
    for index, values in measure_streams(program, placed, on, rows, tiles, in_flight=in_flight):
        found.update(zip(index, values))
    return np.stack([found[i] for i in range(len(rows))])


@functools.cache
def squares_program(mc):
    """Squared norms [B, weights], one column per weight: a wrong one could hide behind the others in one norm over all of them."""

    @jax.jit
    def program(params, x):
        found = norms.weight_squares(params, mc, x, weight_names(mc), compute_dtype="float32", remat="nothing_saveable")
        return by_stream(jnp.stack([found[name] for name in weight_names(mc)], axis=1), x)

    return program


@functools.cache
def expected_squares(mc, n: int) -> dict[str, np.ndarray]:
    """{weight: squared norm of the gradients of `make_rows(n)`} in float64."""
    grads = [row_gradient(host_params(mc), mc, row.input_ids, row.prompt_tokens) for row in make_rows(n)]
    return {name: np.array([((g["layers"] | g)[name] ** 2).sum() for g in grads]) for name in weight_names(mc)}


@pytest.mark.parametrize("model", MODELS)
def test_every_weight_by_itself_and_all_together_equal_float64(model):
    """Rows share a tile with others and with padding: neither counts."""
    mc = MODELS[model]
    expected = expected_squares(mc, 5)
    whole = np.sqrt(sum(expected.values()))
    assert whole.std() > 0.05 * whole.mean()
    squares = run_tiles(mc, squares_program(mc), make_rows(5))
    np.testing.assert_allclose(np.sqrt(squares.sum(axis=1)), whole, rtol=1e-5)
    for i, name in enumerate(weight_names(mc)):
        np.testing.assert_allclose(np.sqrt(squares[:, i]), np.sqrt(expected[name]), rtol=1e-5, err_msg=name)


def test_the_exact_form_equals_float64():
    expected = expected_squares(TIED, 5)
    found = run_tiles(TIED, norms.make_exact(TIED, weight_names(TIED), "float32", "none"), make_rows(5))[:, 0]
    np.testing.assert_allclose(found, np.sqrt(sum(expected.values())), rtol=1e-5)


def test_neither_order_nor_the_number_in_flight_changes_a_bit():
    rows = make_rows(20)
    order = np.random.default_rng(3).permutation(20)
    first = run_tiles(TIED, squares_program(TIED), rows)
    second = run_tiles(TIED, squares_program(TIED), [rows[i] for i in order], in_flight=64)
    np.testing.assert_array_equal(second, first[order])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp8", "2x2x2"])
@pytest.mark.parametrize("model", MODELS)
def test_meshes_agree(model, mesh):
    mc = MODELS[model]
    single = run_tiles(mc, squares_program(mc), make_rows(10))
    np.testing.assert_allclose(run_tiles(mc, squares_program(mc), make_rows(10), devices=8, mesh=mesh), single, rtol=2e-5)


@pytest.mark.slow
def test_the_exact_form_on_a_mesh():
    program = norms.make_exact(TINY, weight_names(TINY), "float32", "none")
    single = run_tiles(TINY, program, make_rows(3))
    np.testing.assert_allclose(run_tiles(TINY, program, make_rows(3), devices=8, mesh={"fsdp": 4, "tensor": 2}), single, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_both_forms_agree_in_every_family(name):
    mc = CASES[name]
    forms = (make(mc, weight_names(mc), "float32", "none") for make in (norms.make_ghost, norms.make_exact))
    ghost, exact = (run_tiles(mc, form, make_rows(5)) for form in forms)
    np.testing.assert_allclose(ghost, exact, rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_near():
    rows, names = make_rows(6), weight_names(UNTIED)
    full, half = (run_tiles(UNTIED, norms.make_ghost(UNTIED, names, dtype, "none"), rows) for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose(half, full, rtol=0.05)


def test_pairs_and_product_agree_whichever_is_cheaper():
    rng = np.random.default_rng(0)
    for t, d, f in ((3, 40, 50), (50, 4, 6)):  # by pairs of positions, by the product
        x, g = rng.standard_normal((2, t, d)).astype(np.float32), rng.standard_normal((2, t, f)).astype(np.float32)
        expected = np.square(np.einsum("btd,btf->bdf", x.astype(float), g)).sum((1, 2))
        np.testing.assert_allclose(norms._product_norms(jnp.asarray(x), jnp.asarray(g)), expected, rtol=2e-6)


def test_the_head_by_pairs_by_product_and_in_chunks_of_the_vocabulary(monkeypatch):
    rng = np.random.default_rng(1)
    for positions, d, cap in ((5, 9, 2.5), (12, 4, 0.0)):  # by pairs, by the product
        table, hidden = rng.standard_normal((300, d)), rng.standard_normal((2, positions, d))
        labels, weights = rng.integers(0, 300, (2, positions)), rng.random((2, positions))
        raw = hidden @ table.T
        z, slope = (cap * np.tanh(raw / cap), 1 / np.cosh(raw / cap) ** 2) if cap else (raw, 1.0)
        p = np.exp(z - z.max(-1, keepdims=True))
        error = weights[..., None] * (p / p.sum(-1, keepdims=True) - np.eye(300)[labels]) * slope
        expected = np.square(np.einsum("bcv,bcd->bvd", error, hidden)).sum((1, 2))
        arrays = jnp.asarray(table, jnp.float32), jnp.asarray(hidden, jnp.float32)
        for elements in (1, 1 << 24):  # chunks of 128 tokens, the last padded, and one chunk
            monkeypatch.setattr(norms, "_CHUNK_ELEMENTS", elements)
            normaliser = norms._log_normaliser(*arrays, cap)
            found = norms._head_norms(*arrays, normaliser, jnp.asarray(labels), jnp.asarray(weights, jnp.float32), cap)
            np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_no_gradient_of_all_rows_is_ever_held():
    """The program's temporary memory stays far below rows x parameters."""
    mc = dataclasses.replace(TINY, hidden_size=64, intermediate_size=256, num_layers=12)
    rows = make_rows(8)
    [tile] = plan_streams(rows, shards=1, tile_tokens=256)
    arrays = stream_arrays(rows, tile)
    on = make_mesh({"fsdp": 1}, jax.devices()[:1])
    with jax.set_mesh(on):
        program = norms.make_ghost(mc, weight_names(mc), "float32", "nothing_saveable")
        stats = program.lower(abstract_params(mc, on), arrays).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 0.5 * len(rows) * 4 * mc.num_params()


def test_subsets_are_names_or_patterns():
    assert choose(TINY, ("wv", "w?"), key="k") == ("wq", "wk", "wv", "wo")
    assert choose(UNTIED, ("b*", "*norm"), key="k") == ("attn_norm", "bq", "bk", "bv", "mlp_norm", "final_norm")
    assert choose(TINY, ("*",), key="k") == weight_names(TINY)
    for patterns, words in (((), "empty"), (("wqq",), "did you mean 'wq'"), (("head",), "matches no weight")):
        with pytest.raises(ConfigError, match=words):
            choose(TINY, patterns, key="k")
    with pytest.raises(ConfigError, match=r"config\.k: 'embed' has a row per token"):
        choose(TINY, ("*",), key="k", tables=False)


def test_products_are_kept_where_they_fit_and_a_policy_that_was_asked_for_stays():
    wide = dataclasses.replace(TINY, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, head_dim=128)
    assert remat_policy(TINY, 2048, "float32", "nothing_saveable") == "dots"
    assert remat_policy(wide, 2048, "bfloat16", "nothing_saveable") == "nothing_saveable"
    assert remat_policy(wide, 2048, "bfloat16", "dots") == "dots" and remat_policy(TINY, 2048, "float32", "none") == "none"
