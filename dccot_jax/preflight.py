"""Checks of a whole config before any work: names of tasks, teachers, signals and selectors, and files that must be there."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.config import ConfigError
from dccot_jax.mix.curriculum import make_pacing
from dccot_jax.mix.groups import PlanError
from dccot_jax.select.selectors import check_steps
from dccot_jax.select.signals import split_signals
from dccot_jax.tasks.registry import UnknownTaskError, get_task
from dccot_jax.teachers.build import TeacherError, make_teacher
from dccot_jax.teachers.replay import replay_spec

_KNOWN_DIFFICULTIES = ("n_steps", "completion_tokens", "question_tokens")


def check(config: ConfigDict) -> None:
    """Validate a config and everything it names, arm by arm.

    Raises ConfigError at the first field that cannot work, with the value and what would be accepted.
    """
    config_lib.validate(config)
    for name, arm in config_lib.arms(config).items():
        try:
            _check_arm(arm)
        except ConfigError as error:
            raise ConfigError(f"arm {name}: {error}" if config.arms else str(error)) from None


def _check_arm(config: ConfigDict) -> None:
    for key in ("traces.task", "evaluate.iid", "evaluate.ood", "evaluate.cross"):
        value = config_lib.lookup(config, key)
        for task in (value,) if isinstance(value, str) else value:
            try:
                get_task(task)
            except UnknownTaskError as error:
                raise ConfigError(f"config.{key}: {error}") from None
    _check_teachers(config)
    split_signals(config.score.signals)
    check_steps(config.select.steps, config.score.signals)
    difficulty = config.curriculum.difficulty
    if config.curriculum.kind != "none":
        if difficulty not in (*_KNOWN_DIFFICULTIES, *config.score.signals):
            raise ConfigError(
                f"config.curriculum.difficulty: {difficulty!r} is not one of {', '.join(_KNOWN_DIFFICULTIES)}, nor in config.score.signals"
            )
        try:
            make_pacing(config.curriculum)
        except PlanError as error:
            raise ConfigError(str(error)) from None
    for key in ("path", "tokenizer"):
        folder = config.student[key]
        if folder and folder != "embedded" and not (Path(folder).expanduser() / "tokenizer.json").exists():
            raise ConfigError(f"config.student.{key}: {folder!r} is not a Hugging Face directory (no tokenizer.json there)")


def _check_teachers(config: ConfigDict) -> None:
    specs = [(f"traces.teachers[{place}]", spec) for place, spec in enumerate(config.traces.teachers)]
    if config.augment.methods:
        specs.append(("augment.teacher", config.augment.teacher))
    for where, spec in specs:
        if dict(spec).get("kind") == "replay" and where != "augment.teacher":
            root = Path(config.data_dir).expanduser() if config.data_dir else Path()
            try:
                replayed = replay_spec(dict(spec))
            except TeacherError as error:
                raise ConfigError(f"config.{where}: {error}") from None
            for file in replayed.files:
                if not (root / file).exists():
                    raise ConfigError(f"config.{where}.files: {file!r} is not in data_dir {str(root)!r}")
            continue
        try:
            make_teacher(dict(spec))
        except (TeacherError, ValueError) as error:
            raise ConfigError(f"config.{where}: {error}") from None
