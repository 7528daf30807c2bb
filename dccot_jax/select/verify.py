"""Stage ``verify``: is each trace's answer right, and does it stay out of every evaluation set?

Reads: traces (or augment), the training task, every evaluation set. Writes ``traces.parquet`` with ``verdict`` (the flexible
reading: right, wrong, or None where the gold answer or the judge failed) and ``verdict_reason``; ``overlap.parquet``, n-grams
shared with evaluation sets (`decontaminate.OVERLAP_SCHEMA`); and ``dropped.parquet``:

  leak:<task>          a text of the row is, or contains, a question of the test split of an evaluation task; or the row was made from one
  overlap_<n>:<task>   it holds at least `verify.ngram_drop_share` of a test question's n-grams (off by default)
  missing_gold         nothing to judge against

A group is kept or dropped whole. The backward parts of a reverse group carry the verdict of their forward part (their own
consistency was required when they were made). Wrong traces stay: dropping them is a selector's decision.

Fails if the traces were made on another split of the task than the one its test set belongs to.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, table_hash
from dccot_jax.context import Context
from dccot_jax.records import Dropped, Trace, table_to_traces, traces_to_table
from dccot_jax.select import decontaminate
from dccot_jax.tasks.answers import NO_VERDICT, judge
from dccot_jax.tasks.registry import check_traces_split, evaluation_tasks, get_task, load_items

CHUNK_ROWS = 2000
THREADS = 4  # symbolic comparison waits for child processes

_CHUNK_SCHEMA = pa.schema([("id", pa.string()), ("verdict", pa.bool_()), ("reason", pa.string())])


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Verify. The manifest's facts hold verdict counts, reasons and the evaluation sets that were checked."""
    if not ctx.is_main:
        ctx.barrier("verify")
        return StageResult("")
    traces = table_to_traces(inputs["traces"].table("traces"))
    data_dir = ctx.data_dir or (Path(cfg.data_dir).expanduser() if cfg.data_dir else None)
    check_splits(traces, data_dir)
    registered = cfg.verify.against == "registered"
    tests = decontaminate.evaluation_questions(
        decontaminate.guarded_tasks(evaluation_names(cfg), data_dir, registered=registered), data_dir
    )
    kept, dropped = decontaminate.drop_leaked(traces, decontaminate.ExactIndex(tests))
    overlap, figures = decontaminate.overlaps(kept, tests, cfg.verify.ngram_sizes)
    out.write_table("overlap", overlap)
    if cfg.verify.ngram_drop_share:
        kept, more = decontaminate.drop_overlapping(kept, overlap, cfg.verify.ngram_drop_size, cfg.verify.ngram_drop_share)
        dropped = dropped + more
    kept, more = drop_unjudgeable(kept)
    dropped = dropped + more
    verdicts = _verdicts(kept, cfg.verify.time_limit_seconds, out, ctx)
    verified = with_verdicts(kept, verdicts)
    table = traces_to_table(verified)
    out.write_table("traces", table)
    counts = out.write_dropped(dropped)
    right, wrong = (sum(trace.verdict is value for trace in verified) for value in (True, False))
    ctx.log(f"  {right:,} right, {wrong:,} wrong, {len(verified) - right - wrong:,} without verdict; dropped: {counts or 'none'}")
    ctx.barrier("verify")
    return StageResult(
        logical_hash=table_hash(table),
        rows_in=len(traces),
        rows_out=len(verified),
        dropped=counts,
        facts={
            "right": right,
            "wrong": wrong,
            "no_verdict": len(verified) - right - wrong,
            "reasons": dict(sorted(collections.Counter(trace.verdict_reason for trace in verified).items())),
            "right_by_teacher": {
                name: [sum(trace.verdict is True for trace in rows), len(rows)] for name, rows in sorted(_by_teacher(verified).items())
            },
            "evaluation_tasks": list(figures),
            "overlap": figures,
        },
    )


