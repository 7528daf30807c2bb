"""Reports of all hosts on all hosts: devices, versions, a sum over every device, the config's needs, the workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.extend.backend import get_backend
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dccot_jax import __version__
from dccot_jax.doctor.lines import one_line
from dccot_jax.doctor.storage import Storage, probe
from dccot_jax.preflight import check
from dccot_jax.records import InputError

_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Host:
    """One host's report.

    Attributes:
      index, name: its process index and host name. kinds: its number of devices by kind.
      memory: bytes that JAX may use, per device, least first; empty where the backend does not say (CPU).
      versions: package to version.
      device_sum: the sum of a one from every device of every host, None when that failed; collective: why, one line.
      config: what a run would refuse there, one line, or empty; None without a config. storage: None without a workdir.
    """

    index: int
    name: str
    kinds: Mapping[str, int]
    memory: Sequence[int]
    versions: Mapping[str, str]
    device_sum: float | None = None
    collective: str = ""
    config: str | None = None
    storage: Storage | None = None

    @property
    def devices(self) -> int:
        return sum(self.kinds.values())


def examine(config: ConfigDict | None, workdir: epath.Path | None) -> list[Host]:
    """The reports of all hosts, by index; the same list on each. Collective: every process must call it.

    Raises RuntimeError if the hosts cannot exchange data at all.
    """
    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    host = Host(
        index=jax.process_index(),
        name=socket.gethostname(),
        kinds=dict(Counter(device.device_kind for device in devices)),
        memory=sorted(limit for limit in limits if limit),
        versions=_versions(),
        config=None if config is None else _refusal(config),
    )
    try:
        host = dataclasses.replace(host, device_sum=_sum_over_devices())
    except Exception as error:  # whatever a runtime or network raises is the finding
        host = dataclasses.replace(host, collective=one_line(error))
    if workdir is not None:
        host = dataclasses.replace(host, storage=probe(workdir, host.index, gather))
    return [_from_json(report) for report in gather(dataclasses.asdict(host))]


def gather(value: Any) -> list[Any]:
    """JSON values of all hosts, by index. Collective."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps([jax.process_index(), value]).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([text.size], np.int32))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    pairs = [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def _from_json(report: dict[str, Any]) -> Host:
    storage = report["storage"]
    if storage is not None:
        storage = Storage(storage["write"], tuple(storage["unseen"]), storage["delete"])
    return Host(**{**report, "storage": storage})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "dccot_jax": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    backend = get_backend()
    if backend.platform != "cpu":  # what is below the plugin: CUDA, or the TPU's runtime
        found[f"{backend.platform} runtime"] = " ".join(str(backend.platform_version).split())[:80]
    return found


def _sum_over_devices() -> float:
    """A one from each device of every host, added up by `psum`: the number of devices."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    ones = jax.make_array_from_callback((jax.device_count(),), NamedSharding(mesh, P("all")), lambda _: np.ones(1, np.float32))
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=P("all"), out_specs=P()))(ones)
    return float(np.asarray(total.addressable_data(0))[0])


def _refusal(config: ConfigDict) -> str:
    """What keeps this config from running on this host: files that are not here, a mesh that does not fit."""
    try:
        check(config)
    except InputError as error:
        return one_line(error)
    return ""
