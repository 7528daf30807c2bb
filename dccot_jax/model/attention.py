"""Rotary positions and causal, segment-masked, grouped-query attention: the reference form for every backend.

Shapes: B rows, T query and S key positions, K key/value heads, G query heads per key/value head, H head size.
Segment ids are 1-based and 0 is padding; positions restart with every segment.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dccot_jax.model.config import Rope
from dccot_jax.model.linear import contract

NEGATIVE = -1e30  # finite, so that a fully masked (padding) row gives no NaN


def rope_divisors(rope: Rope | None, head_dim: int) -> jax.Array:
    """What positions are divided by to give angles, float32 [H/2]: theta^(2i/H), stretched as `rope.scaling` says; None: infinity.

    "linear" (arXiv 2306.15595) multiplies all by the factor. "llama3" (arXiv 2407.21783; transformers'
    `_compute_llama3_parameters`) does so for wavelengths above original/low_freq_factor, keeps those below
    original/high_freq_factor, and interpolates the frequencies between.
    """
    if rope is None:
        return jnp.full(head_dim // 2, jnp.inf, jnp.float32)
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    divisors = jnp.float32(rope.theta) ** exponents
    scaling = rope.scaling
    if scaling is None:
        return divisors
    if scaling.kind == "linear":
        return divisors * scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_positions / (2 * math.pi * divisors)  # within the original context
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return divisors / (kept + (1 - kept) / scaling.factor)


def rope_tables(positions: jax.Array, divisors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, H/2], float32, of positions [B, T] over divisors [H/2], half-split layout."""
    angles = positions.astype(jnp.float32)[..., None] / divisors
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, ..., H] by tables [B, T, H/2]; computed in float32, returned in x's dtype."""
    shape = cos.shape[:2] + (1,) * (x.ndim - 3) + cos.shape[2:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_segment_mask(segment_ids: jax.Array) -> jax.Array:
    """Boolean [B, T, T]: query t sees key s iff s <= t, both are of one segment, and neither is padding."""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal & same & (segment_ids > 0)[:, :, None]


def window_mask(length: int, window: int | jax.Array) -> jax.Array:
    """Boolean [T, T]: key s is among the last `window` tokens that query t may see, itself one of them."""
    index = jnp.arange(length)
    return index[:, None] - index[None, :] < window


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118); x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float, softcap: float = 0.0) -> jax.Array:
    """q [B, T, K, G, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, K, G, H]; scores and softmax in float32."""
    scores = soft_cap(contract("btkgh,bskh->bkgts", q, k) * scale, softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, NEGATIVE), axis=-1)
    return contract("bkgts,bskh->btkgh", weights.astype(q.dtype), v, dtype=q.dtype)
