"""Rows through a program tile by tile, committed in chunks: the loop of every gradient signal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.chunks import committed, drop_other_layouts, read_committed
from dccot_jax.context import Context
from dccot_jax.model.sharding import BATCH
from dccot_jax.records import content_hash
from dccot_jax.select.dispatch import Program
from dccot_jax.select.gradients.layout import Streams, measure_streams, plan_streams
from dccot_jax.select.views import Row, chunk_tiles

VALUE = "value"
# Tokens of one tile per device: every row of a tile costs memory for its own gradient of one weight.
TILE_TOKENS = {"cpu": 2048}
TILE_TOKENS_ACCELERATOR = 8192


@dataclasses.dataclass(frozen=True)
class Pass:
    """One program over rows: how they are cut, and where its chunks are."""

    name: str
    rows: Sequence[Row]
    tiles: Sequence[Streams]
    chunks: Sequence[range]
    series: Sequence[str]
    done: Sequence[bool]

    @property
    def left(self) -> int:
        """Rows of chunks that are still to be made."""
        return sum(len(self.tiles[t].rows) for chunk, done in zip(self.chunks, self.done) if not done for t in chunk)


def plan_pass(name: str, rows: Sequence[Row], cfg: ConfigDict, mesh: Mesh, out: ArtifactWriter, ctx: Context) -> Pass:
    """Cut rows into tiles and chunks and see which are committed; chunks of `name` under another layout are discarded."""
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    tiles = plan_streams(rows, shards=shards, tile_tokens=TILE_TOKENS.get(jax.default_backend(), TILE_TOKENS_ACCELERATOR))
    chunks = chunk_tiles(tiles, cfg.score.chunk_rows)
    layout = content_hash(
        "gradients/2", [[rows[i].id for i in tile.rows] for tile in tiles], [chunk.stop for chunk in chunks], ctx.process_count
    )[:12]
    drop_other_layouts(out, ctx, f"{name}-", layout)
    series = [f"{name}-{layout}-p{process}" for process in range(ctx.process_count)]
    return Pass(name, rows, tiles, chunks, series, committed(out, ctx, series, len(chunks)))


def run_pass(
    plan: Pass, make: Callable[[], tuple[Program, Any]], cfg: ConfigDict, mesh: Mesh, out: ArtifactWriter, ctx: Context, *, label: str
) -> None:
    """Make the chunks that are not there. `make` gives the program and what it reads; it is not called if none is left."""
    with ctx.progress(label, len(plan.rows)) as meter:
        meter.skip(len(plan.rows) - plan.left)
        if plan.left:
            program, state = make()
            todo = [index for index, done in enumerate(plan.done) if not done]
            tiles = [plan.tiles[t] for index in todo for t in plan.chunks[index]]
            results = measure_streams(program, state, mesh, plan.rows, tiles, in_flight=max(1, min(2, cfg.score.batch_tiles)))
            for index in todo:
                parts = []
                for t in plan.chunks[index]:
                    parts.append(next(results))
                    meter.advance(len(plan.tiles[t].rows))
                out.commit_chunk(plan.series[ctx.process_index], index, _table(plan.rows, parts))
                ctx.stop_point(f"{label}: chunk committed")
    ctx.barrier(f"{plan.name}-chunks")


def read_pass(plan: Pass, out: ArtifactWriter) -> Iterator[tuple[list[str], np.ndarray]]:
    """Per chunk, (row ids, values [n, K] float32), in the order of the tiles, over all processes' parts."""
    for index, chunk in enumerate(plan.chunks):
        found: dict[str, np.ndarray] = {}
        for series in plan.series:
            table = read_committed(out, series, index)
            values = table[VALUE].combine_chunks()
            flat = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
            found.update(zip(table["id"].to_pylist(), flat.to_numpy().reshape(table.num_rows, -1)))
        ids = [plan.rows[i].id for t in chunk for i in plan.tiles[t].rows]
        yield ids, np.stack([found[i] for i in ids])


def vectors(values: np.ndarray) -> pa.Array:
    """[n, K] as a column: float32 where K is 1, else fixed-size lists of float32."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _table(rows: Sequence[Row], parts: Sequence[tuple[list[int], np.ndarray]]) -> pa.Table:
    ids = [rows[i].id for found, _ in parts for i in found]
    return pa.table({"id": pa.array(ids, pa.string()), VALUE: vectors(np.concatenate([values for _, values in parts]))})
