"""Rows as streams of fixed shape for the gradient signals: no padding where work is per token.

A row's bucket depends on its length alone, and every bucket has one program. The rows of a bucket are spread evenly over as
many streams as their tokens need, so no stream is half empty. A prefix that rows share stands in each of them: what comes
back to it is each row's own. Streams and shapes are a function of the set of rows.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dccot_jax.select.dispatch import Program, dispatch
from dccot_jax.select.views import Row, bucket_length

_STEP = 32  # sizes are multiples of this


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is compiled for, per stream: `tokens` N, `scored` M head positions, `slots` S rows of up to `length` T tokens,
    `completion` C of them predicted."""

    tokens: int
    scored: int
    slots: int
    length: int
    completion: int


@dataclasses.dataclass(frozen=True)
class Streams:
    """A tile: one stream per shard, each the indices of its rows, some perhaps empty."""

    streams: tuple[tuple[int, ...], ...]
    shape: Shape

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(i for stream in self.streams for i in stream)


def plan_streams(rows: Sequence[Row], *, shards: int, tile_tokens: int) -> list[Streams]:
    """Rows into streams of about `tile_tokens` tokens, streams into tiles of `shards`. Every row is in exactly one stream."""
    buckets: dict[int, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), rows[i].id)):
        buckets.setdefault(bucket_length(len(rows[i].input_ids)), []).append(i)
    tiles = []
    for bucket in sorted(buckets):
        streams = _spread(rows, buckets[bucket], shards, tile_tokens)
        counts = [rows[i].completion_tokens for i in buckets[bucket]]
        shape = Shape(
            _up(max(sum(len(rows[i].input_ids) for i in stream) for stream in streams)),
            _up(max(sum(rows[i].completion_tokens for i in stream) for stream in streams)),
            max(len(stream) for stream in streams),
            _up(len(rows[buckets[bucket][0]].input_ids)),
            _up(max(counts)),
        )
        tiles += [Streams(tuple(streams[at : at + shards]), shape) for at in range(0, len(streams), shards)]
    return tiles


def _spread(rows: Sequence[Row], chosen: Sequence[int], shards: int, tile_tokens: int) -> list[tuple[int, ...]]:
    """Each row, longest first, into the stream that holds the fewest tokens so far."""
    total = sum(len(rows[i].input_ids) for i in chosen)
    count = -(-max(1, round(total / tile_tokens)) // shards) * shards
    streams: list[list[int]] = [[] for _ in range(count)]
    room = [(0, at) for at in range(count)]
    for i in chosen:
        held, at = heapq.heappop(room)
        streams[at].append(i)
        heapq.heappush(room, (held + len(rows[i].input_ids), at))
    return [tuple(stream) for stream in streams]


def _up(size: int) -> int:
    return -(-size // _STEP) * _STEP


def stream_arrays(rows: Sequence[Row], tile: Streams) -> dict[str, np.ndarray]:
    """Arrays of a tile, B streams; see `Shape` for the other sizes.

    Returns:
      tokens, positions [B, N] int32; rows [B, S, T] int32: a row's tokens in the stream, -1 past its end; back [B, N] int32:
      s·T + t of every token; index, labels [B, M] int32: tokens of the stream and what they predict; weights [B, M] float32:
      1/n of a row with n predicted tokens, 0 in padding; places [B, S, C] int32: a row's predicted tokens among the M, -1 past
      their end; owners [B, M] int32: s·C + c of each.
    """
    shape, count = tile.shape, len(tile.streams)
    wide, few = (count, shape.tokens), (count, shape.scored)
    found: dict[str, np.ndarray] = {name: np.zeros(wide, np.int32) for name in ("tokens", "positions", "back")}
    found |= {name: np.zeros(few, np.int32) for name in ("index", "labels", "owners")} | {"weights": np.zeros(few, np.float32)}
    found["rows"] = np.full((count, shape.slots, shape.length), -1, np.int32)
    found["places"] = np.full((count, shape.slots, shape.completion), -1, np.int32)
    for b, stream in enumerate(tile.streams):
        start = first = 0
        for slot, i in enumerate(stream):
            ids, n = rows[i].input_ids, rows[i].completion_tokens
            place, own, scored = np.arange(len(ids)), slice(start, start + len(ids)), slice(first, first + n)
            found["tokens"][b, own], found["positions"][b, own] = ids, place
            found["rows"][b, slot, : len(ids)], found["back"][b, own] = start + place, slot * shape.length + place
            found["index"][b, scored] = start + rows[i].prompt_tokens - 1 + np.arange(n)
            found["labels"][b, scored], found["weights"][b, scored] = ids[rows[i].prompt_tokens :], 1.0 / n
            found["places"][b, slot, :n] = first + np.arange(n)
            found["owners"][b, scored] = slot * shape.completion + np.arange(n)
            start, first = start + len(ids), first + n
    return found


def measure_streams(
    program: Program, state: Any, mesh: Mesh, rows: Sequence[Row], tiles: Sequence[Streams], *, in_flight: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield, tile by tile, (row indices, what the program makes of each, [n, K]) of the rows this process can address."""

    def arrays(tile: Streams) -> Mapping[str, np.ndarray]:
        return stream_arrays(rows, tile)

    for tile, parts in dispatch(program, state, mesh, tiles, arrays, in_flight=in_flight):
        found: list[int] = []
        values = [np.zeros((0, parts[0][1].shape[-1]), np.float32)]
        for first, measured in parts:
            for stream, own in zip(tile.streams[first : first + len(measured)], measured):
                found += stream
                values.append(own[: len(stream)])
        yield found, np.concatenate(values)
