"""Stage `select`: verified traces, token counts and scores in, ids kept and a reason for every other id out."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, table_hash
from dccot_jax.config import to_plain
from dccot_jax.context import Context
from dccot_jax.records import Trace, count_reasons, table_to_traces
from dccot_jax.select.candidates import FIELDS, Candidate, Step, describe
from dccot_jax.select.columns import ScoreColumns, open_tables, read_columns
from dccot_jax.select.selectors import apply_steps, check_steps, required_corpora
from dccot_jax.tasks.registry import build_target, get_task, load_items


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Apply `cfg.select.steps`; host only, process 0 writes.

    Reads `traces` of ``verify``, `tokens` of ``tokenize``, where present `scores` of ``score``, and `cfg.select.tables`.
    Writes kept.parquet (id) and dropped.parquet (id, reason, detail); every row of `tokens` is in exactly one of them.
    Facts: `funnel`, a list with rows, groups and completion tokens in and out and drops per reason for each step.

    Raises ConfigError (malformed step, signal not scored, a table that cannot be used) or SelectionError (nothing kept, unusable values)
    with one clear line.
    """
    traces = table_to_traces(inputs["verify"].table("traces"))
    lengths = inputs["tokenize"].batches("tokens", ("id", "prompt_tokens", "completion_tokens"))
    tokens = [row for batch in lengths for row in batch.to_pylist()]
    scores = [inputs["score"].table("scores")] if "score" in inputs else []
    columns = read_columns([*scores, *open_tables(cfg.select.tables)])
    steps = to_plain(cfg.select.steps)
    check_steps(steps, list(columns.numbers), list(columns.vectors))
    kept, dropped, reports = apply_steps(
        make_candidates(traces, tokens, columns),
        steps,
        seed=cfg.seed,
        available=list(columns.numbers),
        vectors=list(columns.vectors),
        corpora=load_corpora(steps, ctx.data_dir or (Path(cfg.data_dir).expanduser() if cfg.data_dir else None)),
    )

    table = pa.table({"id": pa.array(sorted(i for c in kept for i in c.ids), pa.string())})
    if ctx.is_main:
        out.write_table("kept", table)
        out.write_dropped(dropped)
    for report in reports:
        ctx.log(f"  {report.step}: {report.rows_out:,} of {report.rows_in:,} rows, {report.tokens_out:,} of {report.tokens_in:,} tokens")
    return StageResult(
        logical_hash=table_hash(table),
        rows_in=len(tokens),
        rows_out=table.num_rows,
        dropped=count_reasons(dropped),
        facts={
            "steps": [describe(step) for step in steps],
            "funnel": [dataclasses.asdict(report) for report in reports],
            "completion_tokens": sum(c.completion_tokens for c in kept),
            "groups": len(kept),
        },
    )


def load_corpora(steps: Sequence[Step], data_dir: Path | None) -> dict[str, list[str]]:
    """The training questions (and, for ``full``, gold rationales and answers) of the tasks that `dsir` steps are to resemble."""
    found = {}
    for key, name in required_corpora(steps).items():
        task, items = get_task(name), load_items(name, "train", data_dir)
        if key.endswith(":question"):
            found[key] = [item.question for item in items]
        else:
            found[key] = [f"{item.question}\n{build_target(task, item.rationale or '', item.gold or '')}" for item in items]
    return found


def make_candidates(traces: Sequence[Trace], tokens: Sequence[Mapping[str, Any]], columns: ScoreColumns) -> list[Candidate]:
    """Group tokenised rows for the selectors, sorted by group id.

    Args:
      traces: the verified rows. tokens: rows with id, prompt_tokens, completion_tokens. Rows without tokens do not take
        part; tokenising has dropped their groups whole, or left out parts that its format does not train.
      columns: scores; a row that was dropped while scoring is absent.

    Raises ValueError if a tokenised row is not among the traces.
    """
    known = {trace.id: trace for trace in traces}
    counts = {row["id"]: row for row in tokens}
    groups: dict[str, list[Trace]] = defaultdict(list)
    for row_id in sorted(counts):
        if row_id not in known:
            raise ValueError(f"tokens row {row_id} is not among the verified traces: the artifacts do not belong together")
        groups[known[row_id].group_id].append(known[row_id])
    return [_candidate(group_id, members, counts, columns) for group_id, members in sorted(groups.items())]


def _candidate(group_id: str, members: Sequence[Trace], counts: Mapping[str, Any], columns: ScoreColumns) -> Candidate:
    forward = [t for t in members if t.part == "forward"] or list(members)
    values: dict[str, float] = {}
    for name in (*columns.numbers, *FIELDS):
        found = [_value(name, t, counts, columns) for t in forward]
        if all(value is not None for value in found):
            values[name] = fmean(value for value in found if value is not None)
    vectors = {
        name: np.mean([column[t.id] for t in forward], axis=0) if len(forward) > 1 else column[forward[0].id]
        for name, column in columns.vectors.items()
        if all(t.id in column for t in forward)
    }
    verdict, reason = _group_verdict(members, forward)
    completion_tokens = sum(counts[t.id]["completion_tokens"] for t in members)
    return Candidate(group_id, tuple(t.id for t in members), completion_tokens, verdict, reason, values, vectors, forward[0])


def _value(name: str, trace: Trace, counts: Mapping[str, Any], columns: ScoreColumns) -> float | None:
    if name == "n_steps":
        return trace.n_steps
    if name in FIELDS:
        return counts[trace.id][name]
    return columns.numbers[name].get(trace.id)


def _group_verdict(members: Sequence[Trace], forward: Sequence[Trace]) -> tuple[bool | None, str]:
    """Wrong if any part is wrong; not verified if a forward part is not; else correct."""
    for trace in members:
        if trace.verdict is False:
            return False, trace.verdict_reason
    for trace in forward:
        if trace.verdict is None:
            return None, trace.verdict_reason
    return True, ""
