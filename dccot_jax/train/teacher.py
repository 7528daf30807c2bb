"""The teacher whose next-token distributions a student learns (``train.distill``): beside it on its mesh, or stored ahead."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from dccot_jax.artifact import Artifact
from dccot_jax.config import ConfigError
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.model import hf
from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.divergence import check_vocabularies
from dccot_jax.records import InputError
from dccot_jax.train.checkpoint import abstract_params, load_student, resolve_checkpoint
from dccot_jax.train.losses import Distillation, distillation


def teacher_settings(student: Artifact, mc: ModelConfig, distill: Any, stored: Artifact | None = None) -> Distillation | None:
    """What is learned from which teacher; None where ``train.distill.kind`` is "none".

    Args:
      stored: the artifact of stage ``distill``, where ``train.distill.top_k`` asks for it; the teacher is not opened then.

    Raises ConfigError if the teacher cannot be opened, or does not share the student's tokens.
    """
    if distill.kind == "none":
        return None
    if stored is None:
        return distillation(open_config(mc, student.file("tokenizer"), distill), distill)
    if stored.facts["vocab_size"] != mc.vocab_size:
        raise ConfigError(
            f"config.train.distill.teacher: {stored.path} holds tokens of a model with {stored.facts['vocab_size']},"
            f" the student has {mc.vocab_size}"
        )
    return distillation(None, distill)


def open_config(mc: ModelConfig | None, tokenizer: epath.Path | None, distill: Any) -> ModelConfig:
    """The teacher's model config; no weights are read.

    Args:
      mc: the student's, None where its size is not known yet. tokenizer: directory of the student's, None likewise.

    Raises ConfigError if the teacher cannot be opened, does not share the student's tokens, or has fewer than ``top_k``.
    """
    where = f"config.train.distill.teacher: {distill.teacher!r}"
    try:
        teacher, theirs = read_model(epath.Path(distill.teacher).expanduser())
        if (theirs / "config.json").exists() and not any(theirs.glob("*.safetensors")):
            raise ModelError(f"no *.safetensors in {theirs}; a teacher needs its weights")
        if mc is not None:
            check_vocabularies(mc, teacher)
        same = tokenizer is None or _same_tokens(theirs, tokenizer)
    except InputError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not same:
        raise ConfigError(f"{where} has other tokens than the student; distributions need the same")
    if distill.top_k > teacher.vocab_size:
        raise ConfigError(
            f"config.train.distill.top_k: {distill.top_k} exceeds the teacher's {teacher.vocab_size} tokens;"
            f" it must be 0 (the teacher runs beside the student) to {teacher.vocab_size}"
        )
    return teacher


def read_model(path: epath.PathLike) -> tuple[ModelConfig, epath.Path]:
    """The model of a Hugging Face directory, or of a student or train artifact, and where its tokenizer is; no weights are read.

    Raises CheckpointError: neither of these. ModelError: an architecture this decoder does not know.
    """
    found = resolve_checkpoint(path)
    if isinstance(found, Artifact):
        return ModelConfig.from_dict(found.json("student")["model"]), found.file("tokenizer")
    return hf.read_config(found), found


def load_teacher(settings: Distillation | None, distill: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """{"teacher": its parameters on the mesh} where there is one."""
    if settings is None or settings.teacher is None:
        return {}
    path = epath.Path(distill.teacher).expanduser()
    return {"teacher": load_student(path, mesh, param_dtype=jnp.dtype(distill.teacher_dtype)).params}


def abstract_teacher(settings: Distillation | None, distill: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Shapes and shardings of `load_teacher`."""
    if settings is None or settings.teacher is None:
        return {}
    return {"teacher": abstract_params(settings.teacher, mesh, jnp.dtype(distill.teacher_dtype))}


def _same_tokens(one: epath.Path, other: epath.Path) -> bool:
    return load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()
