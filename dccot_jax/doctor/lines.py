"""Spelling: errors in one line, hosts as ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def spell(hosts: Sequence[int]) -> str:
    """`host 0`, `hosts 0, 2-5`."""
    runs: list[list[int]] = []
    for index in sorted(hosts):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ("hosts " if len(hosts) > 1 else "host ") + ", ".join("-".join(map(str, ends)) for ends in runs)


def by_value(values: Mapping[int, Any]) -> dict[Any, list[int]]:
    """Value -> the hosts that have it, in the order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, value in values.items():
        groups.setdefault(value, []).append(index)
    return groups
