"""Scoring without padding and without reading a prefix twice: rows as trees of segments in bins of fixed shape.

A bin is one stream of N tokens. It holds, once, what all prompts begin with (`root`) and the unconditional view's context;
for each question in it, once, the rest of its prompt; and each row's completion once per view. Positions continue along the
path that a token stands on, and attention follows it: queries go in blocks of `BLOCK`, each with the list of the tokens it may
see (`model/attention.py: attend_blocks`). Everything else in the decoder is per token and sees no padding but a bin's end.
The last token of a completion predicts nothing and is read only where hidden states are wanted.

Bins and shapes are a function of the set of rows, so scores do not depend on the order of the input or on how many bins are in
flight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from hashlib import blake2b
from operator import itemgetter
from typing import Any

import jax
import numpy as np

from dccot_jax.select.signals import VIEWS
from dccot_jax.select.views import Row, bucket_length

BLOCK = 32  # queries per block: larger ones waste slots at the end of segments, smaller ones gather keys more often
CLASSES = 4  # lengths of key lists in a program
SHORT = 512  # paths up to this length share one program; beyond, one for each power of two
MIN_ROOT = 8
OPEN_BINS = 16
FEW_BINS = 32  # per shard
SLACK = 1.1  # how far a bin's blocks and scored positions may exceed their share, which the shape has to hold for every bin

Span = tuple[int, int]  # first token in the stream, number of tokens


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of one prompt that stand in one bin; indices into the row list."""

    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is compiled for, per bin: `tokens` N, `scored` M positions per view, `slots` S rows of up to `completion`
    C tokens, and per class of keys (number of keys, number of query blocks)."""

    tokens: int
    scored: int
    slots: int
    completion: int
    blocks: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class PackedTile:
    """One bin per shard, some perhaps empty; all tiles of a band have one shape."""

    bins: tuple[tuple[Group, ...], ...]
    shape: Shape

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(i for groups in self.bins for i in bin_rows(groups))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read of every row. `root`: tokens that every prompt begins with. `context`: what precedes the completion in the
    unconditional view, None where that view is not asked for. `whole`: also the last token of a completion, for its hidden state."""

    root: np.ndarray
    context: np.ndarray | None
    whole: bool = False

    @property
    def shared(self) -> int:
        """Tokens that every bin begins with."""
        return len(self.root) + (0 if self.context is None else len(self.context))

    @property
    def views(self) -> tuple[str, ...]:
        return VIEWS[:1] if self.context is None else VIEWS

    def completion(self, row: Row) -> int:
        """Tokens of the completion that are read, in each view."""
        return row.completion_tokens - (not self.whole)


def bin_rows(groups: Sequence[Group]) -> list[int]:
    """The rows of a bin in the order of its slots."""
    return [i for group in groups for i in group.rows]


def bin_tokens(rows: Sequence[Row], reading: Reading, groups: Sequence[Group]) -> int:
    """Tokens that a bin with these groups holds."""
    return reading.shared + sum(_cost(rows, reading, group.rows)[0] for group in groups)


def find_reading(rows: Sequence[Row], context: Sequence[int] | None, *, whole: bool) -> Reading:
    """`root` is the longest common beginning of all prompts, if it is worth sharing; see `Reading` for the others."""
    first = rows[0].input_ids[: rows[0].prompt_tokens]
    shared = len(first)
    for row in rows:
        shared = min(shared, row.prompt_tokens)
        differs = np.flatnonzero(row.input_ids[:shared] != first[:shared])
        shared = int(differs[0]) if len(differs) else shared
    root = first[: shared if shared >= MIN_ROOT else 0]
    return Reading(root, None if context is None else np.asarray(context, np.int32), whole)


def plan_packed(rows: Sequence[Row], reading: Reading, *, shards: int, tile_tokens: int) -> list[PackedTile]:
    """Rows into bins of about `tile_tokens` tokens (more where a row is longer), bins into tiles of `shards` bins. No row is split."""
    prompts: dict[bytes, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: rows[i].id):
        prompts.setdefault(blake2b(rows[i].input_ids[: rows[i].prompt_tokens].tobytes(), digest_size=16).digest(), []).append(i)
    bands: dict[int, list[list[int]]] = {}
    for found in prompts.values():
        longest = max(len(rows[i].input_ids) for i in found)
        bands.setdefault(max(SHORT, 1 << (longest - 1).bit_length()), []).append(found)
    tiles = []
    for band in sorted(bands):
        need = max(reading.shared + _cost(rows, reading, [i])[0] for found in bands[band] for i in found)
        size = tile_tokens if need <= tile_tokens else bucket_length(need)
        size, bins = _even(rows, reading, bands[band], need, size, shards)
        shape = _shape(rows, reading, bins, size)
        bins += [()] * (-len(bins) % shards)
        tiles += [PackedTile(tuple(bins[at : at + shards]), shape) for at in range(0, len(bins), shards)]
    return tiles


