"""The likeliest tokens and the mass of the rest, against float64: blocks, devices, temperature, ties, the whole vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import TINY, UNTIED, host_params, mesh, params_on

from dccot_jax.model import head, top_tokens

B, T = 4, 5


def _expected(mc, hidden, k, temperature):
    params: Any = host_params(mc)
    table = params["embed"].T if mc.tie_embeddings else params["head"]
    z = hidden.astype(np.float64) @ np.asarray(table, np.float64) / temperature
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    ids = np.argsort(-log_p, axis=-1, kind="stable")
    every = np.take_along_axis(log_p, ids, -1)
    return ids[..., :k], every[..., :k], np.exp(every[..., k:]).sum(-1)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(("mc", "k", "block"), [(TINY, 5, 8), (UNTIED, 20, 8), (UNTIED, 48, None)])
def test_tokens_and_masses_equal_float64(sizes, mc, k, block):
    hidden = np.random.default_rng(0).standard_normal((B, T, mc.hidden_size)).astype(np.float32)
    ids, logp, rest = _expected(mc, hidden, k, 1.5)
    on = mesh(*sizes)
    with jax.set_mesh(on):
        run = jax.jit(functools.partial(head.top_tokens, mc=mc, k=k, temperature=1.5, chunk=3, block=block))
        found, values = jax.device_get(run(params_on(mc, on), hidden=hidden))
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_allclose(values[..., :k], logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.exp(values[..., k]), rest, rtol=1e-5, atol=1e-12)
    assert np.isfinite(values).all()


def test_equal_logits_are_counted_once_and_a_small_rest_keeps_its_digits():
    hidden = jnp.zeros((1, 1, TINY.hidden_size)).at[..., 0].set(1.0)
    for z in (np.zeros(48), np.r_[40.0, np.zeros(47)]):
        params = {"embed": jnp.zeros((48, TINY.hidden_size)).at[:, 0].set(jnp.asarray(z, jnp.float32))}
        ids, logp = head.top_tokens(params, TINY, hidden, 3, block=8)
        p = np.exp(z) / np.exp(z).sum()
        assert ids[0, 0].tolist() == [0, 1, 2]
        np.testing.assert_allclose(np.exp(np.float64(logp[0, 0])), [*p[:3], p[3:].sum()], rtol=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_position_with_a_logit_that_is_no_number_has_no_finite_result(sign):
    z = np.random.default_rng(0).standard_normal((1, 2, 1, 8)).astype(np.float32)
    z[0, 1, 0, 5] = np.copysign(np.nan, sign)  # what x86 makes of inf - inf has its sign bit set
    state, ids = top_tokens.start(1, 2, 3), np.arange(8)[None]
    for block in (z, np.zeros_like(z)):
        state = top_tokens.absorb(state, jnp.asarray(block), jnp.asarray(ids))
    _, logp = top_tokens.finish(state)
    assert np.isfinite(logp[0, 0]).all() and np.isnan(logp[0, 1]).all()
