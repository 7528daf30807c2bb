"""`dccot select`: a recipe over a file of traces and its scores; the kept rows as they stood in the file, and why the others left."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dccot_jax import config as config_lib
from dccot_jax import pipeline
from dccot_jax.artifact import Artifact
from dccot_jax.context import Context
from dccot_jax.records import Dropped, InputError
from dccot_jax.select.candidates import SelectionError
from dccot_jax.select.columns import check_table, open_tables, read_table
from dccot_jax.standalone import show
from dccot_jax.standalone.request import Request
from dccot_jax.standalone.rows import (
    TraceFile,
    counts_artifact,
    judged,
    read_dropped,
    read_traces,
    rows_artifact,
    told,
    write_dropped,
    write_kept,
)
from dccot_jax.standalone.score import prepare

_COUNTS = ("id", "prompt_tokens", "completion_tokens")


def run(request: Request, ctx: Context) -> None:
    """Write the kept rows to ``<out>`` and every other id with its reason to ``<name>.dropped.parquet``.

    Lengths in tokens come from the score table, or from the student where one is given. With a score table that has lengths, a
    trace that is not in it is dropped, for the reason in the ``.dropped.parquet`` beside that table, else as ``not_scored``, and
    its group with it.
    Raises InputError: `out` exists, no lengths, scores of other traces or of none, nothing kept.
    """
    for path in (request.out, request.beside("dropped.parquet")):
        if path.exists():
            raise InputError(f"--out={request.out}: {path.name} exists; name another file")
    for path in request.config.select.tables:
        check_table(path)
    file = read_traces(request.file, format=request.format, gold_field=request.gold_field, answer_type=request.answer_type)
    file = judged(file, request.config.verify.time_limit_seconds, ctx)
    try:
        done, lost = _candidates(request, file, ctx)
        done = pipeline.make(config_lib.override(request.config, {"score.signals": ()}), "select", ctx, done)
        if ctx.is_main:
            chosen = done["select"]
            kept = set(chosen.table("kept")["id"].to_pylist())
            dropped = [*file.dropped, *lost, *read_dropped(chosen.file("dropped.parquet"))]
            rows = write_kept(file, kept, request.out)
            write_dropped(file, dropped, request.beside("dropped.parquet"))
            show.selection(chosen.facts["funnel"], dropped, open_tables(request.config.select.tables), kept)
            show.files(request.out, request.beside("dropped.parquet"), rows=rows)
        ctx.barrier("selection written")
    except SelectionError as error:
        hint = "" if file.typed and "not_verified" not in str(error) else "; --gold_field and --answer_type say what the right answers are"
        raise InputError(f"{error}{hint}") from None
    finally:
        if ctx.is_main:
            request.clear_parts()


def _candidates(request: Request, file: TraceFile, ctx: Context) -> tuple[dict[str, Artifact], list[Dropped]]:
    """The artifacts that selecting reads, and the rows that do not take part."""
    if request.config.student.path:
        config, given = prepare(request, file, ctx)
        done = pipeline.make(config, "tokenize", ctx, given)
        return done, read_dropped(done["tokenize"].file("dropped.parquet"))
    counted = [path for path in request.config.select.tables if set(_COUNTS) <= set(pq.read_schema(Path(path).expanduser()).names)]
    if not counted:
        raise InputError(
            "lengths in tokens are needed: --scores with the columns prompt_tokens and completion_tokens, as `dccot score` writes them,"
            " or --student=DIR to count with its tokenizer"
        )
    table = read_table(counted[0], _COUNTS)
    known, scored = {trace.id for trace in file.traces}, set(table["id"].to_pylist())
    beside = Path(counted[0]).expanduser()
    reasons = {row.id: row for row in read_dropped(beside.with_name(f"{beside.stem}.dropped.parquet"))}
    if not known & scored:
        dropped = [reasons[i] for i in file.places if i in reasons]
        if dropped:
            raise InputError(f"--scores={counted[0]}: no row of {file.path} got scores ({told(file, dropped)})")
        raise InputError(f"--scores={counted[0]}: no id of {file.path} is in it; scores of other traces?")
    lost = [reasons.get(i, Dropped(i, "not_scored", f"not in {beside.name}")) for i in sorted(known - scored)]
    broken = {trace.group_id: trace.id for trace in file.traces if trace.id not in scored}
    rest = [t for t in file.traces if t.id in scored and t.group_id in broken]
    lost += [Dropped(trace.id, "group_incomplete", f"{broken[trace.group_id]} of its group has no scores") for trace in rest]
    gone = {row.id for row in lost}
    counts = table.filter(pa.array([i in known and i not in gone for i in table["id"].to_pylist()], pa.bool_()))
    return {"verify": rows_artifact(file, ctx), "tokenize": counts_artifact(counts, ctx)}, lost
