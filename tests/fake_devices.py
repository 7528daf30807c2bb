"""Devices that are not there, for meshes that are laid out and not run."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh is laid out by. stands_for: a real device to run on in its place."""

    id: int
    slice_index: int
    process_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    stands_for: Any = None


def tpu_slices(slices: int, shape: tuple[int, int], kind: str = "TPU v6 lite", stand_ins: Any = None) -> list[FakeDevice]:
    """TPU slices of shape[0] x shape[1] chips each, in no order that a mesh could lean on: slices alternate, ids run backwards."""
    columns, rows = shape
    count = slices * columns * rows
    found = []
    for i in range(count):
        index, chip = i % slices, i // slices
        coords = (chip % columns, chip // columns, 0)
        found.append(FakeDevice(count - i, index, i // 4, "tpu", kind, coords, 0, None if stand_ins is None else stand_ins[i]))
    return found


def gpu_hosts(hosts: int, each: int) -> list[FakeDevice]:
    """One process per GPU, dealt to the hosts in turn, as Slurm's cyclic distribution does."""
    return [FakeDevice(i, i % hosts, i, "gpu", "NVIDIA H100 80GB HBM3") for i in range(hosts * each)]
