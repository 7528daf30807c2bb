"""Stage `distill`: what a teacher expects at every trained position of every tokenised row, its k likeliest tokens.

A pass like scoring: tiles of fixed contents, the trained positions' hidden states through the head in blocks of the vocabulary (no
[B, T, V] array exists), every process with its shard of each tile, committed in chunks of `score.chunk_rows` rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from etils import epath
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult
from dccot_jax.chunks import committed, drop_other_layouts, read_committed
from dccot_jax.context import Context
from dccot_jax.model import decoder, head
from dccot_jax.model.backends.choice import choose
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import BATCH, activation_spec, make_mesh, reshard
from dccot_jax.records import Dropped, content_hash
from dccot_jax.select.dispatch import Program
from dccot_jax.select.engine import cast_matrices, score_tiles
from dccot_jax.select.tables import read_rows, usable_rows
from dccot_jax.select.views import TILE_TOKENS, TILE_TOKENS_ACCELERATOR, Row, chunk_tiles, plan_tiles
from dccot_jax.train.checkpoint import load_student
from dccot_jax.train.teacher import open_config

KIND = "distill"
_IN_FLIGHT = 2


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Store the `train.distill.top_k` likeliest tokens of `train.distill.teacher` over the rows of ``inputs["tokenize"]``.

    Writes topk.parquet (id; ids, k a position; logp, k + 1 a position, last the logarithm of the mass of every other token; over
    the positions that `train.loss_mask` trains, in their order; rows in no order) and dropped.parquet: rows that the teacher
    cannot read, or of which it says what is not finite.

    Raises ConfigError if the teacher cannot be opened, has other tokens than ``inputs["student"]``, or fewer than k.
    """
    distill, tokens = cfg.train.distill, inputs["tokenize"].table("tokens")
    student = inputs["student"]
    mc = open_config(ModelConfig.from_dict(student.json("student")["model"]), student.file("tokenizer"), distill)
    started = time.monotonic()
    rows, dropped = usable_rows(read_rows(tokens), mc.max_positions, "teacher")
    if cfg.train.loss_mask == "full":  # what is scored is all that follows the prompt
        rows = [dataclasses.replace(row, prompt_tokens=1) for row in rows]
    series, count, facts = _store(cfg, mc, rows, out, ctx)
    ctx.barrier(f"{KIND}-chunks")
    if not ctx.is_main:
        return StageResult("")

    digests: dict[str, str] = {}
    out.write_row_groups("topk", _merged(out, series, count, digests, distill.top_k_dtype))
    lost = [Dropped(row.id, "non_finite_logp", "the teacher's log-probabilities are not finite") for row in rows if row.id not in digests]
    counts = out.write_dropped(sorted([*dropped, *lost], key=lambda d: d.id))
    about = {"top_k": distill.top_k, "vocab_size": mc.vocab_size, "dtype": distill.top_k_dtype, "teacher": distill.teacher}
    return StageResult(
        content_hash("distill/1", distill.top_k, distill.top_k_dtype, mc.vocab_size, sorted(digests.items()), digits=64),
        rows_in=tokens.num_rows,
        rows_out=len(digests),
        dropped=counts,
        facts=about | facts,
        device_seconds=round(time.monotonic() - started, 3),
    )


