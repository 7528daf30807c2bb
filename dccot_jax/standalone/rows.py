"""A file of traces in any format of `formats`, as traces for the stages, and the way back from trace ids to the file's rows.

A trace's id and group hang on its content alone (not on gold answers, nor on what a flag says of it), so the same row has the
same id in any file. Rows written by this project keep their own ids.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dccot_jax.artifact import Artifact, StageResult, Store, artifact_identity, finish, read_table, table_hash, write_table
from dccot_jax.context import Context
from dccot_jax.formats import FormatError, Imported, default_prompt, export_traces, import_records
from dccot_jax.formats_files import write_rows
from dccot_jax.formats_rows import Fields
from dccot_jax.records import (
    ANSWER_TYPES,
    TRACE_SCHEMA,
    Dropped,
    Trace,
    canonical_json,
    content_hash,
    count_reasons,
    trace_id,
    traces_to_table,
)
from dccot_jax.select.verify import THREADS, verdict_of, with_verdicts
from dccot_jax.tasks.plain import plain_task_name
from dccot_jax.tasks.registry import UnknownTaskError, get_task
from dccot_jax.teachers.prompts import inverse_question_prompt
from dccot_jax.teachers.rows import answered_trace

_WHOLE = "trace"  # the format whose rows hold every field of a trace
_NO_VERDICT = "no gold answer"


@dataclasses.dataclass(frozen=True)
class TraceFile:
    """What a file holds.

    Attributes:
      path: the file. format: one of `formats.FORMATS`. imported: its rows as they stand.
      traces: one per trace, in the file's order. dropped: rows that are none, by place. places: {trace id: ``file.jsonl:12``}.
      typed: whether every trace with a gold answer says of which type it is.
    """

    path: Path
    imported: Imported
    traces: list[Trace]
    dropped: list[Dropped]
    places: Mapping[str, str]
    typed: bool

    @property
    def format(self) -> str:
        return self.imported.format


def read_traces(path: str | Path, *, format: str = "auto", gold_field: str = "", answer_type: str = "") -> TraceFile:
    """Read a file.

    Args:
      format, gold_field: as in `formats.import_records`. answer_type: of the gold answers, where a row does not say it and its
        task is not a registered one.

    A row that is there already is dropped as ``duplicate``, with its whole group.
    Raises FormatError (unreadable file, bad line, unknown format, or not one usable row; the message says where and why).
    """
    path = Path(path).expanduser()
    imported = import_records(path, format, gold_field=gold_field)
    whole = imported.format == _WHOLE
    records = imported.records if whole else [_flat_meta(record) for record in imported.records]
    groups: dict[str, list[Fields]] = {}
    for number, record in enumerate(records):
        group = record.get("group_id") if whole else record.get("group")
        groups.setdefault(str(group or number), []).append(record)
    traces: dict[str, Trace] = {}
    places: dict[str, str] = {}
    dropped = list(imported.dropped)
    for members in groups.values():
        made = [_whole_trace(record) if whole else _foreign_trace(record, answer_type) for record in members]
        again = next((trace for trace in made if trace.id in traces), None)
        if again is not None:
            dropped += [Dropped(record["source"], "duplicate", f"{again.id} stands at {places[again.id]}") for record in members]
            continue
        if len(made) > 1 and not whole:
            group_id = content_hash("group/1", sorted(trace.id for trace in made))
            made = [dataclasses.replace(trace, group_id=group_id) for trace in made]
        traces |= {trace.id: trace for trace in made}
        places |= {trace.id: record["source"] for trace, record in zip(made, members)}
    if not traces:
        first = f"{dropped[0].id}: {dropped[0].reason} {dropped[0].detail}".rstrip() if dropped else "the file is empty"
        raise FormatError(f"{path}: no usable row ({first})")
    if whole:
        _check_types(list(traces.values()))
    untyped = not whole and not answer_type and any(t.gold_answer and t.task == plain_task_name(t.answer_type) for t in traces.values())
    return TraceFile(path, imported, list(traces.values()), dropped, places, not untyped)


def judged(file: TraceFile, time_limit: float, ctx: Context) -> TraceFile:
    """The file with a verdict for every trace that has a gold answer and none yet, as the verify stage gives them."""
    known: dict[str, tuple[bool | None, str]] = {}
    open_: list[Trace] = []
    for trace in file.traces:
        if trace.verdict is not None or not trace.gold_answer or not file.typed:
            known[trace.id] = (trace.verdict, trace.verdict_reason or _NO_VERDICT)
        elif trace.part == "forward":
            open_.append(trace)
    with ctx.progress("verify", len(open_)) as meter, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for trace, verdict in zip(open_, pool.map(lambda trace: verdict_of(trace, time_limit), open_)):
            known[trace.id] = verdict
            meter.advance()
    return dataclasses.replace(file, traces=with_verdicts(file.traces, known))


def rows_artifact(file: TraceFile, ctx: Context) -> Artifact:
    """The traces as the stages after ``verify`` read them: an artifact of the store under `ctx.workdir`."""
    table = traces_to_table(file.traces)
    meaning = table_hash(table)
    return _artifact("verify", {"traces": table}, meaning, {}, ctx)


def counts_artifact(counts: pa.Table, ctx: Context) -> Artifact:
    """Token counts of traces (id, prompt_tokens, completion_tokens) in the place of the tokenize stage's artifact."""
    return _artifact("tokenize", {"tokens": counts}, table_hash(counts), {}, ctx)


