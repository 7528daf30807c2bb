"""Replay: traces that a teacher wrote earlier, read from files and joined to the task's training questions.

Rows are joined on the normalised question (for multiple choice also on the options), never on their number: files of
different teachers miss different rows. Of questions that differ in signs alone ("3 + 4?", "3 - 4?") a row joins the one with its
own signs, or without any such the first. A row whose question is no training question is dropped, so a file of test
rationales cannot be trained on. A file made on another public split of the task is refused before any row is dropped.
Gold answers, options and step counts come from the task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dccot_jax.formats import FORMATS, Fields, import_records
from dccot_jax.questions import question_key
from dccot_jax.records import Dropped, Trace, content_hash, normalise_question
from dccot_jax.tasks.answers import equal, extract
from dccot_jax.tasks.base import Item, Task
from dccot_jax.tasks.registry import build_target, check_questions_split
from dccot_jax.teachers.build import TeacherError
from dccot_jax.teachers.prompts import inverse_question_prompt
from dccot_jax.teachers.rows import answered_trace, item_fields, rationale

_KEYS = ("kind", "name", "level", "style", "files", "format", "skip_corrupt")


@dataclasses.dataclass(frozen=True)
class ReplaySpec:
    """One teacher's files.

    Attributes:
      name: the teacher. level, style: recorded on every trace. files: paths relative to ``data_dir`` (or absolute).
      format: one of `formats.FORMATS` or ``auto``. skip_corrupt: count corrupt JSON lines as dropped instead of stopping.
    """

    name: str
    files: tuple[str, ...]
    level: str = ""
    style: str = ""
    format: str = "auto"
    skip_corrupt: bool = False


def replay_spec(spec: Mapping[str, Any]) -> ReplaySpec:
    """Check a ``{"kind": "replay", ...}`` spec. Raises TeacherError naming the field."""
    unknown = sorted(set(spec.keys()) - set(_KEYS))
    if unknown:
        raise TeacherError(f"replay teacher: unknown field {unknown[0]!r}; known are {', '.join(_KEYS)}")
    files = spec.get("files", ())
    if isinstance(files, str) or not files:
        raise TeacherError(f"replay teacher: files = {files!r} must be a list of at least one path")
    if not spec.get("name"):
        raise TeacherError("replay teacher: name is missing (the teacher who wrote the files)")
    if spec.get("format", "auto") not in ("auto", *FORMATS):
        raise TeacherError(f"replay teacher: format {spec['format']!r} is not one of auto, {', '.join(FORMATS)}")
    fields = {key: spec[key] for key in _KEYS if key in spec and key not in ("kind", "files")}
    for key in ("name", "level", "style"):
        fields[key] = str(fields.get(key, ""))
    return ReplaySpec(files=tuple(files), **fields)


@dataclasses.dataclass
class Replayed:
    """Traces of one spec, what was dropped, and how many rows the files held (as imported, before the join)."""

    traces: list[Trace]
    dropped: list[Dropped]
    rows: int


def replay(
    spec: ReplaySpec,
    task: Task,
    items: Sequence[Item],
    *,
    split: str,
    data_dir: Path | None,
    wanted: Collection[str] | None = None,
    test: Sequence[Item] = (),
) -> Replayed:
    """Read and join one teacher's files.

    Args:
      task, items: the task and all its training items. split: the tag every trace carries (`rows.split_tag`).
      data_dir: what file names are relative to. wanted: ids of items to keep; None keeps all.
      test: the task's test split; each file's questions are held against it (`registry.check_questions_split`).

    Dropped, with the row's place as id: ``not_in_train_split``, ``other_split`` (a trace file made on another split),
    ``over_question_limit``, ``truncated``, ``inconsistent`` (a reverse record that failed its check), ``duplicate``, and what
    `formats.import_records` drops. Parts of one group are kept or dropped together.

    Raises:
      FormatError: a file that cannot be read.
      SplitMismatchError: a file was made on another public split: many of its questions, but not all, stand in `test`.
    """
    join = _Join(items)
    result = Replayed([], [], 0)
    seen: set[str] = set()
    samples: dict[tuple[str, ...], dict[str, int]] = {}
    for name in spec.files:
        path = Path(name).expanduser()
        imported = import_records(
            path if path.is_absolute() or data_dir is None else data_dir / path, spec.format, name=path.name, skip_corrupt=spec.skip_corrupt
        )
        result.rows += len(imported.records) + len(imported.dropped)
        result.dropped += imported.dropped
        records = [record | _group_field(spec, name, data_dir, record) for record in _with_join_questions(imported.records)]
        originals = [_asked(record) for record in records if record.get("part", "forward") == "forward"]
        check_questions_split(originals, test, source=f"{path.name}: ")
        refused = _refused(records, join, split, wanted)
        for index, record in enumerate(records):
            reason, detail = refused.get(index, ("", ""))
            if reason:
                result.dropped.append(Dropped(_place(record), reason, detail))
                continue
            item = join.find(record)
            assert item is not None  # _refused has seen to it
            trace = _trace(spec, task, item, record, split, samples)
            if trace.id in seen:
                result.dropped.append(Dropped(_place(record), "duplicate", trace.id))
                continue
            seen.add(trace.id)
            result.traces.append(trace)
    return result


class _Join:
    """Items by normalised question and options, and by the question alone where that is unambiguous."""

    def __init__(self, items: Iterable[Item]):
        self._signed: dict[str, Item] = {}
        self._full: dict[str, Item] = {}
        self._stem: dict[str, Item | None] = {}
        for item in items:
            self._signed.setdefault(question_key(item.question, item.choices), item)
            self._full.setdefault(_key(item.question, item.choices), item)
            stem = _key(item.question, ())
            self._stem[stem] = None if stem in self._stem and self._stem[stem] is not item else item

    def find(self, record: Fields) -> Item | None:
        question = _asked(record)
        choices = record.get("join_choices", record.get("choices", ()))
        found = self._signed.get(question_key(question, choices)) or self._full.get(_key(question, choices))
        # A row whose options we could not read still joins on its question, if no other item asks the same.
        return found if found is not None or choices else self._stem.get(_key(question, ()))


def _key(question: str, choices: Sequence[str]) -> str:
    return "\n".join(normalise_question(part) for part in (question, *choices))


def _with_join_questions(records: Sequence[Fields]) -> list[Fields]:
    """Rows of exported traces that ask a made-up question join through the original: their group's forward part, or an ancestor."""
    by_id = {record["id"]: record for record in records if "id" in record}
    forward = {record["group_id"]: record for record in records if record.get("group_id") and record.get("part") == "forward"}

    def origin(record: Fields, depth: int = 0) -> Fields:
        if record.get("part", "forward") != "forward":
            return forward.get(record.get("group_id", ""), record)
        parents = [by_id[parent] for parent in record.get("parent_ids", ()) if parent in by_id]
        return origin(parents[0], depth + 1) if parents and depth < 8 else record

    found = []
    for record in records:
        first = origin(record)
        found.append(
            record if first is record else {**record, "join_question": first["question"], "join_choices": first.get("choices", ())}
        )
    return found


