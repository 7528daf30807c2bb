"""Candidates: the groups of rows that selectors choose from, and what a selector may read of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dccot_jax import questions
from dccot_jax.records import InputError, Trace


class SelectionError(InputError):
    """A selection that keeps nothing, or values that a step cannot use; the message names the step and what is the matter."""


# Numbers that every row has, beside the scored signals.
FIELDS = ("completion_tokens", "prompt_tokens", "n_steps")
# What rows can be told apart by; `meta.<key>` reads a key of a trace's own notes.
LABELS = ("task", "teacher", "style", "level", "method", "answer_type")
META = "meta."
TEXTS = ("question", "reasoning", "target")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One group of rows.

    Attributes:
      group_id: shared id. ids: its rows, sorted. completion_tokens: over all its rows (student's tokenizer).
      verdict: True, False or None (not verified), over the group as `teacher_correct` reads it; verdict_reason: why.
      values: {signal: value}; a signal without a value is absent, never a default.
      vectors: {signal: [D] float array} of vector-valued signals, e.g. embeddings; absent like values.
      record: the group's first forward row, whose texts and labels stand for the group.
    """

    group_id: str
    ids: tuple[str, ...]
    completion_tokens: int
    verdict: bool | None
    verdict_reason: str
    values: Mapping[str, float]
    vectors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)
    record: Trace | None = dataclasses.field(default=None, compare=False)


# A selector returns the kept candidates and, for every other one, (reason, detail) by group id.
Verdicts = dict[str, tuple[str, str]]
Selected = tuple[list[Candidate], Verdicts]
Step = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step gets beside its candidates and options.

    Attributes:
      seed: root seed of the run. corpora: {task name: texts} of the distributions to resemble (`dsir`).
      run: applies another step to candidates (`random` at the size of another step).
    """

    seed: int
    corpora: Mapping[str, Sequence[str]]
    run: Callable[[Sequence[Candidate], Step], Selected]


Selector = Callable[[Sequence[Candidate], Step, Setting], Selected]


def describe(step: Step) -> str:
    """`top(signal=ifd_loss, rows=500)`: the step as people read it."""
    options = ", ".join(f"{key}={_shown(value)}" for key, value in step.items() if key != "name")
    return f"{step['name']}({options})" if options else str(step["name"])


def rows(candidates: Sequence[Candidate]) -> int:
    """Traces of all groups."""
    return sum(len(c.ids) for c in candidates)


def tokens(candidates: Sequence[Candidate]) -> int:
    """Completion tokens of all groups."""
    return sum(c.completion_tokens for c in candidates)


def partition(candidates: Sequence[Candidate], reason: Callable[[Candidate], tuple[str, str] | None]) -> Selected:
    """Keep those without a reason."""
    reasons = {c.group_id: found for c in candidates if (found := reason(c)) is not None}
    return [c for c in candidates if c.group_id not in reasons], reasons


def with_values(candidates: Sequence[Candidate], *names: str) -> Selected:
    """Those with a finite value of every signal; the others are dropped with ``no_score_<signal>``."""

    def reason(c: Candidate) -> tuple[str, str] | None:
        for name in names:
            value = c.values.get(name)
            if value is None or not math.isfinite(value):
                return f"no_score_{name}", f"{name}: the group has no usable value"
        return None

    return partition(candidates, reason)


def with_vectors(candidates: Sequence[Candidate], name: str) -> tuple[list[Candidate], np.ndarray, Verdicts]:
    """Those with a finite vector, sorted by group id, their vectors [N, D] float32, and reasons (``no_score_<name>``) for the others."""

    def reason(c: Candidate) -> tuple[str, str] | None:
        vector = c.vectors.get(name)
        if vector is None or not np.isfinite(vector).all():
            return f"no_score_{name}", f"{name}: the group has no usable vector"
        return None

    found, missing = partition(sorted(candidates, key=lambda c: c.group_id), reason)
    matrix = np.stack([c.vectors[name] for c in found]).astype(np.float32) if found else np.zeros((0, 1), np.float32)
    return found, matrix, missing


def by_value(candidates: Sequence[Candidate], name: str, prefer: str = "high") -> list[Candidate]:
    """Best first: highest values, or with ``prefer="low"`` the lowest; ties by group id."""
    sign = -1.0 if prefer == "high" else 1.0
    return sorted(candidates, key=lambda c: (sign * c.values[name], c.group_id))


def label(candidate: Candidate, name: str) -> str:
    """Value of one of `LABELS`, or of ``meta.<key>`` ("" where the trace has no such key)."""
    record = _record(candidate)
    if name.startswith(META):
        return str(json.loads(record.meta or "{}").get(name[len(META) :], ""))
    return str(getattr(record, name))


def text(candidate: Candidate, name: str) -> str:
    """One of `TEXTS` of the group's forward row."""
    return str(getattr(_record(candidate), name))


def question_key(candidate: Candidate) -> tuple[str, str]:
    """Candidates with equal keys answer the same question."""
    record = _record(candidate)
    return record.task, questions.question_key(record.question, record.choices)


def _record(candidate: Candidate) -> Trace:
    if candidate.record is None:
        raise ValueError(f"candidate {candidate.group_id} carries no trace, which this selector reads")
    return candidate.record


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return describe(value) if "name" in value else ", ".join(f"{key} {item}" for key, item in value.items())
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
