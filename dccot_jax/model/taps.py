"""Weights that report their gradient row by row: each row's gradient is reduced to a few numbers where it arises.

Put a `Tapped` in the place of a weight and differentiate with respect to its `probe`: the probe adds nothing to the
forward pass, and its cotangent is what `measure` makes of each row's own gradient of that weight. No gradient is summed
over rows, and no row's gradient outlives the layer it belongs to. Under a scan over layers all fields are stacked.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dccot_jax.model.sharding import activation_spec, explicit_mesh


class Measure(Protocol):
    """What becomes of a row's gradient; hashable, so that a program is compiled once for it. K = `width` numbers per row."""

    @property
    def width(self) -> int: ...

    def product(self, x: jax.Array, g: jax.Array, aux: Any) -> jax.Array:
        """[B, K] float32 of the gradients sum_t x_t g_t^T, with x [B, T, D] and g [B, T, F]."""
        ...

    def vector(self, grad: jax.Array, aux: Any) -> jax.Array:
        """[B, K] float32 of the gradients [B, D] of a norm's scale or of a bias."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "probe", "aux"], meta_fields=["measure"])
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A weight [D, F] or [D] as stored, its probe (zeros [B, K], float32), what the measure reads beside the gradient."""

    weight: jax.Array
    probe: jax.Array
    aux: Any
    measure: Measure


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "nudge"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Nudged:
    """An embedding table [V, D] to whose looked-up rows `nudge` [B, T, D] (zeros) is added: its cotangent is their gradient."""

    weight: jax.Array
    nudge: jax.Array


def per_row(w: Any, x: jax.Array) -> jax.Array:
    """A vector [D] to be broadcast over x [B, ..., D]: itself, or where it is tapped one copy per row, [B, 1, ..., D]."""
    return _copies(x.ndim, w.measure, w.weight, w.probe, w.aux) if isinstance(w, Tapped) else w


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _copies(ndim: int, measure: Measure, w: jax.Array, probe: jax.Array, aux: Any) -> jax.Array:
    rows = probe.shape[0]
    shape = (rows, *(1,) * (ndim - 2), w.shape[0])
    axis = jax.typeof(w).sharding.spec[0] if explicit_mesh() is not None else None
    return jax.lax.broadcast_in_dim(w, shape, (ndim - 1,), out_sharding=activation_spec(rows, *(None,) * (ndim - 2), axis))


def _copies_forward(ndim: int, measure: Measure, w: jax.Array, probe: jax.Array, aux: Any) -> tuple[jax.Array, Any]:
    return _copies(ndim, measure, w, probe, aux), aux


def _copies_backward(ndim: int, measure: Measure, aux: Any, g: jax.Array) -> tuple[Any, ...]:
    grad = jnp.squeeze(g, axis=tuple(range(1, ndim - 1))).astype(jnp.float32)
    return None, measure.vector(grad, aux), None


_copies.defvjp(_copies_forward, _copies_backward)
