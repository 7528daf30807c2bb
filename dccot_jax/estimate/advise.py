"""The smallest change with which a training fits, found by asking the estimator itself.

Tried: fewer rows at a time (microbatches), recomputing more (remat), another mesh, a larger slice; none of them changes what is
learned. Only where a batch has too few rows for the devices is a larger batch offered too, which does. Changes are ranked
by their number, then by the predicted step time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from dccot_jax.estimate.memory import fits, step_memory
from dccot_jax.estimate.roofline import predict
from dccot_jax.estimate.topologies import Topology, larger
from dccot_jax.estimate.training import Training
from dccot_jax.model.sharding import MeshError, mesh_shape

REMAT_BY_MEMORY = ("none", "dots", "nothing_saveable")
OPTIONS = 3


@dataclasses.dataclass(frozen=True)
class Option:
    """A change that makes the training fit: config keys with their new values, and the slice, with what it then needs."""

    change: dict[str, Any]
    topology: str
    allocated_bytes: int
    step_seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def advise(training: Training, mesh: dict[str, int], topology: Topology) -> list[Option]:
    """At most `OPTIONS` changes, the smallest first, one for each set of settings that are changed; [] if nothing found fits.

    Args:
      training: what does not fit. mesh: sizes as the config has them, one of which may be -1. topology: where it should run.
    """
    here = _best(training, mesh, topology)
    options = here[:OPTIONS]
    for slice_ in larger(topology):
        found = _best(training, mesh, slice_)
        if found:
            options = [*here[: OPTIONS - 1], found[0]]
            break
    return options


def _best(training: Training, mesh: dict[str, int], topology: Topology) -> list[Option]:
    """The quickest of every set of changed settings that fits on this slice, fewest settings first."""
    best: dict[tuple[str, ...], Option] = {}
    for change, candidate in _candidates(training, mesh, topology):
        if candidate.problem():
            continue
        memory = step_memory(candidate)
        if not fits(memory, topology):
            continue
        option = Option(change, topology.name, memory.allocated, predict(candidate, topology)["step_seconds"])
        kinds = tuple(sorted({key.split(".")[0] if key.startswith("mesh") else key for key in change}))
        if kinds not in best or option.step_seconds < best[kinds].step_seconds:
            best[kinds] = option
    found = [(kinds, option) for kinds, option in best.items() if not any(set(other) < set(kinds) for other in best)]
    return [option for _, option in sorted(found, key=lambda pair: ("train.rows_per_step" in pair[0], len(pair[0]), pair[1].step_seconds))]


def _candidates(training: Training, mesh: dict[str, int], topology: Topology) -> Iterator[tuple[dict[str, Any], Training]]:
    """Every combination of settings on a slice, as (what is changed, the training)."""
    stingier = REMAT_BY_MEMORY[REMAT_BY_MEMORY.index(training.remat) :]
    meshes = _meshes(topology.chips)
    try:
        given = mesh_shape(mesh, topology.chips)
    except MeshError:
        given = ()
    for shape, remat in itertools.product(meshes, stingier):
        settings = {} if shape == given else {f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor"), shape)}
        settings |= {} if remat == training.remat else {"train.remat": remat}
        base = dataclasses.replace(training, mesh=shape, remat=remat)
        for count in _divisors(training.rows):
            change = settings | ({} if count == training.microbatches else {"train.microbatches": count})
            yield change, dataclasses.replace(base, microbatches=count)
        if shape == given and base.problem():
            step = base.microbatches * base.shards
            rows = math.ceil(base.rows / step) * step
            yield settings | {"train.rows_per_step": rows}, dataclasses.replace(base, rows=rows)


def _meshes(devices: int) -> list[tuple[int, int, int]]:
    return [
        (data, fsdp, devices // (data * fsdp))
        for data in _divisors(devices)
        for fsdp in _divisors(devices // data)
    ]  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]
