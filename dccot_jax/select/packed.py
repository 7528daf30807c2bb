"""The scoring program over bins (`select/packing.py`): every view of every row in one stream, each prefix once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import activation_spec, reshard
from dccot_jax.select.dispatch import Program, dispatch
from dccot_jax.select.packing import PackedTile, Reading, bin_rows, packed_arrays
from dccot_jax.select.signals import Signal, required_stats
from dccot_jax.select.views import Row


@functools.lru_cache(maxsize=8)
def make_packed_program(mc: ModelConfig, signals: tuple[Signal, ...], compute_dtype: str, vectors: tuple[str, ...] = ()) -> Program:
    """The jitted function (params, arrays of `packed_arrays`) -> [B, S, signals + V D] float32; call it under a mesh.

    The scores, then the V `vectors` of hidden size D one after the other. One compilation per `packing.Shape`, kept for later
    scorings in this process; one forward for all views and signals.
    """
    needs = required_stats(signals)

    def score_row(stats: Any, mask: jax.Array) -> jax.Array:
        return jnp.stack([signal.fn(stats, dict.fromkeys(needs, mask)) for signal in signals])

    def score_bin(stats: Any, places: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.vmap(score_row)(jax.tree.map(lambda values: values[places], stats), mask)

    @jax.jit
    def score_tile(params: Any, x: Mapping[str, Any]) -> jax.Array:
        hidden = decoder.forward_blocks(params, mc, x["tokens"], x["positions"], x["blocks"], x["back"], compute_dtype=compute_dtype)
        bins, found = len(hidden), []
        if signals:
            stats = {}
            for view, want in needs.items():
                scored = head.gather_positions(hidden, x["index"][view])
                stats[view] = head.token_stats(params, mc, scored, x["labels"], want=want)
            # vmap wants every operand's bins on the same axes; a reshape may have lost them where a device holds one bin.
            stats = jax.tree.map(lambda values: reshard(values, activation_spec(bins, None)), stats)
            places, mask = (reshard(x[name], activation_spec(bins, None, None)) for name in ("rows", "mask"))
            found.append(jax.vmap(score_bin)(stats, places, mask))
        if vectors:
            wide = reshard(hidden, activation_spec(bins, None, None)).astype(jnp.float32)
            found += [jax.vmap(_mean)(reshard(x["pools"][name], activation_spec(bins, None, None)), wide) for name in vectors]
        return jnp.concatenate([reshard(values, activation_spec(bins, None, None)) for values in found], axis=2)

    return score_tile


def _mean(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    return jnp.dot(weights, hidden, precision=jax.lax.Precision.HIGHEST)


def score_bins(
    program: Program,
    params: Any,
    mesh: Mesh,
    rows: Sequence[Row],
    reading: Reading,
    tiles: Sequence[PackedTile],
    vectors: Sequence[str] = (),
    *,
    in_flight: int,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield, tile by tile, (row indices, values [n, ...] of `make_packed_program`) of the rows this process can address."""

    def arrays(tile: PackedTile) -> dict[str, Any]:
        return packed_arrays(rows, reading, tile, vectors)

    for tile, parts in dispatch(program, params, mesh, tiles, arrays, in_flight=in_flight):
        found: list[int] = []
        values = [np.zeros((0, parts[0][1].shape[-1]), np.float32)]
        for first, scores in parts:
            for groups, own in zip(tile.bins[first : first + len(scores)], scores):
                chosen = bin_rows(groups)
                found += chosen
                values.append(own[: len(chosen)])
        yield found, np.concatenate(values)
