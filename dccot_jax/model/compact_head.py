"""The cross-entropy of a training step on one device of a kind with small caches: trained positions only, in pieces that stay there.

Positions of weight zero (prompts, padding) are left out: the others are moved to the front, and the loops below end with the last
of them. Logits exist for `POSITIONS` positions and `TOKENS` tokens of the vocabulary at a time, in running sums going
forward (`model/running.py` says how) and once more in the backward pass, which writes each block's gradient of the table once.
N positions in chunks of C, V tokens in blocks of v.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dccot_jax.model.attention import NEGATIVE, soft_cap
from dccot_jax.model.linear import dot

POSITIONS = 128
TOKENS = 2048


class Head(NamedTuple):
    """What the loops need to know: whether the table is [V, D] (tied) or [D, V], the cap of the logits, tokens per block."""

    tied: bool
    softcap: float
    block: int

    @property
    def product(self) -> str:
        return "nd,vd->nv" if self.tied else "nd,dv->nv"


class Chosen(NamedTuple):
    """Trained positions first, in chunks: hidden [N/C, C, D], labels and weights [N/C, C]; where they were, and how many chunks count."""

    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array
    order: jax.Array
    chunks: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def nll_sum(about: Head, table: jax.Array, hidden: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ w · -log p(label), a float32 scalar.

    Args:
      table: [V, D] or [D, V], cast to the dtype of `hidden`. hidden: [B, T, D]. labels: int [B, T]. weights: float32 [B, T].
    """
    return _forward(about, table, hidden, labels, weights)[0]


def _forward(about: Head, table: jax.Array, hidden: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
    chosen = _choose(hidden, labels, weights)
    blocks = _blocks(about, table.astype(hidden.dtype))

    def chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, log_sums = carry
        h, y, w = chosen.hidden[i], chosen.labels[i], chosen.weights[i]

        def block(state: tuple[jax.Array, ...], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
            (top, exps, label), (rows, number) = state, part
            z = soft_cap(dot(about.product, h, rows, None), about.softcap)
            higher = jnp.maximum(top, jnp.max(z, axis=-1))
            exps = exps * jnp.exp(top - higher) + jnp.sum(jnp.exp(z - higher[:, None]), axis=-1)
            at = y - number * about.block
            own = jnp.take_along_axis(z, jnp.clip(at, 0, about.block - 1)[:, None], axis=1)[:, 0]
            return (higher, exps, jnp.where((at >= 0) & (at < about.block), own, label)), None

        zero = jnp.zeros(y.shape, jnp.float32)
        (top, exps, label), _ = jax.lax.scan(block, (zero + NEGATIVE, zero, zero), (blocks, jnp.arange(len(blocks))))
        log_sum = top + jnp.log(exps)
        return total + jnp.sum(jnp.where(w != 0, (log_sum - label) * w, 0.0)), log_sums.at[i].set(log_sum)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(chosen.labels.shape, jnp.float32))
    total, log_sums = jax.lax.fori_loop(0, chosen.chunks, chunk, start)
    return total, (table, hidden, chosen, log_sums)


def _backward(about: Head, saved: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    table, hidden, chosen, log_sums = saved
    blocks = _blocks(about, table.astype(hidden.dtype))
    weights = chosen.weights * g
    tokens, to_hidden, to_table = jnp.arange(about.block), "nv,vd->nd" if about.tied else "nv,dv->nd", "nv,nd->vd"

    def block(of_hidden: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, number = part

        def chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            of_hidden, of_rows = carry
            h, w = chosen.hidden[i], weights[i][:, None]
            z = soft_cap(dot(about.product, h, rows, None), about.softcap)
            hit = tokens == (chosen.labels[i] - number * about.block)[:, None]
            of_z = jnp.where(w != 0, (jnp.exp(z - log_sums[i][:, None]) - hit) * w, 0.0)
            if about.softcap:
                of_z = of_z * (1.0 - (z / about.softcap) ** 2)
            of_z = of_z.astype(h.dtype)
            return of_hidden.at[i].add(dot(to_hidden, of_z, rows, None)), of_rows + dot(to_table, of_z, h, None)

        empty = jnp.zeros((about.block, hidden.shape[-1]), jnp.float32)
        return jax.lax.fori_loop(0, chosen.chunks, chunk, (of_hidden, empty))

    of_hidden, of_table = jax.lax.scan(block, jnp.zeros(chosen.hidden.shape, jnp.float32), (blocks, jnp.arange(len(blocks))))
    of_table = of_table.reshape(-1, hidden.shape[-1])
    flat = of_hidden.reshape(-1, hidden.shape[-1])[: chosen.order.size].astype(hidden.dtype)
    of_hidden = jnp.zeros_like(flat).at[chosen.order].set(flat, unique_indices=True).reshape(hidden.shape)
    return (of_table if about.tied else of_table.T).astype(table.dtype), of_hidden, None, None


nll_sum.defvjp(_forward, _backward)


def _choose(hidden: jax.Array, labels: jax.Array, weights: jax.Array) -> Chosen:
    count = labels.size
    size = min(POSITIONS, count)
    order = jnp.argsort(jnp.reshape(weights == 0, -1), stable=True)

    def take(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x).reshape(count, *x.shape[2:])[order]
        return jnp.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    chunks = (jnp.sum(weights != 0) + size - 1) // size
    return Chosen(take(hidden), take(labels), take(weights), order, chunks)


def _blocks(about: Head, table: jax.Array) -> jax.Array:
    """[V/v, v, D], or [V/v, D, v] where untied."""
    if about.tied:
        return table.reshape(-1, about.block, table.shape[1])
    return jnp.moveaxis(table.reshape(table.shape[0], -1, about.block), 1, 0)
