"""The gradient signals of stage `score`: columns of scores, and the features behind them.

`grand` is one column. `less` is a column per sub-task of the validation side, ``less_<name>``, and their maximum, ``less``.
Files of `less`: ``features.parquet`` (id and, per checkpoint, ``step_<n>``: the projected Adam-preconditioned gradient as a
fixed-size list of float32, not normalised; a row group per chunk, in the order of the tiles) and ``validation.parquet`` (id,
subtask, the projected gradients). Both sides are committed in chunks, per checkpoint; a resume opens only checkpoints that
are not done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import weight_shapes
from dccot_jax.records import Dropped, table_to_traces
from dccot_jax.select.engine import cast_matrices
from dccot_jax.select.gradients.chunks import Pass, plan_pass, read_pass, run_pass, vectors
from dccot_jax.select.gradients.features import Adam, Projection, make_features
from dccot_jax.select.gradients.influence import influence, most_influenced, subtask_directions
from dccot_jax.select.gradients.norms import make_exact, make_ghost
from dccot_jax.select.gradients.rows import remat_policy
from dccot_jax.select.gradients.settings import check_snapshots, feature_weights, validation_sources
from dccot_jax.select.gradients.subset import choose
from dccot_jax.select.gradients.validation import Validation, validation_rows
from dccot_jax.select.views import Row
from dccot_jax.train.checkpoint import Student
from dccot_jax.train.snapshots import restore_snapshot, snapshot_model

Columns = dict[str, dict[str, float]]
_FORMS = {"ghost": make_ghost, "exact": make_exact}


def score(
    cfg: ConfigDict,
    source: Artifact,
    student: Student,
    mesh: Mesh,
    rows: Sequence[Row],
    inputs: Mapping[str, Artifact],
    out: ArtifactWriter,
    ctx: Context,
) -> tuple[Columns, list[Dropped], dict[str, Any]]:
    """The gradient signals of `score.signals`: columns (empty on processes other than 0), rows held out for validation, and facts.

    Args:
      source: the artifact that `student` was opened from.

    Raises ConfigError as `less` does.
    """
    columns, dropped, facts = {}, [], {}
    if "grand" in cfg.score.signals:
        columns, facts = grand(cfg, student, mesh, rows, out, ctx)
    if "less" in cfg.score.signals:
        more, dropped, about = less(cfg, source, student, mesh, rows, inputs, out, ctx)
        columns, facts = columns | more, facts | about
    return columns, dropped, facts


def grand(
    cfg: ConfigDict, student: Student, mesh: Mesh, rows: Sequence[Row], out: ArtifactWriter, ctx: Context
) -> tuple[Columns, dict[str, Any]]:
    """Column `grand` (empty on processes other than 0), and facts."""
    started, settings = time.monotonic(), cfg.score.gradients
    names = choose(student.mc, settings.norm_subset, key="score.gradients.norm_subset")
    plan = plan_pass("grand", rows, cfg, mesh, out, ctx)
    program = _FORMS[settings.norm](student.mc, names, cfg.compute_dtype, _remat(plan, student.mc, cfg))
    run_pass(plan, lambda: (program, cast_matrices(student.params, cfg.compute_dtype, mesh)), cfg, mesh, out, ctx, label="gradient norms")
    column = {i: float(v) for ids, values in read_pass(plan, out) for i, v in zip(ids, values[:, 0])} if ctx.is_main else {}
    return {"grand": column}, {"grand_weights": list(names), "grand_seconds": round(time.monotonic() - started, 3)}


def less(
    cfg: ConfigDict,
    source: Artifact,
    student: Student,
    mesh: Mesh,
    rows: Sequence[Row],
    inputs: Mapping[str, Artifact],
    out: ArtifactWriter,
    ctx: Context,
) -> tuple[Columns, list[Dropped], dict[str, Any]]:
    """Columns `less` and ``less_<sub-task>`` (empty on processes other than 0), rows held out for validation, and facts.

    Args:
      source: the train artifact that holds the snapshots; `student` was opened from it.

    Raises ConfigError if it holds another number of snapshots than asked for, or a sub-task has no rows.
    """
    started, settings = time.monotonic(), cfg.score.gradients
    snapshots = check_snapshots(source, settings.checkpoints)
    mc = snapshot_model(source)
    names = feature_weights(mc, settings)
    known = validation_rows(
        validation_sources(cfg),
        rows,
        table_to_traces(inputs["verify"].table("traces")),
        load_tokenizer(student.tokenizer_dir),
        max_positions=student.mc.max_positions,
        data_dir=ctx.data_dir,
    )
    gone = {row.id for row in known.held_out}
    pool = [row for row in rows if row.id not in gone]
    trained = source.manifest["config"]
    adam = Adam(trained["train.b1"], trained["train.b2"], trained["train.eps"])
    projection = Projection(settings.dim, settings.seed, settings.projection)

    passes: list[tuple[Pass, Pass]] = []
    for snapshot in snapshots:
        step = snapshot["step"]
        state = _Snapshot(source, step, mesh, cfg.compute_dtype)
        pair = [plan_pass(f"{side}-{step}", side_rows, cfg, mesh, out, ctx) for side, side_rows in (("val", known.rows), ("less", pool))]
        for plan, form in zip(pair, (None, adam)):
            program = make_features(mc, names, projection, form, cfg.compute_dtype, _remat(plan, mc, cfg))
            label = f"{'validation' if form is None else 'training'} features at step {step}"
            run_pass(plan, lambda program=program, state=state: (program, state.tree()), cfg, mesh, out, ctx, label=label)
        passes.append((pair[0], pair[1]))
    facts = {
        "less_weights": list(names),
        "less_parameters": _parameters(mc, names),
        "less_checkpoints": snapshots,
        "less_subtasks": {name: list(known.subtask.values()).count(name) for name in sorted(set(known.subtask.values()))},
        "less_seconds": round(time.monotonic() - started, 3),
    }
    if not ctx.is_main:
        return {}, known.held_out, facts
    directions = _validation(known, [validation for validation, _ in passes], snapshots, out)
    columns: Columns = {}
    parts = _influences([training for _, training in passes], snapshots, directions, columns, out)
    out.write_row_groups("features", parts)
    return columns, known.held_out, facts


class _Snapshot:
    """A snapshot that is opened when it is first needed."""

    def __init__(self, source: Artifact, step: int, mesh: Mesh, compute_dtype: str):
        def opened() -> dict[str, Any]:
            state = restore_snapshot(source, step, mesh)
            return state | {"params": cast_matrices(state["params"], compute_dtype, mesh)}

        self._open = opened
        self._tree: dict[str, Any] | None = None

    def tree(self) -> dict[str, Any]:
        if self._tree is None:
            self._tree = self._open()
        return self._tree


def _validation(
    known: Validation, passes: Sequence[Pass], snapshots: Sequence[Mapping[str, Any]], out: ArtifactWriter
) -> list[dict[str, np.ndarray]]:
    """Directions of the sub-tasks at each checkpoint; writes validation.parquet."""
    table, directions = {}, []
    for plan, snapshot in zip(passes, snapshots):
        parts = list(read_pass(plan, out))
        ids = [i for found, _ in parts for i in found]
        values = np.concatenate([values for _, values in parts])
        table |= {"id": ids, "subtask": [known.subtask[i] for i in ids], f"step_{snapshot['step']}": vectors(values)}
        directions.append(subtask_directions(values, table["subtask"]))
    out.write_table("validation", pa.table(table))
    return directions


def _influences(
    passes: Sequence[Pass],
    snapshots: Sequence[Mapping[str, Any]],
    directions: Sequence[Mapping[str, np.ndarray]],
    columns: Columns,
    out: ArtifactWriter,
) -> Iterator[pa.Table]:
    """Yield the features of each chunk, all checkpoints side by side, and fill `columns` on the way."""
    rates = [snapshot["learning_rate"] for snapshot in snapshots]
    for parts in zip(*(read_pass(plan, out) for plan in passes), strict=True):
        ids = parts[0][0]
        values = influence([features for _, features in parts], directions, rates)
        found = {f"less_{name}": value for name, value in values.items()} | {"less": most_influenced(values)}
        for name, value in found.items():
            columns.setdefault(name, {}).update(zip(ids, value.tolist()))
        steps = {f"step_{snapshot['step']}": vectors(features) for snapshot, (_, features) in zip(snapshots, parts)}
        yield pa.table({"id": pa.array(ids, pa.string()), **steps})


def _remat(plan: Pass, mc: ModelConfig, cfg: ConfigDict) -> str:
    tokens = max((tile.shape.tokens for tile in plan.tiles), default=0)
    return remat_policy(mc, tokens, cfg.compute_dtype, cfg.train.remat)


def _parameters(mc: ModelConfig, names: Sequence[str]) -> int:
    shapes = weight_shapes(mc)
    return sum(math.prod(shapes["layers"].get(name, shapes.get(name))) for name in names)
