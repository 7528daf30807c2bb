"""Checks before any work that local rows can be had: of the training task, and of every task that is evaluated.

Without `config.data_dir` rows come from the hub, and nothing is asked there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dccot_jax.config import ConfigError, lookup
from dccot_jax.evaluate.protocol import GROUPS, SPLIT, evaluation_groups
from dccot_jax.tasks.base import Task, TaskDataError
from dccot_jax.tasks.registry import get_task, load_items, local_files


def check_data(config: ConfigDict, *, traces: bool) -> None:
    """Raises ConfigError naming the field, the file and the way out. `traces`: the training task's own rows are needed too."""
    if config.data_dir and not Path(config.data_dir).expanduser().is_dir():
        raise ConfigError(f"config.data_dir: {config.data_dir!r} is not a directory")
    task = get_task(config.traces.task)
    for split in ("train", SPLIT) if traces else ():  # a trace must not ask what the test split asks
        if split in task.splits and (fault := _fault(task, split, config.data_dir)):
            raise ConfigError(f"config.traces.task: {fault}")
    groups = evaluation_groups(config)
    faults = {name: _fault(get_task(name), SPLIT, config.data_dir) for names in groups.values() for name in names}
    for group in GROUPS:
        for name in groups[group]:
            if faults[name]:
                raise ConfigError(f"config.evaluate.{group}: {faults[name]}; {_way_out(config, group, groups, faults)}")


def _way_out(config: ConfigDict, group: str, groups: dict[str, tuple[str, ...]], faults: dict[str, str]) -> str:
    """What to set so that only tasks at hand are evaluated."""
    left = {key: tuple(name for name in groups[key] if not faults[name]) for key in GROUPS}
    named = any(lookup(config, f"evaluate.{key}") for key in GROUPS)
    if not any(left.values()):
        return "nor are the other tasks at hand; config.data_dir must hold what is evaluated"
    changed = [group] if named else [key for key in GROUPS if groups[key]]
    setting = " ".join(f"config.evaluate.{key}={left[key]}" for key in changed)
    why = "" if named else f"config.evaluate names no task, so the relations of traces.task = {config.traces.task!r} are evaluated: "
    return f"{why}put the file there, or set {setting}"


def _fault(task: Task, split: str, data_dir: str) -> str:
    """Why the rows cannot be read from `data_dir`; "" where they can, or come from the hub or from code."""
    if not task.local_files or (task.hub and not data_dir):
        return ""
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime) for path in local_files(task, data_dir or ".").values()]
    return _reading(task, split, data_dir, tuple(stamps))


@functools.lru_cache(maxsize=256)
def _reading(task: Task, split: str, data_dir: str, stamps: Sequence[tuple[str, int, float]]) -> str:
    """The error of reading a split, or "". `stamps` tell changed files apart: the arms of a config name the same tasks."""
    try:
        load_items(task.name, split, data_dir)
    except TaskDataError as error:
        return str(error)
    return ""
