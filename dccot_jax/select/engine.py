"""Stage `score`: any set of signals of a student over every tokenised row, one forward per view.

One jitted program (per bucket shape) runs the views, gathers the completion positions, passes only those through the
chunked head, and vmaps the signals over rows. Tiles have a fixed shape per bucket and fixed contents; `score.batch_tiles`
only says how many are in flight and `score.chunk_rows` how many rows are committed together, so neither changes a bit.
Every process scores its shard of each tile and commits the rows it can address; process 0 merges them, sorted by id.

Vectors are pooled in the same forward and travel behind the scores. Signals over pieces of rows (`select/items.py`) go
through the same program once more, with the pieces as rows.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, table_hash
from dccot_jax.chunks import committed, drop_other_layouts, read_committed
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.model import decoder, head
from dccot_jax.model.backends.choice import choose
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import BATCH, activation_spec, make_mesh, reshard
from dccot_jax.records import Dropped, Trace, content_hash, table_to_traces
from dccot_jax.select import items as pieces
from dccot_jax.select import packed, packing, sentences
from dccot_jax.select.dispatch import Program, dispatch
from dccot_jax.select.relative import grape
from dccot_jax.select.signals import (
    DEITA,
    GRADIENTS,
    ITEMS,
    JUDGED,
    OVER_TIME,
    RELATIVE,
    SAMPLED,
    SENTENCES,
    TWO_MODEL,
    VECTORS,
    VIEWS,
    Signal,
    required_stats,
    split_signals,
)
from dccot_jax.select.tables import finite_rows, read_rows, scores_table, usable_rows, vector_array
from dccot_jax.select.views import (
    TILE_TOKENS,
    TILE_TOKENS_ACCELERATOR,
    Row,
    Tile,
    chunk_tiles,
    completion_context,
    plan_tiles,
    view_arrays,
)
from dccot_jax.train.checkpoint import Student, load_student


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Score every row of `tokenize` with the student in `inputs` (``train`` if given, else ``student``).

    Writes scores.parquet (id, completion_tokens, one float32 column per signal, of fixed-size lists for vectors; sorted by
    id), dropped.parquet, for sampled signals samples.jsonl and draws.jsonl, and for `less` its features
    (`select/gradients/stage.py`). A row with a non-finite signal, no completion or more tokens than the model has positions is
    dropped with a reason; no score is ever a default.

    Raises ConfigError on an unknown signal, or a student with another tokenizer than the rows were made with.
    """
    forward, others = split_signals(cfg.score.signals)
    mesh = make_mesh(cfg.mesh)
    source = inputs.get("train") or inputs["student"]
    check_tokenizer(source, inputs["tokenize"])
    student = load_student(source, mesh)
    started = time.monotonic()
    tokens = inputs["tokenize"].table("tokens")
    rows, dropped = usable_rows(read_rows(tokens), student.mc.max_positions)
    columns, vectors, facts = _score_rows(cfg, student, mesh, rows, forward, others, out, ctx) if rows else ({}, {}, {})
    if rows and set(others) - {*VECTORS, *GRADIENTS, *TWO_MODEL, *OVER_TIME}:
        traces = {trace.id: trace for trace in table_to_traces(inputs["verify"].table("traces"))}
        for name in (name for name in others if name in RELATIVE):
            columns[name] = grape([traces[row.id] for row in rows], columns[RELATIVE[name]])
        for name in (name for name in others if name in ITEMS):
            columns[name], lost, facts[name] = _score_items(cfg, student, mesh, rows, traces, name, out, ctx)
            dropped = dropped + lost
        if set(others) & set(SAMPLED):
            from dccot_jax.select import sampled  # brings the sampler and its compile cost; most scorings do without

            found, lost, more = sampled.score(cfg, others, student, mesh, [traces[row.id] for row in rows], out, ctx)
            columns, dropped, facts = columns | found, dropped + lost, facts | more
        if set(others) & set(SENTENCES):
            found, more = sentences.score(cfg, others, [traces[row.id] for row in rows], out, ctx)
            vectors, facts = vectors | found, facts | more
        if set(others) & {*JUDGED, *DEITA}:
            from dccot_jax.select import beyond  # imports this module

            found = beyond.grade(cfg, others, student, mesh, [traces[row.id] for row in rows], out, ctx)
            columns, dropped, facts = columns | found.columns, dropped + found.dropped, facts | found.facts
    gradient_columns: dict[str, dict[str, float]] = {}
    if rows and set(others) & set(GRADIENTS):
        from dccot_jax.select.gradients import stage as gradients  # imports this module

        gradient_columns, lost, more = gradients.score(cfg, source, student, mesh, rows, inputs, out, ctx)
        dropped, facts = dropped + lost, facts | more
    if rows and set(others) & {*TWO_MODEL, *OVER_TIME}:
        from dccot_jax.select import beyond

        student = dataclasses.replace(student, params=None)  # its memory is for the next model
        tokenizer = inputs["tokenize"].facts["tokenizer_hash"]
        found = beyond.compare(cfg, others, source, student, mesh, rows, columns.get("nll", {}), tokenizer, out, ctx)
        columns, vectors = columns | found.columns, vectors | found.vectors
        dropped, facts = dropped + found.dropped, facts | found.facts
    if not ctx.is_main:
        return StageResult("")

    columns = {name: column for name, column in columns.items() if name in cfg.score.signals} | gradient_columns
    dropped = list({d.id: d for d in reversed(dropped)}.values())  # two signals may lose the same row; the first reason counts
    gone = {d.id for d in dropped}
    kept, bad = finite_rows([row for row in rows if row.id not in gone], columns, vectors)
    table = scores_table(kept, columns, vectors)
    out.write_table("scores", table)
    counts = out.write_dropped(sorted([*dropped, *bad], key=lambda d: d.id))
    facts |= {"student": {"kind": source.kind, "identity": source.identity}, "signals": sorted({*columns, *vectors})}
    return StageResult(
        table_hash(table),
        rows_in=tokens.num_rows,
        rows_out=table.num_rows,
        dropped=counts,
        facts=facts,
        device_seconds=round(time.monotonic() - started, 3),
    )


