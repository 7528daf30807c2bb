"""Rows to try attention backends on, and what attention means, pair by pair in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dccot_jax.model.backends.meaning import NO_WINDOW, Attention, Form

SCALE = 0.3


def rows(tokens: int, packed: bool) -> np.ndarray:
    """Segment ids [3, T]: several segments and padding (or one of two lengths), and a row that is padding throughout."""
    found = np.zeros((3, tokens), np.int32)
    if packed:
        bounds = [0, tokens // 7, tokens // 2 + 3, tokens // 2 + 4, tokens - 5]
        for segment, (first, last) in enumerate(itertools.pairwise(bounds), 1):
            found[0, first:last] = segment
        found[1, : tokens // 3], found[1, tokens // 3 :] = 1, 2
    else:
        found[0], found[1, : tokens - tokens // 4] = 1, 1
    return found


def arrays(tokens: int, heads: int, groups: int, width: int, seed: int = 0) -> list[Any]:
    """q [3, T, K, G, H], k and v [3, T, K, H], and a cotangent like q, float32."""
    rng = np.random.default_rng(seed)
    wide, narrow = (3, tokens, heads, groups, width), (3, tokens, heads, width)
    return [rng.normal(size=shape).astype(np.float32) for shape in (wide, narrow, narrow, wide)]


def meaning(q: Any, k: Any, v: Any, segment_ids: np.ndarray, window: int, softcap: float) -> np.ndarray:
    """Attention by its definition, one query after the other, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, segments in enumerate(segment_ids):
        for t, segment in enumerate(segments):
            seen = [s for s in range(t + 1) if segments[s] == segment and (not window or t - s < window)]
            if not segment:
                continue
            scores = np.einsum("kgh,skh->kgs", q[b, t], k[b, seen]) * SCALE
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, t] = np.einsum("kgs,skh->kgh", weights / weights.sum(-1, keepdims=True), v[b, seen])
    return out


def run(
    make: Callable[[jax.Array, Form], Attention],
    segment_ids: np.ndarray,
    inputs: Sequence[np.ndarray],
    window: int = 0,
    *,
    windows: tuple[int, ...] | None = None,
    softcap: float = 0.0,
    packed: bool = True,
) -> list[np.ndarray]:
    """[values, and gradients of q, k, v for the cotangent] of a backend, float32.

    Args:
      windows: of all layers, of which this one has `window`; None: they are alike.
    """
    form = Form(SCALE, softcap, windows or (window,), packed)
    own = None if windows is None else jnp.asarray(window or NO_WINDOW, jnp.int32)
    q, k, v, cotangent = map(jnp.asarray, inputs)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, back = jax.vjp(lambda q, k, v: make(jnp.asarray(segment_ids), form)(q, k, v, own), q, k, v)
        return out, *back(cotangent.astype(out.dtype))

    return [np.asarray(x, np.float32) for x in both(q, k, v)]
