"""The student's sizes from a config alone: a `config.json`, or the model fields and a tokenizer. No weights are read."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from dccot_jax.config import ConfigError
from dccot_jax.data.tokenizer import VOCAB_SIZE, load_tokenizer
from dccot_jax.model import hf
from dccot_jax.model.config import ModelConfig, ModelError, from_config
from dccot_jax.train.checkpoint import CheckpointError
from dccot_jax.train.teacher import read_model

# Fields that change what a model computes and neither its sizes nor its work.
_SIZELESS = ("rope_scaling", "rope_parameters")


def student_model(config: ConfigDict) -> tuple[ModelConfig, list[str]]:
    """The model of ``config.student``, and remarks for the user.

    ``student.path`` may be a directory that holds a config.json and nothing else, or that file. A model whose rotary positions this
    decoder does not know is estimated all the same, with a remark: they cost nothing.

    Raises:
      ConfigError: no such file, an unknown architecture, impossible sizes, or rows longer than the model's positions.
    """
    model, remarks = _read(Path(config.student.path).expanduser()) if config.student.path else (_declared(config), [])
    if config.train.row_tokens > model.max_positions:
        raise ConfigError(f"config.train.row_tokens: {config.train.row_tokens} exceeds the student's {model.max_positions} positions")
    return model, remarks


def teacher_model(config: ConfigDict) -> ModelConfig | None:
    """The model of ``config.train.distill.teacher``, as the trainer reads it or a config.json alone; None: none runs beside it.

    Raises ConfigError: neither a student nor a train artifact nor a Hugging Face model, or an architecture this decoder does not know.
    """
    distill = config.train.distill
    if distill.kind == "none" or distill.top_k:
        return None
    path = Path(distill.teacher).expanduser()
    try:
        return read_model(path.parent if path.name == "config.json" else path)[0]
    except (ModelError, CheckpointError) as error:
        raise ConfigError(f"config.train.distill.teacher: {error}") from None


def _read(path: Path) -> tuple[ModelConfig, list[str]]:
    folder = path.parent if path.name == "config.json" else path
    try:
        return hf.read_config(folder), []
    except ModelError as error:
        file = folder / "config.json"
        if not file.exists():
            raise ConfigError(f"config.student.path: {error}") from None
        fields = {name: value for name, value in json.loads(file.read_text()).items() if name not in _SIZELESS}
        try:
            return hf.from_hf(fields), [f"`dccot run` refuses this student: {error}"]
        except ModelError:
            raise ConfigError(f"config.student.path: {error}") from None


def _declared(config: ConfigDict) -> ModelConfig:
    tokenizer = config.student.tokenizer
    vocab = VOCAB_SIZE if tokenizer == "embedded" else len(load_tokenizer(tokenizer))
    try:
        return from_config(config.student.model, vocab)
    except ModelError as error:
        raise ConfigError(f"config.student.model: {error}") from None