def write_kept(file: TraceFile, kept: Collection[str], out: Path) -> int:
    """Write the rows of the kept traces, in the file's format and order; returns how many rows.

    Parquet to parquet keeps every column's type. A DC-CoT row holds several traces: those kept are written in that format.
    Raises FormatError on a suffix that says nothing.
    """
    places = {file.places[identity] for identity in kept}
    if file.format == "dccot":
        return export_traces([trace for trace in file.traces if trace.id in kept], out, "dccot")
    chosen = [row.place in places for row in file.imported.rows]
    if out.suffix == ".parquet" and _is_parquet(file.path):
        write_table(out, pq.read_table(file.path).filter(pa.array(chosen)))
    else:
        try:
            write_rows(out, [row.fields for row, keep in zip(file.imported.rows, chosen) if keep])
        except (TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{out}: a column of {file.path.name} cannot be written as JSON ({error}); write .parquet") from None
    return sum(chosen)


def write_dropped(file: TraceFile, dropped: Sequence[Dropped], out: Path) -> None:
    """Table of (id, source, reason, detail), sorted by source line; `id` of a row that became no trace is its place."""
    order = {row.place: number for number, row in enumerate(file.imported.rows)}
    rows = [(file.places.get(d.id, d.id), d) for d in dropped]
    rows.sort(key=lambda pair: (order.get(pair[0], len(order)), pair[1].id))
    columns: dict[str, list[str]] = {"id": [d.id for _, d in rows], "source": [place for place, _ in rows]}
    columns |= {"reason": [d.reason for _, d in rows], "detail": [d.detail for _, d in rows]}
    write_table(out, pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))


def read_dropped(path: epath.PathLike) -> list[Dropped]:
    """Rows of a table that `write_dropped` or a stage wrote; none where there is no such file."""
    rows = read_table(path).to_pylist() if epath.Path(path).exists() else []
    return [Dropped(row["id"], row["reason"], row["detail"]) for row in rows]


def told(file: TraceFile, dropped: Sequence[Dropped]) -> str:
    """The reasons counted, and the last row as an example; for a message where rows are lost."""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in count_reasons(dropped).items())
    last = dropped[-1]
    return f"{counts}; e.g. {file.places.get(last.id, last.id)}: {last.detail}".rstrip(": ")


# --- one trace ----------------------------------------------------------------------------------------------------------


