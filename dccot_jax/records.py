"""Records every room shares: traces, their parquet schema and ids, and the teacher protocol.

A *trace* is one training example: a question, a teacher's rationale and answer, and where they came from.
Its id is a content hash, so it is the same in every run, on every machine and after every resume.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import pyarrow as pa

# Fields whose values say what a trace *is*. Verdicts, scores and counts are not among them.
IDENTITY_FIELDS = ("task", "split", "question", "teacher", "style", "method", "part", "sample_index", "target", "parent_ids")

_JOINERS = re.compile("[\u00ad\u200c\u200d\u2060\ufe00-\ufe0f\ufeff]")

ANSWER_TYPES = ("number", "yes_no", "choice", "latex", "date", "string")


class InputError(ValueError):
    """Something the user gave cannot work: a config, a file, a checkpoint. The message is one line; the command exits with 2."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """One teacher trace.

    Attributes:
      id: content hash, 24 hex digits; `make_trace` computes it.
      task, split: registry name of the task and the split its question belongs to (``train``, or the split's hash tag).
      question: the question as asked, without the prompt suffix. choices: option texts, empty if none.
      gold_answer: canonical gold answer, or None when missing. gold_source: ``given`` or ``pseudo`` (a vote).
      answer_type: one of `ANSWER_TYPES`.
      teacher, style, level: who wrote it, in which style, at which level of detail (strings, may be empty).
      method: ``vanilla``, ``rephrase``, ``question``, ``answer``, ``reverse``, ``no_cot``.
      group_id: rows made together from one question share it; a single row is its own group (its id).
      part: role inside the group: ``forward``, ``backward_question`` or ``backward_reasoning``.
      sample_index: which of several samples of the same request. parent_ids: traces it was derived from.
      prompt: full user message, or None to build it from the question and the task's suffix.
      reasoning, answer: the teacher's rationale and its stated answer. target: the text the student learns to write.
      n_steps: number of reasoning steps where known. finish_reason: ``stop``, ``length`` or ``error``.
      prompt_tokens, completion_tokens: as metered by the *teacher*; None when unknown.
      verdict: True / False / None (not verified or gold unusable). verdict_reason: one short word or phrase.
      source: file and line, or generator, that the row came from. meta: JSON text, free form.
    """

    task: str
    split: str
    question: str
    target: str
    id: str = ""
    choices: tuple[str, ...] = ()
    gold_answer: str | None = None
    gold_source: str = "given"
    answer_type: str = "string"
    teacher: str = ""
    style: str = ""
    level: str = ""
    method: str = "vanilla"
    group_id: str = ""
    part: str = "forward"
    sample_index: int = 0
    parent_ids: tuple[str, ...] = ()
    prompt: str | None = None
    reasoning: str = ""
    answer: str | None = None
    n_steps: int | None = None
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    verdict: bool | None = None
    verdict_reason: str = ""
    source: str = ""
    meta: str = "{}"


TRACE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string()), nullable=False),
        pa.field("gold_answer", pa.string()),
        pa.field("gold_source", pa.string(), nullable=False),
        pa.field("answer_type", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("style", pa.string(), nullable=False),
        pa.field("level", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("parent_ids", pa.list_(pa.string()), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("reasoning", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("target", pa.string(), nullable=False),
        pa.field("n_steps", pa.int32()),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("verdict", pa.bool_()),
        pa.field("verdict_reason", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
    ],
    metadata={b"dccot_schema": b"trace/1"},
)

DROPPED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ],
    metadata={b"dccot_schema": b"dropped/1"},
)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A row that was not used: its id (or source location), a short countable reason, and a free-text detail."""

    id: str
    reason: str
    detail: str = ""


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and no spaces: equal values give equal text. Raises ValueError on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(*parts: Any, digits: int = 24) -> str:
    """SHA-256 over the canonical JSON of `parts`, as `digits` hex digits."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()[:digits]


def derive_seed(root: int, *names: Any) -> int:
    """A 63-bit seed for one named consumer of randomness; neighbouring roots or names give unrelated seeds."""
    return int(content_hash("seed", int(root), *names, digits=64), 16) % (1 << 63)


def trace_id(trace: Trace) -> str:
    """Content id of a trace, from `IDENTITY_FIELDS` only."""
    return content_hash("trace/1", {name: getattr(trace, name) for name in IDENTITY_FIELDS})


def make_trace(**fields: Any) -> Trace:
    """Build a Trace with its id filled in; ``group_id`` defaults to the id. Raises ValueError on an unknown answer type."""
    trace = Trace(**fields)
    if trace.answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {trace.answer_type!r} is not one of {', '.join(ANSWER_TYPES)}")
    identity = trace_id(trace)
    return dataclasses.replace(trace, id=identity, group_id=trace.group_id or identity)


def traces_to_table(traces: Iterable[Trace]) -> pa.Table:
    """Traces as a pyarrow table in `TRACE_SCHEMA`, in the given order."""
    rows = list(traces)
    columns = {name: [_to_arrow(getattr(row, name)) for row in rows] for name in TRACE_SCHEMA.names}
    return pa.table(columns, schema=TRACE_SCHEMA)


def table_to_traces(table: pa.Table) -> list[Trace]:
    """Inverse of `traces_to_table`. Raises ValueError naming a missing column."""
    missing = [name for name in TRACE_SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"not a trace table: column {missing[0]!r} is missing")
    rows = table.select(TRACE_SCHEMA.names).to_pylist()
    return [Trace(**{**row, "choices": tuple(row["choices"]), "parent_ids": tuple(row["parent_ids"])}) for row in rows]


def dropped_to_table(dropped: Iterable[Dropped]) -> pa.Table:
    """Dropped rows as a pyarrow table in `DROPPED_SCHEMA`."""
    rows = list(dropped)
    return pa.table({name: [getattr(row, name) for row in rows] for name in DROPPED_SCHEMA.names}, schema=DROPPED_SCHEMA)


def normalise_question(text: str) -> str:
    """Join key for questions: NFKC, lower case, letters and digits only, single spaces between words (`questions` keeps signs too)."""
    folded = fold_text(text)
    return " ".join(re.findall(rf"[^\W_]{letters(folded)}*", folded))


def fold_text(text: str) -> str:
    """NFKC, lower case, without characters that only steer how letters join (joiners, soft hyphens, variation selectors)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded if folded.isascii() else unicodedata.normalize("NFKC", _JOINERS.sub("", folded))


def letters(folded: str) -> str:
    """Regular expression of one letter or digit of this text, or one of its marks (vowel signs, accents): they stay in their words."""
    marks = "" if folded.isascii() else "".join(sorted(c for c in set(folded) if unicodedata.category(c)[0] == "M"))
    return rf"(?:[^\W_]|[{marks}])" if marks else r"[^\W_]"


def _to_arrow(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- teachers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Message:
    """One chat message; role is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that reaches the teacher; its canonical JSON is the cache key (with the teacher's own key)."""

    messages: tuple[Message, ...]
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    sample_index: int = 0


@dataclasses.dataclass(frozen=True)
class Response:
    """What came back. ``reasoning`` holds a separate thinking channel, if the teacher has one.

    finish_reason is ``stop``, ``length`` or ``error``; on ``error``, ``error`` says why and text is empty.
    """

    text: str
    reasoning: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""
    error: str = ""


class Teacher(Protocol):
    """Anything that turns a request into a response. Must be safe to call concurrently."""

    name: str

    @property
    def cache_key(self) -> str:
        """Hash of everything besides the request that can change a response (model, base URL, script version)."""
        ...

    async def complete(self, request: Request) -> Response: ...


def user_request(text: str, **sampling: Any) -> Request:
    """A request with one user message."""
    return Request(messages=(Message("user", text),), **sampling)


def count_reasons(dropped: Sequence[Dropped]) -> dict[str, int]:
    """Number of dropped rows per reason, sorted by reason."""
    counts: dict[str, int] = {}
    for row in dropped:
        counts[row.reason] = counts.get(row.reason, 0) + 1
    return dict(sorted(counts.items()))
