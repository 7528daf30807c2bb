"""The output head: no [B, T, V] array exists, in training or in scoring.

Training (`weighted_nll`) goes over chunks of positions; each sees the full vocabulary, and its body is under
`jax.checkpoint`, so the backward pass recomputes the logits; on a CPU it goes over trained positions and blocks of the vocabulary
(`model/compact_head.py`). Scoring (`token_stats`) also goes over blocks of the
vocabulary and keeps running sums (`model/running.py`): a block's logits are few enough to stay in a CPU's cache through all
passes over them. A caller that scores few positions gathers their hidden states first (`gather_positions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dccot_jax.model import compact_head, running
from dccot_jax.model import top_tokens as likeliest
from dccot_jax.model.attention import NEGATIVE, soft_cap
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.linear import contract, contract_once, dot, gather_once
from dccot_jax.model.running import STATS
from dccot_jax.model.sharding import BATCH, activation_spec, explicit_mesh, platform, reshard, use_spec

_CHUNK_ELEMENTS = 1 << 25  # float32 logits of one chunk on one device: 128 MiB
# In scoring: logits of one chunk and block on one device, and the tokens of a block; by backend, then anywhere else.
_BLOCKS = {"cpu": (1 << 20, 2048)}
_BLOCKS_ACCELERATOR = (1 << 25, 8192)


def logits(params: dict[str, Any], mc: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [B, C, V] of hidden states [B, C, D], soft-capped where the model says so; for a few positions at a time."""
    read, hidden = open_head(params, mc, hidden)
    return read(hidden)


