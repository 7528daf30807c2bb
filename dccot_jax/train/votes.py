"""Whether any process was asked to stop, known to all of them in the same step and without waiting.

Each process puts a 1 on its devices beside the batch if it was asked to; the compiled step adds them up. The sum is read with the
step's other metrics, so every process reads the same number of the same step: they save the same checkpoint and leave together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOTE = "stop"  # name in the batch and in the metrics


def vote_sharding(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """One number per device, over all axes."""
    return jax.NamedSharding(mesh, jax.P(mesh.axis_names))


def vote_shape(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((mesh.size,), jnp.float32, sharding=vote_sharding(mesh))


def cast_vote(mesh: jax.sharding.Mesh, stop: bool) -> jax.Array:
    """This process's part of the global [devices] array of votes."""
    return jax.make_array_from_callback((mesh.size,), vote_sharding(mesh), lambda _: np.full(1, stop, np.float32))


def counting(step: Callable[..., Any]) -> Callable[..., Any]:
    """A train step whose batch carries votes and whose metrics carry their sum."""

    def voted(state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, dict[str, Any]]:
        new, metrics = step(state, {name: x for name, x in batch.items() if name != VOTE})
        return new, {**metrics, VOTE: (jnp.sum(batch[VOTE]), jnp.ones((), jnp.float32))}

    return jax.jit(voted, donate_argnums=0)
