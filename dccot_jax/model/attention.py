"""Rotary positions and causal, segment-masked, grouped-query attention: the reference form for every backend.

Shapes: B rows, T query and S key positions, K key/value heads, G query heads per key/value head, H head size.
Segment ids are 1-based and 0 is padding; positions restart with every segment.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dccot_jax.model.linear import contract

NEGATIVE = -1e30  # finite, so that a fully masked (padding) row gives no NaN


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, H/2], float32, of positions [B, T]: angle p * theta^(-2i/H), half-split layout."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[..., None] / (jnp.float32(theta) ** exponents)
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


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, K, G, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, K, G, H]; softmax in float32."""
    scores = contract("btkgh,bskh->bkgts", q, k) * (q.shape[-1] ** -0.5)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, NEGATIVE), axis=-1)
    return contract("bkgts,bskh->btkgh", weights.astype(q.dtype), v, dtype=q.dtype)
