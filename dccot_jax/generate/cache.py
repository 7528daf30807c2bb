"""Device state of generation: slots, their key/value cache, and how a slot's columns are laid out.

Every layer keeps k and v as [S, K, C, H] for S slots. Columns 0..P-1 hold a slot's prompt, left-aligned. The remaining R
columns are a ring that all slots write together, one column per step, so that a step's write is one contiguous update;
a slot sees the columns written since it was filled. R is at least the longest answer, so a slot never meets itself.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dccot_jax.model.attention import NEGATIVE, soft_cap
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import batch_axes

State = dict[str, Any]

_LADDER = tuple(sorted({32, 48} | {size << k for size in (64, 96) for k in range(16)}))


def bucket(length: int) -> int:
    """Smallest of 32, 48, 64, 96, 128, 192, ... that holds `length`: few shapes, few compilations."""
    return next(size for size in _LADDER if size >= length)


def new_state(mc: ModelConfig, slots: int, prompt_columns: int, ring_columns: int, dtype: Any) -> State:
    """Empty slots. k, v: per layer [S, K, P + R, H]; the rest [S], int32, bool or (`entropy`) float32, `answer` [S, R], `step` a scalar."""
    shape = (slots, mc.num_kv_heads, prompt_columns + ring_columns, mc.head_dim)
    empty = {name: jnp.zeros(slots, jnp.int32) for name in ("token", "prompt_length", "new_tokens", "row_id")}
    return {
        **empty,
        "k": [jnp.zeros(shape, dtype) for _ in range(mc.num_layers)],
        "v": [jnp.zeros(shape, dtype) for _ in range(mc.num_layers)],
        "active": jnp.zeros(slots, bool),
        "entropy": jnp.zeros(slots, jnp.float32),  # summed over the tokens so far
        "answer": jnp.zeros((slots, ring_columns), jnp.int32),
        "step": jnp.zeros((), jnp.int32),
    }


def fill_slots(state: State, slots: jax.Array, ks: jax.Array, vs: jax.Array, fields: dict[str, jax.Array]) -> State:
    """Put prefilled rows into slots: ks, vs [L, B, T, K, H], slots [B] (an index past the end is dropped), fields [B, ...]."""
    length = ks.shape[2]

    def put(cache: jax.Array, new: jax.Array) -> jax.Array:
        return cache.at[slots, :, :length].set(jnp.swapaxes(new, 1, 2), mode="drop")

    filled = {name: state[name].at[slots].set(value, mode="drop") for name, value in fields.items()}
    ks_new = [put(cache, ks[layer]) for layer, cache in enumerate(state["k"])]
    vs_new = [put(cache, vs[layer]) for layer, cache in enumerate(state["v"])]
    return {**state, **filled, "k": ks_new, "v": vs_new}


def visible(state: State, window: int = 0) -> jax.Array:
    """Boolean [S, P + R]: the columns that each slot's newest token sees, its own among them; of a layer with a window (0: none)."""
    columns, ring = state["k"][0].shape[2], state["answer"].shape[1]
    column, length, made = jnp.arange(columns - ring)[None], state["prompt_length"][:, None], state["new_tokens"][:, None]
    prompt = column < length
    age = (state["step"] - jnp.arange(ring)) % ring
    if window:
        prompt, made = prompt & (length + made - 1 - column < window), jnp.minimum(made, window)
    return jnp.concatenate([prompt, age[None] < made], axis=1)


def write_column(cache: jax.Array, new: jax.Array, state: State) -> jax.Array:
    """Write new [S, 1, K, H] into this step's ring column."""
    ring = state["answer"].shape[1]
    column = cache.shape[2] - ring + state["step"] % ring
    return jax.lax.dynamic_update_slice(cache, jnp.swapaxes(new, 1, 2), (0, 0, column, 0))


def attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float, softcap: float = 0.0) -> jax.Array:
    """One query per slot: q [S, 1, K, G, H], k and v [S, K, C, H], mask [S, C] -> [S, 1, K, G, H]; scores and softmax in float32."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    options: Any = {"precision": precision, "preferred_element_type": jnp.float32}
    scores = soft_cap(jnp.einsum("skgh,skch->skgc", q[:, 0], k, **options) * scale, softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, NEGATIVE), axis=-1).astype(q.dtype)
    return jnp.einsum("skgc,skch->skgh", weights, v, **options).astype(q.dtype)[:, None]


def state_shardings(mc: ModelConfig, mesh: Mesh, slots: int) -> State:
    """Caches are spread over the mesh (slots over the batch axes, heads over `tensor`); all that the host reads is replicated."""
    heads = "tensor" if mc.num_kv_heads % mesh.shape["tensor"] == 0 else None
    spread = NamedSharding(mesh, P(batch_axes(slots, mesh), heads, None, None))
    abstract = jax.eval_shape(lambda: new_state(mc, slots, 1, 1, jnp.float32))
    return jax.tree.map(lambda x: spread if x.ndim == 4 else NamedSharding(mesh, P()), abstract)


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices with Auto axes: scatters into slots are left to the compiler, `state_shardings` pins the results."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
