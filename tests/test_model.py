"""The decoder against a float64 reference, packing, shardings and the shared product rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from reference_decoder import log_softmax, reference_logits

from dccot_jax.config import default_config
from dccot_jax.model.config import ModelConfig, ModelError, from_config
from dccot_jax.model.decoder import forward, init_params
from dccot_jax.model.head import logits, token_stats, weighted_nll
from dccot_jax.model.hf_config import from_hf, to_hf
from dccot_jax.model.linear import contract, linear
from dccot_jax.model.sharding import batch_spec, make_mesh, param_shardings, param_specs, weight_shapes
from dccot_jax.records import InputError

TIED = ModelConfig("llama", 96, 36, 48, 2, 6, 2, 8, rope_theta=50000.0, max_positions=512)  # N*H = 48 is not D
UNTIED = ModelConfig(
    "qwen2", 90, 24, 40, 2, 4, 2, 6, rope_theta=777.0, rms_eps=1e-6, tie_embeddings=False, qkv_bias=True, max_positions=512
)


def random_params(mc: ModelConfig, seed: int = 0, deviation: float = 0.25) -> dict:
    """Parameters with every norm and bias random too, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        neutral = path[-1].key.endswith("norm") and not mc.arch.norm_offset
        return jnp.asarray(rng.normal(neutral, deviation, shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, weight_shapes(mc), is_leaf=lambda x: isinstance(x, tuple))


def packed_batch(mc: ModelConfig, lengths: list[list[int]], row_tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of documents with the given lengths; labels are the next token, weight 0 on each document's last token."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((len(lengths), row_tokens), np.int32) for name in ("tokens", "segment_ids", "positions", "labels")}
    batch["weights"] = np.zeros((len(lengths), row_tokens), np.float32)
    for row, documents in enumerate(lengths):
        start = 0
        for segment, length in enumerate(documents, 1):
            ids = rng.integers(0, mc.vocab_size, length)
            here = slice(start, start + length)
            batch["tokens"][row, here], batch["segment_ids"][row, here], batch["positions"][row, here] = ids, segment, np.arange(length)
            batch["labels"][row, start : start + length - 1] = ids[1:]
            batch["weights"][row, start : start + length - 1] = rng.random(length - 1)
            start += length
    return batch


def loss_fn(params: dict, mc: ModelConfig, batch: dict, **options) -> jax.Array:
    hidden = forward(params, mc, batch["tokens"], batch["segment_ids"], batch["positions"], **options)
    total, weight = weighted_nll(params, mc, hidden, batch["labels"], batch["weights"], chunk=16)
    return total / weight


@pytest.mark.parametrize("mc", [TIED, UNTIED], ids=["tied", "untied"])
def test_forward_equals_float64_reference_beyond_256_positions(mc: ModelConfig):
    params = random_params(mc)
    tokens = np.random.default_rng(1).integers(0, mc.vocab_size, 300)
    ones = np.ones((1, 300), np.int32)
    run = jax.jit(lambda p, t: logits(p, mc, forward(p, mc, t, ones, np.arange(300, dtype=np.int32)[None])))
    np.testing.assert_allclose(run(params, tokens[None])[0], reference_logits(params, mc, tokens), atol=2e-4, rtol=1e-4)


def test_packed_rows_score_each_document_as_if_alone():
    mc = UNTIED
    params = random_params(mc)
    batch = packed_batch(mc, [[9, 20, 7], [31]], 40)
    hidden = jax.jit(lambda p, b: forward(p, mc, b["tokens"], b["segment_ids"], b["positions"]))(params, batch)
    logp = token_stats(params, mc, hidden, batch["labels"], want=("label_logp",))["label_logp"]
    assert np.isfinite(hidden).all()
    for row, start, length in [(0, 0, 9), (0, 9, 20), (0, 29, 7), (1, 0, 31)]:
        ids = batch["tokens"][row, start : start + length]
        expected = log_softmax(reference_logits(params, mc, ids))[np.arange(length - 1), ids[1:]]
        np.testing.assert_allclose(logp[row, start : start + length - 1], expected, rtol=1e-4, atol=1e-4)


def check_on_mesh(mc: ModelConfig, batch: dict[str, np.ndarray], sizes: dict[str, int], atol: float = 2e-6) -> None:
    """Loss and gradients on 8 devices equal those on one, and every gradient has its parameter's sharding."""
    step = jax.value_and_grad(lambda p, b: loss_fn(p, mc, b))
    value, grads = jax.jit(step)(random_params(mc), batch)
    mesh = make_mesh(sizes)
    shardings = param_shardings(mc, mesh)
    rows = jax.NamedSharding(mesh, batch_spec(len(batch["tokens"]), mesh=mesh))
    with jax.set_mesh(mesh):
        value8, grads8 = jax.jit(step)(jax.device_put(random_params(mc), shardings), jax.device_put(batch, rows))
        jax.block_until_ready(grads8)
    assert jax.tree.all(jax.tree.map(lambda g, s: g.sharding == s, grads8, shardings))
    np.testing.assert_allclose(value8, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), grads8, grads)


def test_gradients_have_parameter_shardings_and_equal_one_device():
    check_on_mesh(UNTIED, packed_batch(UNTIED, [[9, 20, 7], [31], [40], [12, 12, 12]], 40), {"data": 2, "fsdp": -1, "tensor": 2})


def test_sizes_that_an_axis_does_not_divide_are_replicated():
    mc = ModelConfig("llama", 33, 18, 27, 1, 3, 3, 4, tie_embeddings=True)
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    specs = param_specs(mc, make_mesh(sizes))
    assert specs["embed"] == P(None, None)
    assert specs["layers"]["wq"] == specs["layers"]["w_up"] == P(None, None, None)
    check_on_mesh(mc, packed_batch(mc, [[9], [11], [5, 6]], 12), sizes)  # 3 rows on 8 devices


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "2x2x2"])
def test_one_key_value_head_on_a_mesh(sizes):
    mc = ModelConfig("llama", 64, 32, 48, 2, 4, 1, 8, max_positions=64)
    params, batch = random_params(mc), packed_batch(mc, [[20], [8, 12]] * 2, 24)
    expected = jax.jit(lambda p: loss_fn(p, mc, batch))(params)
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, jax.devices()[:count])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mc, mesh))
        grads = jax.jit(jax.grad(lambda p: loss_fn(p, mc, batch)))(placed)
        found = jax.jit(lambda p: loss_fn(p, mc, batch))(placed)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(jax.device_get(grads)))