def open_head(params: dict[str, Any], mc: ModelConfig, hidden: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """`logits` as a function of chunks of hidden states, and the hidden states [B, T, D] to cut: the head is gathered once for all."""
    name = "embed" if mc.tie_embeddings else "head"
    use = use_spec(mc, name)
    vocab = None if use is None else use[0 if mc.tie_embeddings else 1]
    subscripts = "bcd,vd->bcv" if mc.tie_embeddings else "bcd,dv->bcv"
    once, hidden = gather_once(params[name], hidden, use)

    def read(part: jax.Array) -> jax.Array:
        z = contract_once(subscripts, part, once, out=activation_spec(part.shape[0], None, vocab))
        return soft_cap(z, mc.final_softcap)

    return read, hidden


def token_stats(
    params: dict[str, Any],
    mc: ModelConfig,
    hidden: jax.Array,
    labels: jax.Array,
    *,
    want: Sequence[str] = STATS,
    chunk: int | None = None,
    block: int | None = None,
) -> dict[str, jax.Array]:
    """Statistics of the next-token distribution at every position.

    Args:
      hidden: [B, T, D]. labels: int [B, T], the token that position t must predict.
      want: any of "label_logp" (log p(label), nats), "entropy" (nats), "margin" (largest minus second largest probability),
        "error_norm" (norm of p - one-hot(label)) and "label_rank" (1 + number of larger logits, as a float).
      chunk: positions per chunk. block: about how many tokens of the vocabulary at a time. None picks them by size.

    Returns:
      {name: float32 [B, T]}.
    """
    unknown = sorted(set(want) - set(STATS))
    if unknown:
        raise ValueError(f"token_stats: unknown statistic {', '.join(unknown)}; known: {', '.join(STATS)}")

    block_logits, size, blocks = _vocabulary_blocks(params, mc, hidden, block)
    batch, length = labels.shape
    chunk = chunk or max(16, _block_sizes()[0] * _devices() // (batch * size))

    def body(carry: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
        h, y = chunk
        zero = reshard(jnp.zeros(y.shape, jnp.float32), activation_spec(batch, None))
        own = None
        if "label_rank" in want:  # ranks need the labels' logits first, and exactly as they are compared
            own, _ = jax.lax.scan(
                lambda total, i: (total + running.label_logit(*block_logits(h, i)[:2], y), None), zero, jnp.arange(blocks)
            )
        state, _ = jax.lax.scan(
            lambda state, i: (running.absorb(state, *block_logits(h, i)[:2], y, own), None), running.start(zero, want), jnp.arange(blocks)
        )
        return carry, running.finish(state, want)

    _, stats = scan_chunks(mc, body, None, hidden, (labels,), chunk)
    return {name: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for name, x in stats.items()}


def top_tokens(
    params: dict[str, Any],
    mc: ModelConfig,
    hidden: jax.Array,
    k: int,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k likeliest next tokens at every position of hidden states [B, T, D].

    Args:
      k: at most V. chunk, block: as in `token_stats`.

    Returns:
      ids int32 [B, T, k], the likeliest first; float32 [B, T, k + 1], their log-probabilities under softmax(z / temperature) and,
      last, that of every other token together (about -1e30 where there is none).
    """
    block_logits, size, blocks = _vocabulary_blocks(params, mc, hidden, block)
    batch, length = hidden.shape[:2]
    chunk = chunk or max(16, _block_sizes()[0] * _devices() // (batch * (size + k)))

    def body(carry: None, part: tuple[jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        def absorb(state: likeliest.State, i: jax.Array) -> tuple[likeliest.State, None]:
            z, ids, _ = block_logits(part[0], i)
            return likeliest.absorb(state, z / temperature, ids), None

        state, _ = jax.lax.scan(absorb, likeliest.start(batch, part[0].shape[1], k), jnp.arange(blocks))
        return carry, likeliest.finish(state)

    _, found = scan_chunks(mc, body, None, hidden, (), chunk)
    ids, logp = (jnp.moveaxis(x, 0, 1).reshape(batch, -1, x.shape[-1])[:, :length] for x in found)
    return ids, logp


def weighted_nll(
    params: dict[str, Any],
    mc: ModelConfig,
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weight * -log p(label), sum of weight), float32 scalars over the whole batch.

    Args:
      hidden: [B, T, D]. labels: int [B, T], already shifted. weights: float [B, T], 0 where nothing is predicted.
      chunk: positions per chunk, of the whole vocabulary each; None picks the way and the size by device.
    """
    weights = weights.astype(jnp.float32)
    if chunk is None and platform() == "cpu" and _devices("tensor") == 1:
        name = "embed" if mc.tie_embeddings else "head"
        arrays = (params[name], hidden, labels, weights)
        if explicit_mesh() is not None:
            arrays = tuple(reshard(x, P(*(None,) * x.ndim)) for x in map(jnp.asarray, arrays))
        about = compact_head.Head(mc.tie_embeddings, mc.final_softcap, _block_size(mc.vocab_size, compact_head.TOKENS))
        return compact_head.nll_sum(about, *arrays), jnp.sum(weights)

    read, hidden = open_head(params, mc, hidden)

    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, y, w = chunk
        logp = _label_logp(read(h), y)
        return total - jnp.sum(jnp.where(w != 0, logp * w, 0.0)), None

    total, _ = scan_chunks(mc, body, jnp.zeros((), jnp.float32), hidden, (labels, weights), chunk)
    return total, jnp.sum(weights)


def nll_error(params: dict[str, Any], mc: ModelConfig, hidden: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Gradient of sum of weight · -log p(label) with respect to `hidden` [B, T, D], in its dtype; see `weighted_nll`.

    With rows W_v of the table it is w (sum_v p_v W_v - W_label). Logits are made once, a block of the vocabulary at a time: the sum
    is one of exponentials relative to the largest logit so far, rescaled when that grows (arXiv 1805.02867), as in attention.
    """
    block_logits, size, blocks = _vocabulary_blocks(params, mc, hidden, None)
    batch, cap = len(labels), mc.final_softcap
    spec = activation_spec(batch, None, None)
    subscripts = "bcsv,svd->bcd" if mc.tie_embeddings else "bcsv,dsv->bcd"

    def body(carry: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        h, y, w = chunk

        def absorb(state: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            top, total, mixed = state
            z, _, part = block_logits(h, i)
            higher = jnp.maximum(top, jnp.max(z, axis=(2, 3)))
            exps = jnp.exp(z - higher[..., None, None])
            scale = jnp.exp(top - higher)
            total = total * scale + jnp.sum(exps, axis=(2, 3))
            return (higher, total, mixed * scale[..., None] + dot(subscripts, _uncapped(exps, z, cap).astype(h.dtype), part, spec)), None

        zero = reshard(jnp.zeros(y.shape, jnp.float32), activation_spec(batch, None))
        start = (zero + NEGATIVE, zero, jnp.zeros(h.shape, jnp.float32, out_sharding=spec))
        (_, total, mixed), _ = jax.lax.scan(absorb, start, jnp.arange(blocks))
        own = _table_rows(params, mc, y).astype(h.dtype)
        z = soft_cap(jnp.sum(h.astype(jnp.float32) * own.astype(jnp.float32), axis=-1, keepdims=True), cap)
        return carry, (w[..., None] * (mixed / total[..., None] - _uncapped(own.astype(jnp.float32), z, cap))).astype(h.dtype)

    chunk = max(16, _block_sizes()[0] * _devices() // (batch * size))
    _, errors = scan_chunks(mc, body, None, hidden, (labels, weights.astype(jnp.float32)), chunk)
    errors = jnp.moveaxis(errors, 0, 1).reshape(batch, -1, hidden.shape[2])[:, : hidden.shape[1]]
    return reshard(errors, spec)


def _table_rows(params: dict[str, Any], mc: ModelConfig, ids: jax.Array) -> jax.Array:
    """The vectors [B, C, D] of tokens ids [B, C] in the head's table."""
    name = "embed" if mc.tie_embeddings else "head"
    table = reshard(params[name], use_spec(mc, name))
    spec = activation_spec(len(ids), None, None)
    if mc.tie_embeddings:
        return table[ids] if spec is None else table.at[ids].get(out_sharding=spec)
    if spec is None:
        return jnp.moveaxis(table[:, ids], 0, -1)
    return jnp.moveaxis(table.at[:, ids].get(out_sharding=P(None, *spec[:2])), 0, -1)


def logit_error(z: jax.Array, hit: jax.Array, normaliser: jax.Array, weights: jax.Array, cap: float) -> jax.Array:
    """d loss / d logit before the cap, w (softmax(z) - onehot(y)) (1 - (z / cap)^2), of capped logits z.

    Args:
      hit: where the label is, shaped like z. normaliser: log sum exp(z). weights: w; both broadcast against z.
    """
    return _uncapped(weights * (jnp.exp(z - normaliser) - hit), z, cap)


def _uncapped(error: jax.Array, z: jax.Array, cap: float) -> jax.Array:
    """The cotangent of logits before the cap, from `error` of capped logits z; padding may be minus infinity."""
    return error * (1.0 - jnp.square(jnp.maximum(z, -cap) / cap)) if cap else error


def gather_positions(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] at positions index [B, M] -> [B, M, D]; indices past the end read the last position."""
    rows = hidden.shape[0]
    hidden = reshard(hidden, activation_spec(rows, None, None))
    index = reshard(jnp.minimum(index, hidden.shape[1] - 1), activation_spec(rows, None))
    return jax.vmap(lambda h, i: h[i])(hidden, index)  # row by row: no device gathers another one's rows


def _label_logp(z: jax.Array, labels: jax.Array) -> jax.Array:
    """log p(label) [B, C] of float32 logits z [B, C, V]; the label's logit by a masked sum, which a sharded vocabulary allows."""
    shifted = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    total = jnp.sum(jnp.exp(shifted), axis=-1)
    hit = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2) == labels[..., None]
    return jnp.sum(jnp.where(hit, shifted, 0.0), axis=-1) - jnp.log(total)


def _vocabulary_blocks(
    params: dict[str, Any], mc: ModelConfig, hidden: jax.Array, block: int | None
) -> tuple[Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]], int, int]:
    """A function (h [B, C, D], number of a block) -> (logits [B, C, S, v], token ids [S, v], block of the table), v, number of blocks.

    The vocabulary is spread over S = devices of the `tensor` axis; a block takes v tokens from each.
    """
    name = "embed" if mc.tie_embeddings else "head"
    use = use_spec(mc, name)
    axis = None if use is None else use[0 if mc.tie_embeddings else 1]
    mesh = explicit_mesh()
    shards = 1 if axis is None or mesh is None else mesh.shape[axis]
    local = mc.vocab_size // shards
    size = _block_size(local, block or _block_sizes()[1])
    table = reshard(params[name].astype(hidden.dtype), use)
    if mc.tie_embeddings:
        shape, spec, at, subscripts = (shards, -1, size, mc.hidden_size), P(axis, None, None, None), 1, "bcd,svd->bcsv"
    else:
        shape, spec, at, subscripts = (mc.hidden_size, shards, -1, size), P(None, axis, None, None), 2, "bcd,dsv->bcsv"
    table = table.reshape(shape) if use is None else jnp.reshape(table, shape, out_sharding=spec)

    def block_logits(h: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        part = jax.lax.dynamic_index_in_dim(table, i, at, keepdims=False)
        z = contract(subscripts, h, part, out=activation_spec(h.shape[0], None, axis, None))
        ids = local * jnp.arange(shards)[:, None] + i * size + jnp.arange(size)
        return soft_cap(z, mc.final_softcap), ids, part

    return block_logits, size, local // size


def _block_size(tokens: int, wanted: int) -> int:
    """The smallest divisor of `tokens` that is not below `wanted`, or all of them."""
    return min((d for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0 for d in (n, tokens // n) if d >= wanted), default=tokens)


def _block_sizes() -> tuple[int, int]:
    return _BLOCKS.get(platform(), _BLOCKS_ACCELERATOR)


def scan_chunks(
    mc: ModelConfig, body: Callable[..., Any], carry: Any, hidden: jax.Array, arrays: Sequence[jax.Array], chunk: int | None
) -> tuple[Any, Any]:
    """Scan `body` over chunks [n, B, C, ...] of arrays [B, T, ...], zero-padded to whole chunks."""
    batch, length = hidden.shape[:2]
    size = min(chunk or default_chunk(mc, batch, _devices("tensor")), length)
    count = math.ceil(length / size)
    size = math.ceil(length / count)

    def split(x: jax.Array) -> jax.Array:
        x = reshard(x, activation_spec(batch, *(None,) * (x.ndim - 1)))
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, tuple(split(x) for x in (hidden, *arrays)))


def default_chunk(mc: ModelConfig, batch: int, shards: int) -> int:
    """Positions per chunk, so that each of the devices that share the logits [batch, chunk, V] holds `_CHUNK_ELEMENTS` of them at most."""
    return max(16, _CHUNK_ELEMENTS * shards // (batch * mc.vocab_size))


def _devices(*more: str) -> int:
    """Devices over which rows lie, times those of the axes `more`."""
    mesh = explicit_mesh()
    return math.prod(mesh.shape[axis] for axis in (*BATCH, *more)) if mesh is not None else 1
