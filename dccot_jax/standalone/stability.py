"""`dccot stability`: how much of a recipe's scores and of its kept set hangs on the seed, the dtype and the batch size.

One thing is changed at a time, against the first value of each. Everything else is shared through the store; another batch size
is not part of any identity, since it must not change a bit, so each one scores again in a store of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dccot_jax import config as config_lib
from dccot_jax import pipeline
from dccot_jax.artifact import Artifact, write_atomic
from dccot_jax.context import Context
from dccot_jax.records import InputError, table_to_traces
from dccot_jax.report.distributions import overlaps
from dccot_jax.select.columns import ScoreColumns, open_tables, read_columns
from dccot_jax.select.cuts import Run, make_run, moved
from dccot_jax.select.stage import make_candidates
from dccot_jax.standalone import show
from dccot_jax.standalone.rank_agreement import kendall, spearman
from dccot_jax.standalone.request import KEYS, Request
from dccot_jax.standalone.rows import judged, read_dropped, read_traces
from dccot_jax.standalone.score import check_gold, check_less, prepare, sized

# What a batch is to each part of scoring: tiles in flight, rows committed together, replies generated together.
_BATCH_KEYS = (KEYS["batch_size"], "score.chunk_rows", "evaluate.batch_rows")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Score columns, kept ids and where the others left, under one setting."""

    columns: ScoreColumns
    kept: frozenset[str]
    run: Run


def run(request: Request, ctx: Context) -> None:
    """Write the JSON report to ``<out>``: baseline, and per change `compare`'s figures and those of `cuts.moved`.

    Raises InputError as the two commands do, and if the batch size changed anything at all (after writing the report).
    """
    if request.out.exists():
        raise InputError(f"--out={request.out}: exists; name another file")
    check_less(request)
    file = read_traces(request.file, format=request.format, gold_field=request.gold_field, answer_type=request.answer_type)
    check_gold(file, request)
    file = judged(file, request.config.verify.time_limit_seconds, ctx)
    config, given = prepare(request, file, ctx)
    given = pipeline.make(config, "tokenize", ctx, given)
    config = sized(config, request, given["tokenize"])
    ids = given["tokenize"].table("tokens")["id"].to_pylist()
    baseline = {factor: values[0] for factor, values in request.spread.items()}
    first = _outcome(config, baseline, given, ctx)
    changes = []
    for factor, values in request.spread.items():
        for value in values[1:]:
            ctx.log(f"{factor} {value}:")
            other = _outcome(config, baseline | {factor: value}, given, ctx, apart=factor == "batch_size")
            if ctx.is_main:
                found = compare(first, other, ids) | moved(request.steps, first.run, other.run)
                changes.append({"factor": factor, "value": value, **found})
    if not ctx.is_main:
        return
    report = {
        "traces": str(request.file),
        "student": str(config.student.path),
        "recipe": request.steps,
        "rows": len(file.traces),
        "baseline": baseline,
        "kept_rows": len(first.kept),
        "changes": changes,
    }
    write_atomic(request.out, (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    request.clear_parts()
    show.stability(report)
    broken = [change for change in changes if change["factor"] == "batch_size" and not change["equal"]]
    if broken:
        raise InputError(f"batch size {broken[0]['value']} changes scores or the kept set, which it must not; see {request.out}")


def compare(first: Outcome, other: Outcome, ids: Sequence[str]) -> dict[str, Any]:
    """Agreement of two outcomes over the rows `ids`.

    Returns:
      equal: every score has the same bits, for the same rows, and the kept sets are one; kept_rows; jaccard of the kept sets, and
      jaccard_expected if both were drawn at random (None where both are empty); signals, per name:
      kind (``number`` or ``vector``), rows (scored in both), lost (scored in one only), max_difference (absolute; None without
      rows) and, for numbers, spearman and kendall (None where not defined).
    """
    signals = {name: _compare_numbers(values, other.columns.numbers[name]) for name, values in first.columns.numbers.items()}
    signals |= {name: _compare_vectors(values, other.columns.vectors[name]) for name, values in first.columns.vectors.items()}
    kept = np.array([[i in outcome.kept for i in ids] for outcome in (first, other)])
    shared = overlaps(kept, np.ones_like(kept))
    same = all(found["lost"] == 0 and found["max_difference"] in (0.0, None) for found in signals.values())
    return {
        "equal": same and first.kept == other.kept,
        "jaccard": shared["jaccard"][0][1],
        "jaccard_expected": shared["jaccard_expected"][0][1],
        "kept_rows": len(other.kept),
        "signals": signals,
    }


def _compare_numbers(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    ids = sorted(a.keys() & b.keys())
    x, y = ([side[i] for i in ids] for side in (a, b))
    largest = max((abs(left - right) for left, right in zip(x, y)), default=None)
    return {"kind": "number", **_counts(a, b, ids), "max_difference": largest, "spearman": spearman(x, y), "kendall": kendall(x, y)}


def _compare_vectors(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, Any]:
    ids = sorted(a.keys() & b.keys())
    largest = max((float(np.max(np.abs(a[i] - b[i]))) for i in ids), default=None)
    return {"kind": "vector", **_counts(a, b, ids), "max_difference": largest}


def _counts(a: Mapping[str, Any], b: Mapping[str, Any], both: list[str]) -> dict[str, int]:
    return {"rows": len(both), "lost": len(a) + len(b) - 2 * len(both)}


def _outcome(
    config: config_lib.ConfigDict, setting: Mapping[str, Any], given: Mapping[str, Artifact], ctx: Context, *, apart: bool = False
) -> Outcome:
    changes = {KEYS[factor]: value for factor, value in setting.items()} | dict.fromkeys(_BATCH_KEYS, setting["batch_size"])
    config = config_lib.override(config, changes)
    if config.score.student == "warmup" and config.score.signals:  # one training: the batch size is of scoring
        given = pipeline.make(config, "train:warmup", ctx, given)
    if apart:
        ctx = dataclasses.replace(ctx, workdir=ctx.workdir / f"batch_size-{setting['batch_size']}")
    done = pipeline.make(config, "select", ctx, given)
    tables = [done["score"].table("scores")] if "score" in done else []
    tokens = done["tokenize"].table("tokens").select(["id", "prompt_tokens", "completion_tokens"]).to_pylist()
    columns = read_columns([*tables, *open_tables(config.select.tables)])
    candidates = make_candidates(table_to_traces(done["verify"].table("traces")), tokens, columns)
    kept = frozenset(done["select"].table("kept")["id"].to_pylist())
    return Outcome(read_columns(tables), kept, make_run(candidates, read_dropped(done["select"].file("dropped.parquet"))))
