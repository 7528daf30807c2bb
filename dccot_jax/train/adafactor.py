"""Adafactor (arXiv 1804.04235): second moments of a matrix kept as one row and one column of means.

Written for stacks of layers: a layer's matrix is factored, and its update clipped, by itself. The factors are laid out as
the parameter's rows and columns, so no statistic is replicated that its parameter shards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

DECAY = 0.8  # of the second moments: 1 - n^-0.8 at update n
FLOOR = 1e-30  # added to squared gradients
CLIP = 1.0  # largest root mean square of a layer's update


class Factored(NamedTuple):
    """Second moments of one leaf: means over columns [.., m] and over rows [.., n], or `full` where the leaf has no matrix."""

    rows: Any
    columns: Any
    full: Any


class AdafactorState(NamedTuple):
    """Updates so far, and a `Factored` per parameter."""

    count: jax.Array
    moments: Any


def scale_by_adafactor(stacked: str = "layers") -> optax.GradientTransformation:
    """Gradient over the root of its factored second moment, clipped; to be multiplied by a learning rate like AdamW's.

    With v = β·v + (1 - β)·(g² + 1e-30), β = 1 - n^-0.8, and v̂ of a matrix = rows ⊗ columns / mean(rows) (Algorithm 4, without
    relative step sizes and without scaling by the parameter, as transformers uses it): update = g / √v̂ / max(1, rms(g / √v̂)).

    Args:
      stacked: key of the subtree whose leaves have one more dimension in front, over which nothing is averaged.
    """

    def init(params: Any) -> AdafactorState:
        def moments(path: Any, p: jax.Array) -> Factored:
            none = jnp.zeros((), jnp.float32)
            zero = jnp.zeros_like(p, dtype=jnp.float32)
            if not _is_matrix(p, _depth(path, stacked)):
                return Factored(none, none, zero)
            return Factored(jnp.mean(zero, axis=-1), jnp.mean(zero, axis=-2), none)  # means, so that they are sharded as they will be

        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(moments, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        del params
        count = state.count + 1
        beta = 1.0 - count.astype(jnp.float32) ** -DECAY

        def leaf(path: Any, g: jax.Array, old: Factored) -> tuple[jax.Array, Factored]:
            depth = _depth(path, stacked)
            square = jnp.square(g) + FLOOR
            if _is_matrix(g, depth):
                rows = beta * old.rows + (1.0 - beta) * jnp.mean(square, axis=-1)
                columns = beta * old.columns + (1.0 - beta) * jnp.mean(square, axis=-2)
                share = rows / jnp.mean(rows, axis=-1, keepdims=True)
                scaled = g * jax.lax.rsqrt(share)[..., :, None] * jax.lax.rsqrt(columns)[..., None, :]
                new = Factored(rows, columns, old.full)
            else:
                full = beta * old.full + (1.0 - beta) * square
                scaled, new = g * jax.lax.rsqrt(full), Factored(old.rows, old.columns, full)
            size = jnp.sqrt(jnp.mean(jnp.square(scaled), axis=tuple(range(depth, g.ndim)), keepdims=True))
            return scaled / jnp.maximum(1.0, size / CLIP), new

        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        pairs = [leaf(path, g, old) for (path, g), old in zip(leaves, tree.flatten_up_to(state.moments), strict=True)]
        return tree.unflatten([u for u, _ in pairs]), AdafactorState(count, tree.unflatten([m for _, m in pairs]))

    return optax.GradientTransformation(init, update)


def _depth(path: Any, stacked: str) -> int:
    """Leading dimensions over which nothing is averaged."""
    return int(any(getattr(part, "key", None) == stacked for part in path))


def _is_matrix(x: jax.Array, depth: int) -> bool:
    return x.ndim - depth >= 2
