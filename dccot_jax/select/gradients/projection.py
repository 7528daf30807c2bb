"""A random projection that is never stored: every block of its matrix is made from (seed, weight, layer, block) where it is used.

R [P, dim] has independent entries of mean 0 and variance 1, so E <R^T a, R^T b> / dim = <a, b>, with a relative error of about
1/sqrt(dim) (Johnson-Lindenstrauss). Entry (i, j) hangs on the seed, the weight's name, the layer, i and j alone: not on `dim`
(a smaller one is a prefix), the rows of a batch, the devices or the backend: the generator is threefry, a function of a counter.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from dccot_jax.model.linear import dot
from dccot_jax.model.sharding import activation_spec

KINDS = ("rademacher", "normal")
BLOCK = 512  # parameters of one block; another value is another matrix
WORD = 32  # outputs whose signs one random word holds


def weight_key(seed: int, name: str, layer: jax.Array | int) -> jax.Array:
    """Key of one weight of one layer; `layer` is 0 for weights outside the layers."""
    root = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), layer)


def block(key: jax.Array, index: jax.Array | int, dim: int, kind: str) -> jax.Array:
    """R^T of parameters index·BLOCK to (index + 1)·BLOCK - 1 of a weight: float32 [dim, BLOCK], signs or normals."""
    own = jax.random.fold_in(key, index)
    if kind == "normal":
        return jax.random.normal(own, (dim, BLOCK), jnp.float32)
    words = jax.random.bits(own, (dim // WORD, 1, BLOCK), jnp.uint32)
    bits = (words >> jnp.arange(WORD, dtype=jnp.uint32)[None, :, None]) & 1
    return (1.0 - 2.0 * bits.astype(jnp.float32)).reshape(dim, BLOCK)


def project(values: jax.Array, key: jax.Array, first: jax.Array | int, dim: int, kind: str) -> jax.Array:
    """R^T v of values [B, n], parameters first·BLOCK onwards of a weight -> float32 [B, dim]; not yet divided by sqrt(dim)."""
    rows, length = values.shape
    spec = activation_spec(rows, None)
    count = -(-length // BLOCK)
    padded = jnp.pad(values, ((0, 0), (0, count * BLOCK - length)))

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, i * BLOCK, BLOCK, axis=1)
        return total + dot("bn,jn->bj", part, block(key, first + i, dim, kind), spec)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((rows, dim), jnp.float32, out_sharding=spec))
