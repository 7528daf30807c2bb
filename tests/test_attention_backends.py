"""Every attention backend means the same: xla against the definition, the kernels against xla; which one `auto` takes."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import arrays, meaning, rows, run
from family_cases import CASES
from training_cases import mesh, pack, params_on, place, run_config, sequences

from dccot_jax.model.backends import choice, splash, xla
from dccot_jax.model.backends.meaning import Form, on_shards
from dccot_jax.model.backends.registry import BACKENDS, AttentionError, Need, automatic, maker, refusal, resolve
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import init_state, make_train_step

interpreted = partial(splash.make, interpret=True)

# (tokens, key/value heads, groups, head size, window, soft cap)
SHAPES = {
    "grouped": (300, 2, 2, 16, 0, 0.0),
    "window": (300, 1, 2, 16, 70, 0.0),
    "window-of-one": (130, 1, 1, 16, 1, 0.0),
    "capped": (140, 2, 1, 64, 40, 1.5),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", ["window", "capped"])
def test_the_reference_is_the_definition(case, packed):
    _, heads, groups, width, window, softcap = SHAPES[case]
    segments, inputs = rows(61, packed), arrays(61, heads, groups, width)
    found = run(xla.make, segments, inputs, min(window, 9), softcap=softcap, packed=packed)
    np.testing.assert_allclose(found[0], meaning(inputs[0], inputs[1], inputs[2], segments, min(window, 9), softcap), atol=2e-6)
    assert not found[0][2].any() and all(np.isfinite(x).all() and not x[2].any() for x in found)


@pytest.mark.parametrize(("case", "packed"), [*((case, True) for case in SHAPES), ("grouped", False)])
def test_splash_equals_the_reference(case, packed):
    tokens, heads, groups, width, window, softcap = SHAPES[case]
    segments, inputs = rows(tokens, packed), arrays(tokens, heads, groups, width)
    settings = {"window": window, "softcap": softcap, "packed": packed}
    wanted, found = (run(make, segments, inputs, **settings) for make in (xla.make, interpreted))
    for x, y in zip(wanted, found, strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5 * max(1.0, np.abs(x).max()))
    assert not found[0][segments == 0].any() and all(not x[2].any() for x in found)


@pytest.mark.parametrize("make", [xla.make, interpreted], ids=["xla", "splash"])
def test_each_layer_has_its_own_window(make):
    segments, inputs = rows(140, True), arrays(140, 1, 2, 16)
    for window in (0, 33):
        alone = run(xla.make, segments, inputs, window)
        for x, y in zip(alone, run(make, segments, inputs, window, windows=(33, 0)), strict=True):
            np.testing.assert_allclose(y, x, atol=1e-5 * max(1.0, np.abs(x).max()))


@pytest.mark.parametrize("make", [xla.make, interpreted], ids=["xla", "splash"])
def test_a_packed_segment_equals_the_same_segment_alone(make):
    segments, inputs = rows(300, True), arrays(300, 1, 1, 16)
    whole = run(make, segments, inputs, 40)
    places = [np.flatnonzero(segments[0] == segment) for segment in (1, 2, 3, 4)]
    ids, alone = np.zeros((4, 300), np.int32), [np.zeros_like(x, shape=(4, *x.shape[1:])) for x in inputs]
    for row, at in enumerate(places):
        ids[row, : len(at)] = 1
        for x, y in zip(alone, inputs, strict=True):
            x[row, : len(at)] = y[0, at]
    for x, y in zip(run(make, ids, alone, 40, packed=False), whole, strict=True):
        for row, at in enumerate(places):
            np.testing.assert_allclose(y[0, at], x[row, : len(at)], atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 1, 2)])
def test_splash_runs_on_the_shards_of_a_mesh(sizes):
    """Rows over data and fsdp, key/value heads over tensor; nothing is communicated."""
    on = mesh(*sizes)
    segments, inputs = rows(128, True)[[0, 1, 0, 1]], [np.concatenate([x[:2], x[1:]]) for x in arrays(128, 2, 2, 16)]
    q, k, v, _ = inputs
    form = Form(0.3, 0.0, (50,))
    wide = jax.P(("data", "fsdp"), None, "tensor", None, None)

    def gradients_of(make):
        total = lambda q, k, v, s: jnp.sum(jnp.sin(make(s, form)(q, k, v, None)))  # noqa: E731
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))

    with jax.set_mesh(on):
        specs = (wide, jax.P(*wide[:4]), jax.P(*wide[:4]), jax.P(wide[0], None))
        placed = [jax.device_put(x, jax.NamedSharding(on, spec)) for x, spec in zip((q, k, v, segments), specs, strict=True)]
        compiled = gradients_of(interpreted).lower(*placed).compile()
        total, found = compiled(*placed)
    assert not {"all-gather", "all-to-all"} & set(re.findall(r"all-[a-z]+", compiled.as_text() or ""))
    assert found[0].sharding.spec == wide
    wanted, gradients = gradients_of(xla.make)(*map(jnp.asarray, (q, k, v, segments)))
    assert float(total) == pytest.approx(float(wanted), abs=1e-3)
    for x, y in zip(gradients, found, strict=True):
        np.testing.assert_allclose(np.asarray(y), x, atol=1e-5 * max(1.0, np.abs(x).max()))


def test_on_a_mesh_with_auto_axes_the_shards_are_found_from_the_shapes():
    on = mesh(2, 1, 2)
    auto = jax.sharding.Mesh(on.devices, on.axis_names, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    q, k, v, _ = map(jnp.asarray, arrays(16, 2, 1, 8))
    seen = []

    def kernel(q, k, v):
        seen.append((q.shape, k.shape))
        return q + v[..., None, :]

    with jax.set_mesh(auto):
        out = jax.jit(partial(on_shards, kernel))(q[:2], k[:2], v[:2])
    assert seen[0] == ((1, 16, 1, 1, 8), (1, 16, 1, 8))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(q[:2] + v[:2, ..., None, :]))


TPU = Need("tpu", "TPU v5 lite", 4096, 128, 0.0, "bfloat16", True)
H100 = Need("gpu", "NVIDIA H100 80GB HBM3", 4096, 128, 0.0, "bfloat16", True)
A100 = dataclasses.replace(H100, device_kind="NVIDIA A100-SXM4-80GB")
CPU = Need("cpu", "cpu", 4096, 128, 0.0, "bfloat16", True)


@pytest.mark.parametrize(
    ("need", "changes", "wanted"),
    [
        (CPU, {}, "xla"),
        (CPU, {"tokamax": True, "packed": False}, "xla"),
        (TPU, {}, "splash"),
        (TPU, {"softcap": 50.0, "head_dim": 256, "packed": False}, "splash"),
        (TPU, {"head_dim": 64}, "splash"),
        (TPU, {"dtype": "float32"}, "xla"),
        (TPU, {"tokens": 256}, "xla"),
        (H100, {}, "cudnn"),
        (H100, {"packed": False, "tokamax": True}, "cudnn"),
        (H100, {"head_dim": 256}, "cudnn"),
        (A100, {"head_dim": 256}, "xla"),
        (A100, {"head_dim": 256, "tokamax": True}, "tokamax"),
        (H100, {"head_dim": 100}, "xla"),
        (H100, {"tokens": 4095}, "xla"),
        (H100, {"tokens": 4095, "packed": False}, "cudnn"),
        (H100, {"softcap": 50.0}, "xla"),
        (H100, {"softcap": 50.0, "tokamax": True}, "tokamax"),
        (H100, {"dtype": "float32", "tokamax": True}, "xla"),
        (dataclasses.replace(H100, device_kind="AMD Instinct MI300X"), {"tokamax": True}, "xla"),
    ],
)
def test_auto_takes_the_platforms_kernel_where_it_can_do_what_is_needed(need, changes, wanted):
    need = dataclasses.replace(need, **changes)
    assert automatic(need) == resolve("auto", need) == wanted
    assert refusal(wanted, need) is None and resolve(wanted, need) == wanted


@pytest.mark.parametrize(
    ("name", "need", "message"),
    [
        ("splash", CPU, "'splash' needs a TPU; this is cpu; 'auto' takes 'xla' here"),
        ("cudnn", TPU, "'cudnn' needs an NVIDIA GPU; this is TPU v5 lite; 'auto' takes 'splash' here"),
        ("cudnn", dataclasses.replace(H100, dtype="float32"), "'cudnn' needs compute_dtype = 'bfloat16'; it is 'float32'"),
        ("cudnn", dataclasses.replace(H100, softcap=50.0), "no soft cap of the scores; this model's is 50.0"),
        ("cudnn", dataclasses.replace(A100, head_dim=256), "at most 128 dimensions, a multiple of 8; this model's have 256"),
        ("cudnn", dataclasses.replace(H100, tokens=4095), "packed rows of an even number of tokens; these have 4095"),
        ("tokamax", H100, "needs the package tokamax"),
        ("flash", CPU, "'flash' is not one of auto, xla, splash, cudnn, tokamax"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_in_one_line(name, need, message):
    with pytest.raises(AttentionError, match=r"^config\.attention: ") as caught:
        resolve(name, need)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_backend_has_its_module():
    assert [maker(name).__module__.rsplit(".", 1)[1] for name in BACKENDS] == list(BACKENDS)


def leaking(segment_ids, form):
    """What a kernel without segments does to packed rows; right for rows of one segment."""
    return xla.make((jnp.cumsum(segment_ids[:, ::-1], axis=1)[:, ::-1] > 0).astype(jnp.int32), form)


def test_a_kernel_is_tried_on_the_device_before_it_is_used(monkeypatch):
    mc = CASES["gemma2"]
    makes = {"splash": interpreted, "cudnn": leaking, "xla": xla.make}
    monkeypatch.setattr(choice, "maker", makes.__getitem__)
    choice.trial.cache_clear()
    assert choice.trial("splash", mc, "float32", True) == ""
    assert choice.trial("cudnn", mc, "float32", False) == ""
    assert "away from the reference's" in choice.trial("cudnn", mc, "float32", True)
    assert choice.trial("tokamax", mc, "float32", True) == "KeyError: 'tokamax'"
    monkeypatch.setattr(choice, "resolve", lambda asked, need: "cudnn")
    name, remark = choice.choose("auto", mc, 4096, "float32", packed=True)
    assert name == "xla" and remark.startswith("attention: xla, because cudnn cannot be used on this device: its values are ")
    with pytest.raises(AttentionError, match=r"config\.attention: 'cudnn' cannot be used on this device: its values"):
        choice.choose("cudnn", mc, 4096, "float32", packed=True)
    assert choice.choose("cudnn", mc, 4096, "float32", packed=False) == ("cudnn", "")
    choice.trial.cache_clear()


def test_a_train_step_with_splash_equals_one_with_xla(monkeypatch):
    """Packed rows on a mesh, two micro-batches, remat, windows that differ by layer: loss and gradient norm."""
    monkeypatch.setattr(splash, "make", partial(splash.make, interpret=True))
    mc, on = CASES["qwen2-window"], mesh(1, 1, 2)
    train = run_config(microbatches=2, rows_per_step=2).train
    rng = np.random.default_rng(1)
    batch = pack([sequences(rng, 2) for _ in range(2)], 48)
    found = []
    for name in ("xla", "splash"):
        step = make_train_step(mc, on, train, jnp.float32, steps=3, attention=name)
        with jax.set_mesh(on):
            state, metrics = step(init_state(params_on(mc, on), make_optimizer(train), on), place(batch, on))
        found.append((float(metrics["loss"][0]), float(metrics["grad_norm"][0]), float(jnp.sum(state["params"]["layers"]["wk"] ** 2))))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
