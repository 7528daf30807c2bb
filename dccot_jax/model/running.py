"""Statistics of next-token distributions from logits that arrive block by block (online softmax, arXiv 1805.02867).

Shapes: B rows, C positions, S shards of the vocabulary, v tokens of a block in each shard. A state is a dict of float32
[B, C]; its sums are relative to the largest logit so far and are rescaled when that grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dccot_jax.model.attention import NEGATIVE

STATS = ("label_logp", "entropy", "margin", "error_norm", "label_rank")
_SUMS = {  # what each statistic needs beside the largest logit and the sum of exponentials
    "label_logp": ("label",),
    "entropy": ("weighted",),
    "margin": ("second",),
    "error_norm": ("others", "squares"),
    "label_rank": ("larger",),
}
State = dict[str, jax.Array]


def start(zero: jax.Array, want: Sequence[str]) -> State:
    """The state before the first block; `zero` is float32 zeros [B, C], laid out as the states shall be."""
    state = dict.fromkeys(("sum", *(name for stat in want for name in _SUMS[stat])), zero)
    return state | {name: zero + NEGATIVE for name in ("max", "second") if name == "max" or name in state}


def absorb(state: State, z: jax.Array, ids: jax.Array, labels: jax.Array, own: jax.Array | None) -> State:
    """The state with a block's logits z [B, C, S, v] of the tokens ids [S, v] added.

    Args:
      labels: int [B, C]. own: the labels' logits [B, C] as `label_logit` sums them, where "label_rank" is wanted.
    """
    over = (2, 3)
    largest = jax.lax.stop_gradient(jnp.max(z, axis=over))
    top = jnp.maximum(state["max"], largest)
    moved = state["max"] - top
    scale = jnp.exp(moved)
    shifted = z - top[..., None, None]
    exps = jnp.exp(shifted)
    new = {"max": top, "sum": state["sum"] * scale + jnp.sum(exps, axis=over)}
    if "label" in state:
        new["label"] = state["label"] + label_logit(z, ids, labels)
    if "weighted" in state:  # sum of exp(s) s, with s = z - max
        new["weighted"] = (state["weighted"] + state["sum"] * moved) * scale + jnp.sum(exps * shifted, axis=over)
    if "second" in state:
        below = jnp.max(jnp.where(z < largest[..., None, None], z, NEGATIVE), axis=over)
        below = jnp.where(jnp.sum(z == largest[..., None, None], axis=over) > 1, largest, below)
        new["second"] = jnp.maximum(jnp.minimum(state["max"], largest), jnp.maximum(state["second"], below))
    if "others" in state:
        others = jnp.where(ids == labels[..., None, None], 0.0, exps)
        new["others"] = state["others"] * scale + jnp.sum(others, axis=over)
        new["squares"] = state["squares"] * scale * scale + jnp.sum(others * others, axis=over)
    if "larger" in state:
        assert own is not None
        new["larger"] = state["larger"] + jnp.sum(z > own[..., None, None], axis=over).astype(jnp.float32)
    return new


def label_logit(z: jax.Array, ids: jax.Array, labels: jax.Array) -> jax.Array:
    """The label's logit [B, C] if the block has it, else 0: a masked sum, which a sharded vocabulary allows."""
    return jnp.sum(jnp.where(ids == labels[..., None, None], z, 0.0), axis=(2, 3))


def finish(state: State, want: Sequence[str]) -> dict[str, jax.Array]:
    """The statistics [B, C] once all blocks are in; what they are is said at `head.token_stats`."""
    log_sum = jnp.log(state["sum"])
    found = {}
    if "label_logp" in want:
        found["label_logp"] = state["label"] - state["max"] - log_sum
    if "entropy" in want:
        found["entropy"] = log_sum - state["weighted"] / state["sum"]
    if "margin" in want:
        found["margin"] = (1.0 - jnp.exp(state["second"] - state["max"])) / state["sum"]
    if "error_norm" in want:
        # sum p^2 - 2 p_y + 1 = (1 - p_y)^2 + sum_{v != y} p_v^2, and 1 - p_y as a sum: nothing cancels where p_y is near 1
        found["error_norm"] = jnp.sqrt(state["others"] ** 2 + state["squares"]) / state["sum"]
    if "label_rank" in want:
        found["label_rank"] = 1.0 + state["larger"]
    return found
