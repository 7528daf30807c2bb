"""Rotary positions and causal, segment-masked, grouped-query attention: the reference form for every backend.

Shapes: B rows, T query and S key positions, K key/value heads, G query heads per key/value head, H head size.
Segment ids are 1-based and 0 is padding; positions restart with every segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from dccot_jax.model.config import Rope
from dccot_jax.model.linear import SAVED, contract, dot
from dccot_jax.model.sharding import activation_spec, explicit_mesh
from dccot_jax.model.streams import Rows, to_rows, to_stream

KEPT = 512  # length of rows up to which the remat policy "dots" keeps the weights of their attention
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
    """q [B, T, K, G, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, K, G, H]; scores and softmax in float32.

    Where T = S the mask must be causal: keys behind a block of queries are not looked at.
    """
    batch, length, heads, groups, width = q.shape
    keys = k.shape[1]
    count = query_blocks(length) if length == keys else 1
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    found = []
    for first in range(0, length, length // count):
        last = first + length // count
        seen = last if length == keys else keys
        # The operands in the layout of the products, the queries of a key's heads one after the other.
        mine = q[:, first:last].transpose(0, 2, 3, 1, 4).reshape(batch, heads, -1, width)
        out = _attend(scale, softcap, mine, k[:, :, :seen], v[:, :, :seen], mask[:, first:last, :seen])
        found.append(out.reshape(batch, heads, groups, -1, width).transpose(0, 3, 1, 2, 4))
    return found[0] if count == 1 else jnp.concatenate(found, axis=1)


def query_blocks(length: int) -> int:
    """Of at least 128 queries, at most eight: a causal mask hides 7/16 of the keys from eight."""
    return next((count for count in (8, 4, 2) if length % count == 0 and length // count >= 128), 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, softcap: float, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, K, G*T, H], k and v [B, K, S, H], mask [B, T, S] -> like q; the backward pass computes the scores anew."""
    return _attend_forward(scale, softcap, q, k, v, mask)[0]


