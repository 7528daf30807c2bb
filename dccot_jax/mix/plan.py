"""Stage `plan`: the mix and the curriculum as one explicit, hashed table of packed rows per step.

Files: ``plan.parquet`` (`PLAN_SCHEMA`, sorted by step, row, slot), ``plan.json`` (see `plan_document`) and
``dropped.parquet`` (kept ids that no step uses, with reasons). The trainer reads the table by index and draws nothing.

Two ways to set the length: ``train.steps`` exactly, pass after pass; or ``train.epochs``, every group exactly that many
times. A curriculum in epochs gets the number of steps those epochs take without one, so that its arms have equal steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, table_hash
from dccot_jax.context import Context
from dccot_jax.mix.curriculum import Curriculum, build_curriculum
from dccot_jax.mix.groups import TOKEN_COLUMNS, TRACE_COLUMNS, Group, PlanError, build_groups, drop_groups
from dccot_jax.mix.mixing import Mixed, Total, domain_mix, is_long, is_strong, subset, two_part_mix
from dccot_jax.mix.pack import PACKER, Placed, fits, pack_epochs, pack_steps, weight_rule
from dccot_jax.records import Dropped, content_hash, derive_seed

PLAN_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # packed row of the step, 0..rows_per_step-1
        pa.field("slot", pa.int32(), nullable=False),  # place in the packed row, from 0
        pa.field("token_row", pa.int32(), nullable=False),  # row number in tokens.parquet
        pa.field("id", pa.string(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),  # of every trained token of this row
    ],
    metadata={b"dccot_schema": b"plan/1"},
)


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Mix, order and pack the selected rows, without those of which ``inputs["distill"]``, where there is one, stored nothing.

    Raises PlanError if nothing is selected, the teacher can read none of it, or the settings cannot work.
    """
    if not ctx.is_main:
        return StageResult("")
    kept = inputs["select"].table("kept")["id"].to_pylist()
    if not kept:
        raise PlanError(
            "empty selection: config.select kept no row, so there is nothing to train on; loosen the selectors or check the verdicts"
        )
    unread = _unread(inputs["distill"], kept) if "distill" in inputs else []
    tokens, traces = inputs["tokenize"].batches("tokens", TOKEN_COLUMNS), inputs["verify"].batches("traces", TRACE_COLUMNS)
    groups, dropped = build_groups(set(kept).difference(row.id for row in unread), traces, tokens)
    if unread and not groups:
        first = unread[0]
        raise PlanError(
            f"empty plan: config.train.distill.teacher can read {len(kept) - len(unread)} of {len(kept)} selected rows, and no whole"
            f" group of them, e.g. not {first.id} ({first.reason}: {first.detail}); take a teacher that can, or train.distill.top_k = 0"
        )
    dropped += unread
    scores = _scores(cfg.curriculum.difficulty, inputs.get("score")) if cfg.curriculum.kind != "none" else {}
    plan = make_plan(cfg, groups, scores)
    dropped += plan.dropped
    table = plan_table(plan.steps, cfg)
    document = plan_document(
        cfg, plan, table, tokens_hash=inputs["tokenize"].logical_hash, tokenizer_hash=inputs["tokenize"].facts["tokenizer_hash"]
    )
    out.write_table("plan", table)
    out.write_json("plan", document)
    counts = out.write_dropped(sorted(dropped, key=lambda row: row.id))
    seen, unique = document["completion_tokens"]["seen"], document["completion_tokens"]["unique"]
    shape = f"{document['steps']:,} steps of {cfg.train.rows_per_step} x {cfg.train.row_tokens} tokens, {document['fill_rate']:.1%} full"
    ctx.log(f"  plan {document['hash'][:12]}: {shape}; {document['groups']:,} groups; completion tokens {unique:,} unique, {seen:,} seen")
    facts = {key: document[key] for key in ("hash", "steps", "groups", "sequences", "tokens", "completion_tokens", "fill_rate", "mix")}
    return StageResult(document["hash"], rows_in=len(kept), rows_out=len(set(table["id"].to_pylist())), dropped=counts, facts=facts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Placed rows per step, and how they came about."""

    steps: list[list[Placed]]
    curriculum: Curriculum
    mix: dict[str, Any]
    dropped: list[Dropped]


def make_plan(cfg: ConfigDict, groups: Sequence[Group], scores: Mapping[str, float | None]) -> Plan:
    """The plan of a config over kept groups: a pure function of both.

    Args:
      scores: trace id -> value of the signal that ``config.curriculum.difficulty`` names, where it names one.
    Raises PlanError if no group is left to train on.
    """
    rows, row_tokens = cfg.train.rows_per_step, cfg.train.row_tokens
    mixed = _mix(cfg, groups)
    wide = [group for group in mixed.groups if not fits(group, rows, row_tokens)]
    usable = [group for group in mixed.groups if fits(group, rows, row_tokens)] if wide else mixed.groups
    dropped = mixed.dropped + drop_groups(wide, "exceeds_step", f"does not fit {rows} rows of {row_tokens} tokens")
    curriculum, missing = build_curriculum(cfg.curriculum, usable, scores, seed=derive_seed(cfg.seed, "curriculum"))
    dropped += missing
    if not curriculum.order:
        raise PlanError(
            f"empty plan: none of {len(groups)} selected groups is left after mixing; dropped for {sorted({row.reason for row in dropped})}"
        )
    seed = derive_seed(cfg.seed, "plan")
    if cfg.train.steps == 0 and round(cfg.train.epochs * len(curriculum.order)) < 1:
        raise PlanError(f"config.train.epochs: {cfg.train.epochs} of {len(curriculum.order)} groups is less than one group")
    steps: list[list[Placed]] = []
    if cfg.train.steps == 0:
        in_id_order = sorted(curriculum.order, key=lambda group: group.id)
        steps = list(pack_epochs(in_id_order, cfg.train.epochs, rows=rows, row_tokens=row_tokens, seed=seed))
    if cfg.train.steps or cfg.curriculum.kind != "none":
        steps = list(pack_steps(curriculum, cfg.train.steps or len(steps), rows=rows, row_tokens=row_tokens, seed=seed))
    used = {placed.group.id for step in steps for placed in step}
    dropped += drop_groups(
        [group for group in curriculum.order if group.id not in used], "not_reached", f"the plan ends after {len(steps)} steps"
    )
    return Plan(steps, curriculum, mixed.facts, dropped)


def plan_table(steps: Sequence[Sequence[Placed]], cfg: ConfigDict) -> pa.Table:
    """Placed rows as a table in `PLAN_SCHEMA`, sorted by step, row and slot."""
    weight = weight_rule(cfg.train.loss_weight, full=cfg.train.loss_mask == "full")
    placed = [(number, item) for number, step in enumerate(steps) for item in sorted(step, key=lambda item: (item.row, item.slot))]
    return pa.table(
        {
            "step": pa.array([number for number, _ in placed], pa.int32()),
            "row": pa.array([item.row for _, item in placed], pa.int32()),
            "slot": pa.array([item.slot for _, item in placed], pa.int32()),
            "token_row": pa.array([item.token.token_row for _, item in placed], pa.int32()),
            "id": pa.array([item.token.id for _, item in placed], pa.string()),
            "weight": pa.array(np.asarray([weight(item) for _, item in placed], np.float32)),
        },
        schema=PLAN_SCHEMA,
    )


def plan_document(cfg: ConfigDict, plan: Plan, table: pa.Table, *, tokens_hash: str, tokenizer_hash: str) -> dict[str, Any]:
    """What ``plan.json`` holds.

    ``hash`` is the hash of the last segment. A segment is a stretch of steps and its hash covers the hash of the one
    before; this plan is one segment. ``tokens`` counts all placed tokens, ``completion_tokens`` those of targets, once
    per trace (``unique``) and as often as they are used (``seen``). ``pool_sizes`` lists [first step, groups in use].
    """
    placed = [item for step in plan.steps for item in step]
    unique = {item.token.id: item for item in placed}
    steps, rows, row_tokens = len(plan.steps), cfg.train.rows_per_step, cfg.train.row_tokens
    total = sum(item.token.length for item in placed)
    reads = {
        "tokens": tokens_hash,
        "tokenizer": tokenizer_hash,
        "rows_per_step": rows,
        "row_tokens": row_tokens,
        "loss_mask": cfg.train.loss_mask,
    }
    segment = {
        "first_step": 0,
        "steps": steps,
        "previous": "",
        "hash": content_hash("plan/1", PACKER, reads, table_hash(table, by=("step", "row", "slot")), "", digits=64),
    }
    return {
        "hash": segment["hash"],
        "segments": [segment],
        "steps": steps,
        "rows_per_step": rows,
        "row_tokens": row_tokens,
        "loss_mask": cfg.train.loss_mask,
        "loss_weight": cfg.train.loss_weight,
        "packer": PACKER,
        "tokenizer_hash": tokenizer_hash,
        "tokens_hash": tokens_hash,
        "groups": len({item.group.id for item in unique.values()}),
        "sequences": {"unique": len(unique), "seen": len(placed)},
        "tokens": total,
        "completion_tokens": {
            "unique": sum(item.token.completion_tokens for item in unique.values()),
            "seen": sum(item.token.completion_tokens for item in placed),
        },
        "fill_rate": total / (steps * rows * row_tokens),
        "curriculum": cfg.curriculum.kind,
        "pool_sizes": _pool_sizes(plan.curriculum, steps),
        "mix": plan.mix,
    }


def _mix(cfg: ConfigDict, groups: Sequence[Group]) -> Mixed:
    total = Total(cfg.mix.total_examples, cfg.mix.total_tokens)
    seed = derive_seed(cfg.seed, "mix")
    if cfg.mix.kind == "none":
        return subset(groups, total, seed=seed)
    if cfg.mix.kind == "domain":
        return domain_mix(groups, dict(cfg.mix.weights), cfg.mix.temperature, total, mode=cfg.mix.mode, seed=seed)
    if cfg.mix.kind == "length":
        return two_part_mix(
            groups, is_long(groups, cfg.mix.long), cfg.mix.alpha, total, mode=cfg.mix.mode, seed=seed, labels=("long", "short")
        )
    if cfg.mix.kind == "teacher":
        return two_part_mix(
            groups, is_strong(groups, cfg.mix.strong), cfg.mix.alpha, total, mode=cfg.mix.mode, seed=seed, labels=("strong", "other")
        )
    raise PlanError(f"config.mix.kind: {cfg.mix.kind!r} is not one of none, length, teacher, domain")


def _unread(stored: Artifact, kept: Sequence[str]) -> list[Dropped]:
    """The kept rows that stage ``distill`` dropped, with its reasons, as ``teacher_<reason>``."""
    wanted = set(kept)
    return [
        Dropped(row["id"], f"teacher_{row['reason']}", row["detail"])
        for batch in stored.batches("dropped", ("id", "reason", "detail"))
        for row in batch.to_pylist()
        if row["id"] in wanted
    ]


def _scores(name: str, score: Artifact | None) -> dict[str, float | None]:
    if score is None:
        return {}
    table = score.table("scores")
    return dict(zip(table["id"].to_pylist(), table[name].to_pylist())) if name in table.column_names else {}


def _pool_sizes(curriculum: Curriculum, steps: int) -> list[list[int]]:
    found: list[list[int]] = []
    for step in range(steps):
        size = curriculum.pool_size(step, steps)
        if not found or found[-1][1] != size:
            found.append([step, size])
    return found
