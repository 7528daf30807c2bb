"""cuDNN's flash attention through `jax.nn.dot_product_attention`, on NVIDIA GPUs.

It knows no segments. Packed rows go through its boolean mask, which becomes a bias [B, 1, T, T] in the compute dtype: exact, in
memory that is free of the heads. Rows of one segment need no mask: padding stands behind, where causality hides it.
"""

from __future__ import annotations

import jax

from dccot_jax.model.attention import window_mask
from dccot_jax.model.backends.meaning import Attention, Form, as_attention, zero_padding


def make(segment_ids: jax.Array, form: Form) -> Attention:
    """Attention over rows with these segment ids [B, T]; without a soft cap, in 16 bits."""
    return as_attention(_attend, form, segment_ids)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: int, form: Form) -> jax.Array:
    batch, tokens, heads, groups, width = q.shape
    mask = None
    if form.packed:
        # Padding is a segment here, which leaves no softmax empty.
        mask = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = (mask & window_mask(tokens, window) if window else mask)[:, None]
    out = jax.nn.dot_product_attention(
        q.reshape(batch, tokens, heads * groups, width),
        k,
        v,
        mask=mask,
        scale=form.scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window and not form.packed else None,
        implementation="cudnn",
    )
    return zero_padding(out.reshape(q.shape), segment_ids)
