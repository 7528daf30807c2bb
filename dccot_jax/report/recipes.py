"""Selection recipes: what each kept and dropped, with real traces at both ends, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dccot_jax.artifact import ArmRun, Artifact
from dccot_jax.report.distributions import bin_edges
from dccot_jax.report.pools import Pool
from dccot_jax.select.candidates import describe
from dccot_jax.select.passes import declared_passes
from dccot_jax.select.selectors import RULES, step_reads

EXAMPLES = 2  # kept rows shown at each end
REASONS = 4  # drop reasons of which examples are shown
QUESTION_CHARACTERS, RATIONALE_CHARACTERS = 320, 480
_TEXTS = ("id", "question", "reasoning", "target", "teacher", "style", "method", "gold_answer", "answer")


def steps_of(select: Artifact) -> list[dict[str, Any]]:
    """The steps of a selection as its config has them."""
    return [dict(step) for step in select.manifest["config"].get("select.steps", ())]


def deciding_signal(steps: Sequence[Mapping[str, Any]], pool: Pool) -> str:
    """The number that the last step with one reads; else the first scored signal; else the length."""
    for step in reversed(steps):
        named = step.get("signals", ())
        for name in (step.get("signal"), *([named] if isinstance(named, str) else named), *sorted(step_reads(step, RULES))):
            if name in pool.signals:
                return str(name)
    return next(iter(pool.scored), "completion_tokens")


def recipe(run: ArmRun, pool: Pool) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """One selection on its pool, and the examples to show, without their texts, by id.

    Returns {steps, reads, rows_in, rows_out, completion_tokens, dropped {reason: rows}, funnel, signal, histograms, examples [ids], cost};
    an example is {id, kept, end, signal, score, reason, detail}.
    """
    select = run.artifacts["select"]
    steps = steps_of(select)
    kept = np.zeros(len(pool.ids), bool)
    places = pool.places(select.table("kept")["id"].combine_chunks())
    kept[places[places >= 0]] = True
    name = deciding_signal(steps, pool)
    shown = examples(pool, kept, select, name)
    reads = sorted({column for step in steps for column in step_reads(step, RULES)})
    return {
        "steps": [describe(step) for step in steps],
        "reads": reads,
        "rows_in": select.manifest["rows_in"],
        "rows_out": select.manifest["rows_out"],
        "completion_tokens": select.facts.get("completion_tokens"),
        "dropped": dict(select.manifest["dropped"]),
        "funnel": [dict(step) for step in select.facts.get("funnel", ())],
        "signal": name,
        "histograms": kept_histograms(pool, kept),
        "examples": list(shown),
        "cost": cost(run, reads),
    }, shown


def kept_histograms(pool: Pool, kept: np.ndarray) -> dict[str, Any]:
    """{signal: {edges [bins+1], kept [bins], dropped [bins], n, outside}} of rows with a value, `outside` of them beyond the edges."""
    found = {}
    for name, values in pool.signals.items():
        known = np.isfinite(values)
        edges = bin_edges(values[known])
        if edges is None:
            continue
        counts = [np.histogram(values[known & chosen], edges)[0] for chosen in (kept, ~kept)]
        n = int(known.sum())
        found[name] = {
            "edges": edges.tolist(),
            "kept": counts[0].tolist(),
            "dropped": counts[1].tolist(),
            "n": n,
            "outside": n - int(sum(part.sum() for part in counts)),
        }
    return found


def examples(pool: Pool, kept: np.ndarray, select: Artifact, name: str) -> dict[str, dict[str, Any]]:
    """Rows at both ends of a signal: of those kept, and of those dropped for each of the commonest reasons. Ties go by id.

    A reason none of whose rows has a value is shown by its first row by id.
    """
    values = pool.signals[name]
    found: dict[str, dict[str, Any]] = {}

    def add(rows: np.ndarray, count: int, **facts: Any) -> None:
        scored = rows[np.isfinite(values[rows])]
        ends = _ends(pool, values, scored, count) if len(scored) else [(row, "") for row in _by_id(pool, rows)[:1]]
        for row, end in ends:
            score = float(values[row]) if np.isfinite(values[row]) else None
            identity = pool.ids[int(row)].as_py()
            found.setdefault(identity, {"id": identity, "end": end, "signal": name, "score": score, **facts})

    add(np.flatnonzero(kept), EXAMPLES, kept=True, reason="", detail="")
    if select.has("dropped.parquet"):
        dropped = select.table("dropped")
        places = pool.places(dropped["id"].combine_chunks())
        reasons = dropped["reason"]
        common = sorted(select.manifest["dropped"].items(), key=lambda item: (-item[1], item[0]))[:REASONS]
        for reason, _ in common:
            rows = places[np.asarray(pc.call_function("equal", [reasons, reason])) & (places >= 0)]
            add(rows, 1, kept=False, reason=reason, detail="")
        details = {row["id"]: row["detail"] for row in dropped.filter(_is_in(dropped["id"], list(found))).to_pylist()}
        for identity, one in found.items():
            one["detail"] = details.get(identity, "")
    return found


def add_texts(verify: Artifact, shown: Mapping[str, dict[str, Any]]) -> None:
    """Put shortened question, rationale and labels into the examples; the trace table passes by, a batch at a time."""
    wanted = pa.array(list(shown), pa.string())
    for batch in verify.batches("traces", _TEXTS):
        for row in batch.filter(_is_in(batch.column("id"), wanted)).to_pylist():
            rationale = row["reasoning"] or row["target"]
            shown[row["id"]].update(
                {
                    **{key: row[key] for key in ("teacher", "style", "method", "gold_answer", "answer")},
                    "question": shorten(row["question"], QUESTION_CHARACTERS),
                    "rationale": shorten(rationale, RATIONALE_CHARACTERS),
                    "rationale_characters": len(rationale),
                }
            )


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, cut after a word where there is one, with an ellipsis for the rest."""
    if len(text) <= limit:
        return text
    head = text[: limit - 2]
    space = max(head.rfind(" "), head.rfind("\n"))
    return (head[:space] if space > limit // 2 else head).rstrip() + " …"


def cost(run: ArmRun, reads: Sequence[str]) -> dict[str, Any]:
    """What a recipe costs: passes that the columns it `reads` declare, and what the artifacts' manifests measured.

    `scored` describes the whole score artifact: its signals may be more than the recipe reads. Seconds are wall time, and where
    `rows_resumed` is not 0 those of the last session only.
    """
    score = run.artifacts.get("score")
    facts = score.facts if score is not None else {}
    snapshots = len(facts.get("less_checkpoints") or facts.get("snapshots") or ()) or 1
    draws = facts.get("draws_per_question", 1)
    found: dict[str, Any] = {
        "declared": declared_passes(reads, snapshots, draws),
        "select_seconds": run.artifacts["select"].manifest["wall_seconds"],
    }
    if score is not None:
        student = facts.get("student", {})
        warmup = run.artifacts.get("train:warmup")
        found["scored"] = {
            "signals": list(facts.get("signals", ())),
            "declared": declared_passes(facts.get("signals", ()), snapshots, draws),
            "student": student.get("kind"),
            "compute_dtype": score.manifest["config"].get("compute_dtype"),
            "rows": score.manifest["rows_in"],
            "wall_seconds": score.manifest["wall_seconds"],
            "device_seconds": score.manifest["device_seconds"],
            "warmup_seconds": warmup.manifest["wall_seconds"] if warmup is not None else None,
            **{key: facts.get(key) for key in ("rows_per_second", "rows_resumed", "tokens", "questions_per_second", "sample_tokens")},
        }
    return found


def _ends(pool: Pool, values: np.ndarray, rows: np.ndarray, count: int) -> list[tuple[int, str]]:
    """(row, "lowest" or "highest"): `count` at each end, without repeats."""
    low = _first(pool, values, rows, count)
    high = [row for row in _first(pool, -values, rows, count) if row not in low]
    return [(row, "lowest") for row in low] + [(row, "highest") for row in reversed(high)]


def _first(pool: Pool, values: np.ndarray, rows: np.ndarray, count: int) -> list[int]:
    """The `count` rows of smallest value, ties by id."""
    if len(rows) > count:
        bound = np.partition(values[rows], count - 1)[count - 1]
        below = rows[values[rows] < bound]
        level = _by_id(pool, rows[values[rows] == bound])[: count - len(below)]
        rows = np.concatenate([below, level])
    order = sorted(rows.tolist(), key=lambda row: (values[row], pool.ids[row].as_py()))
    return order


def _by_id(pool: Pool, rows: np.ndarray) -> np.ndarray:
    return rows[np.asarray(pc.call_function("sort_indices", [pool.ids.take(pa.array(rows))]))] if len(rows) else rows


def _is_in(column: Any, values: Any) -> Any:
    return pc.call_function("is_in", [column], pc.SetLookupOptions(pa.array(values, pa.string())))