def _scores(scale: float, softcap: float, q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Capped and masked scores, float32 [B, K, G, T, S]."""
    z = soft_cap(dot("bkqh,bksh->bkqs", q, k, None) * scale, softcap)
    return jnp.where(mask[:, None, None], z.reshape(*z.shape[:2], -1, *mask.shape[1:]), NEGATIVE)


def _attend_forward(scale: float, softcap: float, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    z = _scores(scale, softcap, q, k, mask)
    top = jnp.max(z, axis=-1, keepdims=True)
    exps = jnp.exp(z - top)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    weights = (exps / total).astype(q.dtype).reshape(*q.shape[:3], -1)
    out = dot("bkqs,bksh->bkqh", weights, v, None).astype(q.dtype)
    return out, (q, k, v, mask, out, top + jnp.log(total))


def _attend_backward(scale: float, softcap: float, saved: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    """With weights P = softmax(Z): dZ = P * (dP - sum(dO * O)), dP = dO V^T (arXiv 2205.14135, appendix B.2)."""
    q, k, v, mask, out, log_sum = saved
    g = g.astype(q.dtype)
    z = _scores(scale, softcap, q, k, mask)
    weights = jnp.exp(z - log_sum)
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).reshape(log_sum.shape)
    of_z = weights * (dot("bkqh,bksh->bkqs", g, v, None).reshape(z.shape) - inner)
    if softcap:
        of_z = of_z * jnp.where(mask[:, None, None], 1.0 - (z / softcap) ** 2, 0.0)
    of_z = (of_z * scale).astype(q.dtype).reshape(*q.shape[:3], -1)
    of_q = dot("bkqs,bksh->bkqh", of_z, k, None)
    of_k = dot("bkqs,bkqh->bksh", of_z, q, None)
    of_v = dot("bkqs,bkqh->bksh", weights.astype(q.dtype).reshape(of_z.shape), g, None)
    return of_q.astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, window: int | jax.Array | None, *, scale: float, softcap: float = 0.0
) -> jax.Array:
    """Attention within each row of streams: q [B, N, K, G, H], k and v [B, N, K, H] -> like q; to be differentiated.

    A row's padding is behind its end, where the causal mask hides it. `window`: how far back a query sees; None: all the way.
    Each device attends within its own streams and key/value heads; nothing is communicated.
    """
    length = rows.index.shape[-1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        mask = mask & window_mask(length, window)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        return _attend_whole(scale, softcap, q, k, v, bias)

    # Kept in this form: the backward pass would else make rotation and rows again, inside the loops that turn them.
    q, k, v = (checkpoint_name(to_rows(x, rows), SAVED) for x in (q, k, v))
    bias = jnp.where(mask, 0.0, NEGATIVE)
    if explicit_mesh() is None:
        return to_stream(local(q, k, v, bias), rows)
    return to_stream(jax.shard_map(local, out_specs=jax.typeof(q).sharding.spec)(q, k, v, bias), rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_whole(scale: float, softcap: float, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """softmax(soft_cap(q·k · scale) + bias) v, with q [R, T, K, G, H], k and v [R, T, K, H], bias [T, T] -> like q.

    No sum over scores is made but in products: of exponentials e as one more column of v, and in the backward pass, where
    D = sum_s p_s dp_s = <do, o> (arXiv 2205.14135, appendix B.2), not at all. With l = sum e: ds = e (do/l · v - D/l).
    """
    return _attend_whole_forward(scale, softcap, q, k, v, bias)[0]


def _attend_whole_forward(scale: float, softcap: float, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
    rows, length, heads, groups, width = q.shape
    scores = soft_cap(dot("bqh,bhs->bqs", _by_query(q), _by_width(k), None) * scale, softcap) + jnp.tile(bias, (groups, 1))
    exps = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)).astype(q.dtype)
    exps = checkpoint_name(exps, SAVED) if length <= KEPT else exps
    wide = jnp.pad(_by_width(v), ((0, 0), (0, 1), (0, 0)), constant_values=1)
    found = dot("bqs,bhs->bqh", exps, wide, None)
    total = checkpoint_name(found[..., -1:], SAVED)
    out = checkpoint_name((found[..., :-1] / total).astype(q.dtype), SAVED)
    return out.reshape(rows, heads, groups, length, width).transpose(0, 3, 1, 2, 4), (q, k, v, exps, total, out)


def _attend_whole_backward(scale: float, softcap: float, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    q, k, v, exps, total, out = saved
    rows, length, heads, groups, width = q.shape
    keys, values = _by_width(k), _by_width(v)
    wide = _by_query(g).astype(jnp.float32) / total
    inner = jnp.sum(wide * out.astype(jnp.float32), axis=-1, keepdims=True)
    error = exps.astype(jnp.float32) * (dot("bqh,bhs->bqs", wide.astype(q.dtype), values, None) - inner)
    if softcap:
        error = error * (1.0 - jnp.square(jnp.tanh(dot("bqh,bhs->bqs", _by_query(q), keys, None) * (scale / softcap))))
    error = error.astype(q.dtype)
    dq = (dot("bqs,bhs->bqh", error, keys, None) * scale).astype(q.dtype)
    # Turned in memory, by more than the product could undo: CPUs make sums over the first axis of both operands in float32.
    turned = (_by_width(g).astype(jnp.float32) / total.swapaxes(1, 2)).astype(q.dtype)
    dk = (dot("bhq,bqs->bhs", _by_width(q), error, None) * scale).astype(k.dtype)
    dv = dot("bhq,bqs->bhs", turned, exps, None).astype(v.dtype)
    dk, dv = (x.reshape(rows, heads, width, length).transpose(0, 3, 1, 2) for x in (dk, dv))
    return dq.reshape(rows, heads, groups, length, width).transpose(0, 3, 1, 2, 4), dk, dv, None


def _by_query(x: jax.Array) -> jax.Array:
    """[R, T, K, G, H] -> [R·K, G·T, H]."""
    rows, length, heads, groups, width = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(rows * heads, groups * length, width)


def _by_width(x: jax.Array) -> jax.Array:
    """[R, T, K, G, H] -> [R·K, H, G·T], or [R, T, K, H] -> [R·K, H, T]."""
    rows, _, heads, *_, width = x.shape
    return x.transpose(0, 2, *range(x.ndim - 1, 2, -1), 1).reshape(rows * heads, width, -1)


_attend_whole.defvjp(_attend_whole_forward, _attend_whole_backward)


def block_bias(positions: jax.Array, queries: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """What is added to the scores of blocks of queries: "bias" float32 [B, R, Q, S], 0 where a key is there and not after the query.

    Args:
      positions: int32 [B, N]. queries [B, R, Q], keys [B, R, S]: tokens of the stream, keys -1: none.

    Returns, beside it, "ahead" int32 [B, R, Q, S]: how far a query stands behind a key.
    """
    look_up = jax.vmap(lambda at, index: at[index])
    ahead = look_up(positions, queries)[..., :, None] - look_up(positions, jnp.maximum(keys, 0))[..., None, :]
    return {"ahead": ahead, "bias": jnp.where((keys >= 0)[..., None, :] & (ahead >= 0), 0.0, NEGATIVE)}


def attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: Sequence[Mapping[str, jax.Array]],
    back: jax.Array,
    window: int | jax.Array | None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """Attention over streams of tokens in which every query says what it may see: q [B, N, K, G, H], k and v [B, N, K, H] -> like q.

    Args:
      blocks: per class of keys, "queries" int32 [B, R, Q] and "keys" int32 [B, R, S], tokens of the stream (keys -1: none), and
        from `block_bias` "ahead" int32 and "bias" float32 [B, R, Q, S].
      window: a query sees only keys that are less than this behind it; None: all that "bias" admits.
      back: int32 [B, N], where token n's query stands among the B x (R1 Q + R2 Q + ...) of all classes.

    Each device attends within its own streams and key/value heads; nothing is communicated.
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Sequence[Mapping[str, jax.Array]], back: jax.Array, window: jax.Array):
        bins, length, heads, groups, width = q.shape
        first = jnp.arange(bins)[:, None, None] * length
        q, k, v = (x.reshape(bins * length, *x.shape[2:]) for x in (q, k, v))
        found = []
        for block in blocks:
            _, rows, count = block["queries"].shape
            keys = block["keys"].shape[-1]
            rows *= bins
            at_q = (block["queries"] + first).reshape(rows, count)
            at_k = (jnp.maximum(block["keys"], 0) + first).reshape(rows, keys)
            bias = block["bias"].reshape(rows, 1, 1, count, keys)
            if windowed:
                bias += jnp.where(block["ahead"] < window, 0.0, NEGATIVE).reshape(bias.shape)
            # The operands in the layout of the products: one product per block and key/value head.
            mine = q[at_q].transpose(0, 2, 3, 1, 4).reshape(rows * heads, groups * count, width)
            theirs = k[at_k].transpose(0, 2, 3, 1).reshape(rows * heads, width, keys)
            values = v[at_k].transpose(0, 2, 1, 3).reshape(rows * heads, keys, width)
            scores = contract("bqh,bhs->bqs", mine, theirs).reshape(rows, heads, groups, count, keys)
            weights = jax.nn.softmax(soft_cap(scores * scale, softcap) + bias, axis=-1)
            out = contract("bqs,bsh->bqh", weights.astype(q.dtype).reshape(rows * heads, groups * count, keys), values, dtype=q.dtype)
            out = out.reshape(bins, rows // bins, heads, groups, count, width).transpose(0, 1, 4, 2, 3, 5)
            found.append(out.reshape(bins, -1, heads, groups, width))
        return jax.vmap(lambda x, i: x[i])(jnp.concatenate(found, axis=1), back)

    windowed, limit = window is not None, jnp.asarray(0 if window is None else window, jnp.int32)
    if explicit_mesh() is None:
        return local(q, k, v, blocks, back, limit)
    wide, narrow = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
    stream = activation_spec(q.shape[0], None)
    of_blocks = [{name: activation_spec(x.shape[0], *(None,) * (x.ndim - 1)) for name, x in block.items()} for block in blocks]
    specs = (wide, narrow, narrow, of_blocks, stream, P())
    return jax.shard_map(local, in_specs=specs, out_specs=wide)(q, k, v, blocks, back, limit)