def packed_arrays(rows: Sequence[Row], reading: Reading, tile: PackedTile, vectors: Sequence[str] = ()) -> dict[str, Any]:
    """Arrays of a tile, B bins; see `Shape` for the other sizes.

    Returns:
      tokens, positions [B, N] int32; back [B, N] int32: where a token's query stands among all blocks of all classes;
      blocks: for each class {"queries": [B, R, BLOCK], "keys": [B, R, keys]} int32 tokens of the stream, keys -1 where there is none;
      index: for each view [B, M] int32, the tokens that predict `labels` [B, M] int32;
      rows [B, S, C] int32: a row's places among the M, and mask [B, S, C] float32: 1 where there is one;
      pools: for each of `vectors` [B, S, N] float32, the weights of the hidden states that a row's mean is made of.
    """
    shape, count = tile.shape, len(tile.bins)
    arrays: dict[str, Any] = {name: np.zeros((count, shape.tokens), np.int32) for name in ("tokens", "positions", "back")}
    arrays["blocks"] = [
        {"queries": np.zeros((count, blocks, BLOCK), np.int32), "keys": np.full((count, blocks, keys), -1, np.int32)}
        for keys, blocks in shape.blocks
    ]
    arrays["index"] = {view: np.zeros((count, shape.scored), np.int32) for view in reading.views}
    arrays["labels"] = np.zeros((count, shape.scored), np.int32)
    arrays["rows"] = np.zeros((count, shape.slots, shape.completion), np.int32)
    arrays["mask"] = np.zeros((count, shape.slots, shape.completion), np.float32)
    arrays["pools"] = {name: np.zeros((count, shape.slots, shape.tokens), np.float32) for name in vectors}
    for b, groups in enumerate(tile.bins):
        if groups:
            _fill_bin(rows, reading, groups, shape, jax.tree.map(itemgetter(b), arrays))
    return arrays


# --- filling bins ---------------------------------------------------------------------------------------------------------

Cost = tuple[int, int, int]  # tokens of the stream, scored positions per view, blocks of queries


def _cost(rows: Sequence[Row], reading: Reading, chosen: Sequence[int]) -> Cost:
    """What rows of one prompt take in a bin, beside the reading."""
    stem = rows[chosen[0]].prompt_tokens - len(reading.root)
    own = [reading.completion(rows[i]) for i in chosen]
    views, scored = len(reading.views), sum(rows[i].completion_tokens for i in chosen)
    blocks = _blocks_of(stem + own[0]) + sum(_blocks_of(n) for n in own[1:]) + (views - 1) * sum(_blocks_of(n) for n in own)
    return stem + views * sum(own), scored, blocks


def _blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _fits(cost: Cost, room: Cost) -> bool:
    return cost[0] <= room[0] and cost[1] <= room[1] and cost[2] <= room[2]


def _room(rows: Sequence[Row], reading: Reading, prompts: Sequence[list[int]], tokens: int) -> Cost:
    """What a bin of `tokens` holds: of the other two as much as falls to its tokens on average, and at least any single row."""
    costs = [_cost(rows, reading, found) for found in prompts]
    total, scored, blocks = (sum(cost[n] for cost in costs) for n in range(3))
    single = [_cost(rows, reading, [i]) for found in prompts for i in found]

    def share(n: int, of_all: int) -> int:
        return max(max(cost[n] for cost in single), int(SLACK * tokens * of_all / max(total, 1)))

    return tokens, share(1, scored), share(2, blocks)


