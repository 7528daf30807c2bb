"""What `config.score.gradients` asks for, checked against the model and the tasks before any work."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.artifact import MANIFEST, open_artifact
from dccot_jax.config import ConfigError, to_plain
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.lora import adapter_names
from dccot_jax.select.gradients.subset import choose
from dccot_jax.tasks.registry import UnknownTaskError, get_task

VALIDATION_ROWS = 32
WITHOUT_ADAPTERS = ("wq", "wv")  # weights that `less` reads by default
_KEY = "score.gradients.validation"


@dataclasses.dataclass(frozen=True)
class ValidationSource:
    """One sub-task of the validation side.

    Attributes:
      name: of the sub-task; its influence is the column ``less_<name>``.
      task, split: registered task whose gold rationales are used; task "" means traces of the pool. rows: how many items, or questions.
    """

    name: str
    task: str
    split: str
    rows: int


def validation_sources(cfg: ConfigDict) -> tuple[ValidationSource, ...]:
    """The sub-tasks of `score.gradients.validation`; (): items of the training task's own train split.

    Raises ConfigError on an entry that is not of the two forms, a name used twice, or the test split.
    """
    entries = to_plain(cfg.score.gradients.validation) or [{"task": cfg.traces.task}]
    found: list[ValidationSource] = []
    for place, entry in enumerate(entries):
        where = f"config.{_KEY}[{place}]"
        source = _source(entry, where)
        if source.name in [other.name for other in found]:
            raise ConfigError(f"{where}: a second sub-task named {source.name!r}; give one of them a 'name'")
        found.append(source)
    return tuple(found)


def _source(entry: Any, where: str) -> ValidationSource:
    forms = "{'task': 'svamp', 'rows': 32} or {'traces': 32}"
    if not isinstance(entry, Mapping) or ("task" in entry) == ("traces" in entry):
        raise ConfigError(f"{where}: {entry!r} is not a sub-task; write {forms}")
    accepted = ("task", "split", "rows", "name") if "task" in entry else ("traces", "name")
    for key in entry:
        if key not in accepted:
            raise ConfigError(f"{where}.{key}: unknown; accepted are {', '.join(accepted)}")
    task, split = str(entry.get("task", "")), str(entry.get("split", "train"))
    rows = entry.get("rows", VALIDATION_ROWS) if task else entry.get("traces")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ConfigError(f"{where}.{'rows' if task else 'traces'}: {rows!r} must be a whole number of at least 1")
    if split == "test":
        raise ConfigError(f"{where}.split: 'test' would let the selection see what evaluation asks; name another split")
    name = str(entry.get("name", task or "traces"))
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{where}.name: {name!r} must be of letters, digits, '_' and '-'")
    return ValidationSource(name, task, split, rows)


def check_gradients(cfg: ConfigDict, mc: ModelConfig) -> None:
    """Check what the requested gradient signals need; does nothing where none is requested. Raises ConfigError."""
    settings = cfg.score.gradients
    if "grand" in cfg.score.signals:
        choose(mc, settings.norm_subset, key="score.gradients.norm_subset")
    if "less" not in cfg.score.signals:
        return
    for place, source in enumerate(validation_sources(cfg)):
        if source.task:
            try:
                task = get_task(source.task)
            except UnknownTaskError as error:
                raise ConfigError(f"config.{_KEY}[{place}].task: {error}") from None
            if source.split not in task.splits:
                raise ConfigError(
                    f"config.{_KEY}[{place}].split: task {task.name!r} has no {source.split} split, only {', '.join(task.splits)}"
                )
    _check_checkpoints(cfg, mc)


def feature_weights(mc: ModelConfig, settings: ConfigDict) -> tuple[str, ...]:
    """Names of the weights whose gradient `less` projects, by `score.gradients.subset`; with adapters, some of these.

    Raises ConfigError on a pattern that matches nothing, and on weights that were not trained: they have no moments.
    """
    names = adapter_names(mc)
    chosen = choose(mc, settings.subset or names or WITHOUT_ADAPTERS, key="score.gradients.subset", tables=False)
    frozen = [name for name in chosen if names and name not in names]
    if frozen:
        raise ConfigError(
            f"config.score.gradients.subset: {', '.join(frozen)} stayed as they were beside the adapters; there are {', '.join(names)}"
        )
    return chosen


def _check_checkpoints(cfg: ConfigDict, mc: ModelConfig) -> None:
    from dccot_jax.train.adapters import trained_model  # bring Orbax; most configs ask for no features
    from dccot_jax.train.snapshots import snapshot_model

    count, student = cfg.score.gradients.checkpoints, cfg.score.student
    if student == "base":
        raise ConfigError(
            "config.score.signals: 'less' needs checkpoints with Adam moments, the untrained student has none; set score.student to"
            " 'warmup' or to a train artifact made with train.snapshots"
        )
    if student == "warmup":
        if cfg.train.optimizer != "adamw":
            raise ConfigError(f"config.train.optimizer: {cfg.train.optimizer!r} keeps no second moments, which 'less' needs; 'adamw' does")
        if count > cfg.score.warmup.steps:
            raise ConfigError(f"config.score.gradients.checkpoints: {count} of only score.warmup.steps = {cfg.score.warmup.steps} steps")
        feature_weights(trained_model(mc, cfg.train), cfg.score.gradients)
        return
    folder = Path(student).expanduser()
    if (folder / MANIFEST).exists():
        artifact = open_artifact(folder)
        check_snapshots(artifact, count)
        feature_weights(snapshot_model(artifact), cfg.score.gradients)


def check_snapshots(artifact: Any, count: int) -> list[dict[str, Any]]:
    """The snapshots of a train artifact, oldest first. Raises ConfigError unless there are `count`, with moments."""
    snapshots: list[dict[str, Any]] = list(artifact.facts.get("snapshots") or ())
    if len(snapshots) != count:
        raise ConfigError(
            f"config.score.gradients.checkpoints: {count}, but {artifact.path} holds {len(snapshots)} snapshots"
            " (train.snapshots of its config)"
        )
    optimizer = artifact.manifest["config"]["train.optimizer"]
    if optimizer != "adamw":
        raise ConfigError(f"config.score.student: {artifact.path} was trained with {optimizer}, whose snapshots have no second moments")
    return snapshots
