"""The reference: scores of all pairs, masked; runs everywhere, and every other backend is compared with it."""

from __future__ import annotations

import jax

from dccot_jax.model.attention import attend, causal_segment_mask, window_mask
from dccot_jax.model.backends.meaning import Attention, Form, zero_padding


def make(segment_ids: jax.Array, form: Form) -> Attention:
    """Attention over rows with these segment ids [B, T]; memory grows with B · heads · T²."""
    length, mask = segment_ids.shape[1], causal_segment_mask(segment_ids)
    if form.windows[0] and len(form.windows) == 1:
        mask = mask & window_mask(length, form.windows[0])

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array | None) -> jax.Array:
        seen = mask if own is None else mask & window_mask(length, own)
        return zero_padding(attend(q, k, v, seen, scale=form.scale, softcap=form.softcap), segment_ids)

    return attention
