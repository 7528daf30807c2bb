"""Signals of two models: the student's loss minus that of another model, over the same completion tokens.

  rho                   other model: `score.models.holdout`. Reducible holdout loss (RHO-LOSS, Mindermann et al., arXiv 2206.07137,
                        eq. 3): high where the student can still learn what a model trained on held-out rows knows. Offline: one
                        student, scored once, where the paper scores anew at every step.
  excess                `score.models.reference`. Excess loss over a model of good data (Rho-1, arXiv 2404.07965; DoReMi, arXiv
                        2305.10429, per row and not clipped).
  teacher_student_gap   `score.models.teacher`. How much likelier the text is to the model that wrote it, or to one like it.

Each is nll(student) - nll(other), nats per token, both by the same program over the same tokens: the other model must have the
student's tokenizer. The models are open one after the other, never together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactError
from dccot_jax.config import ConfigError
from dccot_jax.data.tokenizer import TokenizerError, tokenizer_hash
from dccot_jax.records import Dropped
from dccot_jax.select.signals import TWO_MODEL
from dccot_jax.select.views import Row
from dccot_jax.train.checkpoint import CheckpointError, resolve_checkpoint

Nll = Mapping[str, float]


def other_models(cfg: ConfigDict) -> dict[str, str]:
    """{role: path} of the models that the requested signals compare with. Raises ConfigError on a missing path."""
    found = {}
    for name in sorted(set(cfg.score.signals) & set(TWO_MODEL)):
        role = TWO_MODEL[name]
        found[role] = str(cfg.score.models[role])
        if not found[role]:
            raise ConfigError(
                f"config.score.models.{role}: empty; {name!r} compares the student with another model: give a train artifact or a"
                " Hugging Face directory"
            )
    return found


def open_other(key: str, path: str) -> tuple[Artifact | Path, str]:
    """(a student or train artifact or a Hugging Face directory, the hash of its tokenizer).

    Raises ConfigError naming config key `key` if it is none of these.
    """
    try:
        found = resolve_checkpoint(Path(path).expanduser())
        if isinstance(found, Artifact):
            return found, str(found.json("student")["tokenizer"]["hash"])
        return Path(found), tokenizer_hash(found)
    except (CheckpointError, ArtifactError, TokenizerError, OSError, KeyError) as error:
        raise ConfigError(f"config.{key}: {' '.join(str(error).split())}") from None


def check_tokenizers(key: str, path: str, theirs: str, rows: str) -> None:
    """Raises ConfigError unless both tokenizers are one: losses over different tokens cannot be subtracted."""
    if theirs != rows:
        raise ConfigError(
            f"config.{key}: {path} has tokenizer {theirs[:16]}, the student's rows were tokenised with {rows[:16]}; losses can be compared"
            " only over the same tokens, so both models must share the tokenizer and its chat template"
        )


def differences(
    cfg: ConfigDict,
    names: Sequence[str],
    student: Nll,
    rows: Sequence[Row],
    tokenizer: str,
    score: Callable[[Artifact | Path, Sequence[Row], str], tuple[Nll, int, dict[str, Any]]],
) -> tuple[dict[str, dict[str, float]], list[Dropped], dict[str, Any]]:
    """Columns of the signals `names`, rows that another model cannot read, and facts.

    Args:
      student: nll per row id; empty on processes other than 0, as the columns then are. tokenizer: hash of the rows' one.
      score: (model, rows, name of the pass) -> nll per row id, the model's positions, facts. Rows longer than the positions
        are left out of it.
    """
    others = {role: path for role, path in other_models(cfg).items() if role in {TWO_MODEL[name] for name in names}}
    scored: dict[str, Nll] = {}
    losses: dict[str, Nll] = {}
    dropped: list[Dropped] = []
    facts: dict[str, Any] = {}
    for role, path in others.items():
        key = f"score.models.{role}"
        model, theirs = open_other(key, path)
        check_tokenizers(key, path, theirs, tokenizer)
        if path not in scored:  # one model may play several roles
            scored[path], positions, facts[role] = score(model, rows, role)
            long = [row for row in rows if len(row.input_ids) > positions]
            dropped += [Dropped(r.id, "exceeds_positions", f"{len(r.input_ids)} tokens, {path} has {positions} positions") for r in long]
        losses[role] = scored[path]
    columns = {name: {row: student[row] - loss for row, loss in losses[TWO_MODEL[name]].items() if row in student} for name in names}
    return columns, dropped, facts
