"""Import and export of traces in the formats people have and other trainers read.

=================  ====================================================================================================
prompt_completion  ``{prompt, completion}``: strings or lists of messages (TRL)
messages           ``{messages: [{role, content, reasoning_content?}]}`` (TRL, LLaMA-Factory ``openai``)
sharegpt           ``{conversations: [{from, value}]}``
alpaca             ``{instruction, input, output}``
eit                ``{instruction, output}``
question_answer    ``{question, answer}``
dccot              one row per question with ``forward_reasoning``, ``backward_question``, ``answer_aug``, ... (DC-CoT, RevThink)
trace              every field of `records.Trace`
=================  ====================================================================================================

Files are JSON arrays, JSON lines or parquet, the first two also gzipped. One question and one reply per row; rows with more
turns, missing fields, anything but text or text that is no Unicode (half of a surrogate pair) are counted as dropped, with
their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dccot_jax.formats_files import FormatError, Row, read_rows, write_rows
from dccot_jax.formats_rows import READERS, Fields, RowError, check_unicode, detect, gold_text
from dccot_jax.records import TRACE_SCHEMA, Dropped, Trace

__all__ = ["FORMATS", "FormatError", "Imported", "dataset_info", "export_traces", "import_records"]

FORMATS = tuple(READERS)


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a file held: trace fields per row (``source`` says where each stood), what could not be used, the format, the rows."""

    records: list[Fields]
    dropped: list[Dropped]
    format: str
    rows: list[Row]


def import_records(path: str | Path, format: str = "auto", *, name: str = "", skip_corrupt: bool = False, gold_field: str = "") -> Imported:
    """Read one file of traces.

    Args:
      path: the file. format: one of `FORMATS`, or ``auto`` (decided by the first row's field names).
      name: how ``source`` names the file (default: its name). skip_corrupt: count corrupt JSON lines instead of raising.
      gold_field: the column of right answers (default: the first of `formats_rows.GOLD_FIELDS` that a row has).

    Returns:
      Imported. Every record holds at least question, target, reasoning, meta and source; further `Trace` fields where the
      file has them. Of a ``dccot`` record, parts of one group share ``group`` and all carry ``join_question``.

    Raises:
      FormatError: unreadable file, corrupt line (file, line and problem are named), unknown or undetectable format, or no row has
        `gold_field`.
    """
    if format != "auto" and format not in READERS:
        raise FormatError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
    rows, dropped = read_rows(path, name=name, skip_corrupt=skip_corrupt)
    if not rows:
        return Imported([], dropped, format, [])
    if gold_field and not any(gold_field in row.fields for row in rows):
        raise FormatError(f"{path}: no row has the field {gold_field!r}; fields of the first row: {', '.join(rows[0].fields)}")
    if format == "auto":
        found = next((kind for kind in (detect(row.fields) for row in rows) if kind), None)
        if found is None:
            fields = ", ".join(sorted(rows[0].fields)) or "none"
            raise FormatError(f"{path}: unknown format (fields of the first row: {fields}); give one of {', '.join(FORMATS)}")
        format = found
    records: list[Fields] = []
    for row in rows:
        try:
            check_unicode(row.fields)
            parts = READERS[format](row.fields)
        except RowError as error:
            dropped.append(Dropped(row.place, error.reason, error.detail))
            continue
        for part in parts:
            if gold_field and part.get("part", "forward") == "forward":
                part["gold_answer"] = gold_text(row.fields.get(gold_field))
            group = {"group": f"{row.place}/{part['group']}"} if part.get("group") else {}
            records.append({**part, **group, "source": row.place})
    return Imported(records, dropped, format, rows)


def export_traces(traces: Iterable[Trace], path: str | Path, format: str, *, prompt_of: Callable[[Trace], str] | None = None) -> int:
    """Write traces in one of `FORMATS`; the suffix of `path` says whether as .jsonl, .json (both also .gz) or .parquet.

    Every row but DC-CoT's carries the trace's id, question, task, teacher and gold answer beside the format's own columns.

    Args:
      traces: what to write, in this order. path: written atomically.
      prompt_of: gives the user message of a trace (as `tasks.registry.build_prompt` does); default: the trace's own prompt, or
        its question and options.

    Returns:
      the number of rows written.

    Raises:
      FormatError: unknown format or suffix.
    """
    rows = list(traces)
    shown = prompt_of or default_prompt
    if format == "dccot":
        records = _dccot_records(rows)
    elif format in _WRITERS:
        records = [_with_lineage(_WRITERS[format](shown(row), row.target), row) for row in rows]
    elif format == "trace":
        records = [{name: _plain(getattr(row, name)) for name in TRACE_SCHEMA.names} for row in rows]
    else:
        raise FormatError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    write_rows(path, records)
    return len(records)


