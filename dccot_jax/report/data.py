"""What happened to the data and in training, read from the artifacts' manifests and tables: funnel, curves, lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils.epath import Path

from dccot_jax.artifact import ArmRun, Artifact

FUNNEL = ("traces", "augment", "verify", "tokenize", "score", "select", "plan")
LINEAGE_SCHEMA = pa.schema(
    [
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),  # trace id
        pa.field("uses", pa.int32(), nullable=False),  # how often the plan trains on it
        pa.field("first_step", pa.int32(), nullable=False),
        pa.field("traces", pa.string(), nullable=False),  # artifact whose table holds the trace, relative to the workdir
    ],
    metadata={b"dccot_schema": b"lineage/1"},
)


def funnel(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """Rows in, dropped by reason and kept at every data stage, per arm (of its first seed; `seeds_differ` says if others differ)."""
    found = []
    for arm, group in by_arm(runs).items():
        stages = [_stages(run) for run in group]
        if not stages[0]:
            continue
        plan = group[0].artifacts.get("plan")
        facts = dict(plan.facts) if plan is not None else {}
        counts = [[(row["rows_in"], row["rows_out"], row["dropped"]) for row in rows] for rows in stages]
        found.append(
            {
                "arm": arm,
                "seed": group[0].seed,
                "stages": stages[0],
                "seeds_differ": any(other != counts[0] for other in counts[1:]),
                "plan": {
                    key: facts[key] for key in ("hash", "steps", "sequences", "tokens", "completion_tokens", "fill_rate") if key in facts
                },
            }
        )
    return found


def training(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """Loss curve and figures of every training: [{arm, seed, steps, loss, final_loss, facts, wall_seconds}]."""
    found = []
    for run in runs:
        artifact = run.artifacts.get("train")
        if artifact is None:
            continue
        log = read_log(artifact)
        points = [(int(row["step"]), float(row["loss"])) for row in log if row.get("loss") is not None and "step" in row]
        found.append(
            {
                "arm": run.arm,
                "seed": run.seed,
                "steps": [step for step, _ in points],
                "loss": [loss for _, loss in points],
                "final_loss": points[-1][1] if points else None,
                "tokens_per_second": _median([row["tokens_per_second"] for row in log if row.get("tokens_per_second")]),
                "facts": dict(artifact.facts),
                "wall_seconds": artifact.manifest["wall_seconds"],
            }
        )
    return found


def read_log(artifact: Artifact) -> list[dict[str, Any]]:
    """Rows of `train_log.jsonl`, one per step logged (the last one counts where a resume repeats a step); [] without the file."""
    if not artifact.has("train_log.jsonl"):
        return []
    rows: dict[int, dict[str, Any]] = {}
    with artifact.file("train_log.jsonl").open("r") as file:
        for line in file:
            row = json.loads(line)
            if "step" in row:
                rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def costs(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """Wall seconds by stage over distinct artifacts, and their sum."""
    seen: dict[str, tuple[str, float]] = {}
    for run in runs:
        for artifact in run.artifacts.values():
            seen[f"{artifact.kind}-{artifact.identity}"] = (artifact.kind, float(artifact.manifest["wall_seconds"]))
    stages: dict[str, float] = {}
    for kind, seconds in seen.values():
        stages[kind] = round(stages.get(kind, 0.0) + seconds, 3)
    return {"wall_seconds": stages, "total_wall_seconds": round(sum(stages.values()), 3), "artifacts": len(seen)}


def lineage(runs: Sequence[ArmRun], workdir: Path) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Which traces trained which student, and where every artifact is.

    Returns the table (`LINEAGE_SCHEMA`, one row per arm, seed and trace) and [{arm, seed, artifacts: {node: {...}}}]. From
    a cell one walks to its arm's rows here, from a trace id to every student that saw it, and through the trace table's
    `parent_ids` to what it was made from.
    """
    tables, index = [], []
    for run in runs:
        index.append(
            {
                "arm": run.arm,
                "seed": run.seed,
                "artifacts": {
                    name: {"path": _place(item, workdir), "identity": item.identity, "logical_hash": item.logical_hash}
                    for name, item in run.artifacts.items()
                },
            }
        )
        plan = run.artifacts.get("plan")
        source = run.artifacts.get("verify")
        if plan is None:
            continue
        grouped = plan.table("plan").select(["id", "step"]).group_by("id").aggregate([("step", "count"), ("step", "min")]).sort_by("id")
        n = grouped.num_rows
        tables.append(
            pa.table(
                {
                    "arm": pa.array([run.arm] * n, pa.string()),
                    "seed": pa.array([run.seed] * n, pa.int64()),
                    "id": grouped.column("id"),
                    "uses": grouped.column("step_count").cast(pa.int32()),
                    "first_step": grouped.column("step_min").cast(pa.int32()),
                    "traces": pa.array([_place(source, workdir) if source is not None else ""] * n, pa.string()),
                },
                schema=LINEAGE_SCHEMA,
            )
        )
    return (pa.concat_tables(tables) if tables else LINEAGE_SCHEMA.empty_table()), index


def by_arm(runs: Sequence[ArmRun]) -> dict[str, list[ArmRun]]:
    """Runs of each arm, in their order."""
    found: dict[str, list[ArmRun]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def config_differences(runs: Sequence[ArmRun]) -> dict[str, dict[str, Any]]:
    """Dotted config keys on which arms differ (seeds aside): {key: {arm: value}}."""
    flat = {arm: dict(_flatten(group[0].config)) for arm, group in by_arm(runs).items() if "train" in group[0].artifacts}
    keys = sorted({key for values in flat.values() for key in values} - {"seed", "seeds", "name"})
    found = {}
    for key in keys:
        values = {arm: flat[arm].get(key) for arm in flat}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            found[key] = values
    return found


def _stages(run: ArmRun) -> list[dict[str, Any]]:
    rows = []
    for name in FUNNEL:
        artifact = run.artifacts.get(name)
        if artifact is not None:
            manifest = artifact.manifest
            tokens = artifact.facts.get("completion_tokens")
            rows.append(
                {
                    "stage": name,
                    "rows_in": manifest["rows_in"],
                    "rows_out": manifest["rows_out"],
                    "dropped": dict(manifest["dropped"]),
                    "completion_tokens": tokens.get("unique") if isinstance(tokens, Mapping) else tokens,
                    "wall_seconds": manifest["wall_seconds"],
                    "identity": artifact.identity,
                }
            )
    return rows


def _place(artifact: Artifact, workdir: Path) -> str:
    return str(artifact.path.relative_to(workdir)) if artifact.path.is_relative_to(workdir) else str(artifact.path.name)


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value)]
