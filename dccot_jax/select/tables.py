"""Token tables in, score tables out, and the rows that get no score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dccot_jax.records import Dropped
from dccot_jax.select.views import Row


def read_rows(tokens: pa.Table) -> list[Row]:
    """Rows of a tokens table, sorted by id; token ids are views into one buffer."""
    tokens = tokens.sort_by("id").combine_chunks()
    lists = tokens["input_ids"].combine_chunks()
    offsets, flat = lists.offsets.to_numpy(), lists.values.to_numpy()
    prompts = tokens["prompt_tokens"].to_pylist()
    return [Row(i, flat[offsets[n] : offsets[n + 1]], prompts[n]) for n, i in enumerate(tokens["id"].to_pylist())]


def scores_table(
    rows: Sequence[Row], columns: Mapping[str, Mapping[str, float]], vectors: Mapping[str, Mapping[str, np.ndarray]]
) -> pa.Table:
    """Score table of `rows`: id, completion_tokens, one float32 column per signal in name order, one of float32 [D] per vector."""
    arrays = {"id": pa.array([row.id for row in rows], pa.string())}
    arrays["completion_tokens"] = pa.array([row.completion_tokens for row in rows], pa.int32())
    for name in sorted(columns):
        arrays[name] = pa.array([columns[name][row.id] for row in rows], pa.float32())
    for name in sorted(vectors):
        arrays[name] = vector_array([vectors[name][row.id] for row in rows])
    return pa.table(arrays)


def vector_array(vectors: Sequence[np.ndarray]) -> pa.FixedSizeListArray:
    """[D] float32 vectors as one fixed-size list column."""
    matrix = np.stack(vectors) if len(vectors) else np.zeros((0, 1))
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.astype(np.float32).ravel()), matrix.shape[1])


def usable_rows(rows: Sequence[Row], max_positions: int, model: str = "student") -> tuple[list[Row], list[Dropped]]:
    """Rows the model can read and that have something to score, and a reason for every other one."""
    usable, dropped = [], []
    for row in rows:
        if row.completion_tokens < 1 or row.prompt_tokens < 1:
            dropped.append(Dropped(row.id, "empty_completion", f"{row.prompt_tokens} prompt and {row.completion_tokens} completion tokens"))
        elif len(row.input_ids) > max_positions:
            dropped.append(Dropped(row.id, "exceeds_positions", f"{len(row.input_ids)} tokens, the {model} has {max_positions} positions"))
        else:
            usable.append(row)
    return usable, dropped


def finite_rows(
    rows: Sequence[Row], columns: Mapping[str, Mapping[str, float]], vectors: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[list[Row], list[Dropped]]:
    """Rows all of whose scores are finite, and the rest with reason ``non_finite_<first signal>``."""
    kept, dropped = [], []
    found: Mapping[str, Mapping[str, Any]] = {**columns, **vectors}
    for row in rows:
        bad = [name for name in sorted(found) if not np.isfinite(found[name][row.id]).all()]
        if bad:
            detail = ", ".join(f"{name} = {columns[name][row.id]}" if name in columns else name for name in bad)
            dropped.append(Dropped(row.id, f"non_finite_{bad[0]}", detail))
        else:
            kept.append(row)
    return kept, dropped