def _even(
    rows: Sequence[Row], reading: Reading, prompts: Sequence[list[int]], need: int, size: int, shards: int
) -> tuple[int, list[tuple[Group, ...]]]:
    """Bins of at most `size` tokens, and how many they hold: where there are few, they are made smaller, so that none is half empty."""
    bins = _fill(rows, reading, prompts, _room(rows, reading, prompts, size - reading.shared))
    if len(bins) > FEW_BINS * shards:
        return size, bins
    count = -(-len(bins) // shards) * shards
    total = sum(_cost(rows, reading, found)[0] for found in prompts)
    for slack in range(2, 30, 2):  # per cent
        smaller = -(-max(need, reading.shared + total * (100 + slack) // (100 * count)) // 64) * 64
        if smaller >= size:
            break
        found = _fill(rows, reading, prompts, _room(rows, reading, prompts, smaller - reading.shared))
        if len(found) <= count:
            return smaller, found
    return size, bins


def _fill(rows: Sequence[Row], reading: Reading, prompts: Sequence[list[int]], room: Cost) -> list[tuple[Group, ...]]:
    """Best fit over a few open bins; the rows of a prompt are split over bins only where they would leave much room unused."""
    done: list[tuple[Group, ...]] = []
    bins: list[tuple[Cost, list[Group]]] = []  # (room left, groups)
    for found in prompts:
        left = list(found)
        while left:
            cost = _cost(rows, reading, left)
            fitting = [(free, at) for at, (free, _) in enumerate(bins) if _fits(cost, free)]
            stem = rows[left[0]].prompt_tokens - len(reading.root)
            at = max(range(len(bins)), key=lambda at: bins[at][0][0], default=-1)  # the roomiest
            part: list[int] = []
            if fitting:
                at, part = min(fitting)[1], left
            elif 2 * cost[0] > room[0] and at >= 0 and bins[at][0][0] >= stem + room[0] // 4:
                part = _part(rows, reading, left, bins[at][0])
            if not part:
                bins.append((room, []))
                at, part = len(bins) - 1, _part(rows, reading, left, room)
            free, groups = bins[at]
            taken = _cost(rows, reading, part)
            bins[at] = ((free[0] - taken[0], free[1] - taken[1], free[2] - taken[2]), [*groups, Group(tuple(part))])
            left = [i for i in left if i not in part]
        while len(bins) > OPEN_BINS:
            done.append(tuple(bins.pop(min(range(len(bins)), key=lambda at: bins[at][0]))[1]))
    return [*done, *(tuple(groups) for _, groups in bins)]


def _part(rows: Sequence[Row], reading: Reading, left: Sequence[int], room: Cost) -> list[int]:
    """Rows of a prompt that fit into `room`, longest first, in the order in which they came."""
    chosen: list[int] = []
    for i in sorted(left, key=lambda i: -rows[i].completion_tokens):
        more = [j for j in left if j == i or j in chosen]
        if _fits(_cost(rows, reading, more), room):
            chosen = more
    return chosen


# --- laying a bin out -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Consecutive tokens of the stream, and the spans of the stream that precede them on their path."""

    start: int
    ids: np.ndarray
    before: tuple[Span, ...]

    @property
    def position(self) -> int:
        return sum(count for _, count in self.before)


@dataclasses.dataclass(frozen=True)
class _Layout:
    segments: list[_Segment]
    index: dict[str, list[np.ndarray]]  # per view and row: tokens that predict its completion
    pools: dict[str, list[tuple[Span, ...]]]  # per vector and row: the tokens whose hidden states it averages


def _layout(rows: Sequence[Row], reading: Reading, groups: Sequence[Group]) -> _Layout:
    root = len(reading.root)
    segments: list[_Segment] = []
    index: dict[str, list[np.ndarray]] = {view: [] for view in reading.views}
    prompts, completions = [], []
    used = 0

    def add(ids: np.ndarray, *before: Span) -> int:
        nonlocal used
        segments.append(_Segment(used, ids, tuple(span for span in before if span[1])))
        used += len(ids)
        return used - len(ids)

    add(reading.root)
    context = (0, 0) if reading.context is None else (add(reading.context), len(reading.context))
    for group in groups:
        stem: Span | None = None
        for i in group.rows:
            row = rows[i]
            ids, scored = row.input_ids[: row.prompt_tokens + reading.completion(row)], np.arange(row.completion_tokens)
            if stem is None:  # the first row's completion follows its prompt directly
                start = add(ids[root:], (0, root))
                stem = (start, row.prompt_tokens - root)
                start += stem[1]
            else:
                start = add(ids[row.prompt_tokens :], (0, root), stem)
            last = stem[0] + stem[1] - 1 if stem[1] else root - 1
            index["conditional"].append(np.where(scored == 0, last, start + scored - 1))
            prompts.append(((0, root), stem))
            completions.append(((start, reading.completion(row)),))
            if reading.context is not None:
                start = add(ids[row.prompt_tokens :], context)
                index["unconditional"].append(np.where(scored == 0, context[0] + context[1] - 1, start + scored - 1))
    return _Layout(segments, index, {"embedding_prompt": prompts, "embedding_rationale": completions})


def _blocks(layout: _Layout) -> list[tuple[int, int, tuple[Span, ...]]]:
    """(first query, number of queries, spans of keys) of every block; longest list of keys first."""
    found = []
    for segment in layout.segments:
        for at in range(0, len(segment.ids), BLOCK):
            count = min(BLOCK, len(segment.ids) - at)
            found.append((segment.start + at, count, (*segment.before, (segment.start, at + count))))
    return sorted(found, key=lambda block: (-sum(count for _, count in block[2]), block[0]))


def _shape(rows: Sequence[Row], reading: Reading, bins: Sequence[tuple[Group, ...]], tokens: int) -> Shape:
    """The shape that holds every bin. A block may stand in a class of more keys than it needs."""
    chosen = [rows[i] for groups in bins for i in bin_rows(groups)]
    before = 0 if reading.context is None else len(reading.context)
    longest = max(max(len(row.input_ids), before + row.completion_tokens) for row in chosen)
    lengths = np.array(sorted({bucket_length(n) if longest > 64 * BLOCK else -(-n // BLOCK) * BLOCK for n in range(1, longest + 1)}))
    most = np.zeros(len(lengths), int)  # blocks of any bin that need as many keys as this length, or more
    scored = slots = completion = 1
    for groups in bins:
        needs = np.searchsorted(lengths, _key_counts(rows, reading, groups))
        most = np.maximum(most, np.bincount(needs, minlength=len(lengths))[::-1].cumsum()[::-1])
        counts = [rows[i].completion_tokens for i in bin_rows(groups)]
        scored, slots, completion = max(scored, sum(counts)), max(slots, len(counts)), max(completion, *counts)
    blocks = _classes([int(n) for n in lengths], [int(n) for n in most])
    return Shape(tokens, -(-scored // 64) * 64, -(-slots // 4) * 4, bucket_length(completion), blocks)


def _key_counts(rows: Sequence[Row], reading: Reading, groups: Sequence[Group]) -> list[int]:
    """How many keys each block of a bin has; the blocks are those of `_blocks`, in another order."""
    root = len(reading.root)
    segments = [(0, root)]  # (tokens before it on its path, tokens)
    if reading.context is not None:
        segments.append((0, len(reading.context)))
        segments += [(len(reading.context), reading.completion(rows[i])) for i in bin_rows(groups)]
    for group in groups:
        first, *others = (rows[i] for i in group.rows)
        segments.append((root, first.prompt_tokens - root + reading.completion(first)))
        segments += [(row.prompt_tokens, reading.completion(row)) for row in others]
    return [before + min(count, at + BLOCK) for before, count in segments for at in range(0, count, BLOCK)]


def _classes(lengths: Sequence[int], most: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """At most CLASSES pairs (keys, blocks), longest first, with the least sum of keys x blocks.

    Args:
      lengths: of key lists, rising. most: blocks that need lists of at least that length.
    """
    most = [*most, 0]
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # lengths covered: (cost, where the classes end)
    found = []
    for _ in range(CLASSES):
        best = {
            stop: min(
                (cost + lengths[stop - 1] * (most[start] - most[stop]), (*ends, stop))
                for start, (cost, ends) in best.items()
                if start < stop
            )
            for stop in range(min(best) + 1, len(lengths) + 1)
        }
        if len(lengths) in best:
            found.append(best[len(lengths)])
        else:
            break
    ends = min(found)[1]
    pairs, above = [], 0
    for stop, start in zip(reversed(ends), [*reversed(ends[:-1]), 0]):
        count = -(-(most[start] - above) // 4) * 4
        if count > 0:
            pairs.append((lengths[stop - 1], count))
            above += count
    return tuple(pairs)


def _fill_bin(rows: Sequence[Row], reading: Reading, groups: Sequence[Group], shape: Shape, own: dict[str, Any]) -> None:
    """Write a bin into its slices `own` of the arrays."""
    layout = _layout(rows, reading, groups)
    for segment in layout.segments:
        stop = segment.start + len(segment.ids)
        own["tokens"][segment.start : stop] = segment.ids
        own["positions"][segment.start : stop] = segment.position + np.arange(len(segment.ids))
    blocks = iter(_blocks(layout))
    first = 0
    for (_, count), target in zip(shape.blocks, own["blocks"]):
        for slot, (start, queries, spans) in zip(range(count), blocks):
            target["queries"][slot, :queries] = np.arange(start, start + queries)
            keys = np.concatenate([np.arange(at, at + n) for at, n in spans])
            target["keys"][slot, : len(keys)] = keys
            own["back"][start : start + queries] = first + slot * BLOCK + np.arange(queries)
        first += count * BLOCK
    at = 0
    for slot, i in enumerate(bin_rows(groups)):
        count = rows[i].completion_tokens
        for view, index in layout.index.items():
            own["index"][view][at : at + count] = index[slot]
        own["labels"][at : at + count] = rows[i].input_ids[rows[i].prompt_tokens :]
        own["rows"][slot, :count] = np.arange(at, at + count)
        own["mask"][slot, :count] = 1.0
        for name, weights in own["pools"].items():
            spans = layout.pools[name][slot]
            for start, n in spans:
                weights[slot, start : start + n] = 1.0 / sum(n for _, n in spans)
        at += count
