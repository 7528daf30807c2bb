"""Machines by the names the cloud uses: chips, memory, peak rates, links, hosts.

v5p counts TensorCores (two per chip), v5e and v6e count chips; JAX sees one device per chip on all of them.

Sources, per chip: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e} (peak bf16 rate, HBM bandwidth, bidirectional ICI
bandwidth, slice shapes and hosts) and the data sheets of NVIDIA A100 80GB SXM, H100 SXM and H200 SXM (dense bf16 rate,
memory bandwidth, bidirectional NVLink bandwidth). Usable memory of a TPU is what its compiler says it may use ("of 15.75G
hbm"), of a GPU what its driver reports.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping

from dccot_jax.records import InputError

GIB = 2**30
TERA = 1e12
GIGA = 1e9


class TopologyError(InputError):
    """A machine nobody here knows; the message lists what is accepted."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    Attributes:
      platform: "tpu", "gpu" or "cpu". device_kind: as JAX names it, by which attention backends are chosen.
      memory: bytes a program may use.
      peak_bf16, peak_float32: dense matrix products, FLOP/s. A TPU makes a float32 product of six bf16 ones (precision HIGHEST).
      memory_bandwidth, link_bandwidth, network_bandwidth: bytes/s; links inside a slice or host, all of a chip's, one way; the
        network between hosts (GPUs: one 400 Gbit/s port per GPU).
      nominal: the rates are an order of magnitude and no vendor's.
    """

    name: str
    platform: str
    device_kind: str
    memory: int
    peak_bf16: float
    peak_float32: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float = 0.0
    nominal: bool = False


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice or a host: `chips` devices of one kind.

    Attributes:
      name: as accepted and printed. shape: of a TPU slice's torus, () elsewhere. hosts: machines that hold the chips.
    """

    name: str
    chip: Chip
    chips: int
    shape: tuple[int, ...]
    hosts: int

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s a chip receives from the others: its links, or the network where a GPU job spans hosts."""
        return self.chip.network_bandwidth if self.chip.network_bandwidth and self.hosts > 1 else self.chip.link_bandwidth


def _tpu(name: str, kind: str, usable_gib: float, peak: float, memory_gbps: float, ici_gbps: float) -> Chip:
    return Chip(name, "tpu", kind, int(usable_gib * GIB), peak * TERA, peak * TERA / 6, memory_gbps * GIGA, ici_gbps * GIGA / 2)


def _gpu(
    name: str, kind: str, mib: int, peak: float, peak_float32: float, memory_gbps: float, nvlink_gbps: float, port_gbps: float
) -> Chip:
    rates = (peak * TERA, peak_float32 * TERA, memory_gbps * GIGA, nvlink_gbps * GIGA / 2, port_gbps * GIGA)
    return Chip(name, "gpu", kind, mib * 2**20, *rates)


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v5e", "TPU v5 lite", 15.75, 197, 819, 400),
        _tpu("v5p", "TPU v5", 95.74, 459, 2765, 1200),
        _tpu("v6e", "TPU v6 lite", 31.25, 918, 1638, 800),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 81_920, 312, 19.5, 2039, 600, 25),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 81_559, 989, 67, 3350, 900, 50),
        _gpu("h200", "NVIDIA H200", 143_771, 989, 67, 4800, 900, 50),
    )
}

# Slice shapes by number of chips, as gcloud accepts them.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
    6144: (16, 16, 24),
}
_SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES}
_CORES = {"v5p": 2}  # TensorCores per chip where the cloud's names count them
_GPUS_PER_HOST = 8
_GPU_HOSTS = 128
_ALIASES = {"v5litepod": "v5e"}  # what gcloud's --accelerator-type calls it


def find_topology(name: str) -> Topology:
    """The machine of a name such as v5e-16, v5p-128, v6e-256, h100x8 or cpu. Raises TopologyError listing what is accepted."""
    if name == "cpu":
        return _this_cpu()
    tpu, gpu = re.fullmatch(r"([a-z0-9]+)-(\d+)", name), re.fullmatch(r"([a-z0-9]+)x(\d+)", name)
    if tpu:
        kind, count = _ALIASES.get(tpu[1], tpu[1]), int(tpu[2])
        chips = count // _CORES.get(kind, 1)
        if kind in _SHAPES and count % _CORES.get(kind, 1) == 0 and chips in _SHAPES[kind]:
            return Topology(f"{kind}-{count}", CHIPS[kind], chips, _SHAPES[kind][chips], _tpu_hosts(kind, chips))
    elif gpu and gpu[1] in CHIPS and CHIPS[gpu[1]].platform == "gpu":
        count = int(gpu[2])
        if count in (1, 2, 4) or (count % _GPUS_PER_HOST == 0 and 0 < count <= _GPUS_PER_HOST * _GPU_HOSTS):
            return Topology(name, CHIPS[gpu[1]], count, (), math.ceil(count / _GPUS_PER_HOST))
    close = difflib.get_close_matches(name, _names(), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise TopologyError(f"--topology={name}: unknown{hint}; accepted are {_accepted()}")


def larger(topology: Topology) -> list[Topology]:
    """The slices of the same kind with more chips, smallest first; for GPUs up to 16 times as many."""
    if topology.chip.platform == "cpu":
        return []
    if topology.chip.platform == "gpu":
        counts = [count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if topology.chips < count <= 16 * topology.chips]
        return [find_topology(f"{topology.chip.name}x{count}") for count in counts]
    kind = topology.chip.name
    return [find_topology(f"{kind}-{chips * _CORES.get(kind, 1)}") for chips in _SHAPES[kind] if chips > topology.chips]


def _tpu_hosts(kind: str, chips: int) -> int:
    """Slices of one host have up to 8 chips (v5e, v6e) or 4; those of several hosts have 4 in each."""
    return 1 if chips <= (8 if kind in ("v5e", "v6e") else 4) else chips // 4


def _this_cpu() -> Topology:
    """This machine: its memory, and 100 GFLOP/s and 10 GB/s per core, which only say the order of magnitude."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate = cores * 100 * GIGA
    return Topology("cpu", Chip("cpu", "cpu", "cpu", memory, rate, rate, cores * 10 * GIGA, cores * 10 * GIGA, nominal=True), 1, (), 1)


def _names() -> list[str]:
    tpus = [f"{kind}-{chips * _CORES.get(kind, 1)}" for kind, shapes in _SHAPES.items() for chips in shapes]
    return [*tpus, *(f"{name}x8" for name, chip in CHIPS.items() if chip.platform == "gpu"), "cpu"]


def _accepted() -> str:
    found = []
    for kind in sorted(_SHAPES):
        sizes = ", ".join(str(chips * _CORES.get(kind, 1)) for chips in _SHAPES[kind])
        found.append(f"{kind}-N with N of {sizes}" + (" (cores)" if kind in _CORES else " (chips)"))
    gpus = ", ".join(f"{name}xN" for name, chip in CHIPS.items() if chip.platform == "gpu")
    return "; ".join([*found, f"{gpus} with N of 1, 2, 4 or a multiple of 8", "cpu"])