def check_tokenizer(student: Artifact, tokens: Artifact) -> None:
    """Raises ConfigError unless the student reads tokens as the rows were written: other ids would be scored as noise."""
    mine, rows = student.json("student")["tokenizer"]["hash"], tokens.facts["tokenizer_hash"]
    if mine != rows:
        raise ConfigError(
            f"config.score.student: {student.path} has tokenizer {mine[:16]}, the rows were tokenised with {rows[:16]};"
            " score with a student that has the same tokenizer"
        )


# --- the program --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def make_program(
    mc: ModelConfig, signals: tuple[Signal, ...], compute_dtype: str, vectors: tuple[str, ...] = (), attention: str = "xla"
) -> Program:
    """The jitted function (params, {view: arrays of `view_arrays`}) -> [B, S + V D] float32; call it under a mesh.

    S scores, then the V `vectors` of hidden size D one after the other. One compilation per bucket, kept for later
    scorings in this process; one forward per view, however many signals.
    """
    needs = required_stats(signals)
    views = required_views(signals, vectors)
    settings: Any = {"compute_dtype": compute_dtype, "remat": "none", "attention": attention, "packed": False}

    def score_row(stats: Any, mask: Any) -> jax.Array:
        return jnp.stack([signal.fn(stats, mask) for signal in signals])

    @jax.jit
    def score_tile(params: Any, arrays: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        stats, found = {}, []
        for view in views:
            x = arrays[view]
            hidden = decoder.forward(params, mc, x["tokens"], x["segment_ids"], x["positions"], **settings)
            if view in needs:
                scored = head.gather_positions(hidden, x["index"])
                stats[view] = head.token_stats(params, mc, scored, x["labels"], want=needs[view])
            if view == "conditional":
                found = [_pooled(hidden, x, of_prompt=name == "embedding_prompt") for name in vectors]
        if signals:
            # vmap wants every operand's rows on the same axes; a reshape may have lost them where a device holds one row.
            per_row = (stats, {view: arrays[view]["mask"] for view in needs})
            found.insert(0, jax.vmap(score_row)(*jax.tree.map(lambda x: reshard(x, activation_spec(len(x), None)), per_row)))
        return jnp.concatenate([reshard(x, activation_spec(len(x), None)) for x in found], axis=1)

    return score_tile


def required_views(signals: Sequence[Signal], vectors: Sequence[str]) -> list[str]:
    """The views that a program of these signals and vectors reads."""
    needs = required_stats(signals)
    return [view for view in VIEWS if view in needs or (view == "conditional" and vectors)]


def _pooled(hidden: jax.Array, x: Mapping[str, jax.Array], *, of_prompt: bool) -> jax.Array:
    """Mean of hidden states [B, L, D] over the prompt's positions, or the completion's: [B, D] float32."""
    last = reshard(x["index"], activation_spec(len(hidden), None))[:, :1]  # the prompt's last position predicts the first completion token
    positions, real = (reshard(x[name], activation_spec(len(hidden), None)) for name in ("positions", "segment_ids"))
    chosen = (real > 0) & ((positions <= last) if of_prompt else (positions > last))
    wide = reshard(hidden, activation_spec(len(hidden), None, None)).astype(jnp.float32)
    total = jnp.sum(jnp.where(chosen[..., None], wide, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1)


def cast_matrices(params: Any, compute_dtype: Any, mesh: Mesh) -> Any:
    """Parameters with every matrix in the compute dtype, norms as they are.

    The decoder casts matrices at each use; casting once gives the same products and saves that work per tile.
    """
    dtype = jnp.dtype(compute_dtype)
    if dtype == jnp.float32:
        return params

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if str(path[-1].key).endswith("norm") else leaf.astype(dtype)

    with jax.set_mesh(mesh):
        return jax.jit(lambda tree: jax.tree_util.tree_map_with_path(cast, tree))(params)


def score_tiles(
    program: Program,
    params: Any,
    mesh: Mesh,
    rows: Sequence[Row],
    tiles: Sequence[Tile],
    views: Sequence[str],
    context: Sequence[int],
    *,
    in_flight: int,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield, tile by tile, (row indices, [n, S] scores) of the rows this process can address.

    At most `in_flight` tiles are dispatched and not yet read back; their order and content do not depend on it.
    """

    def arrays(tile: Tile) -> dict[str, dict[str, np.ndarray]]:
        return {view: view_arrays(view, rows, tile, context) for view in views}

    for tile, parts in dispatch(program, params, mesh, tiles, arrays, in_flight=in_flight):
        yield _local_rows(tile, parts)


def _local_rows(tile: Tile, parts: Sequence[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
    """The real rows among the parts of a tile's result."""
    real = [tile.rows[first : first + len(scores)] for first, scores in parts]
    return [i for chosen in real for i in chosen], np.concatenate([scores[: len(chosen)] for chosen, (_, scores) in zip(real, parts)])


# --- passes over all rows -----------------------------------------------------------------------------------------------


def _score_rows(
    cfg: ConfigDict,
    student: Student,
    mesh: Mesh,
    rows: Sequence[Row],
    forward: tuple[Signal, ...],
    others: Sequence[str],
    out: ArtifactWriter,
    ctx: Context,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Forward signals (with those that relative ones are made of) and vectors, each {name: {row id: value}}, and facts."""
    under = [*(RELATIVE[name] for name in others if name in RELATIVE), *("nll" for name in others if name in TWO_MODEL)]
    needed, _ = split_signals([*(signal.name for signal in forward), *under])
    vectors = tuple(name for name in others if name in VECTORS)
    if not needed and not vectors:
        return {}, {}, {}
    scored, facts = score_forward(cfg, student, mesh, rows, needed, vectors, "score", out, ctx)
    return {signal.name: scored[signal.name] for signal in needed}, {name: scored[name] for name in vectors}, facts


def _score_items(
    cfg: ConfigDict,
    student: Student,
    mesh: Mesh,
    rows: Sequence[Row],
    traces: Mapping[str, Trace],
    name: str,
    out: ArtifactWriter,
    ctx: Context,
) -> tuple[dict[str, float], list[Dropped], dict[str, Any]]:
    """({row id: value}, dropped rows, facts) of a signal over pieces of rows; complete on process 0 only."""
    items = pieces.expand(name, rows, traces, load_tokenizer(student.tokenizer_dir), student.mc.max_positions)
    if not items.rows:
        return {}, items.dropped, {}
    (nll,), _ = split_signals(["nll"])
    scored, facts = score_forward(cfg, student, mesh, items.rows, (nll,), (), name, out, ctx)
    return pieces.reduce(name, items, scored["nll"]) if ctx.is_main else {}, items.dropped, facts


# --- chunks -------------------------------------------------------------------------------------------------------------


def score_forward(
    cfg: ConfigDict,
    student: Student,
    mesh: Mesh,
    rows: Sequence[Row],
    signals: tuple[Signal, ...],
    vectors: tuple[str, ...],
    kind: str,
    out: ArtifactWriter,
    ctx: Context,
    *,
    program: Program | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({signal or vector: {row id: value}}, facts); columns are empty on processes other than 0. Committed chunks are not repeated.

    `kind` names the chunks: the signal whose items `rows` are, else "score" or the model that reads the rows themselves.
    `program`: makes the columns of `signals` in place of `make_program`'s, in buckets.
    """
    # the buckets of rows allow for the context whatever is asked for, so that no score depends on it; items have one view
    context = completion_context(load_tokenizer(student.tokenizer_dir), rows) if kind not in (*ITEMS, *DEITA) else []
    tile_tokens = TILE_TOKENS.get(jax.default_backend(), TILE_TOKENS_ACCELERATOR)
    about: Any = (student.mc, mesh, rows, signals, vectors, context, tile_tokens, cfg.compute_dtype)
    packs = cfg.score.layout == "packed" and program is None
    if packs:
        work = _packed(*about)
    else:
        work = _bucketed(*about, program=program or _program(cfg, student.mc, signals, vectors, ctx))
    tiles = work.tiles
    chunks = chunk_tiles(tiles, cfg.score.chunk_rows)
    names = [signal.name for signal in signals]
    contents = [[rows[i].id for i in tile.rows] for tile in tiles]
    stops = [chunk.stop for chunk in chunks]
    layout = content_hash("score/2", cfg.score.layout, names, vectors, context, contents, stops, ctx.process_count)
    series = [f"{kind}-{layout[:12]}-p{process}" for process in range(ctx.process_count)]
    drop_other_layouts(out, ctx, f"{kind}-", layout[:12])
    done = committed(out, ctx, series, len(chunks))

    params = cast_matrices(student.params, cfg.compute_dtype, mesh)
    started, scored = time.monotonic(), 0
    with ctx.progress(kind, len(rows)) as meter:
        todo = [index for index in range(len(chunks)) if not done[index]]
        for index, chunk in enumerate(chunks):
            if done[index]:
                meter.skip(sum(len(tiles[t].rows) for t in chunk))
        results = work.score(params, [tiles[t] for c in todo for t in chunks[c]], max(1, cfg.score.batch_tiles))
        for index in todo:
            parts = []
            for t in chunks[index]:
                parts.append(next(results))
                meter.advance(len(tiles[t].rows))
                scored += len(tiles[t].rows)
            out.commit_chunk(series[ctx.process_index], index, _chunk_table(rows, names, vectors, parts))
            ctx.stop_point(f"{kind}: chunk committed")
    seconds = time.monotonic() - started
    ctx.barrier(f"{kind}-chunks")
    columns: dict[str, dict[str, Any]] = {name: {} for name in (*names, *vectors)}
    if ctx.is_main:
        for part in series:
            for index in range(len(chunks)):
                _merge(columns, read_committed(out, part, index))
    return columns, {
        "rows_scored": scored,
        "rows_resumed": len(rows) - scored,
        "rows_per_second": round(scored / max(seconds, 1e-9), 3),
        "seconds": round(seconds, 3),
        "tiles": len(tiles),
        **work.facts,
        "unconditional_context": list(context),
    }


@dataclasses.dataclass(frozen=True)
class _Work:
    """A pass over the rows: its tiles, (params, some of them, how many in flight) -> their results in order, and facts."""

    tiles: Sequence[Tile] | Sequence[packing.PackedTile]
    score: Callable[[Any, Sequence[Any], int], Iterator[tuple[list[int], np.ndarray]]]
    facts: Mapping[str, Any]


def _program(cfg: ConfigDict, mc: ModelConfig, signals: tuple[Signal, ...], vectors: tuple[str, ...], ctx: Context) -> Program:
    """`make_program` with the attention backend that the config alone decides, not the rows.

    So in buckets a score does not hang on which other rows are there. In bins (`_packed`, the default) its last bits do: contents
    and shapes of the bins are a function of the set of rows, though of neither their order nor the batch size.
    """
    attention, remark = choose(cfg.attention, mc, cfg.tokens.max_length, cfg.compute_dtype, packed=False)
    if remark:
        ctx.log(f"  {remark}")
    return make_program(mc, signals, cfg.compute_dtype, vectors, attention)


def _bucketed(
    mc: ModelConfig,
    mesh: Mesh,
    rows: Sequence[Row],
    signals: tuple[Signal, ...],
    vectors: tuple[str, ...],
    context: Sequence[int],
    tile_tokens: int,
    compute_dtype: str,
    program: Program,
) -> _Work:
    views = required_views(signals, vectors)
    tiles = plan_tiles(rows, len(context), shards=_shards(mesh), tile_tokens=tile_tokens)

    def score(params: Any, chosen: Sequence[Tile], in_flight: int) -> Iterator[tuple[list[int], np.ndarray]]:
        return score_tiles(program, params, mesh, rows, chosen, views, context, in_flight=in_flight)

    lengths = {"conditional": [len(r.input_ids) for r in rows], "unconditional": [len(context) + r.completion_tokens for r in rows]}
    padded = sum(tile.slots * (tile.bucket.length if view == "conditional" else tile.bucket.scored) for tile in tiles for view in views)
    return _Work(tiles, score, _fill_facts(sum(sum(lengths[view]) for view in views), padded, {tile.bucket for tile in tiles}))


def _packed(
    mc: ModelConfig,
    mesh: Mesh,
    rows: Sequence[Row],
    signals: tuple[Signal, ...],
    vectors: tuple[str, ...],
    context: Sequence[int],
    tile_tokens: int,
    compute_dtype: str,
) -> _Work:
    views = required_views(signals, vectors)
    reading = packing.find_reading(rows, context if "unconditional" in views else None, whole=bool(vectors))
    tiles = packing.plan_packed(rows, reading, shards=_shards(mesh), tile_tokens=tile_tokens)
    program = packed.make_packed_program(mc, signals, compute_dtype, vectors)

    def score(params: Any, chosen: Sequence[packing.PackedTile], in_flight: int) -> Iterator[tuple[list[int], np.ndarray]]:
        return packed.score_bins(program, params, mesh, rows, reading, chosen, vectors, in_flight=in_flight)

    read = sum(packing.bin_tokens(rows, reading, groups) for tile in tiles for groups in tile.bins if groups)
    padded = sum(len(tile.bins) * tile.shape.tokens for tile in tiles)
    return _Work(tiles, score, {"shared_prefix": len(reading.root), **_fill_facts(read, padded, {tile.shape for tile in tiles})})


def _shards(mesh: Mesh) -> int:
    return int(np.prod([mesh.shape[axis] for axis in BATCH]))


def _fill_facts(tokens: int, padded: int, shapes: set[Any]) -> dict[str, Any]:
    """How many tokens went through the model, how much of the room in the tiles they took, and how many programs that took."""
    return {"tokens": tokens, "token_fill": round(tokens / padded, 4), "programs": len(shapes)}


def _chunk_table(
    rows: Sequence[Row], names: Sequence[str], vectors: Sequence[str], parts: Sequence[tuple[list[int], np.ndarray]]
) -> pa.Table:
    order = [i for found, _ in parts for i in found]
    values = np.concatenate([scores for _, scores in parts]).astype(np.float32)
    columns: dict[str, pa.Array] = {"id": pa.array([rows[i].id for i in order], pa.string())}
    columns |= {name: pa.array(values[:, n]) for n, name in enumerate(names)}
    if vectors:
        for name, part in zip(vectors, np.split(values[:, len(names) :], len(vectors), axis=1)):
            columns[name] = vector_array(list(part))
    return pa.table(columns)


def _merge(columns: dict[str, dict[str, Any]], chunk: pa.Table) -> None:
    ids = chunk["id"].to_pylist()
    for name, column in columns.items():
        values = chunk[name].combine_chunks()
        if pa.types.is_fixed_size_list(values.type):
            matrix = np.asarray(values.flatten()).reshape(len(ids), values.type.list_size)
            column.update(zip(ids, matrix))
        else:
            column.update(zip(ids, values.to_pylist()))
