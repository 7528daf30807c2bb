"""The validation side of `less`: rows of the sub-tasks whose loss the selected data are to lower."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dccot_jax.config import ConfigError
from dccot_jax.data.template import Rendered, render_many
from dccot_jax.questions import question_key
from dccot_jax.records import Dropped, Trace, content_hash
from dccot_jax.select.gradients.settings import ValidationSource
from dccot_jax.select.views import Row
from dccot_jax.tasks.registry import build_prompt, build_target, get_task, load_items


@dataclasses.dataclass(frozen=True)
class Validation:
    """Rows of all sub-tasks, the sub-task of each by row id, and the rows of the pool that are held out for them."""

    rows: list[Row]
    subtask: dict[str, str]
    held_out: list[Dropped]


def validation_rows(
    sources: Sequence[ValidationSource],
    rows: Sequence[Row],
    traces: Sequence[Trace],
    tokenizer: Any,
    *,
    max_positions: int,
    data_dir: Path | None,
) -> Validation:
    """Rows of every sub-task; the same whatever the order of `rows` and `traces`.

    A task's sub-task: the items with a gold rationale of the smallest ids (ids are hashes) whose question no trace of the pool
    asks, rendered as evaluation renders gold rationales. A sub-task of traces: one verified trace of each of the questions
    with the smallest hashes; every trace of these questions, and its group, is held out of the pool.

    Args:
      rows: the pool. traces: their traces, verified.
    Raises:
      ConfigError: a sub-task without rows, or one that would hold out the whole pool. TaskDataError: items cannot be had.
    """
    asked = {question_key(trace.question) for trace in traces}
    found, subtask, held_out = [], {}, []
    taken: set[str] = set()
    for source in sources:
        if source.task:
            own = _item_rows(source, asked, tokenizer, max_positions, data_dir)
        else:
            own, lost = _trace_rows(source, rows, traces, taken)
            held_out += lost
        if not own:
            raise ConfigError(
                f"config.score.gradients.validation: sub-task {source.name!r} has no rows: "
                + (
                    f"{source.split} items of {source.task} have no gold rationale, do not fit, or are all in the pool; use {{'traces': n}}"
                    if source.task
                    else "no trace of the pool is verified as correct"
                )
            )
        found += own
        subtask |= {row.id: source.name for row in own}
    if len(held_out) >= len(rows):
        raise ConfigError(f"config.score.gradients.validation: all {len(rows)} rows would be held out; ask for fewer 'traces'")
    return Validation(found, subtask, sorted(held_out, key=lambda d: d.id))


def _item_rows(source: ValidationSource, asked: set[str], tokenizer: Any, max_positions: int, data_dir: Path | None) -> list[Row]:
    task = get_task(source.task)
    items = sorted(load_items(task.name, source.split, data_dir), key=lambda item: item.id)
    usable = [item for item in items if item.rationale and item.gold and question_key(item.question) not in asked]
    found: list[Row] = []
    for start in range(0, len(usable), source.rows):  # further ones stand in for those that do not fit
        batch = usable[start : start + source.rows]
        texts = [(build_prompt(task, i.question, i.choices), build_target(task, i.rationale or "", i.gold or "")) for i in batch]
        for item, row in zip(batch, render_many(tokenizer, texts)):
            if isinstance(row, Rendered) and len(row.input_ids) <= max_positions:
                found.append(Row(f"{source.name}/{item.id}", np.asarray(row.input_ids, np.int32), row.prompt_tokens))
        if len(found) >= source.rows:
            break
    return found[: source.rows]


def _trace_rows(source: ValidationSource, rows: Sequence[Row], traces: Sequence[Trace], taken: set[str]) -> tuple[list[Row], list[Dropped]]:
    """Rows of one sub-task of traces, and what is held out for it; adds its questions to `taken`."""
    pool = {row.id: row for row in rows}
    good: dict[str, Trace] = {}
    for trace in sorted(traces, key=lambda t: t.id):
        key = question_key(trace.question)
        if trace.id in pool and trace.verdict and trace.part == "forward" and key not in taken:
            good.setdefault(key, trace)
    questions = sorted(good, key=lambda key: content_hash("validation/1", key))[: source.rows]
    taken |= set(questions)
    chosen = set(questions)
    groups = {trace.group_id for trace in traces if question_key(trace.question) in chosen}
    found = [dataclasses.replace(pool[good[key].id], id=f"{source.name}/{good[key].id}") for key in questions]
    lost = [Dropped(t.id, "held_out", f"less: of sub-task {source.name}") for t in traces if t.group_id in groups and t.id in pool]
    return found, lost
