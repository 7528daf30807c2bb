"""Checks of a whole config before any work: names, files that must be there, and sizes that must fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.artifact import MANIFEST, ArtifactError, open_artifact
from dccot_jax.config import ConfigError, nearest
from dccot_jax.data.student import check_tokenizer
from dccot_jax.evaluate.protocol import SPLIT, evaluation_groups
from dccot_jax.mix.curriculum import make_pacing
from dccot_jax.mix.groups import PlanError
from dccot_jax.model.backends.registry import AttentionError, Need, resolve
from dccot_jax.model.config import ModelConfig, ModelError, from_config
from dccot_jax.model.gguf_io import is_gguf
from dccot_jax.model.sharding import MeshError, mesh_shape, slice_count
from dccot_jax.preflight_data import check_data
from dccot_jax.records import InputError
from dccot_jax.select.columns import declared_columns
from dccot_jax.select.gradients.settings import check_gradients
from dccot_jax.select.selectors import check_steps
from dccot_jax.select.settings import check_settings
from dccot_jax.select.signals import signal_names, split_signals
from dccot_jax.tasks.registry import UnknownTaskError, get_task
from dccot_jax.tasks.synthetic import SIZES
from dccot_jax.teachers.build import TeacherError, make_teacher
from dccot_jax.teachers.replay import replay_spec
from dccot_jax.train.settings import check_distill, check_lora

SOLVED = tuple(name for name, splits in SIZES.items() if "train" in splits)  # what scripted teachers can answer
_KNOWN_DIFFICULTIES = ("n_steps", "completion_tokens", "question_tokens")


def check(config: ConfigDict, *, devices: bool = True, traces: bool = True) -> None:
    """Validate a config and everything it names, arm by arm.

    Args:
      devices: also that the mesh fits the devices of this run. traces: also that the traces can be had.

    Raises ConfigError at the first field that cannot work, with the value and what would be accepted.
    """
    config_lib.validate(config)
    there = _devices() if devices else None
    arms = config_lib.arms(config)
    for name, arm in arms.items():
        try:
            _check_arm(arm, there, traces)
        except ConfigError as error:
            raise ConfigError(f"arm {name}: {error}" if config.arms else str(error)) from None
    _check_compare(config, list(arms))


def _devices() -> tuple[int, int]:
    """Devices of all hosts, and the slices they are of."""
    import jax

    try:
        return jax.device_count(), slice_count()
    except MeshError as error:
        raise ConfigError(f"config.{error}") from None


def _check_arm(config: ConfigDict, devices: tuple[int, int] | None, traces: bool) -> None:
    _check_tasks(config)
    check_data(config, traces=traces)
    try:
        mesh_shape(config_lib.to_plain(config.mesh), *(devices or ()))
    except MeshError as error:
        raise ConfigError(f"config.{error}") from None
    check_lora(config.train)
    check_distill(config.train)
    if traces:
        _check_teachers(config)
    split_signals(config.score.signals)
    numbers, vectors = declared_columns(config)
    check_steps(config.select.steps, numbers, vectors)
    difficulty, accepted = config.curriculum.difficulty, (*_KNOWN_DIFFICULTIES, *signal_names())
    if difficulty not in accepted:
        hint = nearest(difficulty, accepted)
        raise ConfigError(
            f"config.curriculum.difficulty: {difficulty!r} is not one of {', '.join(_KNOWN_DIFFICULTIES)}, nor a signal{hint}"
        )
    if config.curriculum.kind != "none":
        if difficulty not in _KNOWN_DIFFICULTIES and (difficulty not in config.score.signals or difficulty in vectors):
            raise ConfigError(
                f"config.curriculum.difficulty: {difficulty!r} is not one of {', '.join(_KNOWN_DIFFICULTIES)}, nor in config.score.signals"
            )
        try:
            make_pacing(config.curriculum)
        except PlanError as error:
            raise ConfigError(str(error)) from None
    student = _check_student(config, devices=devices is not None)
    _check_distillation(config, student)
    _check_scorer(str(config.score.student))
    check_settings(config)


def _check_tasks(config: ConfigDict) -> None:
    """Every task is known and has the split it is used for; limits are of evaluated tasks."""
    for key, split in (("traces.task", "train"), ("evaluate.iid", SPLIT), ("evaluate.ood", SPLIT), ("evaluate.cross", SPLIT)):
        value = config_lib.lookup(config, key)
        for name in (value,) if isinstance(value, str) else value:
            try:
                task = get_task(name)
            except UnknownTaskError as error:
                raise ConfigError(f"config.{key}: {error}") from None
            if split not in task.splits:
                raise ConfigError(f"config.{key}: task {name!r} has no {split} split, only {', '.join(task.splits)}")
    names = [name for members in evaluation_groups(config).values() for name in members]
    for name, limit in dict(config.evaluate.limits).items():
        if name not in names:
            raise ConfigError(f"config.evaluate.limits: {name!r} is not evaluated; evaluated are {', '.join(names)}{nearest(name, names)}")
        if not isinstance(limit, int) or limit < 0:
            raise ConfigError(f"config.evaluate.limits: {name!r}: {limit!r} must be a whole number of at least 0 (0: all)")


def _check_student(config: ConfigDict, *, devices: bool) -> ModelConfig:
    """Its files are there, its model can be built, and rows and replies fit its positions.

    Returns the model, whose vocabulary is a stand-in where ``student.path`` is empty.
    """
    for key in ("path", "tokenizer"):
        folder = config.student[key]
        if key == "path" and is_gguf(folder):
            continue  # read below, tokenizer and all in one file
        if folder and folder != "embedded" and not (Path(folder).expanduser() / "tokenizer.json").exists():
            if "://" in folder:
                raise ConfigError(f"config.student.{key}: {folder!r} must be on a local disk of every host; copy it there first")
            raise ConfigError(f"config.student.{key}: {folder!r} is not a Hugging Face directory (no tokenizer.json there)")
    where = "path" if config.student.path else "model"
    try:
        if config.student.path:
            from dccot_jax.model.hf import check_weights, read_config

            model = read_config(Path(config.student.path).expanduser())
            if not is_gguf(config.student.path):
                check_weights(Path(config.student.path).expanduser(), model)
        else:
            model = from_config(config.student.model, vocab_size=1)  # the tokenizer will say how many
    except ModelError as error:
        raise ConfigError(f"config.student.{where}: {error}") from None
    _check_tokenizer(config, model.vocab_size if config.student.path else 0)
    limit = model.max_positions
    source = "student.model.max_positions" if where == "model" else "the positions of student.path"
    if config.train.row_tokens > limit:
        raise ConfigError(f"config.train.row_tokens: {config.train.row_tokens} exceeds {source} = {limit}; at most {limit} fit")
    if config.evaluate.max_new_tokens >= limit:
        raise ConfigError(
            f"config.evaluate.max_new_tokens: {config.evaluate.max_new_tokens} leaves no room for a prompt in {source} = {limit};"
            f" less than {limit} is needed"
        )
    check_gradients(config, model)
    if devices:
        try:
            resolve(config.attention, Need.of(model, config.train.row_tokens, config.compute_dtype, packed=True))
        except AttentionError as error:
            raise ConfigError(str(error)) from None
    return model


def _check_tokenizer(config: ConfigDict, vocab_size: int) -> None:
    """The student's tokenizer reads and renders, where it is a directory's."""
    key = "path" if config.student.path else "tokenizer"
    folder = config.student[key]
    if folder == "embedded" or is_gguf(folder):
        return
    try:
        check_tokenizer(Path(folder).expanduser(), vocab_size)
    except ConfigError:
        raise
    except InputError as error:
        raise ConfigError(f"config.student.{key}: {error}") from None


def _check_distillation(config: ConfigDict, student: ModelConfig) -> None:
    """The teacher of ``train.distill`` can be opened, and has the student's tokens where these are known."""
    if config.train.distill.kind == "none":
        return
    from dccot_jax.data.tokenizer import load_tokenizer
    from dccot_jax.train.teacher import open_config

    folder, known = config.student.path, True
    if not folder and config.student.tokenizer == "embedded":  # made by the first stage
        known = False
    elif not folder:
        folder = config.student.tokenizer
        student = dataclasses.replace(student, vocab_size=len(load_tokenizer(folder)))
    tokenizer = None if not folder or is_gguf(folder) else epath.Path(folder).expanduser()
    open_config(student if known else None, tokenizer, config.train.distill)


