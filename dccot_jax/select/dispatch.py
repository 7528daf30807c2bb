"""Tiles through a program: a few in flight, results in order, each process with the rows that lie on it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dccot_jax.model.sharding import batch_spec

T = TypeVar("T")
Program = Callable[[Any, Any], jax.Array]


def dispatch(
    program: Program, params: Any, mesh: Mesh, tiles: Sequence[T], arrays: Callable[[T], Any], *, in_flight: int
) -> Iterator[tuple[T, list[tuple[int, np.ndarray]]]]:
    """Yield, tile by tile, what the program makes of (`params`, `arrays` of the tile), as far as this process can address it.

    That is a list, never empty, of (first row, values [rows, ...]), each part from its first replica only. At most `in_flight` tiles are
    dispatched and not yet read back; their order and content do not depend on it.
    """
    if jax.default_backend() == "cpu" and mesh.size > 1:
        in_flight = 1  # several queued programs with collectives can starve each other of host threads and hang
    waiting: collections.deque[tuple[T, jax.Array]] = collections.deque()
    for tile in tiles:
        placed = jax.tree.map(lambda x: _place(x, mesh), arrays(tile))
        with jax.set_mesh(mesh):  # not around the yields: a generator must not leave its caller inside a mesh
            waiting.append((tile, program(params, placed)))
        if len(waiting) >= in_flight:
            done, values = waiting.popleft()
            yield done, _local(values)
    while waiting:
        done, values = waiting.popleft()
        yield done, _local(values)


def _place(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """A host array [B, ...] onto the mesh, rows over the batch axes; each process copies only its rows."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, batch_spec(len(x), x.ndim, mesh)), lambda index: x[index])


def _local(values: jax.Array) -> list[tuple[int, np.ndarray]]:
    own = [(shard.index[0].start or 0, np.asarray(shard.data)) for shard in values.addressable_shards if shard.replica_id == 0]
    return own or [(0, np.zeros((0, *values.shape[1:]), values.dtype))]
