"""Losses of rows in float64, differentiable: the decoder of `reference_decoder` written with jax.numpy, one document at a time.

Without windows, stretched rotary positions and layers that have none: what they change is not in a weight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dccot_jax.model.config import ModelConfig, Rope


def row_gradient(params: Any, mc: ModelConfig, ids: np.ndarray, prompt: int) -> Any:
    """Gradient in float64 of the mean -log p over `ids[prompt:]`, as a tree of numpy arrays."""
    length = -(-len(ids) // 64) * 64  # few programs; a causal model cannot see what follows
    place = np.arange(length)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
        scored = (place >= prompt) & (place < len(ids))
        grads = _gradient(mc)(wide, jnp.asarray(np.pad(ids, (0, length - len(ids)))), jnp.asarray(scored))
        return jax.tree.map(np.asarray, grads)


@functools.lru_cache(maxsize=4)
def _gradient(mc: ModelConfig):
    return jax.jit(jax.grad(lambda params, ids, scored: _loss(params, mc, ids, scored)))


def _loss(params: Any, mc: ModelConfig, ids: Any, scored: Any) -> Any:
    assert not any(mc.layer_windows) and set(mc.layer_ropes) == {Rope(mc.rope_theta, None)}
    length = len(ids)
    x = params["embed"][ids] * (mc.hidden_size**0.5 if mc.arch.embed_scale else 1.0)
    angles = jnp.arange(length)[:, None] * mc.rope_theta ** (-2 * jnp.arange(mc.head_dim // 2) / mc.head_dim)
    for layer in range(mc.num_layers):
        w = {name: value[layer] for name, value in params["layers"].items()}
        for name in mc.lora.targets if mc.lora is not None else ():
            w[name] = w[name] + mc.lora.scale * w[name + "_a"] @ w[name + "_b"]
        h = _norm(x, w["attn_norm"], mc)
        q, k, v = ((h @ w["w" + n] + w.get("b" + n, 0.0)).reshape(length, -1, mc.head_dim) for n in "qkv")
        if mc.arch.qk_norm:
            q, k = _norm(q, w["q_norm"], mc), _norm(k, w["k_norm"], mc)
        k, v = (jnp.repeat(y, mc.num_groups, axis=1) for y in (_rotate(k, angles), v))
        scores = _cap(jnp.einsum("tnh,snh->nts", _rotate(q, angles), k) / (mc.query_scalar or mc.head_dim) ** 0.5, mc.attn_softcap)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        y = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores, -1), v).reshape(length, -1) @ w["wo"] + w.get("bo", 0.0)
        x = x + (_norm(y, w["attn_post_norm"], mc) if mc.arch.post_norms else y)
        h = _norm(x, w["mlp_norm"], mc)
        gate, up = h @ w["w_gate"] + w.get("b_gate", 0.0), h @ w["w_up"] + w.get("b_up", 0.0)
        gate = jax.nn.silu(gate) if mc.arch.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        y = (gate * up) @ w["w_down"] + w.get("b_down", 0.0)
        x = x + (_norm(y, w["mlp_post_norm"], mc) if mc.arch.post_norms else y)
    x = _norm(x, params["final_norm"], mc)
    logp = jax.nn.log_softmax(_cap(x @ (params["embed"].T if mc.tie_embeddings else params["head"]), mc.final_softcap), -1)
    nll = -logp[jnp.arange(length - 1), ids[1:]]
    return jnp.sum(jnp.where(scored[1:], nll, 0.0)) / jnp.sum(scored[1:])


def _norm(x: Any, scale: Any, mc: ModelConfig) -> Any:
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + mc.rms_eps) * (1.0 + scale if mc.arch.norm_offset else scale)


def _cap(z: Any, cap: float) -> Any:
    return cap * jnp.tanh(z / cap) if cap else z


def _rotate(x: Any, angles: Any) -> Any:
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
