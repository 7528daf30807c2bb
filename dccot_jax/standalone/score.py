"""`dccot score`: the signals of every row of a file of traces, by any Hugging Face student.

The stages do the work, in a store beside the output (``scores.parquet.parts``) that holds the committed chunks; it goes when the
table is whole. What the table was made from stands in its metadata, so the same command again has nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dccot_jax import config as config_lib
from dccot_jax import pipeline, preflight
from dccot_jax.artifact import Artifact, file_hash, write_atomic, write_table
from dccot_jax.config_identity import config_slice
from dccot_jax.context import Context
from dccot_jax.external import EXTERNAL
from dccot_jax.records import Dropped, InputError, content_hash, count_reasons
from dccot_jax.select.signals import NEEDS_GOLD
from dccot_jax.standalone import show
from dccot_jax.standalone.request import Request
from dccot_jax.standalone.rows import TraceFile, read_dropped, read_traces, rows_artifact, told, write_dropped

_META = b"dccot_scores"


def run(request: Request, ctx: Context) -> None:
    """Write ``<out>`` (id, source, prompt_tokens, completion_tokens, one column per signal; in the file's order) and, beside it,
    ``<name>.dropped.parquet`` (every other row, with a reason) and what else the score stage writes, e.g. ``<name>.samples.jsonl``.

    Raises InputError: no usable row, gold answers missing that a signal needs, `out` holds other scores, or no row got scores; then
    the reasons are written and `out` is not, so that the same command does not take itself for done.
    """
    check_less(request)
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
    _check_rows(file, given["tokenize"], _dropped(file, given))
    config = sized(config, request, given["tokenize"])
    done = pipeline.make(config, "score", ctx, given)
    dropped = _dropped(file, done)
    ctx.barrier("reasons read")
    if ctx.is_main:
        write_dropped(file, dropped, request.beside("dropped.parquet"))
        if done["score"].manifest["rows_out"]:
            _write(request, file, done, made_from)
        request.clear_parts()
    ctx.barrier("scores written")
    _check_rows(file, done["score"], dropped)
    if ctx.is_main:
        show.scores(pq.read_table(request.out), dropped)
        show.files(request.out, request.beside("dropped.parquet"))


def prepare(request: Request, file: TraceFile, ctx: Context) -> tuple[config_lib.ConfigDict, dict[str, Artifact]]:
    """The config with the student's own limits in it, and the artifacts of the rows and of the student."""
    given = {"verify": rows_artifact(file, ctx)}
    given = pipeline.make(request.config, "student", ctx, given)
    positions = given["student"].json("student")["model"]["max_positions"]
    length = request.max_length or positions
    if length > positions:
        raise InputError(f"--max_length={length}: the student has {positions} positions")
    config = config_lib.override(request.config, {"tokens.max_length": length, "train.row_tokens": length})
    preflight.check(config)
    return config, given


def sized(config: config_lib.ConfigDict, request: Request, tokens: Artifact) -> config_lib.ConfigDict:
    """The config with packed rows for a warm-up training as long as asked for, or as the longest row: not the student's positions,
    which may be many times what the memory holds."""
    lengths = tokens.batches("tokens", ("prompt_tokens", "completion_tokens"))
    longest = max((sum(row.values()) for batch in lengths for row in batch.to_pylist()), default=1)
    return config_lib.override(config, {"train.row_tokens": min(max(request.config.train.row_tokens, longest), config.train.row_tokens)})


def check_less(request: Request) -> None:
    """Raises InputError if `less` is asked for without a validation side: here is no training task whose items could be it."""
    if "less" in request.config.score.signals and not request.config.score.gradients.validation:
        key = "config.score.gradients.validation"
        raise InputError(f"less compares rows with others: --{key}=\"({{'traces': 32}},)\" takes those of the file, {{'task': …}} a task's")


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


def _dropped(file: TraceFile, done: Mapping[str, Artifact]) -> list[Dropped]:
    """Every row without scores so far."""
    stages = [done[name] for name in ("tokenize", "score") if name in done]
    return [*file.dropped, *(row for stage in stages for row in read_dropped(stage.file("dropped.parquet")))]


def _check_rows(file: TraceFile, made: Artifact, dropped: Sequence[Dropped]) -> None:
    """Raises InputError if `made` holds no row."""
    if not made.manifest["rows_out"]:
        raise InputError(f"{file.path}: no row could be scored ({told(file, dropped)})")


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
    nodes = pipeline.needed(request.config, "score", ("verify",))
    options, files = [], {}
    for node in nodes:
        keys = [key for key in node.stage.config_keys if key != "student"]  # known by its files
        options.append([node.name, node.stage.version, dict(node.inputs), config_slice(node.config, keys)])
        files |= EXTERNAL[node.stage.external](node.config) if node.stage.external else {}
    read = [request.format, request.gold_field, request.answer_type, request.max_length]
    return content_hash("scores/1", file_hash(request.file), options, files, read)


def _meta(request: Request) -> dict[str, Any]:
    try:
        return json.loads((pq.read_schema(request.out).metadata or {}).get(_META, b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}
