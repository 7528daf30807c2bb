"""`dccot doctor`: tables on the main host, and a line for each finding."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from dccot_jax import config as config_lib
from dccot_jax.doctor.examine import Host, examine
from dccot_jax.doctor.findings import packages, problems
from dccot_jax.doctor.lines import by_value, one_line, spell
from dccot_jax.model.sharding import AXES, MeshError, mesh_shape, slice_count


def run(config: ConfigDict | None, workdir: epath.Path | None) -> int:
    """Examine all hosts. Returns the exit code, the same on each: 0 when all is well, else 1. The main host prints.

    Args:
      config: adds its mesh, and what `dccot validate` checks, on every host. workdir: adds the storage test.
    """
    errors = Console(stderr=True, highlight=False)
    try:
        hosts = examine(config, workdir)
    except RuntimeError as error:
        errors.print(
            f"dccot doctor: host {jax.process_index()} cannot exchange data with the others: {one_line(error)}",
            style="bold red", markup=False, soft_wrap=True,
        )  # fmt: skip
        return 1
    found = problems(hosts)
    if jax.process_index() == 0:
        out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        out.print(_host_table(hosts))
        out.print(_version_table(hosts))
        for line in [] if config is None else _mesh_lines(config, sum(host.devices for host in hosts)):
            out.print(line, markup=False)
        for line in found:
            errors.print(f"dccot doctor: {line}", style="bold red", markup=False, soft_wrap=True)
        if not found:
            out.print(f"all well on {len(hosts)} host(s)", markup=False)
    return 1 if found else 0


def _host_table(hosts: Sequence[Host]) -> Table:
    table = Table(title="Hosts")
    for column in ("host", "name", "devices", "memory per device", "sum over devices", "config", "workdir"):
        table.add_column(column, overflow="fold")
    for host in hosts:
        table.add_row(
            str(host.index),
            host.name,
            ", ".join(f"{count} × {kind}" for kind, count in host.kinds.items()),
            " to ".join(f"{size / 2**30:.1f} GiB" for size in sorted({*host.memory[:1], *host.memory[-1:]})) or "–",
            "failed" if host.device_sum is None else f"{host.device_sum:g}",
            "–" if host.config is None else "refused" if host.config else "valid",
            "–" if host.storage is None else "write, read, delete" if host.storage.well else "failed",
        )
    return table


def _version_table(hosts: Sequence[Host]) -> Table:
    table = Table(title="Versions")
    for column in ("package", "version", "hosts"):
        table.add_column(column, overflow="fold")
    for package in packages(hosts):
        groups = by_value({host.index: host.versions.get(package, "none") for host in hosts})
        for version, members in groups.items():
            table.add_row(package, version, "all" if len(groups) == 1 else spell(members))
    return table


def _mesh_lines(config: ConfigDict, devices: int) -> list[str]:
    """The mesh of the run, or of each group of arms."""
    arms: dict[str, list[str]] = {}
    slices = 1
    for name, arm in config_lib.arms(config).items():
        try:
            slices = slice_count()
            shape = mesh_shape(config_lib.to_plain(arm.mesh), devices, slices)
        except MeshError:
            continue  # among the findings
        arms.setdefault(" × ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True)), []).append(name)
    total = f"{devices} device(s)" + (f" of {slices} slices" if slices > 1 else "")
    return [f"mesh: {mesh} = {total}" + (f" ({', '.join(names)})" if len(arms) > 1 else "") for mesh, names in arms.items()]
