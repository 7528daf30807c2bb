"""The k largest logits of a position, and the mass of all others, from logits that arrive block by block.

Shapes: B rows, C positions, S shards of the vocabulary, v tokens of a block in each shard. A state holds ``top`` (float32
[B, C, k], descending), ``ids`` (int32 [B, C, k]) and ``rest`` (float32 [B, C]: the logarithm of Σ exp z over the tokens that are
not among them). The rest is added up from what drops out, never as one minus a sum, so it keeps its digits where it is small.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dccot_jax.model.attention import NEGATIVE
from dccot_jax.model.sharding import activation_spec, reshard

State = dict[str, jax.Array]


def start(batch: int, positions: int, k: int) -> State:
    """The state before the first block."""
    state = {
        "top": jnp.full((batch, positions, k), NEGATIVE, jnp.float32),
        "ids": jnp.zeros((batch, positions, k), jnp.int32),
        "rest": jnp.full((batch, positions), NEGATIVE, jnp.float32),
    }
    return _laid_out(state)


def absorb(state: State, z: jax.Array, ids: jax.Array) -> State:
    """The state with a block's logits z [B, C, S, v] of the tokens ids [S, v] added; among equal logits the earlier stays."""
    batch, positions, k = state["top"].shape
    flat = reshard(z, activation_spec(batch, None, None, None)).reshape(batch, positions, -1)
    every = jnp.concatenate([state["top"], flat], axis=-1)
    top, place = jax.lax.top_k(every, k)
    lost = jnp.where(jnp.any(jnp.isnan(flat), axis=-1), jnp.nan, 0.0)  # top_k puts a NaN first or last, by its sign
    least = top[..., -1:]
    below = jax.nn.logsumexp(jnp.where(every < least, every, NEGATIVE), axis=-1)
    equal = jnp.sum(every == least, axis=-1) - jnp.sum(top == least, axis=-1)  # as large as the least that stays, and not kept
    tied = jnp.where(equal > 0, least[..., 0] + jnp.log(jnp.maximum(equal, 1).astype(jnp.float32)), NEGATIVE)
    shards, size = ids.shape
    apart = (ids[-1, 0] - ids[0, 0]) // max(shards - 1, 1)  # the ids are arithmetic: looking them up is no gather over devices
    new = ids[0, 0] + (place - k) // size * apart + (place - k) % size
    old = jax.vmap(jax.vmap(lambda row, index: row[index]))(state["ids"], jnp.minimum(place, k - 1))
    found = jnp.where(place < k, old, new)
    return _laid_out({"top": top, "ids": found, "rest": jnp.logaddexp(jnp.logaddexp(state["rest"], below), tied) + lost})


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """(ids [B, C, k], log-probabilities [B, C, k + 1], last that of every other token together) once all blocks are in."""
    every = jnp.concatenate([state["top"], state["rest"][..., None]], axis=-1)
    return state["ids"], jax.nn.log_softmax(every, axis=-1)


def _laid_out(state: State) -> State:
    return {name: reshard(x, activation_spec(x.shape[0], *(None,) * (x.ndim - 1))) for name, x in state.items()}
