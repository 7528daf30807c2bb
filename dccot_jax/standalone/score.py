"""`dccot score`: the signals of every row of a file of traces, by any Hugging Face student.

The stages do the work, in a store beside the output (``scores.parquet.parts``) that holds the committed chunks; it goes when the
table is whole. What the table was made from stands in its metadata, so the same command again has nothing to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dccot_jax import config as config_lib
from dccot_jax import pipeline
from dccot_jax.artifact import Artifact, file_hash, write_atomic, write_table
from dccot_jax.context import Context
from dccot_jax.external import student_files
from dccot_jax.records import InputError, content_hash, count_reasons
from dccot_jax.select.signals import NEEDS_GOLD
from dccot_jax.standalone import show
from dccot_jax.standalone.request import Request
from dccot_jax.standalone.rows import TraceFile, read_dropped, read_traces, rows_artifact, write_dropped

_META = b"dccot_scores"
_STAGES = ("student", "tokenize", "score")  # whose config keys say what the table means


def run(request: Request, ctx: Context) -> None:
    """Write ``<out>`` (id, source, prompt_tokens, completion_tokens, one column per signal; in the file's order) and, beside it,
    ``<name>.dropped.parquet`` (every other row, with a reason) and what else the score stage writes, e.g. ``<name>.samples.jsonl``.

    Raises InputError: no usable row, gold answers missing that a signal needs, or `out` holds other scores.
    """
    made_from = _made_from(request)
    if request.out.exists():
        if _meta(request).get("made_from") == made_from:
            ctx.log(f"{request.out} is up to date: the same rows, student, signals and options")
            return
        raise InputError(f"--out={request.out}: exists and was made from something else; name another file")
    file = read_traces(request.file, format=request.format, gold_field=request.gold_field, answer_type=request.answer_type)
    check_gold(file, request)
    ctx.log(f"{request.file}: {len(file.traces):,} traces, format {file.format}; dropped: {count_reasons(file.dropped) or 'none'}")
    config, given = prepare(request, file, ctx)
    given = pipeline.make(config, "tokenize", ctx, given)
    _check_rows(file, given)
    done = pipeline.make(config, "score", ctx, given)
    if ctx.is_main:
        _write(request, file, done, made_from)
    ctx.barrier("scores written")


def prepare(request: Request, file: TraceFile, ctx: Context) -> tuple[config_lib.ConfigDict, dict[str, Artifact]]:
    """The config with the student's own limits in it, and the artifacts of the rows and of the student."""
    given = {"verify": rows_artifact(file, ctx)}
    given = pipeline.make(request.config, "student", ctx, given)
    positions = given["student"].json("student")["model"]["max_positions"]
    length = request.max_length or positions
    if length > positions:
        raise InputError(f"--max_length={length}: the student has {positions} positions")
    config = config_lib.override(request.config, {"tokens.max_length": length, "train.row_tokens": max(length, 1)})
    return config, given


def check_gold(file: TraceFile, request: Request) -> None:
    """Raises InputError if a signal needs gold answers, and no row has one or nobody said of which type they are."""
    needy = [name for name in request.config.score.signals if name in NEEDS_GOLD]
    if not needy:
        return
    if not any(trace.gold_answer for trace in file.traces):
        columns = ", ".join(file.imported.rows[0].fields)
        raise InputError(f"{file.path}: {needy[0]} needs right answers, and no row has one; name their column by --gold_field: {columns}")
    if not file.typed:
        raise InputError(f"{file.path}: {needy[0]} compares answers; say of which type they are, e.g. --answer_type=number")


def _write(request: Request, file: TraceFile, done: Mapping[str, Artifact], made_from: str) -> None:
    tokens, scores = done["tokenize"], done["score"]
    table = in_file_order(file, scores.table("scores"), tokens.table("tokens"))
    dropped = [*file.dropped, *(row for item in (tokens, scores) for row in read_dropped(item.file("dropped.parquet")))]
    write_dropped(file, dropped, request.beside("dropped.parquet"))
    for name in scores.manifest["files"]:
        if name not in ("scores.parquet", "dropped.parquet"):
            write_atomic(request.beside(name), scores.file(name).read_bytes())
    about = {
        "made_from": made_from,
        "traces": request.file.name,
        "student": str(request.config.student.path),
        "signals": list(request.config.score.signals),
        "compute_dtype": request.config.compute_dtype,
        "facts": dict(scores.facts),
    }
    write_table(
        request.out, table.replace_schema_metadata({_META: json.dumps(about, sort_keys=True).encode()})
    )  # last: it says all is there
    shutil.rmtree(request.workdir)
    show.scores(table, dropped)
    show.files(request.out, request.beside("dropped.parquet"))


def _check_rows(file: TraceFile, done: Mapping[str, Artifact]) -> None:
    """Raises InputError if no row is left after tokenising."""
    if not done["tokenize"].manifest["rows_out"]:
        dropped = [*file.dropped, *read_dropped(done["tokenize"].file("dropped.parquet"))]
        counts = ", ".join(f"{reason} {count:,}" for reason, count in count_reasons(dropped).items())
        last = dropped[-1]
        raise InputError(f"{file.path}: no row could be scored ({counts}; e.g. {file.places.get(last.id, last.id)}: {last.detail})")


def in_file_order(file: TraceFile, scores: pa.Table, tokens: pa.Table) -> pa.Table:
    """The stage's score table with places and prompt lengths, rows as in the file."""
    order = {trace.id: number for number, trace in enumerate(file.traces)}
    ids = scores["id"].to_pylist()
    prompts = dict(zip(tokens["id"].to_pylist(), tokens["prompt_tokens"].to_pylist()))
    table = scores.add_column(1, "source", pa.array([file.places[i] for i in ids], pa.string()))
    table = table.add_column(2, "prompt_tokens", pa.array([prompts[i] for i in ids], pa.int32()))
    return table.take(pa.array(sorted(range(len(ids)), key=lambda n: order[ids[n]]), pa.int64()))


def _made_from(request: Request) -> str:
    """Hash of everything that decides the table: the file, the student's files, options of the stages and their versions."""
    keys = [key for name in _STAGES for key in pipeline.STAGES[name].config_keys]
    options: dict[str, Any] = config_lib.config_slice(request.config, [key for key in keys if key != "student"])
    read = [request.format, request.gold_field, request.answer_type, request.max_length]
    versions = [pipeline.STAGES[name].version for name in _STAGES]
    return content_hash("scores/1", file_hash(request.file), student_files(request.config), options, read, versions)


def _meta(request: Request) -> dict[str, Any]:
    try:
        return json.loads((pq.read_schema(request.out).metadata or {}).get(_META, b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}
