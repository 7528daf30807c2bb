"""From the rows one process built to global arrays of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dccot_jax.model.sharding import BATCH
from dccot_jax.train.losses import BATCH_FIELDS, TEACHER_FIELDS


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Rows of a [G, T, ...] batch over ("data", "fsdp")."""
    return jax.NamedSharding(mesh, jax.P(BATCH, None))


def abstract_batch(mesh: jax.sharding.Mesh, rows: int, tokens: int, top_k: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of the batch that the train step takes: `rows` packed rows of `tokens`.

    Args:
      top_k: how many of a teacher's likeliest tokens were stored ahead for each position; 0: none.
    """
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {name: ((), jnp.float32 if name == "weights" else jnp.int32) for name in BATCH_FIELDS}
    if top_k:
        kinds |= dict(zip(TEACHER_FIELDS, (((top_k,), jnp.int32), ((top_k + 1,), jnp.float32))))
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((rows, tokens, *width), dtype, sharding=sharding) for name, (width, dtype) in kinds.items()}


def local_rows(mesh: jax.sharding.Mesh, rows_per_step: int) -> list[int]:
    """The packed rows whose data this process's devices hold, in order; all a process has to build.

    Processes that split only the ``tensor`` axis between them hold the same rows.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows_per_step, 1))
    return sorted({row for index in held.values() if index is not None for row in range(*index[0].indices(rows_per_step))})


def to_global(local: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, rows: Sequence[int], rows_per_step: int) -> dict[str, jax.Array]:
    """Global [G, T, ...] arrays from this process's rows of them.

    Args:
      local: arrays [len(rows), T, ...]; row i of them is row ``rows[i]`` of the batch. rows: from `local_rows`.
    """
    sharding = batch_sharding(mesh)
    place = {row: i for i, row in enumerate(rows)}

    def globalise(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(rows_per_step)
            return x[place[first] : place[last - 1] + 1]

        return jax.make_array_from_callback((rows_per_step, *x.shape[1:]), sharding, shard)

    return {name: globalise(x) for name, x in local.items()}
