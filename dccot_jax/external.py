"""Files outside the store that an artifact's identity depends on: what a run reads that no stage of it has made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.artifact import MANIFEST, Artifact, file_hash, open_artifact, walk
from dccot_jax.model.gguf_io import is_gguf
from dccot_jax.records import content_hash


@functools.lru_cache(maxsize=512)
def _cached_hash(path: str, size: int, modified: float) -> str:
    return file_hash(path)


def _hash_of(path: epath.PathLike) -> str:
    if "://" in str(path):
        found = epath.Path(path).stat()
        return _cached_hash(str(path), found.length, float(found.mtime))
    stat = Path(path).stat()
    return _cached_hash(str(path), stat.st_size, stat.st_mtime)


def _local_hashes(config: ConfigDict, tasks: Iterable[str]) -> dict[str, str]:
    from dccot_jax.tasks.registry import get_task, local_files

    if not config.data_dir:
        return {}
    found = {name: path for task in tasks for name, path in local_files(get_task(task), config.data_dir).items()}
    return {f"file:{name}": _hash_of(path) for name, path in sorted(found.items())}


def task_files(config: ConfigDict) -> dict[str, str]:
    """Hashes of the local files of the training task and every evaluation task."""
    from dccot_jax.tasks.registry import evaluation_tasks

    groups = evaluation_tasks(config.traces.task, config.evaluate.iid, config.evaluate.ood, config.evaluate.cross)
    return _local_hashes(config, [config.traces.task, *(name for group in groups.values() for name in group)])


def guarded_files(config: ConfigDict) -> dict[str, str]:
    """`task_files`, and with ``verify.against`` "registered" those of every other task whose test rows are at hand."""
    from dccot_jax.select.decontaminate import guarded_tasks

    data_dir = Path(config.data_dir).expanduser() if config.data_dir else None
    return task_files(config) | _local_hashes(config, guarded_tasks((), data_dir, registered=config.verify.against == "registered"))


def trace_files(config: ConfigDict) -> dict[str, str]:
    """Hashes of replayed trace files and of the training task's local files."""
    root = Path(config.data_dir).expanduser() if config.data_dir else Path()
    names = {name for spec in config.traces.teachers for name in spec.get("files", ())}
    replayed = {name: root / Path(name).expanduser() for name in sorted(names)}
    hashes = {f"file:{name}": _hash_of(path) for name, path in replayed.items() if path.exists()}
    return hashes | _local_hashes(config, [config.traces.task])


def score_files(config: ConfigDict) -> dict[str, str]:
    """Hashes of the local files of the tasks that `less` takes validation items from; and what the models are that signals read
    beside the student, by config key: an artifact's logical hash, a directory's files."""
    from dccot_jax.select.gradients.settings import validation_sources
    from dccot_jax.select.settings import models_read
    from dccot_jax.select.signals import SENTENCES
    from dccot_jax.select.two_model import open_other

    sources = validation_sources(config) if "less" in config.score.signals else ()
    found = _local_hashes(config, [source.task for source in sources if source.task])
    for key, path in models_read(config).items():
        model, _ = open_other(key, path)
        found[key] = model.logical_hash if isinstance(model, Artifact) else content_hash("model/1", _model_files(path), digits=64)
    if set(config.score.signals) & set(SENTENCES):
        model = config.score.sentences.model
        files = _model_files(model, deep=True)
        found["score.sentences.model"] = content_hash("model/1", files, digits=64) if files else model  # or its name on the hub
    return found


def select_files(config: ConfigDict) -> dict[str, str]:
    """Hashes of the user's own score tables and of the local files of the tasks that a selection is to resemble."""
    from dccot_jax.select.selectors import required_corpora

    paths = [Path(name).expanduser() for name in config.select.tables]
    hashes = {f"table:{place}": digest for place, digest in enumerate(sorted(_hash_of(path) for path in paths if path.exists()))}
    return hashes | _local_hashes(config, required_corpora(config_lib.to_plain(config.select.steps)).values())


def student_files(config: ConfigDict) -> dict[str, str]:
    """Hashes of a pretrained student's config, tokenizer and weight files."""
    return {
        f"{key}:{name}": value
        for key in ("path", "tokenizer")
        if config.student[key] != "embedded"
        for name, value in _model_files(config.student[key]).items()
    }


def train_files(config: ConfigDict) -> dict[str, str]:
    """What a teacher of distributions is: the hashes of its files, or of the artifact that it is."""
    teacher = config.train.distill.teacher
    folder = epath.Path(teacher).expanduser()
    if teacher and (folder / MANIFEST).exists():
        return {"teacher": open_artifact(folder).logical_hash}
    return {f"teacher:{name}": value for name, value in _model_files(teacher).items()}


def _model_files(place: str, *, deep: bool = False) -> dict[str, str]:
    """Hashes of a GGUF file or of the files of a Hugging Face directory, by their names; none where `place` is neither.

    `place` may lie in a bucket. `deep`: of the directory's folders too.
    """
    folder = epath.Path(place).expanduser()
    if place and is_gguf(place) and folder.exists():
        return {folder.name: _hash_of(folder)}
    if not place or not folder.is_dir():
        return {}
    kinds = (".json", ".safetensors", ".jinja", ".txt", ".model")
    found = sorted(walk(folder) if deep else folder.iterdir(), key=str)
    return {str(path.relative_to(folder)): _hash_of(path) for path in found if path.suffix in kinds}


EXTERNAL: dict[str, Callable[[ConfigDict], dict[str, str]]] = {
    "task_files": task_files,
    "guarded_files": guarded_files,
    "trace_files": trace_files,
    "score_files": score_files,
    "select_files": select_files,
    "student_files": student_files,
    "train_files": train_files,
}
