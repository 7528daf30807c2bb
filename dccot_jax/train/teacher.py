"""The teacher whose next-token distributions a student learns (``train.distill``): opened onto the student's mesh, never trained."""

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
from dccot_jax.train.checkpoint import abstract_params, load_student, resolve_checkpoint
from dccot_jax.train.losses import Distillation, distillation


def teacher_settings(student: Artifact, mc: ModelConfig, distill: Any) -> Distillation | None:
    """What is learned from which teacher; None where ``train.distill.kind`` is "none".

    Raises ConfigError if the teacher cannot be opened, or does not share the student's tokens.
    """
    if distill.kind == "none":
        return None
    try:
        found = resolve_checkpoint(epath.Path(distill.teacher).expanduser())
        if isinstance(found, Artifact):
            teacher, tokenizer = ModelConfig.from_dict(found.json("student")["model"]), found.file("tokenizer")
        else:
            teacher, tokenizer = hf.read_config(found), found
        check_vocabularies(mc, teacher)
    except ModelError as error:
        raise ConfigError(f"config.train.distill.teacher: {distill.teacher!r}: {error}") from None
    if not _same_tokens(tokenizer, student.file("tokenizer")):
        raise ConfigError(
            f"config.train.distill.teacher: {distill.teacher!r} has other tokens than the student; distributions need the same"
        )
    return distillation(teacher, distill)


def load_teacher(settings: Distillation | None, distill: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """{"teacher": its parameters on the mesh} where there is one."""
    if settings is None:
        return {}
    path = epath.Path(distill.teacher).expanduser()
    return {"teacher": load_student(path, mesh, param_dtype=jnp.dtype(distill.teacher_dtype)).params}


def abstract_teacher(settings: Distillation | None, distill: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Shapes and shardings of `load_teacher`."""
    return {} if settings is None else {"teacher": abstract_params(settings.teacher, mesh, jnp.dtype(distill.teacher_dtype))}


def _same_tokens(one: epath.Path, other: epath.Path) -> bool:
    return load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()
