"""LESS features against explicit gradients, the Adam formula and an explicit projection matrix; the projection; influence."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_gradient import row_gradient
from test_grand import BIASED, TIED, make_rows
from training_cases import host_params

from dccot_jax.model.sharding import make_mesh, param_shardings
from dccot_jax.select.gradients import features
from dccot_jax.select.gradients.features import Adam, Projection, make_features
from dccot_jax.select.gradients.influence import influence, most_influenced, subtask_directions, unit
from dccot_jax.select.gradients.layout import measure_streams, plan_streams, stream_arrays
from dccot_jax.select.gradients.projection import BLOCK, block, project, weight_key
from dccot_jax.train.checkpoint import abstract_params

ADAM = Adam(b1=0.9, b2=0.95, eps=1e-8)
SIGNS = Projection(dim=64, seed=5, kind="rademacher")
TOLERANCE = 1e-4  # of a feature's length, as docs/gradients.md states; where the root of v is near 0 rounding grows
NAMES = ("attn_norm", "bk", "wo", "wq_a", "w_down_b", "final_norm")  # that every weight is tapped rightly, the norms say


def moments(mc, seed: int = 1):
    """Plausible moments: gradients of about 0.01, second moments of at least their square's size, one in ten never trained."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        mean = 0.01 * rng.standard_normal(leaf.shape) * (rng.random(leaf.shape) < 0.9)
        return mean.astype(np.float32), (mean**2 * rng.uniform(0.5, 3.0, leaf.shape)).astype(np.float32)

    leaves, tree = jax.tree.flatten(host_params(mc))
    pairs = [draw(leaf) for leaf in leaves]
    return jax.tree.unflatten(tree, [mu for mu, _ in pairs]), jax.tree.unflatten(tree, [nu for _, nu in pairs])


