"""What is wrong, from the hosts' reports: a pure function, one line per finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dccot_jax.doctor.examine import Host
from dccot_jax.doctor.lines import by_value, spell


def problems(hosts: Sequence[Host]) -> list[str]:
    """One line for each thing that would break or falsify a run; empty when all is well."""
    total = sum(host.devices for host in hosts)
    lines = _disagreement("devices per host", {host.index: str(host.devices) for host in hosts})
    lines += _disagreement("device kinds", {host.index: " + ".join(sorted(host.kinds)) for host in hosts})
    for package in packages(hosts):
        if package != "python":  # its patch level may differ
            lines += _disagreement(package, {host.index: host.versions.get(package, "none") for host in hosts})
    for text, members in by_value({host.index: host.collective for host in hosts if host.collective}).items():
        lines.append(f"collectives: {text} (on {spell(members)})")
    for value, members in by_value({host.index: host.device_sum for host in hosts if host.device_sum not in (None, total)}).items():
        lines.append(f"collectives: the sum of a one from each of {total} devices is {value:g} on {spell(members)}")
    for text, members in by_value({host.index: host.config for host in hosts if host.config}).items():
        lines.append(f"{text} (on {spell(members)})")
    return lines + _storage_problems(hosts)


def packages(hosts: Sequence[Host]) -> list[str]:
    """Every package that any host has."""
    return list(dict.fromkeys(package for host in hosts for package in host.versions))


def _disagreement(what: str, values: Mapping[int, str]) -> list[str]:
    groups = by_value(values)
    if len(groups) < 2:
        return []
    return [f"{what}: " + ", ".join(f"{value} on {spell(members)}" for value, members in groups.items()) + "; they must be equal"]


def _storage_problems(hosts: Sequence[Host]) -> list[str]:
    reports = {host.index: host.storage for host in hosts if host.storage is not None}
    lines = []
    for text, members in by_value({index: report.write for index, report in reports.items() if report.write}).items():
        lines.append(f"workdir: no writing on {spell(members)}: {text}")
    for others, members in by_value({index: report.unseen for index, report in reports.items() if report.unseen}).items():
        lines.append(
            f"workdir: not shared: {spell(members)} cannot see what {spell(others)} wrote;"
            " give the path of a disk that all hosts mount, or gs://BUCKET/PATH"
        )
    for text, members in by_value({index: report.delete for index, report in reports.items() if report.delete}).items():
        lines.append(f"workdir: no deleting on {spell(members)}: {text}")
    return lines
