"""Products with float32 accumulation and a backward pass that stays in the compute dtype.

Autodiff would transpose the operands of the weight gradient, which CPUs run many times slower in bfloat16, and would
multiply float32 cotangents with bfloat16 operands. The rule here writes both gradients as plain einsums of operands in
the layout they already have, and scatters a weight's gradient directly into the sharding the weight is stored in: left to
itself, the partitioner sums it whole on every device and then cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from dccot_jax.model.sharding import explicit_mesh, reshard
from dccot_jax.model.streams import Rows, to_rows
from dccot_jax.model.taps import Measure, Tapped

SAVED = "linear_out"  # name of the values that the remat policy "dots" keeps


def linear(x: jax.Array, w: jax.Array | Tapped, *, use: P | None = None, out: P | None = None) -> jax.Array:
    """x [B, T, D] times w [D, F] -> [B, T, F] in the dtype of x; float32 accumulation.

    Args:
      w: stored parameter of any float dtype, cast to x.dtype, then resharded to `use` (the FSDP gather); tapped, each row's
        gradient goes to its measure.
      use: spec of w at the point of use, or None outside a mesh. out: spec of the result.
    """
    if isinstance(w, Tapped):
        return checkpoint_name(_tapped(use, out, w.measure, x, w.weight, w.probe, w.aux, w.rows), SAVED)
    return checkpoint_name(contract("btd,df->btf", x, w, use=use, out=out, dtype=x.dtype), SAVED)


def contract(
    subscripts: str, a: jax.Array, b: jax.Array, *, use: P | None = None, out: P | None = None, dtype: Any = jnp.float32
) -> jax.Array:
    """einsum of two operands in a's dtype, accumulated in float32 and returned as `dtype`.

    Every index of an operand must occur in the result or in the other operand. See `linear` for `use` and `out`.
    """
    return _contract(subscripts, use, out, jnp.dtype(dtype), a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _contract(subscripts: str, use: P | None, out: P | None, dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return dot(subscripts, a, reshard(b.astype(a.dtype), use), out).astype(dtype)


def _forward(subscripts: str, use: P | None, out: P | None, dtype: Any, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return _contract(subscripts, use, out, dtype, a, b), (a, b)


def _backward(subscripts: str, use: P | None, out: P | None, dtype: Any, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    inputs, result = subscripts.split("->")
    first, second = inputs.split(",")
    g = g.astype(a.dtype)
    da = dot(f"{result},{second}->{first}", g, reshard(b.astype(a.dtype), use), _spec_of(a))
    db = _scattered(f"{first},{result}->{second}", a, g, _spec_of(b))
    return da.astype(a.dtype), db.astype(b.dtype)


_contract.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tapped(
    use: P | None, out: P | None, measure: Measure, x: jax.Array, w: jax.Array, probe: jax.Array, aux: Any, rows: Rows
) -> jax.Array:
    return dot("btd,df->btf", x, reshard(w.astype(x.dtype), use), out).astype(x.dtype)


def _tapped_forward(
    use: P | None, out: P | None, measure: Measure, x: jax.Array, w: jax.Array, probe: jax.Array, aux: Any, rows: Rows
) -> tuple[jax.Array, Any]:
    return _tapped(use, out, measure, x, w, probe, aux, rows), (x, w, aux, rows)


def _tapped_backward(use: P | None, out: P | None, measure: Measure, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    x, w, aux, rows = saved
    g = g.astype(x.dtype)
    dx = dot("btf,df->btd", g, reshard(w.astype(x.dtype), use), _spec_of(x))
    return dx.astype(x.dtype), None, measure.product(to_rows(x, rows), to_rows(g, rows), aux), None, None


_tapped.defvjp(_tapped_forward, _tapped_backward)


def dot(subscripts: str, a: jax.Array, b: jax.Array, out: P | None) -> jax.Array:
    """einsum with a float32 result in spec `out`."""
    # float32 asked for is float32 given, also where the hardware's default is a faster format.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32, out_sharding=out)


class Once(NamedTuple):
    """A weight that many products of one scan share: gathered once, its gradient summed over the devices once.

    Attributes:
      weight: in the compute dtype, in the spec of its use; carries no gradient.
      slot: float32 [S, ...] of which each of the S devices along the rows holds one; never read, its cotangent is their gradients.
        The stored weight itself where S = 1.
    """

    weight: jax.Array
    slot: jax.Array


def gather_once(w: jax.Array, like: jax.Array, use: P | None) -> tuple[Once, jax.Array]:
    """`w` for `contract_once` with operands in the dtype and in the rows' sharding of `like` [B, ...], and `like` to take them from.

    The weight is gathered when `like` is there, and its gradient is summed before what made `like` is differentiated; else compilers
    gather it ahead of a scan over micro-batches, and keep whole gradients through the backward pass of the layers.
    """
    axes = _axes(_spec_of(like), 0)
    if _devices(axes) == 1:
        return Once(jax.lax.stop_gradient(w).astype(like.dtype), w), like
    w, like = _together(w, like)
    return Once(reshard(jax.lax.stop_gradient(w).astype(like.dtype), use), _slot(axes, use, w)), like


@jax.custom_vjp
def _together(w: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.optimization_barrier((w, like))


_together.defvjp(lambda w, like: (_together(w, like), None), lambda _, g: jax.lax.optimization_barrier(g))


def contract_once(subscripts: str, a: jax.Array, once: Once, *, out: P | None = None) -> jax.Array:
    """`contract` with a shared weight; a's first index is that of the rows. Float32."""
    return _contract_once(subscripts, out, a, once)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract_once(subscripts: str, out: P | None, a: jax.Array, once: Once) -> jax.Array:
    return dot(subscripts, a, once.weight, out)