def test_initial_parameters_do_not_depend_on_the_mesh_and_arrive_sharded():
    alone = init_params(TIED, 3)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        params = init_params(TIED, 3)
    assert params["layers"]["w_up"].sharding.spec == P(None, "fsdp", "tensor")
    assert jax.tree.map(jnp.shape, params) == weight_shapes(TIED)
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    assert float(jnp.std(alone["layers"]["w_up"])) == pytest.approx(36**-0.5, rel=0.05)


def test_initial_parameters_are_drawn_in_a_fixed_order():
    """A table drawn after or before the head, as the interpreter's hash seed likes, is another table in every process."""
    tied = dataclasses.replace(UNTIED, tie_embeddings=True)
    np.testing.assert_array_equal(init_params(UNTIED, 3)["embed"], init_params(tied, 3)["embed"])


def test_remat_policies_agree_and_bfloat16_is_near():
    batch = packed_batch(TIED, [[9, 20]], 32)
    params = random_params(TIED)
    grads = {}
    for name in ("dots", "none"):
        grads[name] = jax.jit(jax.grad(lambda p, name=name: loss_fn(p, TIED, batch, remat=name)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads["dots"], grads["none"])
    near = jax.jit(jax.grad(lambda p: loss_fn(p, TIED, batch, compute_dtype=jnp.bfloat16)))(params)
    assert near["layers"]["w_up"].dtype == jnp.float32
    for name in ("w_up", "wq", "wo"):
        exact = np.asarray(grads["none"]["layers"][name])
        assert np.linalg.norm(near["layers"][name] - exact) < 0.05 * np.linalg.norm(exact)
    with pytest.raises(ValueError, match="remat 'all'"):
        loss_fn(params, TIED, batch, remat="all")


def test_linear_rule_equals_autodiff():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, [(2, 5, 7), (7, 3), (2, 5, 3)]))
    got = jax.vjp(lambda x, w: linear(x, w), x, w)[1](g)
    expected = jax.vjp(lambda x, w: x @ w, x, w)[1](g)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    low = linear(x.astype(jnp.bfloat16), w)
    assert low.dtype == jnp.bfloat16
    pullback = jax.jit(lambda x, w, g: jax.vjp(lambda x, w: contract("btd,df->btf", x, w), x, w)[1](g))
    text = pullback.lower(x.astype(jnp.bfloat16), w, g).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots and all(line.count("bf16>") == 2 and "f32>" in line.split("->")[-1] for line in dots), dots


def test_make_mesh_rejects_what_cannot_be():
    assert dict(make_mesh({"fsdp": -1}).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    for sizes, message in [
        ({"fsdp": -1, "data": -1}, "at most one"),
        ({"pipe": 2}, "unknown axis pipe"),
        ({"data": 3, "fsdp": -1}, "cannot be split"),
        ({"data": 2}, "needs 2 devices, 8 are there"),
    ]:
        with pytest.raises(InputError, match=message):
            make_mesh(sizes)


def test_config_round_trips_and_names_every_problem():
    for mc in (TIED, UNTIED):
        assert from_hf(to_hf(mc)) == mc
        assert ModelConfig.from_dict(mc.to_dict()) == mc
    shapes = jax.tree.leaves(weight_shapes(UNTIED), is_leaf=lambda x: isinstance(x, tuple))
    assert sum(int(np.prod(shape)) for shape in shapes) == UNTIED.num_params()
    assert from_config(default_config().student.model, 300).vocab_size == 300
    bad = to_hf(TIED) | {"rope_scaling": {"factor": 2}, "rope_interleaved": True, "hidden_act": "gelu", "logit_softcap": 30.0}
    with pytest.raises(ModelError) as error:
        from_hf(bad)
    for name in ("rope_scaling", "rope_interleaved", "hidden_act", "logit_softcap"):
        assert name in str(error.value)
    for change, name in [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 777.0}}, "rope_type"),
    ]:
        with pytest.raises(ModelError, match=name):
            from_hf(to_hf(UNTIED) | change)
    with pytest.raises(ModelError, match="gpt2"):
        from_hf({"model_type": "gpt2"})
    with pytest.raises(ModelError, match="does not divide"):
        ModelConfig("llama", 10, 8, 8, 1, 3, 2, 4)