def _refused(records: Sequence[Fields], join: _Join, split: str, wanted: Collection[str] | None) -> dict[int, tuple[str, str]]:
    """Record number -> (reason, detail); one refused part refuses its whole group."""
    refused: dict[int, tuple[str, str]] = {}
    for index, record in enumerate(records):
        item = join.find(record)
        question = _asked(record)[:80]
        if record.get("split") not in (None, "train", split):
            refused[index] = ("other_split", f"made on {record['split']}, this is {split}")
        elif item is None:
            refused[index] = ("not_in_train_split", question)
        elif wanted is not None and item.id not in wanted:
            refused[index] = ("over_question_limit", question)
        elif record.get("finish_reason") == "length":
            refused[index] = ("truncated", question)
        elif record.get("consistent") is False:
            refused[index] = ("inconsistent", question)
    groups: dict[str, tuple[str, str]] = {}
    for index, verdict in refused.items():
        if group := records[index]["group_id"]:
            groups.setdefault(group, verdict)
    return refused | {index: groups[record["group_id"]] for index, record in enumerate(records) if record["group_id"] in groups}


def _asked(record: Fields) -> str:
    """The question of the task that a row goes back to."""
    return record.get("join_question", record["question"])


def _group_field(spec: ReplaySpec, name: str, data_dir: Path | None, record: Fields) -> Fields:
    """``group_id`` of a record: "" for a row of its own, else a hash that no other teacher's file can share, whatever it is called."""
    group = record.get("group") or record.get("group_id") or ""
    if not group or group == record.get("id"):
        return {"group_id": ""}
    path = Path(name).expanduser()
    if data_dir is not None and path.is_relative_to(data_dir):
        path = path.relative_to(data_dir)
    return {"group_id": content_hash("replay/1", spec.name, spec.level, spec.style, path.as_posix(), group)}


def _place(record: Fields) -> str:
    return f"{record['source']}/{record['part']}" if record.get("part", "forward") != "forward" else record["source"]


def _trace(spec: ReplaySpec, task: Task, item: Item, record: Fields, split: str, samples: dict[tuple[str, ...], dict[str, int]]) -> Trace:
    part, method = record.get("part", "forward"), record.get("method", "vanilla")
    fields = item_fields(item, task, split) | {
        "teacher": spec.name,
        "style": spec.style or record.get("style", ""),
        "level": spec.level or record.get("level", ""),
        "method": method,
        "part": part,
        "group_id": record["group_id"],
        "source": record["source"],
        "meta": record.get("meta", "{}"),
        "finish_reason": record.get("finish_reason", "stop"),
        "prompt_tokens": record.get("prompt_tokens"),
        "completion_tokens": record.get("completion_tokens"),
        "parent_ids": record.get("parent_ids", ()),
    }
    target = record["target"].strip()
    if part == "backward_question":
        prompt = inverse_question_prompt(item.question, item.choices, item.gold or "")
        return answered_trace(target, **fields, prompt=prompt)
    if part == "backward_reasoning":
        fields |= {"question": record["question"], "choices": (), "gold_answer": record.get("gold_answer"), "gold_source": "pseudo"}
        fields["n_steps"] = None
    elif method == "rephrase":
        fields["question"] = record["question"]
    elif method == "question":
        fields |= {"question": record["question"], "gold_answer": record.get("gold_answer"), "gold_source": "pseudo", "n_steps": None}
    target = _stated(target, record.get("answer"), task, item)
    # Different texts for one question are samples 0, 1, 2, ... in file order; the same text again is the same sample.
    texts = samples.setdefault((item.id, method, part, fields["question"]), {})
    fields["sample_index"] = record.get("sample_index", texts.setdefault(target, len(texts)))
    return answered_trace(target, **fields)


def _stated(target: str, answer: str | None, task: Task, item: Item) -> str:
    """The target, with the task's answer line added where it states none: a bare answer, or an answer kept in its own field."""
    found = extract(target, task.answer_type, item.choices)
    if found.strict is not None:
        return target
    if len(target.split()) <= 3 and found.flexible is not None and equal(target, found.flexible, task.answer_type, item.choices):
        return build_target(task, "", found.flexible)
    return build_target(task, rationale(target), answer) if answer else target