def _store(
    cfg: ConfigDict, mc: ModelConfig, rows: Sequence[Row], out: ArtifactWriter, ctx: Context
) -> tuple[list[str], int, dict[str, Any]]:
    """(series of chunks by process, chunks in each, facts); what is committed already is not done again."""
    distill, mesh = cfg.train.distill, make_mesh(cfg.mesh)
    k, dtype = distill.top_k, np.dtype(distill.top_k_dtype)
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    tile_tokens = TILE_TOKENS.get(jax.default_backend(), TILE_TOKENS_ACCELERATOR)
    tiles = plan_tiles(rows, 0, shards=shards, tile_tokens=tile_tokens)
    chunks = chunk_tiles(tiles, cfg.score.chunk_rows)
    contents = [[rows[i].id for i in tile.rows] for tile in tiles]
    layout = content_hash("distill/1", contents, [chunk.stop for chunk in chunks], ctx.process_count)[:12]
    series = [f"{KIND}-{layout}-p{process}" for process in range(ctx.process_count)]
    drop_other_layouts(out, ctx, f"{KIND}-", layout)
    done = committed(out, ctx, series, len(chunks))
    todo = [index for index in range(len(chunks)) if not done[index]]
    stored = 0
    if todo:
        attention, remark = choose(cfg.attention, mc, cfg.tokens.max_length, cfg.compute_dtype, packed=False)
        if remark:
            ctx.log(f"  {remark}")
        teacher = load_student(epath.Path(distill.teacher).expanduser(), mesh, param_dtype=jnp.dtype(distill.teacher_dtype))
        params = cast_matrices(teacher.params, cfg.compute_dtype, mesh)
        program = make_program(mc, k, float(distill.temperature), cfg.compute_dtype, attention)
        work = [tiles[t] for index in todo for t in chunks[index]]
        results = score_tiles(program, params, mesh, rows, work, ["conditional"], [], in_flight=_IN_FLIGHT)
        with ctx.progress(KIND, len(rows)) as meter:
            meter.skip(sum(len(tiles[t].rows) for index, chunk in enumerate(chunks) if done[index] for t in chunk))
            for index in todo:
                parts = []
                for t in chunks[index]:
                    parts.append(next(results))
                    meter.advance(len(tiles[t].rows))
                    stored += len(tiles[t].rows)
                out.commit_chunk(series[ctx.process_index], index, _chunk_table(rows, k, dtype, parts))
                ctx.stop_point(f"{KIND}: chunk committed")
    return series, len(chunks), {"rows_stored": stored, "rows_resumed": len(rows) - stored}


@functools.lru_cache(maxsize=4)
def make_program(mc: ModelConfig, k: int, temperature: float, compute_dtype: str, attention: str) -> Program:
    """The jitted function (params, {"conditional": arrays of `view_arrays`}) -> int32 [B, C, 2k + 1]: ids, then the bits of logp."""

    @jax.jit
    def likeliest(params: Any, arrays: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        x = arrays["conditional"]
        places = (x["tokens"], x["segment_ids"], x["positions"])
        hidden = decoder.forward(params, mc, *places, compute_dtype=compute_dtype, remat="none", attention=attention, packed=False)
        ids, logp = head.top_tokens(params, mc, head.gather_positions(hidden, x["index"]), k, temperature=temperature)
        both = jnp.concatenate([ids, jax.lax.bitcast_convert_type(logp, jnp.int32)], axis=-1)  # one array comes back from a tile
        return reshard(both, activation_spec(len(both), None, None))

    return likeliest


def _chunk_table(rows: Sequence[Row], k: int, dtype: np.dtype, parts: Sequence[tuple[list[int], np.ndarray]]) -> pa.Table:
    """The rows of a chunk whose numbers are all finite."""
    names: list[str] = []
    ids: list[np.ndarray] = []
    logp: list[np.ndarray] = []
    least = np.finfo(dtype).min
    for order, values in parts:
        for i, found in zip(order, values):
            found = np.ascontiguousarray(found[: rows[i].completion_tokens])
            bits = np.ascontiguousarray(found[:, k:]).view(np.float32)
            if np.isfinite(bits).all():
                names.append(rows[i].id)
                ids.append(found[:, :k])
                logp.append(np.maximum(bits, least).astype(dtype))  # of no mass at all where k is all of the vocabulary
    return pa.table({"id": pa.array(names, pa.string()), "ids": _lists(ids, np.dtype(np.int32)), "logp": _lists(logp, dtype)})


def _lists(arrays: Sequence[np.ndarray], dtype: np.dtype) -> pa.ListArray:
    offsets = np.cumsum([0, *(x.size for x in arrays)]).astype(np.int32)
    flat = np.concatenate([x.ravel() for x in arrays]) if arrays else np.zeros(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _merged(out: ArtifactWriter, series: Sequence[str], count: int, digests: dict[str, str], dtype: str) -> Iterator[pa.Table]:
    """The committed chunks one by one, after an empty table; a digest of every row is left in `digests`."""
    yield _chunk_table([], 1, np.dtype(dtype), [])
    for part in series:
        for index in range(count):
            table = read_committed(out, part, index)
            columns = [table[name].combine_chunks() for name in ("ids", "logp")]
            numbers = [(column.values.to_numpy(), np.asarray(column.offsets)) for column in columns]
            for row, name in enumerate(table["id"].to_pylist()):
                digest = hashlib.sha256()
                for values, offsets in numbers:
                    digest.update(values[offsets[row] : offsets[row + 1]])
                digests[name] = digest.hexdigest()
            yield table