def _whole_trace(record: Fields) -> Trace:
    """A row of format ``trace``, as it is; with the prompt written out where its task is not known here."""
    fields = {name: record[name] for name in TRACE_SCHEMA.names if name in record}
    trace = Trace(**{"task": "", "split": "", **fields, "source": record["source"]})
    if not trace.id or not trace.group_id:
        trace = dataclasses.replace(trace, id=trace.id or trace_id(trace))
        trace = dataclasses.replace(trace, group_id=trace.group_id or trace.id)
    if trace.prompt is None and not _registered(trace.task):
        return dataclasses.replace(trace, prompt=default_prompt(trace))
    return trace


def _check_types(traces: Sequence[Trace]) -> None:
    """Raises FormatError naming the first row with a field of another type than `TRACE_SCHEMA` has, or an unknown answer type."""
    for trace in traces:
        if trace.answer_type not in ANSWER_TYPES:
            raise FormatError(f"{trace.source}: answer_type {trace.answer_type!r} is not one of {', '.join(ANSWER_TYPES)}")
    try:
        traces_to_table(traces)
    except (pa.ArrowException, TypeError, ValueError) as error:
        if len(traces) > 1:
            for half in (traces[: len(traces) // 2], traces[len(traces) // 2 :]):
                _check_types(half)
        raise FormatError(f"{traces[0].source}: not a trace row ({' '.join(str(error).split())})") from None


def _foreign_trace(record: Fields, answer_type: str) -> Trace:
    """A trace of any other format. Its prompt is the row's own user message, never one that a task would build."""
    names = ("question", "choices", "gold_answer", "teacher", "style", "level", "method", "part", "sample_index", "finish_reason", "source")
    fields: dict[str, Any] = {name: record[name] for name in names if name in record}
    own_task = str(record.get("task", ""))
    registered = _registered(own_task)
    kind = answer_type or (get_task(own_task).answer_type if registered else "string")
    fields |= {"task": own_task, "split": "", "answer_type": kind}
    fields["meta"] = record.get("meta", "{}")
    if record.get("part") == "backward_question":
        prompt = inverse_question_prompt(record["question"], record.get("choices", ()), record.get("gold_answer") or "")
    else:
        asked = {"question": record["question"], "choices": record.get("choices", ()), "prompt": record.get("prompt")}
        prompt = default_prompt(Trace("", "", target="", **asked))
    trace = answered_trace(record["target"].strip(), **fields, prompt=prompt)
    return trace if registered else dataclasses.replace(trace, task=plain_task_name(kind))


def _flat_meta(record: Fields) -> Fields:
    """The row's further columns as keys of `meta`, for ``meta.<column>``; a task that is not registered among them."""
    meta = dict(json.loads(record.get("meta", "{}")).get("row", {}))
    if "task" in record and not _registered(record["task"]):
        meta["task"] = record["task"]
    return record | {"meta": canonical_json(meta)}


def _registered(task: str) -> bool:
    try:
        return bool(get_task(task))
    except UnknownTaskError:
        return False


# --- artifacts ----------------------------------------------------------------------------------------------------------


def _artifact(kind: str, tables: Mapping[str, pa.Table], meaning: str, facts: Mapping[str, Any], ctx: Context) -> Artifact:
    """An artifact that no stage made; the same tables are the same artifact."""
    store, identity = Store(ctx.workdir / "artifacts"), artifact_identity(kind, 0, {}, {"tables": meaning})
    writer = store.writer(kind, identity)
    if ctx.is_main:
        for name, table in tables.items():
            writer.write_table(name, table)
        result = StageResult(meaning, rows_out=sum(table.num_rows for table in tables.values()), facts=facts)
        finish(writer, kind=kind, identity=identity, version=0, config={}, inputs={}, result=result, wall_seconds=0.0, recorded={})
    ctx.barrier(f"rows {identity}")
    found = store.find(kind, identity)
    assert found is not None
    return found


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"
