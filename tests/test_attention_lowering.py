"""Kernels for machines that are not there: cuDNN in the program for CUDA, splash compiled for a TPU slice; tokamax where installed."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import arrays, rows, run
from family_cases import CASES
from training_cases import run_config

from dccot_jax.estimate.aot import tpu_devices
from dccot_jax.estimate.topologies import find_topology
from dccot_jax.model.backends import cudnn, xla
from dccot_jax.model.backends.meaning import Form
from dccot_jax.model.sharding import make_mesh
from dccot_jax.train.checkpoint import abstract_params
from dccot_jax.train.feed import abstract_batch
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import abstract_state, make_train_step


@pytest.mark.parametrize(
    ("packed", "window", "bias", "reach"), [(True, 0, True, 0), (True, 100, True, 0), (False, 0, False, 0), (False, 100, False, 100)]
)
def test_cudnn_is_called_with_what_the_rows_need(monkeypatch, packed, window, bias, reach):
    """Packed rows with a bias that holds segments and window, rows of one segment without: forward and backward, lowered for CUDA."""
    kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda capability: True)
    form = Form(0.3, 0.0, (window,), packed)
    q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays(128, 2, 2, 64))

    def total(q, k, v):
        return jnp.sum(cudnn.make(jnp.asarray(rows(128, packed)), form)(q, k, v, None).astype(jnp.float32))

    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    for call in (
        ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")
        if bias
        else (
            "__cudnn$fmhaSoftmax",
            "__cudnn$fmhaSoftmaxBackward",
        )
    ):
        assert f"@{call}(" in text or f'"{call}"' in text, sorted({part.split("(")[0] for part in text.split("@") if "fmha" in part})
    config = text.replace(" ", "").replace("\\22", '"').replace('\\"', '"')
    assert f'"sliding_window_length":{reach}' in config and '"mask_type":"CAUSAL"' in config


@pytest.mark.skipif(not any(d.platform == "gpu" and "NVIDIA" in d.device_kind for d in jax.local_devices()), reason="no NVIDIA GPU")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [0, 40])
def test_cudnn_equals_the_reference_on_a_gpu(packed, window):
    segments, inputs = rows(256, packed), arrays(256, 2, 2, 64)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in inputs]
    wanted = run(xla.make, segments, rounded, window, packed=packed)
    found = run(cudnn.make, segments, [jnp.asarray(x, jnp.bfloat16) for x in inputs], window, packed=packed)
    for x, y in zip(wanted, found, strict=True):
        np.testing.assert_allclose(y, x, atol=0.02 * np.abs(x).max())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (30, 1.5)])
def test_tokamax_equals_the_reference(packed, window, softcap):
    """Off a GPU this is tokamax's own XLA form: that its arguments mean what ours mean."""
    pytest.importorskip("tokamax")
    make = importlib.import_module("dccot_jax.model.backends.tokamax").make
    segments, inputs = rows(128, packed), arrays(128, 2, 2, 16)
    wanted, found = (run(maker, segments, inputs, window, softcap=softcap, packed=packed) for maker in (xla.make, make))
    for x, y in zip(wanted, found, strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5 * max(1.0, np.abs(x).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "head_dim", "tokens", "capped"), [({"fsdp": 2, "tensor": 2}, 64, 1024, False), ({"fsdp": 4}, 256, 1100, True)]
)
def test_a_train_step_with_splash_compiles_for_a_tpu(sizes, head_dim, tokens, capped):
    """Packed rows, micro-batches, remat and layers with and without windows, on a v5e slice: the kernels are in the program."""
    pytest.importorskip("libtpu")
    case = CASES["gemma2" if capped else "qwen2-window"]
    mc = dataclasses.replace(case, hidden_size=256, intermediate_size=512, head_dim=head_dim, max_positions=2048, sliding_window=512)
    mesh = make_mesh(sizes, tpu_devices(find_topology("v5e-4")))
    train = run_config(rows_per_step=16, microbatches=2, row_tokens=tokens).train
    state = abstract_state(abstract_params(mc, mesh), make_optimizer(train), mesh)
    batch = abstract_batch(mesh, 16, tokens)
    found = {}
    for name in ("xla", "splash"):
        with jax.set_mesh(mesh):
            compiled = make_train_step(mc, mesh, train, jnp.bfloat16, steps=3, attention=name).lower(state, batch).compile()
        found[name] = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
    assert "splash_mha" not in found["xla"][0]
    for kernel in ("splash_mha_fwd_segmented", "splash_mha_dq_segmented", "splash_mha_dkv_segmented"):
        assert kernel in found["splash"][0]
    assert found["splash"][1] < found["xla"][1]
