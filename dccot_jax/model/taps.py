"""Weights that report their gradient row by row: each row's gradient is reduced to a few numbers where it arises.

Put a `Tapped` in the place of a weight, run the decoder over streams of rows (`decoder.forward_rows`), and differentiate with
respect to its `probe`: the probe adds nothing to the forward pass, and its cotangent is what `measure` makes of each row's
own gradient of that weight. No gradient is summed over rows, and no row's gradient outlives the layer it belongs to. Under a
scan over layers all fields are stacked but `rows`, which the decoder attaches.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dccot_jax.model.sharding import activation_spec, explicit_mesh
from dccot_jax.model.streams import Rows, to_rows


class Measure(Protocol):
    """What becomes of a row's gradient; hashable, so that a program is compiled once for it. K = `width` numbers per row."""

    @property
    def width(self) -> int: ...

    def product(self, x: jax.Array, g: jax.Array, aux: Any) -> jax.Array:
        """[R, K] float32 of the gradients sum_t x_t g_t^T, with x [R, T, D] and g [R, T, F]; both are 0 past a row's end."""
        ...

    def vector(self, grad: jax.Array, aux: Any) -> jax.Array:
        """[R, K] float32 of the gradients [R, D] of a norm's scale or of a bias."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "probe", "aux", "rows"], meta_fields=["measure"])
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A weight [D, F] or [D] as stored, its probe (zeros [R, K], float32), what the measure reads beside the gradient, the R rows."""

    weight: jax.Array
    probe: jax.Array
    aux: Any
    measure: Measure
    rows: Rows | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "nudge"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Nudged:
    """An embedding table [V, D] to whose looked-up rows `nudge` [B, T, D] (zeros) is added: its cotangent is their gradient."""

    weight: jax.Array
    nudge: jax.Array


def attach(tree: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """`tree` with the rows in its tapped weights."""
    return {name: dataclasses.replace(w, rows=rows) if isinstance(w, Tapped) else w for name, w in tree.items()}


def per_row(w: Any, x: jax.Array) -> jax.Array:
    """A vector [D] to be broadcast over x [B, N, ..., D]: itself, or where it is tapped one copy per token, [B, N, 1, ..., D]."""
    return _copies(x.shape[:2], x.ndim, w.measure, w.weight, w.probe, w.aux, w.rows) if isinstance(w, Tapped) else w


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _copies(tokens: tuple[int, int], ndim: int, measure: Measure, w: jax.Array, probe: jax.Array, aux: Any, rows: Rows) -> jax.Array:
    ones = (1,) * (ndim - 3)
    axis = jax.typeof(w).sharding.spec[0] if explicit_mesh() is not None else None
    spec = activation_spec(tokens[0], None, *(None for _ in ones), axis)
    return jax.lax.broadcast_in_dim(w, (*tokens, *ones, w.shape[0]), (ndim - 1,), out_sharding=spec)


def _copies_forward(
    tokens: tuple[int, int], ndim: int, measure: Measure, w: jax.Array, probe: jax.Array, aux: Any, rows: Rows
) -> tuple[jax.Array, Any]:
    return _copies(tokens, ndim, measure, w, probe, aux, rows), (aux, rows)


def _copies_backward(tokens: tuple[int, int], ndim: int, measure: Measure, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    aux, rows = saved
    own = to_rows(jnp.squeeze(g, axis=tuple(range(2, ndim - 1))).astype(jnp.float32), rows)
    return None, measure.vector(jnp.sum(own, axis=1), aux), None, None


_copies.defvjp(_copies_forward, _copies_backward)
