"""Hashes and checksums of sharded parameters that never hold the whole model on one host."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

_PRIMES = (2654435761, 2246822519, 3266489917, 668265263)


def params_hash(params: Any, mesh: jax.sharding.Mesh) -> str:
    """SHA-256 over a nested dict of arrays: path, dtype, shape and bytes of every leaf, sorted by path.

    Equal to `artifact.tree_hash` of the gathered tree, and independent of mesh and processes. A leaf whose axis 0 is not
    sharded (layers are stacked there) is gathered one layer at a time, any other leaf by itself.
    Every process must call this; all return the same hash.
    """
    with jax.set_mesh(mesh):
        gather = jax.jit(lambda x: jax.reshard(x, P()))
        pick = jax.jit(lambda x, i: jax.reshard(jax.lax.dynamic_index_in_dim(x, i, keepdims=False), P()))
        digest = hashlib.sha256()
        for path, leaf in sorted(_leaves(params)):
            digest.update(f"{path}:{leaf.dtype}:{leaf.shape};".encode())
            spec = getattr(leaf.sharding, "spec", None)
            stacked = leaf.ndim > 1 and (not spec or spec[0] is None)
            pieces = (pick(leaf, i) for i in range(leaf.shape[0])) if stacked else (gather(leaf),)
            for piece in pieces:
                digest.update(np.ascontiguousarray(jax.device_get(piece)).tobytes())
    return digest.hexdigest()


def checksums(tree: Any) -> jax.Array:
    """One uint32 per leaf over its bits and their places, computed on the devices that hold it.

    Σ bits·factor modulo 2³², factor = (1 + Σ_d prime_d·index_d) made odd: a changed element, a zeroed block or swapped shards
    change it, another mesh does not. Call under jit and the mesh of `tree`. Leaves must be 32- or 16-bit.
    """
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).astype(jnp.uint32)
    factor = jnp.ones((1,) * x.ndim, jnp.uint32)
    for axis in range(x.ndim):
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        index = jnp.arange(x.shape[axis], dtype=jnp.uint32).reshape(shape)
        factor = factor + index * jnp.uint32(_PRIMES[axis % len(_PRIMES)])
    odd = factor | jnp.uint32(1)  # an even factor would lose the top bit, the sign
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, jax.Array]]:
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in _leaves(value, f"{prefix}/{key}")]
    return [(prefix, tree)]