def _once_forward(subscripts: str, out: P | None, a: jax.Array, once: Once) -> tuple[jax.Array, Any]:
    return _contract_once(subscripts, out, a, once), (a, once)


def _once_backward(subscripts: str, out: P | None, saved: Any, g: jax.Array) -> tuple[jax.Array, Once]:
    a, once = saved
    inputs, result = subscripts.split("->")
    first, second = inputs.split(",")
    g = g.astype(a.dtype)
    da = dot(f"{result},{second}->{first}", g, once.weight, _spec_of(a))
    own = f"{first},{result}->{second}"
    if once.slot.ndim == once.weight.ndim:
        db = dot(own, a, g, _spec_of(once.slot))
    else:
        db = jax.shard_map(lambda a, g: dot(own, a, g, None)[None], in_specs=(_spec_of(a), _spec_of(g)), out_specs=_spec_of(once.slot))(
            a, g
        )
    return da.astype(a.dtype), Once(jnp.zeros_like(once.weight), db.astype(once.slot.dtype))


_contract_once.defvjp(_once_forward, _once_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _slot(axes: tuple[str, ...], use: P, w: jax.Array) -> jax.Array:
    return reshard(jnp.zeros((_devices(axes), *w.shape), jnp.float32), P(axes, *use))


def _slot_forward(axes: tuple[str, ...], use: P, w: jax.Array) -> tuple[jax.Array, Any]:
    return _slot(axes, use, w), w


def _slot_backward(axes: tuple[str, ...], use: P, w: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    stored = jax.typeof(w).sharding.spec
    summed = P(*(kept if kept in axes else used for kept, used in zip(stored, use, strict=True)))  # only summed axes can be scattered over
    return (reshard(_summed(lambda g: g[0], axes, (P(axes, *use),), summed)(g), stored).astype(w.dtype),)


_slot.defvjp(_slot_forward, _slot_backward)


def _scattered(subscripts: str, a: jax.Array, g: jax.Array, out: P | None) -> jax.Array:
    """`dot` whose sum over devices is scattered into `out` where it can be."""
    inputs, result = subscripts.split("->")
    letters = inputs.split(",")[0]
    summed = tuple(axis for i, letter in enumerate(letters) if letter not in result for axis in _axes(_spec_of(a), i))
    if out is None or _devices(axis for axis in out if axis in summed) == 1:
        return dot(subscripts, a, g, out)
    return _summed(lambda a, g: dot(subscripts, a, g, None), summed, (_spec_of(a), _spec_of(g)), out)(a, g)


def _summed(f: Callable[..., jax.Array], axes: Sequence[str], specs: tuple[P | None, ...], out: P) -> Callable[..., jax.Array]:
    """The sum over mesh `axes` of every device's own f(...) of arrays in `specs`, scattered into `out` where that has these axes."""
    shared = [axis for axis in axes if _devices((axis,)) > 1]

    def local(*arrays: jax.Array) -> jax.Array:
        x, rest = f(*arrays), list(shared)
        for i, axis in enumerate(out):
            if axis in rest:
                x = jax.lax.psum_scatter(x, axis, scatter_dimension=i, tiled=True)
                rest.remove(axis)
        return jax.lax.psum(x, rest) if rest else x

    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)  # unchecked: axes of one device are not summed


def _axes(spec: P | None, i: int) -> tuple[str, ...]:
    """Mesh axes over which dimension i of an array in `spec` is laid out."""
    names = None if spec is None else spec[i]
    return (names,) if isinstance(names, str) else names or ()


def _devices(axes: Iterable[str]) -> int:
    return math.prod(explicit_mesh().shape[axis] for axis in axes)


def _spec_of(x: jax.Array) -> P | None:
    return jax.typeof(x).sharding.spec if explicit_mesh() is not None else None
