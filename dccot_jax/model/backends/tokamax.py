"""tokamax's attention kernels for NVIDIA GPUs, where the package is installed (Python 3.12, `pip install tokamax`).

tokamax takes the first of its kernels that accepts the shapes and dtype, its own XLA form last. Segments and windows go in through its
boolean mask [B, 1, T, T], as of 0.0.17.
"""

from __future__ import annotations

import importlib

import jax

from dccot_jax.model.attention import window_mask
from dccot_jax.model.backends.meaning import Attention, Form, as_attention, zero_padding


def make(segment_ids: jax.Array, form: Form) -> Attention:
    """Attention over rows with these segment ids [B, T]."""
    return as_attention(_attend, form, segment_ids)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: int, form: Form) -> jax.Array:
    tokamax = importlib.import_module("tokamax")
    batch, tokens, heads, groups, width = q.shape
    mask = None
    if form.packed:
        mask = segment_ids[:, :, None] == segment_ids[:, None, :]  # padding is a segment here, which leaves no softmax empty
        mask = (mask & window_mask(tokens, window) if window else mask)[:, None]
    out = tokamax.dot_product_attention(
        q.reshape(batch, tokens, heads * groups, width),
        k,
        v,
        mask=mask,
        scale=form.scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window and not form.packed else None,
        logits_soft_cap=form.softcap or None,
    )
    return zero_padding(out.reshape(q.shape), segment_ids)
