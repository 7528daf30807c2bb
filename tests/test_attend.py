"""Attention in causal blocks with its own backward pass equals autodiff through the plain form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dccot_jax.model.attention import attend, causal_segment_mask

SCALE = 0.3


def plain(q, k, v, mask, softcap):
    z = jnp.einsum("btkgh,bskh->bkgts", q, k) * SCALE
    z = softcap * jnp.tanh(z / softcap) if softcap else z
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(jnp.where(mask[:, None, None], z, -1e30), axis=-1), v)


@pytest.mark.parametrize("length, keys, softcap", [(256, 256, 0.0), (256, 256, 2.0), (24, 24, 0.0), (5, 24, 0.0)])
def test_values_and_gradients(length: int, keys: int, softcap: float):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, length, 2, 3, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, keys, 2, 8)).astype(np.float32)
    segments = np.repeat(np.array([[1, 2, 3, 0], [1, 1, 1, 1]]), keys // 4, axis=1)
    mask = causal_segment_mask(jnp.asarray(segments))[:, -length:]
    seen = np.asarray(mask.any(-1))[:, :, None, None, None]
    weights = rng.standard_normal(q.shape).astype(np.float32) * seen  # padding's values mean nothing

    def grads(attention):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(attention(q, k, v) * weights), argnums=(0, 1, 2)))(q, k, v)

    found = grads(lambda q, k, v: attend(q, k, v, mask, scale=SCALE, softcap=softcap))
    expected = grads(lambda q, k, v: plain(q, k, v, mask, softcap))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for one, other in zip(found[1], expected[1]):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    out = attend(q, k, v, mask, scale=SCALE, softcap=softcap)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out * seen, plain(q, k, v, mask, softcap) * seen, rtol=1e-4, atol=1e-5)
