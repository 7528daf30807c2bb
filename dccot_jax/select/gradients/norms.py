"""`grand`: the norm of each row's gradient (GraNd, Paul et al., arXiv 2107.07075), for all weights or some of them.

GraNd(z) = || d loss(z) / d theta ||_2, the loss of a row as in `rows.py`. Two forms that must agree:

- ghost (Goodfellow, arXiv 1510.01799; for sequences Li et al., arXiv 2110.05679, section 4): one backward pass for all rows
  of a tile. With a_t the input and e_t the back-propagated error of a linear layer at position t, its squared gradient norm is
      || sum_t a_t e_t^T ||^2 = sum_{t,t'} <a_t, a_t'> <e_t, e_t'>,
  from the two T x T products or from the D x F one, whichever takes fewer multiplications. A tied table gets both its
  gradients, as embedding and as head, and their product.
- exact: the gradient of one row after the other, its squares summed. One full gradient exists at a time, laid out as the
  parameters are. Slow, and nothing in it knows how a layer is made: what the ghost form is checked against.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from dccot_jax.model.attention import soft_cap
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.head import logit_error
from dccot_jax.model.linear import dot
from dccot_jax.model.sharding import BATCH, activation_spec, explicit_mesh, reshard
from dccot_jax.select.gradients.rows import Arrays, Backward, backward, by_stream, padded_rows, row_losses
from dccot_jax.select.gradients.subset import TABLES

_CHUNK_ELEMENTS = 1 << 24  # float32 logits of one chunk of the vocabulary, over all rows: 64 MiB
Program = Callable[[Any, Arrays], jax.Array]


@dataclasses.dataclass(frozen=True)
class SquaredNorm:
    """The measure of the ghost form: squared norms [B, 1]."""

    width: int = 1

    def product(self, x: jax.Array, g: jax.Array, aux: Any) -> jax.Array:
        del aux
        return _product_norms(x, g)[:, None]

    def vector(self, grad: jax.Array, aux: Any) -> jax.Array:
        del aux
        return jnp.sum(grad * grad, axis=-1)[:, None]


@functools.lru_cache(maxsize=8)
def make_ghost(mc: ModelConfig, names: tuple[str, ...], compute_dtype: str, remat: str) -> Program:
    """The jitted function (params, arrays of `layout.stream_arrays`) -> gradient norms [B, S, 1]; call it under a mesh.

    `names`: weights that count, of `subset.weight_names`.
    """

    @jax.jit
    def program(params: Any, x: Arrays) -> jax.Array:
        squares = weight_squares(params, mc, x, names, compute_dtype=compute_dtype, remat=remat)
        return by_stream(jnp.sqrt(jnp.maximum(functools.reduce(jnp.add, squares.values()), 0.0))[:, None], x)

    return program


def weight_squares(
    params: Any, mc: ModelConfig, x: Arrays, names: Sequence[str], *, compute_dtype: str, remat: str
) -> dict[str, jax.Array]:
    """{weight: squared norm of each row's gradient, [R] float32, over all layers} by the ghost form; one backward pass."""
    measures = {name: (SquaredNorm(), ()) for name in names if name not in TABLES}
    found = backward(params, mc, x, measures, compute_dtype=compute_dtype, remat=remat)
    squares = {name: jnp.sum(report[..., 0], axis=0) if report.ndim == 3 else report[:, 0] for name, report in found.reports.items()}
    if "embed" in names:
        squares["embed"] = _lookup_norms(found.tokens, found.rows_error)
    name = "embed" if mc.tie_embeddings else "head"
    if name in names:
        table = _whole(params["embed"] if mc.tie_embeddings else params["head"].T)
        normaliser = _log_normaliser(table, found.hidden, mc.final_softcap)
        own = _head_norms(table, found.hidden, normaliser, found.labels, found.weights, mc.final_softcap)
        squares[name] = squares[name] + own + 2 * _both_ends(table, found, normaliser, mc.final_softcap) if mc.tie_embeddings else own
    return squares


@functools.lru_cache(maxsize=8)
def make_exact(mc: ModelConfig, names: tuple[str, ...], compute_dtype: str, remat: str) -> Program:
    """As `make_ghost`, by one full gradient per row; every device works on every row."""

    @jax.jit
    def program(params: Any, x: Arrays) -> jax.Array:
        chosen = {name: weight for name, weight in params.items() if name in names}
        layers = {name: weight for name, weight in params["layers"].items() if name in names}

        def loss(part: Any, row: Arrays) -> jax.Array:
            whole = params | part[0] | {"layers": params["layers"] | part[1]}
            return row_losses(whole, mc, row, compute_dtype=compute_dtype, remat=remat)

        def norm(row: Arrays) -> jax.Array:
            grads = jax.grad(loss)((chosen, layers), {name: value[None] for name, value in row.items()})
            return jnp.sqrt(sum(jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in jax.tree.leaves(grads)))

        rows = padded_rows(x)
        if explicit_mesh() is not None:
            rows = {name: jax.reshard(value, P(None, None)) for name, value in rows.items()}
        return by_stream(jax.lax.map(norm, rows)[:, None], x)

    return program


# --- squared norms of one weight's gradient, per row ----------------------------------------------------------------------


def _product_norms(x: jax.Array, g: jax.Array) -> jax.Array:
    """|| sum_t x_t g_t^T ||^2 per row: x [B, T, D], g [B, T, F] -> [B]."""
    batch, length, d = x.shape
    f = g.shape[-1]
    if length * (d + f) < d * f:
        pairs = activation_spec(batch, None, None)
        return jnp.sum(dot("btd,bsd->bts", x, x, pairs) * dot("btf,bsf->bts", g, g, pairs), axis=(1, 2))
    spec = None if explicit_mesh() is None else activation_spec(batch, _last(x), _last(g))
    return jnp.sum(jnp.square(dot("btd,btf->bdf", x, g, spec)), axis=(1, 2))


def _lookup_norms(tokens: jax.Array, error: jax.Array) -> jax.Array:
    """The embedding's gradient sums the errors [B, T, D] of equal tokens: sum over t, t' with one token of <e_t, e_t'>, [B]."""
    same = tokens[:, :, None] == tokens[:, None, :]
    pairs = dot("btd,bsd->bts", error, error, activation_spec(len(tokens), None, None))
    return jnp.sum(jnp.where(same, pairs, 0.0), axis=(1, 2))


def _log_normaliser(table: jax.Array, hidden: jax.Array, cap: float) -> jax.Array:
    """log sum_v exp(soft_cap(h W_v^T)) of table W [V, D] and hidden [B, C, D], over chunks of the vocabulary, float32 [B, C]."""

    def step(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        z = _chunk_logits(table, hidden, *part, cap)
        top = jnp.maximum(carry[0], jnp.max(z, axis=-1))
        return (top, carry[1] * jnp.exp(carry[0] - top) + jnp.sum(jnp.exp(z - top[..., None]), axis=-1)), None

    blank = _zeros(hidden.shape[:2])
    (top, total), _ = jax.lax.scan(step, (blank - 1e30, blank), _vocabulary_chunks(table, hidden))
    return top + jnp.log(total)


def _head_norms(table: jax.Array, hidden: jax.Array, normaliser: jax.Array, labels: jax.Array, weights: jax.Array, cap: float) -> jax.Array:
    """|| sum_c d_c h_c^T ||^2 per row, over chunks of the vocabulary, [B]; d_c = d loss / d (h_c W^T), see `head.logit_error`.

    Args:
      table: W [V, D]. hidden: h, [B, C, D]. normaliser: [B, C]. labels: [B, C]. weights: float32 [B, C]. cap: of the logits, or 0.
    """
    batch, positions, d = hidden.shape
    wide = hidden.astype(jnp.float32)
    spec = activation_spec(batch, None, None)

    def error(chunk: jax.Array, start: jax.Array) -> jax.Array:
        z = _chunk_logits(table, hidden, chunk, start, cap)
        return logit_error(z, start + jnp.arange(len(chunk)) == labels[..., None], normaliser[..., None], weights[..., None], cap)

    def by_pairs(carry: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        d_v = error(*part)
        return carry + dot("bcv,bsv->bcs", d_v, d_v, spec), None

    def by_product(carry: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return carry + jnp.sum(jnp.square(dot("bcv,bcd->bvd", error(*part), wide, spec)), axis=(1, 2)), None

    chunks = _vocabulary_chunks(table, hidden)
    if positions >= d:
        return jax.lax.scan(by_product, _zeros((batch,)), chunks)[0]
    pairs, _ = jax.lax.scan(by_pairs, _zeros((batch, positions, positions)), chunks)
    return jnp.sum(pairs * dot("bcd,bsd->bcs", wide, wide, spec), axis=(1, 2))


def _both_ends(table: jax.Array, found: Backward, normaliser: jax.Array, cap: float) -> jax.Array:
    """Inner product of a tied table's two gradients per row: sum over t, c of d_c[token_t] <h_c, e_t>, [B]; d as in `_head_norms`."""
    spec = activation_spec(len(found.tokens), None, None)
    looked_up = table[found.tokens] if spec is None else table.at[found.tokens].get(out_sharding=spec)
    z = soft_cap(dot("bcd,btd->bct", found.hidden, looked_up.astype(found.hidden.dtype), spec), cap)
    error = logit_error(z, found.tokens[:, None, :] == found.labels[:, :, None], normaliser[..., None], found.weights[..., None], cap)
    return jnp.sum(error * dot("bcd,btd->bct", found.hidden.astype(jnp.float32), found.rows_error, spec), axis=(1, 2))


def _chunk_logits(table: jax.Array, hidden: jax.Array, chunk: jax.Array, start: jax.Array, cap: float) -> jax.Array:
    """Capped logits [B, C, v] of one chunk of the table; minus infinity past its end."""
    z = dot("bcd,vd->bcv", hidden, chunk.astype(hidden.dtype), activation_spec(len(hidden), None, None))
    return jnp.where(start + jnp.arange(len(chunk)) < len(table), soft_cap(z, cap), -jnp.inf)


def _vocabulary_chunks(table: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A whole table [V, D] as zero-padded chunks [n, v, D], and the first token of each, int32 [n]."""
    shards = math.prod(explicit_mesh().shape[axis] for axis in BATCH) if explicit_mesh() is not None else 1
    size = min(len(table), max(128, _CHUNK_ELEMENTS * shards // math.prod(hidden.shape[:2])))
    count = -(-len(table) // size)
    padded = jnp.pad(table, ((0, count * size - len(table)), (0, 0)))
    return padded.reshape(count, size, -1), jnp.arange(count, dtype=jnp.int32) * size


def _whole(table: jax.Array) -> jax.Array:
    return reshard(table, None if explicit_mesh() is None else P(None, None))


def _zeros(shape: tuple[int, ...]) -> jax.Array:
    """Float32 zeros, the first axis over the batch axes."""
    return jnp.zeros(shape, jnp.float32, out_sharding=activation_spec(shape[0], *(None,) * (len(shape) - 1)))


def _last(x: jax.Array) -> Any:
    return jax.typeof(x).sharding.spec[-1]
