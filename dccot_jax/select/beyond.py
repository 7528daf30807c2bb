"""Signals that need more than one forward of the student over the rows: graders and judges, other models, snapshots.

Every pass over rows goes through the engine's programs and its committed chunks; what is made of the scores is in `judged.py`,
`deita_scores.py`, `two_model.py` and `trajectories.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.model import hf
from dccot_jax.records import Dropped, Trace
from dccot_jax.select import deita_scores, engine, judged, trajectories, two_model
from dccot_jax.select.signals import JUDGED, OVER_TIME, TWO_MODEL, Signal, split_signals
from dccot_jax.select.views import Row
from dccot_jax.train.checkpoint import Student, load_student
from dccot_jax.train.snapshots import restore_snapshot_params

Columns = dict[str, dict[str, float]]
Vectors = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass
class Found:
    """Columns of numbers and of vectors (both complete on process 0 only), rows without a value, and facts."""

    columns: Columns = dataclasses.field(default_factory=dict)
    vectors: Vectors = dataclasses.field(default_factory=dict)
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def grade(
    cfg: ConfigDict, names: Sequence[str], student: Student, mesh: Mesh, traces: Sequence[Trace], out: ArtifactWriter, ctx: Context
) -> Found:
    """The signals of graders (`DEITA`) and judges (`JUDGED`) among `names`; `student` grades where no other model is named."""
    found = Found()
    for name, path in deita_scores.grader_models(cfg).items():
        grader = _grader(f"score.deita.{name.removeprefix('deita_')}_model", path, mesh) if path else student
        tokenizer = load_tokenizer(grader.tokenizer_dir)
        rows, uses, lost, digits = deita_scores.grader_rows(name, cfg, traces, tokenizer, grader.mc.max_positions)
        found.dropped += lost
        found.facts[name] = {"grader": path or "student", "graded": len(rows)}
        found.columns[name] = {}
        if rows:
            column = Signal(name, _not_called, {"conditional": ("label_logp",)})
            program = deita_scores.make_grader(grader.mc, digits, cfg.compute_dtype)
            scored, facts = engine.score_forward(cfg, grader, mesh, rows, (column,), (), name, out, ctx, program=program)
            found.facts[name] |= facts
            if ctx.is_main:
                found.columns[name] = {row: scored[name][source] for row, source in uses.items()}
    if set(names) & set(JUDGED):
        columns, lost, facts = judged.judge_rows(cfg, names, traces, out, ctx)
        found.columns |= columns
        found.dropped += lost
        found.facts |= facts
    return found


def compare(
    cfg: ConfigDict,
    names: Sequence[str],
    source: Artifact,
    student: Student,
    mesh: Mesh,
    rows: Sequence[Row],
    nll: Mapping[str, float],
    tokenizer: str,
    out: ArtifactWriter,
    ctx: Context,
) -> Found:
    """The signals of other models (`TWO_MODEL`) and of snapshots (`OVER_TIME`) among `names`; opens one model at a time.

    Args:
      source: the artifact `student` was opened from; the parameters of `student` are not read. nll: the student's, per row id.
      tokenizer: hash of the one the rows were written with.
    """
    found = Found()
    one, both = split_signals(["nll"])[0], split_signals(["nll", "token_accuracy"])[0]

    def other(model: Artifact | Path, rows: Sequence[Row], role: str) -> tuple[dict[str, float], int, dict[str, Any]]:
        opened = load_student(model, mesh)
        fits = [row for row in rows if len(row.input_ids) <= opened.mc.max_positions]
        if not fits:
            return {}, opened.mc.max_positions, {"model": str(opened.source)}
        scored, facts = engine.score_forward(cfg, opened, mesh, fits, one, (), role, out, ctx)
        return scored["nll"], opened.mc.max_positions, {"model": str(opened.source), **facts}

    def at(step: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        snapshot = dataclasses.replace(student, params=restore_snapshot_params(source, step, student.mc, mesh))
        return engine.score_forward(cfg, snapshot, mesh, rows, both, (), f"snapshot{step}", out, ctx)

    compared = [name for name in names if name in TWO_MODEL]
    if compared:
        columns, lost, facts = two_model.differences(cfg, compared, nll, rows, tokenizer, other)
        found.columns |= columns
        found.dropped += lost
        found.facts["other_models"] = facts
    looked_back = [name for name in names if name in OVER_TIME]
    if looked_back:
        steps = trajectories.snapshot_steps_of(source, cfg.score.over_time.snapshots)
        curve, facts = trajectories.curves(steps, at)
        columns, vectors = trajectories.over_time(looked_back, curve, cfg.score.over_time.learned)
        found.columns |= columns
        found.vectors |= vectors
        found.facts["snapshots"] = facts
    return found


def _grader(key: str, path: str, mesh: Mesh) -> Student:
    """A model that only grades: unlike a student it needs no chat template."""
    model, _ = two_model.open_other(key, path)
    if isinstance(model, Artifact):
        return load_student(model, mesh)
    mc, params = hf.load_hf(model, mesh)
    return Student(mc, params, epath.Path(model), eos_id=-1, stop_ids=(), pad_id=0, source=str(model))


def _not_called(stats: Any, mask: Any) -> Any:
    raise AssertionError("the grader's own program makes this column")
