"""One backward pass over streams of rows, each row by itself: what the probes of tapped weights report, and the two ends of the network.

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
from dccot_jax.model.attention import KEPT
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import activation_spec, batch_axes, explicit_mesh, reshard
from dccot_jax.model.streams import Rows, to_rows
from dccot_jax.model.taps import Measure, Nudged, Tapped

KEPT_BYTES = 4 << 30  # of outputs of products on one device, up to which the backward pass makes none of them again
Arrays = Mapping[str, jax.Array]  # of `layout.stream_arrays`: B streams of N tokens and M head positions, S rows in each


class Backward(NamedTuple):
    """What the backward pass of a tile gives, R = B·S rows of up to T tokens, C of them predicted.

    Attributes:
      reports: {name: [L, R, K] or [R, K]}: measures of the tapped weights. tokens: int32 [R, T]. rows_error: [R, T, D] float32:
        gradient with respect to the embedding's looked-up rows. hidden: [R, C, D]: states that predict. labels: int32 [R, C].
        weights: [R, C] of the tokens.
    """

    reports: dict[str, jax.Array]
    tokens: jax.Array
    rows_error: jax.Array
    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array


def remat_policy(mc: ModelConfig, tokens: int, compute_dtype: str, configured: str) -> str:
    """ "dots" where a stream of so many tokens leaves room to keep what the policy keeps, else the configured policy."""
    n, k, d = mc.num_heads, mc.num_kv_heads * mc.head_dim, mc.hidden_size
    width = 4 * d + 2 * (n * mc.head_dim + k) + 2 * mc.intermediate_size + n * KEPT  # of the last, attention weights, at most
    size = jnp.dtype(compute_dtype).itemsize * mc.num_layers * tokens * width
    return "dots" if configured == "nothing_saveable" and size <= KEPT_BYTES else configured


def row_losses(params: Any, mc: ModelConfig, x: Arrays, *, compute_dtype: str, remat: str) -> jax.Array:
    """Sum over rows of each row's mean loss, float32; x: of `padded_rows`."""
    hidden = decoder.forward(params, mc, x["tokens"], x["segment_ids"], x["positions"], compute_dtype=jnp.dtype(compute_dtype), remat=remat)
    return head.weighted_nll(params, mc, head.gather_positions(hidden, x["index"]), x["labels"], x["weights"])[0]


def by_stream(values: jax.Array, x: Arrays) -> jax.Array:
    """values [B·S, K] -> [B, S, K], the streams over the batch axes."""
    streams, slots, _ = x["rows"].shape
    shape, spec = (streams, slots, values.shape[1]), activation_spec(streams, None, None)
    return values.reshape(shape) if spec is None else jnp.reshape(reshard(values, P(spec[0], None)), shape, out_sharding=spec)


def padded_rows(x: Arrays) -> dict[str, jax.Array]:
    """The rows of streams by themselves: tokens, segment_ids, positions [R, T]; index, labels, weights [R, C]."""
    tokens, scored = (Rows(x[name], x[name] >= 0, x[name]) for name in ("rows", "places"))
    found = {name: to_rows(x[name], tokens) for name in ("tokens", "positions")}
    found["segment_ids"] = to_rows(jnp.ones_like(x["tokens"]), tokens)
    at = jax.vmap(lambda place, index: place[index])(x["positions"], x["index"])
    return found | {name: to_rows(value, scored) for name, value in (("index", at), ("labels", x["labels"]), ("weights", x["weights"]))}


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
      x: `stream_arrays`. measures: {weight name: (measure, aux)}; for weights of the layers every leaf of aux has a leading
        axis L. Embedding and head are not tapped: their gradients come from the other fields.
    """
    streams, slots, _ = x["rows"].shape
    dtype = jnp.dtype(compute_dtype)
    rows, scored = Rows(x["rows"], x["rows"] >= 0, x["back"]), Rows(x["places"], x["places"] >= 0, x["owners"])

    def zeros(*shape: int, layers: tuple[int, ...] = ()) -> jax.Array:
        spec = None if explicit_mesh() is None else P(*(None,) * len(layers), batch_axes(streams), *(None,) * (len(shape) - 1))
        return jnp.zeros((*layers, *shape), jnp.float32, out_sharding=spec)

    probes = {
        name: zeros(streams * slots, measure.width, layers=(mc.num_layers,) if name in params["layers"] else ())
        for name, (measure, _) in measures.items()
    }

    def states(probes: dict[str, jax.Array], nudge: jax.Array) -> jax.Array:
        def tap(name: str, weight: jax.Array) -> Any:
            return Tapped(weight, probes[name], measures[name][1], measures[name][0]) if name in measures else weight

        tapped = {name: tap(name, weight) for name, weight in params.items() if name != "layers"}
        tapped["layers"] = {name: tap(name, weight) for name, weight in params["layers"].items()}
        tapped["embed"] = Nudged(params["embed"], nudge)
        hidden = decoder.forward_rows(tapped, mc, x["tokens"], x["positions"], rows, compute_dtype=dtype, remat=remat)
        return head.gather_positions(hidden, x["index"])

    nudge = zeros(*x["tokens"].shape, mc.hidden_size)
    hidden, pull = jax.vjp(states, probes, nudge)
    error = head.nll_error(params, mc, hidden, x["labels"], x["weights"])
    reports, rows_error = pull(error)
    tokens, rows_error = (to_rows(value, rows) for value in (x["tokens"], rows_error))
    return Backward(reports, tokens, rows_error, *(to_rows(value, scored) for value in (hidden, x["labels"], x["weights"])))
