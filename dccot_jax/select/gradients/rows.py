"""One backward pass over a tile, each row by itself: what the probes of tapped weights report, and the two ends of the network.

The loss of a row is the mean of -log p(token) over its completion tokens, prompt and padding excluded; the loss of a tile
is the sum over rows, so a row's gradient does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import batch_axes, explicit_mesh
from dccot_jax.model.taps import Measure, Nudged, Tapped

Arrays = Mapping[str, jax.Array]  # of `views.view_arrays`, conditional view


class Backward(NamedTuple):
    """What the backward pass of a tile gives, B rows, T tokens, C head positions.

    Attributes:
      reports: {name: [L, B, K] or [B, K]}: measures of the tapped weights. rows_error: [B, T, D] float32: gradient with
        respect to the embedding's looked-up rows. hidden: [B, C, D]: states that predict. weights: [B, C]: of the tokens.
    """

    reports: dict[str, jax.Array]
    rows_error: jax.Array
    hidden: jax.Array
    weights: jax.Array


def token_weights(mask: jax.Array) -> jax.Array:
    """1/n on the n completion tokens of a row, from mask [B, C]; all 0 in an empty row."""
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)


def row_losses(params: Any, mc: ModelConfig, x: Arrays, *, compute_dtype: str, remat: str) -> jax.Array:
    """Sum over rows of each row's mean loss, float32."""
    hidden = decoder.forward(params, mc, x["tokens"], x["segment_ids"], x["positions"], compute_dtype=jnp.dtype(compute_dtype), remat=remat)
    return head.weighted_nll(params, mc, head.gather_positions(hidden, x["index"]), x["labels"], token_weights(x["mask"]))[0]


def backward(
    params: Any,
    mc: ModelConfig,
    x: Arrays,
    measures: Mapping[str, tuple[Measure, Any]],
    *,
    compute_dtype: str,
    remat: str,
) -> Backward:
    """Forward and backward over a tile with the weights in `measures` tapped.

    Args:
      x: `view_arrays` of the conditional view. measures: {weight name: (measure, aux)}; for weights of the layers every
        leaf of aux has a leading axis L. Embedding and head are not tapped: their gradients come from the other fields.
    """
    batch = x["tokens"].shape[0]
    dtype = jnp.dtype(compute_dtype)

    rows = (batch_axes(batch),) if explicit_mesh() is not None else None

    def zeros(*shape: int, layers: tuple[int, ...] = ()) -> jax.Array:
        spec = None if rows is None else P(*(None,) * len(layers), *rows, *(None,) * (len(shape) - 1))
        return jnp.zeros((*layers, *shape), jnp.float32, out_sharding=spec)

    probes = {
        name: zeros(batch, measure.width, layers=(mc.num_layers,) if name in params["layers"] else ())
        for name, (measure, _) in measures.items()
    }

    def states(probes: dict[str, jax.Array], nudge: jax.Array) -> jax.Array:
        def tap(name: str, weight: jax.Array) -> Any:
            return Tapped(weight, probes[name], measures[name][1], measures[name][0]) if name in measures else weight

        tapped = {name: tap(name, weight) for name, weight in params.items() if name != "layers"}
        tapped["layers"] = {name: tap(name, weight) for name, weight in params["layers"].items()}
        tapped["embed"] = Nudged(params["embed"], nudge)
        hidden = decoder.forward(tapped, mc, x["tokens"], x["segment_ids"], x["positions"], compute_dtype=dtype, remat=remat)
        return head.gather_positions(hidden, x["index"])

    nudge = zeros(*x["tokens"].shape, mc.hidden_size)
    hidden, pull = jax.vjp(states, probes, nudge)
    weights = token_weights(x["mask"])
    error = jax.grad(lambda h: head.weighted_nll(params, mc, h, x["labels"], weights)[0])(hidden)
    reports, rows_error = pull(error)
    return Backward(reports, rows_error, hidden, weights)
