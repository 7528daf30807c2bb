"""What every attention backend computes, and how a kernel is run on the shards of a mesh.

Rows [B, T] hold segments, ids from 1, 0 is padding; a query sees a key iff both are of one segment, the key is not after the query,
and it is among the last w tokens, itself one of them, where the layer has a window w. Scores are scale · q·k, soft-capped where a cap
is given; the softmax is in float32. At padding the result is zero, and nothing flows back from there: values and gradients are finite
in rows that are padding throughout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dccot_jax.model.sharding import batch_axes, explicit_mesh, reshard

NO_WINDOW = 1 << 30  # further back than any sequence is long

# Rotated q [B, T, K, G, H], rotated k and v [B, T, K, H], the layer's own window (int32 scalar, NO_WINDOW: none) where layers differ in
# it, else None -> attended, shaped and typed like q.
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fixed for all layers of a model and all its rows.

    Attributes:
      scale: of the scores. softcap: 0: none.
      windows: the different windows of the layers, in tokens; 0: a layer without.
      packed: rows may hold several segments; else each holds one, from its first token on, and padding behind it.
    """

    scale: float
    softcap: float = 0.0
    windows: tuple[int, ...] = (0,)
    packed: bool = True


def by_window(form: Form, of_window: Callable[[int], Callable[..., jax.Array]]) -> Attention:
    """For kernels whose mask is part of the program: `of_window` makes the function of (q, k, v) for one window; where layers differ,
    the program holds one for each window and runs the layer's own."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array | None) -> jax.Array:
        if own is None:
            return of_window(form.windows[0])(q, k, v)
        found = jnp.stack([own == (window or NO_WINDOW) for window in form.windows])
        return jax.lax.switch(jnp.argmax(found), [of_window(window) for window in form.windows], q, k, v)

    return attention


def on_shards(kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *rows: jax.Array) -> jax.Array:
    """`kernel`(q, k, v, *rows) on each device's own rows and key/value heads; nothing is communicated.

    Args:
      q: [B, T, K, G, H]. k, v: [B, T, K, H]. rows: further arrays [B, ...].
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, *rows)
    if explicit_mesh() is not None:
        wide, narrow = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
    else:
        heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        wide = P(batch_axes(q.shape[0]), None, heads, None, None)
        narrow = P(*wide[:4])
    others = [P(wide[0], *(None,) * (x.ndim - 1)) for x in rows]
    if explicit_mesh() is not None:
        rows = tuple(reshard(x, spec) for x, spec in zip(rows, others, strict=True))
    # A kernel does not say on which axes its results vary, which the check would need.
    run = jax.shard_map(kernel, in_specs=(wide, narrow, narrow, *others), out_specs=wide, check_vma=False)
    return run(q, k, v, *rows)


def zero_padding(attended: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """attended [B, T, ...] with zeros where segment_ids [B, T] are 0; so is what flows back."""
    real = (segment_ids > 0).reshape(*segment_ids.shape, *(1,) * (attended.ndim - 2))
    return jnp.where(real, attended, jnp.zeros((), attended.dtype))


def pad_tokens(arrays: Sequence[jax.Array], multiple: int) -> list[jax.Array]:
    """Arrays [B, T, ...] with zeros behind axis 1 up to a multiple of `multiple`."""
    return [jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)]) if x.shape[1] % multiple else x for x in arrays]


def as_attention(kernel: Callable[..., jax.Array], form: Form, segment_ids: jax.Array) -> Attention:
    """The attention of `kernel`(q, k, v, segment_ids, window=w, form=form), which works on the rows of one device."""
    return by_window(form, lambda window: lambda q, k, v: on_shards(partial(kernel, window=window, form=form), q, k, v, segment_ids))