def matrix(projection: Projection, name: str, layer: int, count: int) -> np.ndarray:
    """R [count, dim] written out with numpy from the generator's raw words."""
    root = jax.random.fold_in(jax.random.key(projection.seed, impl="threefry2x32"), zlib.crc32(name.encode()))
    parts = []
    for index in range(-(-count // BLOCK)):
        key = jax.random.fold_in(jax.random.fold_in(root, layer), index)
        if projection.kind == "normal":
            parts.append(np.asarray(jax.random.normal(key, (projection.dim, BLOCK), jnp.float32)).T)
            continue
        words = np.asarray(jax.random.bits(key, (projection.dim // 32, 1, BLOCK), jnp.uint32))[:, 0]
        signs = np.empty((BLOCK, projection.dim))
        for j in range(projection.dim):
            signs[:, j] = np.where((words[j // 32] >> np.uint32(j % 32)) & 1, -1.0, 1.0)
        parts.append(signs)
    return np.concatenate(parts)[:count].astype(np.float64)


def explicit(mc, params, rows, names, projection, adam=None, mu=None, nu=None) -> np.ndarray:
    """Features in float64: one full gradient, the formula over it, one matrix product per weight."""
    found = []
    for row in rows:
        grads = row_gradient(params, mc, row.input_ids, row.prompt_tokens)
        total = np.zeros(projection.dim)
        for name in names:
            inside = name in grads["layers"]
            g, m, v = (None if t is None else np.asarray((t["layers"] if inside else t)[name], np.float64) for t in (grads, mu, nu))
            for layer in range(mc.num_layers if inside else 1):
                own = g[layer] if inside else g
                if adam is not None:
                    first, second = (m[layer], v[layer]) if inside else (m, v)
                    own = (adam.b1 * first + (1 - adam.b1) * own) / np.sqrt(adam.b2 * second + (1 - adam.b2) * own**2 + adam.eps)
                total += own.reshape(-1) @ matrix(projection, name, layer, own.size)
        found.append(total / np.sqrt(projection.dim))
    return np.array(found)


def run_tiles(mc, program, rows, *, adam=True, devices=1, mesh=None, in_flight=1) -> np.ndarray:
    on = make_mesh(mesh or {"fsdp": -1}, jax.devices()[:devices])
    shardings = param_shardings(mc, on)
    mu, nu = moments(mc)
    trees = {"params": host_params(mc)} | ({"mu": mu, "nu": nu} if adam else {})
    state = {name: jax.device_put(tree, shardings) for name, tree in trees.items()}
    tiles = plan_streams(rows, shards=on.shape["data"] * on.shape["fsdp"], tile_tokens=256)
    found: dict[int, np.ndarray] = {}
    for index, values in measure_streams(program, state, on, rows, tiles, in_flight=in_flight):
        found.update(zip(index, values))
    return np.stack([found[i] for i in range(len(rows))])


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Each feature's distance, relative to its length."""
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() <= tolerance, error


@pytest.mark.parametrize(
    "names, kind, adam, slab",
    [(NAMES, "rademacher", ADAM, 1), (("wv", "b_up", "final_norm"), "normal", None, 1 << 23)],
    ids=["adam", "sgd"],
)
def test_features_equal_the_formula_written_out(monkeypatch, names, kind, adam, slab):
    """Slabs of one unit: matrices larger than the working memory, the last slab partly empty, blocks crossing rows of the matrix."""
    monkeypatch.setattr(features, "_SLAB_ELEMENTS", slab)
    rows, projection = make_rows(5), Projection(64, 5, kind)
    mu, nu = moments(BIASED)
    expected = explicit(BIASED, host_params(BIASED), rows, names, projection, adam, mu, nu)
    program = make_features(BIASED, names, projection, adam, "float32", "nothing_saveable")
    found = run_tiles(BIASED, program, rows, adam=adam is not None)
    assert_near(found, expected, TOLERANCE)
    order = np.random.default_rng(3).permutation(5)
    again = run_tiles(BIASED, program, [rows[i] for i in order], adam=adam is not None, in_flight=64)
    np.testing.assert_array_equal(again, found[order])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp8", "2x2x2"])
def test_meshes_agree(mesh):
    rows = make_rows(10)
    program = make_features(TIED, ("attn_norm", "wq", "q_norm", "wo", "w_down", "final_norm"), SIGNS, ADAM, "float32", "nothing_saveable")
    assert_near(run_tiles(TIED, program, rows, devices=8, mesh=mesh), run_tiles(TIED, program, rows), TOLERANCE)


def test_neither_gradients_of_all_rows_nor_the_projection_are_held():
    """The program's temporary memory stays far below rows x parameters, and below the parameters x dim of the projection."""
    mc = dataclasses.replace(BIASED, hidden_size=64, intermediate_size=256, num_layers=12)
    rows, projection = make_rows(8), Projection(256, 0, "rademacher")
    [tile] = plan_streams(rows, shards=1, tile_tokens=256)
    on = make_mesh({"fsdp": 1}, jax.devices()[:1])
    with jax.set_mesh(on):
        program = make_features(mc, ("w_gate", "w_up", "w_down"), projection, ADAM, "float32", "nothing_saveable")
        state = dict.fromkeys(("params", "mu", "nu"), abstract_params(mc, on))
        stats = program.lower(state, stream_arrays(rows, tile)).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 0.5 * len(rows) * 4 * mc.num_params()
    assert stats.temp_size_in_bytes < 0.1 * 4 * mc.num_params() * projection.dim


# --- projection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_the_projection_keeps_inner_products(kind):
    """E <R a, R b> / dim = <a, b>; the standard error at unit length is at most sqrt(2 / dim)."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((12, 3000))
    a[6:] = 0.7 * a[:6] + 0.3 * a[6:]
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    dim = 4096
    small = np.asarray(project(jnp.asarray(a, jnp.float32), weight_key(3, "wq", 1), 0, dim, kind), np.float64) / np.sqrt(dim)
    error = small @ small.T - a @ a.T
    assert np.abs(error).max() < 4.5 * np.sqrt(2 / dim)
    assert 0.3 / np.sqrt(dim) < error.std() < 1.5 / np.sqrt(dim)  # neither the identity nor too coarse
    entries = np.asarray(block(weight_key(3, "wq", 1), 2, dim, kind))
    assert abs(entries.mean()) < 4.5 / np.sqrt(entries.size) and abs((entries**2).mean() - 1) < 0.01


def test_every_weight_layer_block_and_seed_has_its_own_matrix_and_a_smaller_one_is_a_prefix():
    keys = [weight_key(3, "wq", 1), weight_key(4, "wq", 1), weight_key(3, "wv", 1), weight_key(3, "wq", 2)]
    blocks = [block(key, 0, 64, "rademacher") for key in keys] + [block(keys[0], 1, 64, "rademacher")]
    flat = np.stack([np.asarray(b).ravel() for b in blocks])
    correlation = flat @ flat.T / flat.shape[1]
    assert np.abs(correlation - np.eye(len(flat))).max() < 0.05
    for kind in ("rademacher", "normal"):
        large, small = block(keys[0], 7, 128, kind), block(keys[0], 7, 32, kind)
        np.testing.assert_array_equal(np.asarray(large)[:32], np.asarray(small))


# --- influence ----------------------------------------------------------------------------------------------------------


def test_influence_is_the_weighted_mean_cosine_and_its_maximum():
    rng = np.random.default_rng(2)
    train = [rng.standard_normal((5, 16)).astype(np.float32) for _ in range(3)]
    known = [rng.standard_normal((7, 16)).astype(np.float32) for _ in range(3)]
    tasks, rates = ["a", "b", "a", "b", "b", "a", "b"], [3e-3, 2e-3, 1e-3]
    found = influence(train, [subtask_directions(v, tasks) for v in known], rates)
    for name in ("a", "b"):
        for i in range(5):
            total = 0.0
            for features_, values, rate in zip(train, known, rates):
                own = [j for j, task in enumerate(tasks) if task == name]
                a, b = features_[i].astype(float), values[own].astype(float)
                cosines = b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1)
                total += rate / sum(rates) * np.mean(cosines)
            assert found[name][i] == pytest.approx(total, rel=1e-5)
    np.testing.assert_array_equal(most_influenced(found), np.maximum(found["a"], found["b"]))
    alone = influence([t[:1] for t in train], [subtask_directions(v, tasks) for v in known], rates)
    assert alone["a"][0] == found["a"][0]  # bitwise: chunks do not matter


def test_a_row_is_its_own_nearest_and_one_without_gradient_has_no_score():
    values = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    found = influence([values], [subtask_directions(values[:1], ["x"])], [1.0])["x"]
    assert found[0] == pytest.approx(1.0) and np.isnan(found[1])
    assert np.linalg.norm(unit(values)[0]) == pytest.approx(1.0)
