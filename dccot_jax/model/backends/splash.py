"""Splash attention: JAX's flash kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`).

Blocks that causality or the window empty are skipped, so time falls with the window; no [T, T] array exists. Rows are padded to a
multiple of 128 tokens. Padding is a segment of its own in the kernel, which leaves no softmax empty; its results are zeroed after.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from dccot_jax.model.backends.meaning import Attention, Form, as_attention, pad_tokens, zero_padding

LANES = 128
_LARGEST_BLOCK = 512


def make(segment_ids: jax.Array, form: Form, *, interpret: bool = False) -> Attention:
    """Attention over rows with these segment ids [B, T]. `interpret`: run the kernel's program on any device, slowly."""
    return as_attention(partial(_attend, interpret=interpret), form, segment_ids)


def block_size(tokens: int) -> int:
    """Tokens of a block of queries or keys: the largest power of two times 128, up to 512, that divides the padded row."""
    padded = -(-tokens // LANES) * LANES
    return next(size for size in (_LARGEST_BLOCK, 256, LANES) if padded % size == 0)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: int, form: Form, interpret: bool = False
) -> jax.Array:
    batch, tokens, heads, groups, width = q.shape
    scaled = (q.astype(jnp.float32) * form.scale).astype(q.dtype)  # the kernel has no scale of its own
    scaled, k, v, segments = pad_tokens((scaled, k, v, segment_ids), LANES)
    length, block = scaled.shape[1], block_size(tokens)
    shape = (length, length)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * (heads * groups)),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=form.softcap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    by_head = scaled.transpose(0, 2, 3, 1, 4).reshape(batch, heads * groups, length, width)
    out: Any = jax.vmap(kernel)(by_head, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), splash.SegmentIds(segments, segments))
    out = out.reshape(batch, heads, groups, length, width).transpose(0, 3, 1, 2, 4)[:, :tokens]
    return zero_padding(out, segment_ids)
