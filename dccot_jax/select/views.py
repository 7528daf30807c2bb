"""What the student reads when a row is scored: views, length buckets and fixed-shape tiles.

A row's bucket depends on the row alone, every bucket has one tile shape, and tiles are cut from the rows sorted by
(bucket, id). So which program scores a row, and in which slot beside which rows, does not depend on the batch size, the
chunk size or the order of the input: scores are bitwise the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# Tokens of one tile per device. On CPU about 2,048 saturate the matrix units of a small student; an accelerator wants more.
TILE_TOKENS = {"cpu": 2048}
TILE_TOKENS_ACCELERATOR = 16384


@dataclasses.dataclass(frozen=True)
class Row:
    """One tokenised trace: the completion is `input_ids[prompt_tokens:]`, end-of-turn token included."""

    id: str
    input_ids: np.ndarray
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.input_ids) - self.prompt_tokens


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Program shape: `length` L, tokens of the conditional view; `scored` C, tokens of the unconditional view and head positions."""

    length: int
    scored: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """`rows` are indices into the row list; the tile is filled up to `slots` with empty rows."""

    bucket: Bucket
    rows: tuple[int, ...]
    slots: int


class HasRows(Protocol):
    """Any kind of tile: a list of rows that are scored together."""

    @property
    def rows(self) -> tuple[int, ...]: ...


def bucket_length(tokens: int) -> int:
    """The smallest of 32, 64, 96, 128, 192, 256, 384, 512, 768, ... (2^k and 3 x 2^k) that holds `tokens`.

    On 4,000 SVAMP traces two steps per doubling waste 5 % more arithmetic than four, and need 9 of 22 programs less.
    """
    power = 32
    while tokens > power:
        if power > 32 and tokens <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def bucket_of(row: Row, context: int) -> Bucket:
    """Bucket of a row when the unconditional view has `context` tokens before the completion."""
    return Bucket(bucket_length(len(row.input_ids)), bucket_length(context + row.completion_tokens))


def tile_slots(bucket: Bucket, tile_tokens: int) -> int:
    """Rows of one tile on one device."""
    return max(1, tile_tokens // bucket.length)


def plan_tiles(rows: Sequence[Row], context: int, *, shards: int, tile_tokens: int) -> list[Tile]:
    """Cut rows into tiles of `shards` x `tile_slots` rows, over the order (bucket, id).

    Every row is in exactly one tile. The list is a function of the set of rows, `context`, `shards` and `tile_tokens`.
    """
    buckets = [bucket_of(row, context) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (buckets[i], rows[i].id))
    tiles: list[Tile] = []
    start = 0
    while start < len(order):
        bucket = buckets[order[start]]
        slots = shards * tile_slots(bucket, tile_tokens)
        stop = start
        while stop < len(order) and stop - start < slots and buckets[order[stop]] == bucket:
            stop += 1
        tiles.append(Tile(bucket, tuple(order[start:stop]), slots))
        start = stop
    return tiles


def chunk_tiles(tiles: Sequence[HasRows], chunk_rows: int) -> list[range]:
    """Group consecutive tiles into chunks of at least `chunk_rows` rows (the last may hold fewer). Tiles are never split."""
    chunks: list[range] = []
    start, held = 0, 0
    for index, tile in enumerate(tiles):
        held += len(tile.rows)
        if held >= chunk_rows or index + 1 == len(tiles):
            chunks.append(range(start, index + 1))
            start, held = index + 1, 0
    return chunks


def completion_context(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """Tokens before the completion in the unconditional view: the template's assistant header, after BOS where rows have one.

    The header is what `add_generation_prompt` adds, e.g. ``<|im_start|>assistant\\n``. If the rendered rows start with the
    tokenizer's BOS token and the header does not, BOS precedes it. If both are empty the end-of-text token stands in, so
    that the first completion token is scored in both views.
    Raises ValueError if the tokenizer has none of the three.
    """
    message = [{"role": "user", "content": "1"}]
    plain = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=False)
    opened = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    header = tokenizer.encode(opened[len(plain) :], add_special_tokens=False) if opened.startswith(plain) else []
    bos = tokenizer.bos_token_id
    if bos is not None and rows and rows[0].input_ids[0] == bos and header[:1] != [bos]:
        header = [bos, *header]
    if not header and tokenizer.eos_token_id is not None:
        header = [tokenizer.eos_token_id]
    if not header:
        raise ValueError("the tokenizer has no assistant header, BOS or EOS token: the unconditional view would start from nothing")
    return [int(token) for token in header]


def view_arrays(view: str, rows: Sequence[Row], tile: Tile, context: Sequence[int]) -> dict[str, np.ndarray]:
    """Arrays of one view of a tile, B = tile.slots rows; empty slots are all padding with mask 0.

    Returns:
      tokens, segment_ids, positions [B, L] int32 (L = bucket.length, or bucket.scored for the unconditional view);
      index [B, C] int32: the positions whose hidden state predicts a completion token, moved to the left;
      labels [B, C] int32: those completion tokens; mask [B, C] float32: 1 where there is one.
    """
    scored = tile.bucket.scored
    length = tile.bucket.length if view == "conditional" else scored
    shapes = {"tokens": length, "segment_ids": length, "positions": length, "index": scored, "labels": scored}
    arrays: dict[str, np.ndarray] = {name: np.zeros((tile.slots, width), np.int32) for name, width in shapes.items()}
    arrays["mask"] = np.zeros((tile.slots, scored), np.float32)
    for slot, number in enumerate(tile.rows):
        row = rows[number]
        completion = row.input_ids[row.prompt_tokens :]
        ids = row.input_ids if view == "conditional" else np.concatenate([np.asarray(context, np.int32), completion])
        n, c = len(ids), len(completion)
        arrays["tokens"][slot, :n] = ids
        arrays["segment_ids"][slot, :n] = 1
        arrays["positions"][slot, :n] = np.arange(n)
        arrays["index"][slot, :c] = np.arange(n - c - 1, n - 1)
        arrays["labels"][slot, :c] = completion
        arrays["mask"][slot, :c] = 1.0
    return arrays
