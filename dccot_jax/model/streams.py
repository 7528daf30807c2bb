"""Rows inside streams: everything that is per token runs over the stream, without padding; attention and gradients by row.

Shapes: B streams of N tokens, S rows of at most T tokens in each. A row's tokens stand in one piece of a stream. Going from
one form to the other is a gather in both directions, and so is the backward pass of either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from dccot_jax.model.sharding import explicit_mesh


class Rows(NamedTuple):
    """Where the rows of streams stand.

    Attributes:
      index: int32 [B, S, T], the token of the stream that is a row's token t; anything past its end. real: bool [B, S, T].
      back: int32 [B, N], s·T + t of every token; anything in the stream's padding.
    """

    index: jax.Array
    real: jax.Array
    back: jax.Array


@jax.custom_vjp
def to_rows(x: jax.Array, rows: Rows) -> jax.Array:
    """x [B, N, ...] -> [B·S, T, ...], zeros past a row's end."""

    def local(x: jax.Array, index: jax.Array, real: jax.Array) -> jax.Array:
        streams, _, length = index.shape
        first = jnp.arange(streams, dtype=index.dtype)[:, None, None] * x.shape[1]
        found = x.reshape(-1, *x.shape[2:])[(index + first).reshape(-1, length)]
        return jnp.where(real.reshape(-1, length, *(1,) * (x.ndim - 2)), found, jnp.zeros((), x.dtype))

    return _per_device(local, x, rows.index, rows.real)


@jax.custom_vjp
def to_stream(y: jax.Array, rows: Rows) -> jax.Array:
    """y [B·S, T, ...] -> [B, N, ...]; values in the stream's padding are meaningless and finite."""

    def local(y: jax.Array, back: jax.Array) -> jax.Array:
        streams = len(back)
        flat = y.reshape(-1, *y.shape[2:])
        return flat[back + jnp.arange(streams, dtype=back.dtype)[:, None] * (len(flat) // streams)]

    return _per_device(local, y, rows.back)


# A token has one place in either form, so the transpose of a gather is the other gather. What comes back to the stream's padding is
# not zero, and is never read: no token sees it, and it is in no row.
to_rows.defvjp(lambda x, rows: (to_rows(x, rows), rows), lambda rows, g: (to_stream(g, rows), None))
to_stream.defvjp(lambda y, rows: (to_stream(y, rows), rows), lambda rows, g: (to_rows(g, rows), None))


def _per_device(local: Any, x: jax.Array, *arrays: jax.Array) -> jax.Array:
    """`local` on each device's own streams; the layout of x is kept."""
    if explicit_mesh() is None:
        return local(x, *arrays)
    batch, *rest = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]
    arrays = tuple(jax.reshard(a, P(batch, *(None,) * (a.ndim - 1))) for a in arrays)
    return jax.shard_map(local, out_specs=P(batch, *rest))(x, *arrays)
