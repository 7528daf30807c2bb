"""Products with float32 accumulation and a backward pass that stays in the compute dtype.

Autodiff would transpose the operands of the weight gradient, which CPUs run many times slower in bfloat16, and would
multiply float32 cotangents with bfloat16 operands. The rule here writes both gradients as plain einsums of operands in
the layout they already have, and reduces a weight's gradient directly into the sharding the weight is stored in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    db = dot(f"{first},{result}->{second}", a, g, _spec_of(b))
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


def _spec_of(x: jax.Array) -> P | None:
    return jax.typeof(x).sharding.spec if explicit_mesh() is not None else None