def _check_scorer(student: str) -> None:
    """`score.student`: base, warmup, or the directory of a finished train (or student) artifact."""
    if student in ("base", "warmup"):
        return
    where, folder = f"config.score.student: {student!r}", Path(student).expanduser()
    if not folder.exists():
        hint = nearest(student, ("base", "warmup"))
        raise ConfigError(f"{where} is not one of base, warmup, nor a path that exists{hint}")
    if (folder / MANIFEST).exists():
        try:
            kind = open_artifact(folder).kind
        except ArtifactError as error:
            raise ConfigError(f"{where}: {error}") from None
        if kind.split(":")[0] not in ("train", "student"):
            raise ConfigError(f"{where} is an artifact of stage {kind}; a train or student artifact is needed")
    elif (folder / "config.json").exists():
        raise ConfigError(f"{where} is a Hugging Face directory; score.student takes a train artifact, for Hugging Face use student.path")
    else:
        raise ConfigError(f"{where} holds no {MANIFEST}; give base, warmup or the directory of a train artifact")


def _check_compare(config: ConfigDict, arms: list[str]) -> None:
    known = [*arms, "base"] if config.evaluate.base else arms
    for place, pair in enumerate(config.report.compare):
        where = f"config.report.compare[{place}]"
        for name in pair:
            if name not in known:
                raise ConfigError(f"{where}: {name!r} is no arm; arms are {', '.join(known)}{nearest(str(name), known)}")


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
                    place = f"data_dir {str(root)!r}" if config.data_dir else "this directory; config.data_dir is empty: name the folder"
                    raise ConfigError(f"config.{where}.files: {file!r} is not in {place}")
            continue
        try:
            make_teacher(dict(spec))
        except (TeacherError, ValueError) as error:
            raise ConfigError(f"config.{where}: {error}") from None
        if dict(spec)["kind"] == "scripted" and config.traces.task not in SOLVED:
            raise ConfigError(
                f"config.{where}: a scripted teacher cannot answer the questions of traces.task = {config.traces.task!r}, only those of"
                f" {', '.join(SOLVED)}; give its traces, e.g. {{'kind': 'replay', 'name': 'my-teacher', 'files': ('traces.jsonl',)}}"
            )
