"""The smallest change with which a training fits, found by asking the estimator itself.

Tried, and combined, in this order:

  1. what leaves the learning alone: fewer rows at a time (microbatches), recomputing more (remat), another mesh
  2. the same on the smallest larger slice of the kind
  3. where nothing of 1 does, what changes what is learned, each said to do so (`ALTERS`): first moments, or what adapters leave
     alone, in bfloat16; adapters in place of all weights; on this slice, else on the smallest that is smaller than that of 2

Where a batch has too few rows for the devices a larger batch, which changes what is learned too, is offered in any case. Changes
of one kind are ranked by how much they alter, then by their number, then by the predicted step time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from dccot_jax.estimate.memory import fits, step_memory
from dccot_jax.estimate.roofline import predict
from dccot_jax.estimate.topologies import Topology, larger
from dccot_jax.estimate.training import Training
from dccot_jax.model.lora import with_adapters
from dccot_jax.model.sharding import MeshError, mesh_shape
from dccot_jax.train.settings import LORA_PRESETS

REMAT_BY_MEMORY = ("none", "dots", "nothing_saveable")
OPTIONS = 3
PRESET = "r16_qv"  # of adapters
# Keys that change what is learned, from least to most, and how.
ALTERS = {
    "train.lora.frozen_dtype": "the weights beside the adapters are rounded to bfloat16",
    "train.moment_dtype": "first moments are rounded to bfloat16",
    "train.rows_per_step": "a step has more rows",
    "train.lora.preset": "adapters are trained in place of all weights",
}
Change = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """A change that makes the training fit: config keys with their new values, and the slice, with what it then needs.

    Attributes:
      alters: how it changes what is learned; () where it does not.
    """

    change: Change
    topology: str
    allocated_bytes: int
    step_seconds: float
    alters: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"alters": list(self.alters)}


def advise(training: Training, mesh: dict[str, int], topology: Topology) -> list[Option]:
    """At most `OPTIONS` changes, the smallest first, one for each set of settings that are changed; [] if nothing found fits.

    Args:
      training: what does not fit. mesh: sizes as the config has them, one of which may be -1. topology: where it should run.
    """
    plain, altered = [({}, training)], _altered(training)
    here = _best(plain, mesh, topology)
    wider = next((found[:1] for slice_ in larger(topology) if (found := _best(plain, mesh, slice_))), [])
    if all(option.alters for option in here):
        for slice_ in (topology, *larger(topology)):
            if wider and slice_.name == wider[0].topology:
                break
            if here := _best([*plain, *altered], mesh, slice_):
                break
    return sorted([*here[: OPTIONS - len(wider)], *wider], key=lambda option: bool(option.alters))


def _altered(training: Training) -> list[tuple[Change, Training]]:
    """The training with settings that change what is learned, alone and together."""
    moments: list[tuple[Change, Training]] = [({}, training)]
    if training.optimizer != "adafactor" and training.moment_dtype == "float32":
        moments.append(({"train.moment_dtype": "bfloat16"}, dataclasses.replace(training, moment_dtype="bfloat16")))
    found = moments[1:]
    rounded = {"train.lora.frozen_dtype": "bfloat16"} if training.frozen_dtype == "float32" else {}
    if training.mc.lora is None:
        adapted, adapters = with_adapters(training.mc, dropout=0.0, **LORA_PRESETS[PRESET]), {"train.lora.preset": PRESET} | rounded
    elif rounded:
        adapted, adapters = training.mc, rounded
    else:
        return found
    return found + [(change | adapters, dataclasses.replace(base, mc=adapted, frozen_dtype="bfloat16")) for change, base in moments]


def _best(variants: Sequence[tuple[Change, Training]], mesh: dict[str, int], topology: Topology) -> list[Option]:
    """The quickest of every set of changed settings that fits on this slice: those that leave the learning alone, fewest settings
    first, then one for every smallest set of settings that change it, the least first.
    """
    best: dict[frozenset[str], Option] = {}
    for altered, variant in variants:
        for change, candidate in _candidates(variant, mesh, topology):
            if candidate.problem():
                continue
            memory = step_memory(candidate)
            if not fits(memory, topology):
                continue
            whole = altered | change
            alters = tuple(how for key, how in ALTERS.items() if key in whole)
            option = Option(whole, topology.name, memory.allocated, predict(candidate, topology)["step_seconds"], alters)
            kinds = frozenset(_kind(key) for key in whole)
            if kinds not in best or option.step_seconds < best[kinds].step_seconds:
                best[kinds] = option
    found = [(kinds, option) for kinds, option in best.items() if not any(other < kinds for other in best)]
    ranked = [option for _, option in sorted(found, key=lambda pair: (_altering(pair[1]), len(pair[0]), pair[1].step_seconds))]
    learned = {frozenset(option.alters) for option in ranked if option.alters}
    kept, seen = [], set[frozenset[str]]()
    for option in ranked:
        how = frozenset(option.alters)
        if not how or (how not in seen and not any(other < how for other in learned)):
            kept.append(option)
            seen.add(how)
    return kept


def _kind(key: str) -> str:
    """Axes of the mesh are one setting, and so are those of the adapters."""
    return next((group for group in ("mesh", "train.lora") if key.startswith(f"{group}.")), key)


def _altering(option: Option) -> tuple[int, int]:
    """How much of what is learned changes: 0 for nothing."""
    order = list(ALTERS.values())
    return max((order.index(how) + 1 for how in option.alters), default=0), len(option.alters)


def _candidates(training: Training, mesh: dict[str, int], topology: Topology) -> Iterator[tuple[Change, Training]]:
    """Every combination of the settings that leave the learning alone on a slice, or more rows, as (what is changed, the training)."""
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