def default_prompt(trace: Trace) -> str:
    """The trace's own prompt, or its question with the options as ``(A) x (B) y``."""
    if trace.prompt is not None:
        return trace.prompt
    options = " ".join(f"({letter}) {text}" for letter, text in zip("ABCDEFGHIJ", trace.choices))
    return f"{trace.question} {options}".rstrip()


def dataset_info(name: str, file_name: str, format: str) -> dict[str, Any]:
    """The stanza for LLaMA-Factory's ``dataset_info.json``. Raises FormatError for formats it does not read."""
    if format in ("alpaca", "eit"):
        columns = {"prompt": "instruction", "response": "output"} | ({"query": "input"} if format == "alpaca" else {})
        return {name: {"file_name": file_name, "formatting": "alpaca", "columns": columns}}
    if format in ("prompt_completion", "question_answer"):
        prompt, response = format.split("_")
        return {name: {"file_name": file_name, "formatting": "alpaca", "columns": {"prompt": prompt, "response": response}}}
    if format == "sharegpt":
        return {name: {"file_name": file_name, "formatting": "sharegpt", "columns": {"messages": "conversations"}}}
    if format == "messages":
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
        return {name: {"file_name": file_name, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}}
    raise FormatError(f"LLaMA-Factory does not read format {format!r}")


_WRITERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "prompt_completion": lambda prompt, target: {"prompt": prompt, "completion": target},
    "messages": lambda prompt, target: {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]},
    "sharegpt": lambda prompt, target: {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": target}]},
    "alpaca": lambda prompt, target: {"instruction": prompt, "input": "", "output": target},
    "eit": lambda prompt, target: {"instruction": prompt, "output": target},
    "question_answer": lambda prompt, target: {"question": prompt, "answer": target},
}


def _with_lineage(record: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """The format's own columns, and where the row came from; of equal names the format's column stays."""
    choices = {"choices": list(trace.choices)} if trace.choices else {}
    lineage = {
        "trace_id": trace.id,
        "task": trace.task,
        "question": trace.question,
        **choices,
        "gold_answer": trace.gold_answer,
        "teacher": trace.teacher,
    }
    return record | {name: value for name, value in lineage.items() if name not in record}


def _dccot_records(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """DC-CoT rows: one per trace that starts a record (vanilla, question, reverse), the answer paths of its question inside.

    An answer path or an answered rephrasing joins the record of its parent, or else opens one for its own question.
    """
    records: dict[str, dict[str, Any]] = {}
    home: dict[str, str] = {}  # trace id -> key of the record it stands in

    def record(key: str, trace: Trace, question: str) -> dict[str, Any]:
        home[trace.id] = key
        start = {"question": default_prompt(dataclasses.replace(trace, question=question, prompt=None)), "gold_answer": trace.gold_answer}
        return records.setdefault(key, start | {"task": trace.task, "teacher": trace.teacher, "trace_id": trace.id})

    leading = [trace for trace in traces if trace.method not in ("answer", "rephrase")]
    # The forward part opens a reverse record, wherever it stands in the input.
    for trace in sorted(leading, key=lambda row: row.part != "forward"):
        if trace.part == "forward":
            record(trace.group_id, trace, trace.question).update(forward_reasoning=trace.target, forward_pred=trace.answer)
        elif trace.part == "backward_question":
            record(trace.group_id, trace, trace.question).update(backward_question=trace.target)
        else:
            found = record(trace.group_id, trace, trace.question)
            found.update(backward_reasoning=trace.target, backward_pred=trace.answer, is_consistent="true")
    for trace in traces:
        if trace.method not in ("answer", "rephrase"):
            continue
        key = next((home[parent] for parent in trace.parent_ids if parent in home), trace.id)
        if trace.method == "rephrase":
            if "rephrased_question" in records.get(key, {}):
                key = trace.id  # a record has room for one
            record(key, trace, trace.question).update(
                rephrased_question=trace.question, rephrased_reasoning=trace.target, rephrased_pred=trace.answer
            )
        else:
            paths = record(key, trace, trace.question).setdefault("answer_aug", [])
            paths.append({"reasoning": trace.target, "answer_raw": trace.answer, "pred": trace.answer})
    return list(records.values())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
