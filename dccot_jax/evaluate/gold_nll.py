"""Negative log-likelihood of gold rationales: what still tells students apart where their accuracy is near 0.

The gold rationale and answer line are rendered exactly like a training row; the sum runs over the completion and its
end-of-turn token. Results are (nats, tokens) per item, so that means weight tokens equally.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dccot_jax.data.template import TemplateError, render_many
from dccot_jax.evaluate.protocol import Question
from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import BATCH, batch_spec
from dccot_jax.records import Dropped
from dccot_jax.tasks.registry import build_target

_TILE_TOKENS = 4096  # tokens of one dispatch, before rounding rows up to the mesh
_BUCKET = 128  # lengths are rounded up to a multiple of this: few programs to compile


@dataclasses.dataclass(frozen=True)
class GoldRow:
    """A rendered gold trace: `input_ids[:prompt_tokens]` is the prompt. `question` is its position in the caller's list."""

    question: int
    input_ids: tuple[int, ...]
    prompt_tokens: int


def gold_rows(questions: Sequence[Question], tokenizer: Any, *, max_positions: int) -> tuple[list[GoldRow], list[Dropped]]:
    """Gold traces of the items that have a rationale, shortest first; those that do not fit or render are listed with reasons."""
    with_gold = [(index, question) for index, question in enumerate(questions) if question.item.rationale]
    texts = [
        (question.user, build_target(question.panel.task, question.item.rationale or "", question.item.gold or ""))
        for _, question in with_gold
    ]
    rows, dropped = [], []
    for (index, question), rendered in zip(with_gold, render_many(tokenizer, texts) if texts else []):
        name = question.panel.task.name
        if isinstance(rendered, TemplateError):
            if rendered.fatal:
                raise rendered
            dropped.append(Dropped(question.item.id, f"gold_{rendered.reason}", f"{name}: {rendered}"))
        elif len(rendered.input_ids) > max_positions:
            dropped.append(
                Dropped(question.item.id, "gold_too_long", f"{name}: {len(rendered.input_ids)} tokens > {max_positions} positions")
            )
        else:
            rows.append(GoldRow(index, tuple(rendered.input_ids), rendered.prompt_tokens))
    return sorted(rows, key=lambda row: (len(row.input_ids), questions[row.question].item.id)), dropped


def tiles(rows: Sequence[GoldRow], mesh: Mesh) -> list[list[GoldRow]]:
    """Rows of one bucket each, in order; how many share a dispatch depends on their length and the mesh, not on settings."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    found: list[list[GoldRow]] = []
    for row in rows:
        bucket = _bucket(len(row.input_ids))
        if not found or _bucket(len(found[-1][0].input_ids)) != bucket or len(found[-1]) >= _slots(bucket, shards):
            found.append([])
        found[-1].append(row)
    return found


def score(
    params: Any,
    mc: ModelConfig,
    mesh: Mesh,
    batches: Sequence[Sequence[GoldRow]],
    *,
    compute_dtype: str,
    pad_id: int,
    attention: str = "xla",
) -> Iterator[np.ndarray]:
    """Yield, tile by tile, the summed nats of its rows: float32 [len(tile)], the same on every process."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    program = _program(mc, compute_dtype, attention)
    for rows in batches:
        length = max(_bucket(len(row.input_ids)) for row in rows)
        arrays = _arrays(rows, _slots(length, shards), length, pad_id)
        with jax.set_mesh(mesh):
            placed = {name: _put(x, mesh) for name, x in arrays.items()}
            yield np.asarray(program(params, placed))[: len(rows)]


@functools.lru_cache(maxsize=8)
def _program(mc: ModelConfig, compute_dtype: str, attention: str) -> Any:
    """Jitted (params, arrays of `_arrays`) -> nats per row [B], replicated."""

    @jax.jit
    def nats(params: Any, x: dict[str, jax.Array]) -> jax.Array:
        settings: Any = {"compute_dtype": jnp.dtype(compute_dtype), "remat": "none", "attention": attention, "packed": False}
        hidden = decoder.forward(params, mc, x["tokens"], x["segment_ids"], x["positions"], **settings)
        picked = head.gather_positions(hidden, x["index"])
        logp = head.token_stats(params, mc, picked, x["labels"], want=("label_logp",))["label_logp"]
        return jax.reshard(-jnp.sum(jnp.where(x["mask"], logp, 0.0), axis=1), P(None))

    return nats


def _arrays(rows: Sequence[GoldRow], slots: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Host arrays of one tile: tokens, segment_ids, positions [slots, length]; index, labels, mask [slots, M]."""
    scored = _bucket(max(len(row.input_ids) - row.prompt_tokens for row in rows))
    tokens = np.full((slots, length), pad_id, np.int32)
    segments = np.zeros((slots, length), np.int32)
    index, labels = np.zeros((slots, scored), np.int32), np.zeros((slots, scored), np.int32)
    mask = np.zeros((slots, scored), bool)
    for slot, row in enumerate(rows):
        n, m = len(row.input_ids), len(row.input_ids) - row.prompt_tokens
        tokens[slot, :n], segments[slot, :n] = row.input_ids, 1
        index[slot, :m] = np.arange(row.prompt_tokens - 1, n - 1)  # position t predicts token t + 1
        labels[slot, :m] = row.input_ids[row.prompt_tokens :]
        mask[slot, :m] = True
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "index": index, "labels": labels, "mask": mask}


def _put(x: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, batch_spec(len(x), x.ndim, mesh)), lambda part: x[part])


def _bucket(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _slots(length: int, shards: int) -> int:
    return -(-max(1, _TILE_TOKENS // length) // shards) * shards
