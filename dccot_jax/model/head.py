"""The output head, chunked over positions: no [B, T, V] array exists, in training or in scoring.

Each chunk sees the full vocabulary; its body is under `jax.checkpoint`, so the backward pass recomputes the logits. One
body serves training (`weighted_nll`) and scoring (`token_stats`). A caller that scores few positions may gather their
hidden states first (`gather_positions`) and pass those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dccot_jax.model.attention import soft_cap
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.linear import contract
from dccot_jax.model.sharding import BATCH, activation_spec, explicit_mesh, reshard, use_spec

STATS = ("label_logp", "entropy", "margin", "error_norm", "label_rank")
_CHUNK_ELEMENTS = 1 << 25  # float32 logits of one chunk on one device: 128 MiB


def logits(params: dict[str, Any], mc: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [B, C, V] of hidden states [B, C, D], soft-capped where the model says so; for a few positions at a time."""
    name = "embed" if mc.tie_embeddings else "head"
    use = use_spec(mc, name)
    vocab = None if use is None else use[0 if mc.tie_embeddings else 1]
    subscripts = "bcd,vd->bcv" if mc.tie_embeddings else "bcd,dv->bcv"
    z = contract(subscripts, hidden, params[name], use=use, out=activation_spec(hidden.shape[0], None, vocab))
    return soft_cap(z, mc.final_softcap)


def token_stats(
    params: dict[str, Any],
    mc: ModelConfig,
    hidden: jax.Array,
    labels: jax.Array,
    *,
    want: Sequence[str] = STATS,
    chunk: int | None = None,
) -> dict[str, jax.Array]:
    """Statistics of the next-token distribution at every position.

    Args:
      hidden: [B, T, D]. labels: int [B, T], the token that position t must predict.
      want: any of "label_logp" (log p(label), nats), "entropy" (nats), "margin" (largest minus second largest probability),
        "error_norm" (norm of p - one-hot(label)) and "label_rank" (1 + number of larger logits, as a float).
      chunk: positions per chunk; None picks one by size.

    Returns:
      {name: float32 [B, T]}.
    """
    unknown = sorted(set(want) - set(STATS))
    if unknown:
        raise ValueError(f"token_stats: unknown statistic {', '.join(unknown)}; known: {', '.join(STATS)}")

    def body(carry: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
        return carry, _stats(logits(params, mc, chunk[0]), chunk[1], want)

    _, stats = scan_chunks(mc, body, None, hidden, (labels,), chunk)
    batch, length = labels.shape
    return {name: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for name, x in stats.items()}


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
    """

    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, y, w = chunk
        logp = _stats(logits(params, mc, h), y, ("label_logp",))["label_logp"]
        return total - jnp.sum(jnp.where(w != 0, logp * w, 0.0)), None

    weights = weights.astype(jnp.float32)
    total, _ = scan_chunks(mc, body, jnp.zeros((), jnp.float32), hidden, (labels, weights), chunk)
    return total, jnp.sum(weights)


def gather_positions(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] at positions index [B, M] -> [B, M, D]; indices past the end read the last position."""
    rows = hidden.shape[0]
    hidden = reshard(hidden, activation_spec(rows, None, None))
    index = reshard(jnp.minimum(index, hidden.shape[1] - 1), activation_spec(rows, None))
    return jax.vmap(lambda h, i: h[i])(hidden, index)  # row by row: no device gathers another one's rows


def _stats(z: jax.Array, labels: jax.Array, want: Sequence[str]) -> dict[str, jax.Array]:
    """Statistics of float32 logits z [B, C, V]; the label's logit by a masked sum, which a sharded vocabulary allows."""
    shifted = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    exps = jnp.exp(shifted)
    total = jnp.sum(exps, axis=-1)
    found = {}
    if "label_logp" in want:
        found["label_logp"] = jnp.sum(jnp.where(_is_label(z, labels), shifted, 0.0), axis=-1) - jnp.log(total)
    if "entropy" in want:
        found["entropy"] = jnp.log(total) - jnp.sum(exps * shifted, axis=-1) / total
    if "margin" in want:
        second = jnp.max(jnp.where(shifted < 0, exps, 0.0), axis=-1)
        found["margin"] = jnp.where(jnp.sum(shifted == 0, axis=-1) > 1, 0.0, 1.0 - second) / total
    if "error_norm" in want:
        # sum p^2 - 2 p_y + 1 = (1 - p_y)^2 + sum_{v != y} p_v^2, and 1 - p_y as a sum: nothing cancels where p_y is near 1
        others = jnp.where(_is_label(z, labels), 0.0, exps)
        found["error_norm"] = jnp.sqrt(jnp.sum(others, axis=-1) ** 2 + jnp.sum(others * others, axis=-1)) / total
    if "label_rank" in want:
        own = jnp.sum(jnp.where(_is_label(z, labels), z, 0.0), axis=-1, keepdims=True)
        found["label_rank"] = 1.0 + jnp.sum(z > own, axis=-1).astype(jnp.float32)
    return found


def _is_label(z: jax.Array, labels: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, z.shape, 2) == labels[..., None]


def scan_chunks(
    mc: ModelConfig, body: Callable[..., Any], carry: Any, hidden: jax.Array, arrays: Sequence[jax.Array], chunk: int | None
) -> tuple[Any, Any]:
    """Scan `body` over chunks [n, B, C, ...] of arrays [B, T, ...], zero-padded to whole chunks."""
    batch, length = hidden.shape[:2]
    mesh = explicit_mesh()
    shards = math.prod(mesh.shape[axis] for axis in (*BATCH, "tensor")) if mesh is not None else 1
    size = min(chunk or default_chunk(mc, batch, shards), length)
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
