"""Weight files to parameter leaves, block by block: a process reads its slices only, and holds little besides its leaves.

A leaf is made on its devices, empty, and filled in place: some rows of one tensor, as the file keeps them, go to the devices,
and a compiled program (`fill_program`) transposes and casts them into their place. Every device fills its own shard, so nothing
moves between devices. Host memory besides the leaves themselves: about two blocks, twice (one is read while another is placed).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_LEAST, _MOST = 1 << 20, 16 << 20  # bytes of a block


class Reader(Protocol):
    """Slices of named tensors, as torch keeps them."""

    @property
    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


def read_leaf(
    reader: Reader,
    names: Sequence[str],
    shape: tuple[int, ...],
    sharding: Any,
    dtype: Any,
    *,
    transposed: bool,
    block_bytes: int,
) -> jax.Array:
    """One parameter leaf of `dtype` in `sharding`; each distinct slice that this process's devices need is read once.

    Args:
      names: its tensors in the file: one per layer where `shape` is stacked, [L, ...], else one.
      transposed: ours is the transpose of each.
      block_bytes: of a block as read, all devices of this process together. A leaf whose shards on this process take no more is
        put together on the host instead.
    """
    held = {_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    if sum(math.prod(stop - start for start, stop in bounds) for bounds in held) * jnp.dtype(dtype).itemsize <= block_bytes:
        return _at_once(reader, names, shape, sharding, dtype, transposed)
    program = fill_program(sharding, len(shape), len(shape) - len(reader.shape(names[0])), transposed)
    leaf = jnp.zeros(shape, dtype, device=sharding)
    for layer, name in enumerate(names):
        for block, first in _blocks(reader, name, file_sharding(sharding, len(shape), len(reader.shape(name)), transposed), block_bytes):
            inner = (first,) + (0,) * (block.ndim - 1)
            start = (layer,) * (len(shape) - block.ndim) + (inner[::-1] if transposed else inner)
            leaf.block_until_ready()  # the block before is in its place: at most two are held
            leaf = program(leaf, block, np.array(start, np.int32))
    return leaf.block_until_ready()


def default_block_bytes(largest: int) -> int:
    """Block size for a model whose largest stacked leaf has so many bytes in the file: a few blocks are a quarter of that."""
    return min(max(largest // 16, _LEAST), _MOST)


@functools.lru_cache(maxsize=256)
def fill_program(sharding: Any, ndim: int, stacked: int, transposed: bool) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """(leaf, block, start) -> leaf with the block, as the file keeps it, transposed and cast into its place. The leaf is donated.

    start: int32 [ndim], where the block begins in each device's own shard. stacked: 1 if the leaf has a layer axis more, else 0.
    """

    def place(leaf: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
        ours = (block.T if transposed else block).astype(leaf.dtype)
        return jax.lax.dynamic_update_slice(leaf, ours.reshape((1,) * stacked + ours.shape), tuple(start))

    if isinstance(sharding, NamedSharding):
        theirs = file_sharding(sharding, ndim, ndim - stacked, transposed)
        specs = (sharding.spec, theirs.spec, P(None))
        place = jax.shard_map(place, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    return jax.jit(place, donate_argnums=0)


def file_sharding(sharding: Any, ndim: int, file_ndim: int, transposed: bool) -> Any:
    """The sharding of a leaf as that of one of its tensors in the file."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (tuple(sharding.spec) + (None,) * ndim)[ndim - file_ndim : ndim]
    return NamedSharding(sharding.mesh, P(*(spec[::-1] if transposed else spec)))


def row_shards(sharding: Any) -> int:
    """Into how many parts a sharding cuts the first axis."""
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return 1
    axes = sharding.spec[0] if isinstance(sharding.spec[0], tuple) else (sharding.spec[0],)
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def block_rows(shape: tuple[int, ...], itemsize: int, sharding: Any, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, count): rows of every device's shard of a tensor, such that all devices of this process together hold `block_bytes`."""
    local = sharding.shard_shape(shape)
    rows = max(1, block_bytes // max(1, math.prod(local[1:]) * itemsize * len(sharding.addressable_devices)))
    return ((first, min(rows, local[0] - first)) for first in range(0, local[0], rows))


def _blocks(reader: Reader, name: str, sharding: Any, block_bytes: int) -> Iterator[tuple[jax.Array, int]]:
    """Blocks of a tensor on the devices, and the row of each device's shard at which they begin."""
    shape, dtype = reader.shape(name), reader.dtype(name)
    shards = row_shards(sharding)
    for first, count in block_rows(shape, dtype.itemsize, sharding, block_bytes):
        seen: dict[tuple, np.ndarray] = {}

        def fetch(index: Any, first: int = first, count: int = count, seen: dict[tuple, np.ndarray] = seen) -> np.ndarray:
            (start, _), *rest = _bounds(index, (count * shards, *shape[1:]))
            begin = start // count * (shape[0] // shards) + first
            bounds = ((begin, begin + count), *rest)
            if bounds not in seen:
                seen[bounds] = reader.read(name, tuple(slice(*pair) for pair in bounds))
            return seen[bounds]

        yield jax.make_array_from_callback((count * shards, *shape[1:]), sharding, fetch), first


def _at_once(reader: Reader, names: Sequence[str], shape: tuple[int, ...], sharding: Any, dtype: Any, transposed: bool) -> jax.Array:
    """A small leaf, put together on the host."""
    seen: dict[tuple, np.ndarray] = {}
    stacked = len(shape) > len(reader.shape(names[0]))

    def fetch(index: Any) -> np.ndarray:
        bounds = _bounds(index, shape)
        if bounds not in seen:
            seen[bounds] = assemble(tuple(slice(*pair) for pair in bounds))
        return seen[bounds]

    def assemble(index: tuple[slice, ...]) -> np.ndarray:
        inner = index[1:] if stacked else index
        parts = names[index[0]] if stacked else names
        out = np.empty((len(parts), *(axis.stop - axis.start for axis in inner)), dtype)
        for i, name in enumerate(parts):
            part = reader.read(name, inner[::-1] if transposed else inner)
            out[i] = part.T if transposed else part
        return out if stacked else out[0]

    return jax.make_array_from_callback(shape, sharding, fetch)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