def evaluation_names(cfg: ConfigDict) -> tuple[str, ...]:
    """Names of the evaluation tasks of a config, each once."""
    groups = evaluation_tasks(cfg.traces.task, cfg.evaluate.iid, cfg.evaluate.ood, cfg.evaluate.cross)
    return tuple(dict.fromkeys(name for group in groups.values() for name in group))


def check_splits(traces: Sequence[Trace], data_dir: Path | None) -> None:
    """Raises SplitMismatchError if traces of a task were made on another split than the one its test set belongs to."""
    for name in sorted({trace.task for trace in traces}):
        train, test = (load_items(name, split, data_dir) if split in get_task(name).splits else [] for split in ("train", "test"))
        check_traces_split(traces, train, test)


def drop_unjudgeable(traces: Sequence[Trace]) -> tuple[list[Trace], list[Dropped]]:
    """Traces to judge, and those of groups in which a gold answer is missing (``missing_gold``)."""
    lost = {trace.group_id for trace in traces if trace.gold_answer is None}
    kept = [trace for trace in traces if trace.group_id not in lost]
    return kept, [Dropped(trace.id, "missing_gold", "") for trace in traces if trace.group_id in lost]


def verdict_of(trace: Trace, time_limit: float) -> tuple[bool | None, str]:
    """(verdict, reason) of one trace by itself: its target judged against its gold answer."""
    assert trace.gold_answer is not None
    found = judge(trace.target, trace.gold_answer, trace.answer_type, trace.choices, time_limit=time_limit)
    return (None if found.reason in NO_VERDICT else found.flexible), found.reason


def with_verdicts(traces: Sequence[Trace], verdicts: Mapping[str, tuple[bool | None, str]]) -> list[Trace]:
    """Traces with their verdicts; parts other than ``forward`` take over the verdict of their group's forward part."""
    forward = {trace.group_id: verdicts[trace.id] for trace in traces if trace.part == "forward"}
    verified = []
    for trace in traces:
        if trace.part == "forward":
            verdict, reason = verdicts[trace.id]
        else:
            verdict, forward_reason = forward.get(trace.group_id, (None, "absent"))
            reason = f"forward_{forward_reason}"
        verified.append(dataclasses.replace(trace, verdict=verdict, verdict_reason=reason))
    return verified


def _verdicts(traces: Sequence[Trace], time_limit: float, out: ArtifactWriter, ctx: Context) -> dict[str, tuple[bool | None, str]]:
    """Verdicts of the forward parts, by id; finished chunks of an earlier run are read and not judged again."""
    rows = [trace for trace in traces if trace.part == "forward"]
    verdicts: dict[str, tuple[bool | None, str]] = {}
    with (
        ctx.progress("verify", len(rows), "traces") as bar,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        for index, start in enumerate(range(0, len(rows), CHUNK_ROWS)):
            part = rows[start : start + CHUNK_ROWS]
            done = out.read_chunk("verdicts", index)
            if done is not None and done.column("id").to_pylist() == [trace.id for trace in part]:
                bar.skip(len(part))
            else:
                pairs = list(pool.map(lambda trace: verdict_of(trace, time_limit), part))
                columns = ([trace.id for trace in part], [verdict for verdict, _ in pairs], [reason for _, reason in pairs])
                done = pa.table(dict(zip(_CHUNK_SCHEMA.names, columns)), schema=_CHUNK_SCHEMA)
                out.commit_chunk("verdicts", index, done)
                bar.advance(len(part))
                ctx.stop_alone("verify: chunk committed")
            verdicts |= {row["id"]: (row["verdict"], row["reason"]) for row in done.to_pylist()}
    return verdicts


def _by_teacher(traces: Sequence[Trace]) -> dict[str, list[Trace]]:
    found: dict[str, list[Trace]] = {}
    for trace in traces:
        label = "/".join(part for part in (trace.teacher, trace.level) if part)
        found.setdefault(label, []).append(trace)
    return found
