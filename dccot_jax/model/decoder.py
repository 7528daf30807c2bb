"""The decoder: declared once with Flax NNX, then a plain function of a nested dict of arrays.

Parameters: {"embed", "layers": {name: [L, ...]}, "final_norm", "head" where untied}; names, shapes and axes are in
`model/sharding.py`. Layers are stacked on axis 0 and scanned under `jax.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from dccot_jax.model.attention import attend_blocks, attend_rows, block_bias, rope_divisors, rope_tables, rotate
from dccot_jax.model.backends.meaning import NO_WINDOW, Attention
from dccot_jax.model.backends.registry import make_attention
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.linear import SAVED, linear
from dccot_jax.model.lora import DROPOUT, delta
from dccot_jax.model.sharding import activation_spec, batch_axes, explicit_mesh, param_specs, reshard, use_spec, weight_shapes
from dccot_jax.model.streams import Rows
from dccot_jax.model.taps import Nudged, attach, per_row

Params = dict[str, Any]

REMAT_POLICIES = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED),
    "none": None,
}
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


class Block(nnx.Module):
    """One layer's parameters: normal with deviation D^-1/2; matrices that write to the residual stream divided by sqrt(2 L)."""

    def __init__(self, mc: ModelConfig, rngs: nnx.Rngs):
        for name, (_, *shape) in weight_shapes(mc)["layers"].items():
            setattr(self, name, nnx.Param(_initial(mc, name, tuple(shape), rngs)))


class Decoder(nnx.Module):
    """The whole parameter tree; only its declaration is used, see `init_params`."""

    def __init__(self, mc: ModelConfig, rngs: nnx.Rngs):
        shapes = weight_shapes(mc)

        @nnx.split_rngs(splits=mc.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(mc, rngs)

        self.layers = stack(rngs)
        for name in shapes:  # in the table's order: each draw counts
            if name != "layers":
                setattr(self, name, nnx.Param(_initial(mc, name, shapes[name], rngs)))


def init_params(mc: ModelConfig, key: jax.Array | int) -> Params:
    """Random float32 parameters from a key or a seed, made in their shardings when a mesh is in use.

    The values do not depend on the mesh.
    """

    def make(key: jax.Array) -> Params:
        _, state = nnx.split(Decoder(mc, nnx.Rngs(key)))
        return nnx.to_pure_dict(state)

    key = jax.random.key(key) if isinstance(key, int) else key
    mesh = explicit_mesh()
    if mesh is None:
        return jax.jit(make)(key)
    specs = param_specs(mc)
    return jax.jit(lambda key: jax.tree.map(jax.reshard, make(key), specs), out_shardings=specs)(key)


def forward(
    params: Params,
    mc: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "nothing_saveable",
    dropout_key: jax.Array | None = None,
    attention: str = "xla",
    packed: bool = True,
) -> jax.Array:
    """Hidden states after the final norm.

    Args:
      tokens, segment_ids, positions: int32 [B, T]; segment ids 1-based with 0 for padding, positions restarted.
      compute_dtype: dtype of activations and products; norms, rotary angles and softmax are float32.
      remat: "nothing_saveable", "dots" (projections are kept) or "none".
      dropout_key: randomness of the adapters' dropout; None: nothing is dropped.
      attention: one of `backends.registry.BACKENDS`.
      packed: rows may hold several segments; False promises one per row, from its first token on.

    Returns:
      [B, T, D] in the compute dtype; values at padding are meaningless and finite.
    """
    rows = tokens.shape[0]
    tokens, segment_ids, positions = (reshard(x, activation_spec(rows, None)) for x in (tokens, segment_ids, positions))
    x = embed(params, mc, tokens, compute_dtype)
    differs = layer_differences(mc)
    if dropout_key is not None:
        differs[DROPOUT] = jax.random.split(dropout_key, mc.num_layers)
    whole_layer = make_layer(mc, positions, make_attention(attention, mc, segment_ids, packed=packed))
    x = _scan_layers(whole_layer, x, (params["layers"], differs), remat)
    return rms_norm(x, params["final_norm"], mc)


def _scan_layers(whole_layer: Layer, x: jax.Array, layers: tuple[Params, Params], remat: str) -> jax.Array:
    """x after all layers, which keep for the backward pass what `remat` says; keys and values are dropped."""

    def layer(x: jax.Array, own: tuple[Params, Params]) -> tuple[jax.Array, None]:
        return whole_layer(x, own)[0], None

    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(layer, x, layers)[0]


def layer_differences(mc: ModelConfig) -> dict[str, jax.Array]:
    """What a scan hands each layer beside its weights, only where layers differ: window int32 [L], rope divisors float32 [L, H/2]."""
    found = {}
    if len(set(mc.layer_windows)) > 1:
        found["window"] = jnp.asarray([window or NO_WINDOW for window in mc.layer_windows], jnp.int32)
    if len(set(mc.layer_ropes)) > 1:
        found["rope"] = jnp.stack([rope_divisors(rope, mc.head_dim) for rope in mc.layer_ropes])
    return found


def forward_blocks(
    params: Params,
    mc: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    blocks: Sequence[Mapping[str, jax.Array]],
    back: jax.Array,
    *,
    compute_dtype: Any = jnp.float32,
) -> jax.Array:
    """Hidden states after the final norm of streams in which every token says what it may see; forward only, nothing is recomputed.

    Args:
      tokens, positions: int32 [B, N].
      blocks, back: "queries" and "keys" of each class of blocks, and where each query stands: see `attention.attend_blocks`.

    Returns:
      [B, N, D] in the compute dtype; values at padding are meaningless and finite.
    """
    rows = tokens.shape[0]
    tokens, positions, back = (reshard(x, activation_spec(rows, None)) for x in (tokens, positions, back))
    blocks = [{name: reshard(x, activation_spec(rows, None, None)) for name, x in block.items()} for block in blocks]
    blocks = [{**block, **block_bias(positions, block["queries"], block["keys"])} for block in blocks]
    (window, *windows) = set(mc.layer_windows)
    uniform = None if windows else window or None

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array | None) -> jax.Array:
        return attend_blocks(q, k, v, blocks, back, uniform if own is None else own, scale=mc.attn_scale, softcap=mc.attn_softcap)

    layer = make_layer(mc, positions, attention)
    x = embed(params, mc, tokens, compute_dtype)
    x, _ = jax.lax.scan(lambda x, own: (layer(x, own)[0], None), x, (params["layers"], layer_differences(mc)))
    return rms_norm(x, params["final_norm"], mc)


def forward_rows(
    params: Params,
    mc: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    rows: Rows,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "nothing_saveable",
) -> jax.Array:
    """Hidden states after the final norm of streams that hold whole rows, each attending to itself; weights may be tapped.

    Args:
      tokens, positions: int32 [B, N]. rows: where the rows stand, see `model/streams.py`. compute_dtype, remat: as for `forward`.

    Returns:
      [B, N, D] in the compute dtype; values at padding are meaningless and finite.
    """
    count = tokens.shape[0]
    tokens, positions = (reshard(x, activation_spec(count, None)) for x in (tokens, positions))
    rows = Rows(*(reshard(x, activation_spec(count, *(None,) * (x.ndim - 1))) for x in rows))
    (window, *windows) = set(mc.layer_windows)
    uniform = None if windows else window or None

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array | None) -> jax.Array:
        return attend_rows(q, k, v, rows, uniform if own is None else own, scale=mc.attn_scale, softcap=mc.attn_softcap)

    plain = make_layer(mc, positions, attention)
    x = embed(params, mc, tokens, compute_dtype)
    x = _scan_layers(lambda x, own: plain(x, (attach(own[0], rows), own[1])), x, (params["layers"], layer_differences(mc)), remat)
    return rms_norm(x, attach(params, rows)["final_norm"], mc)


Layer = Callable[[jax.Array, tuple[Params, Params]], tuple[jax.Array, tuple[jax.Array, jax.Array]]]


def make_layer(mc: ModelConfig, positions: jax.Array, attention: Attention) -> Layer:
    """One layer for a scan over (`params["layers"]`, `layer_differences`): x [B, T, D] -> x, and its keys and values [B, T, K, H].

    Args:
      positions: int32 [B, T]. attention: of this model over these rows (`backends.registry.make_attention`).
    """
    (rope, *ropes) = set(mc.layer_ropes)
    tables = () if ropes else rope_tables(positions, rope_divisors(rope, mc.head_dim))

    def layer(x: jax.Array, own: tuple[Params, Params]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        p, differs = own
        if DROPOUT in differs:
            p = {**p, DROPOUT: differs[DROPOUT]}
        cos, sin = tables or rope_tables(positions, differs["rope"])
        q, k, v = project_qkv(p, mc, x, cos, sin)
        return finish_layer(p, mc, x, attention(q, k, v, differs.get("window"))), (k, v)

    return layer


def embed(params: Params, mc: ModelConfig, tokens: jax.Array, compute_dtype: Any) -> jax.Array:
    """Rows of the embedding table: tokens [B, T] -> [B, T, D]; some families scale them by sqrt(D), rounded to the compute dtype.

    The table stays where it is stored: every device looks up its own columns of D for all rows of its fsdp group, and what is
    exchanged is [B, T, D].
    """
    table, nudge = (params["embed"].weight, params["embed"].nudge) if isinstance(params["embed"], Nudged) else (params["embed"], None)
    spec = activation_spec(tokens.shape[0], None, None)
    if spec is None:
        rows = table[tokens].astype(compute_dtype)
    else:
        columns = jax.typeof(table).sharding.spec[1]
        group = tuple(axis for axis in batch_axes(tokens.shape[0]) or () if axis != columns) or None
        tokens = reshard(tokens, P(group, None))
        rows = reshard(table.at[tokens].get(out_sharding=P(group, None, columns)).astype(compute_dtype), spec)
    rows = rows if nudge is None else (rows + nudge).astype(compute_dtype)
    return rows * jnp.asarray(mc.hidden_size**0.5, compute_dtype) if mc.arch.embed_scale else rows


def project_qkv(p: Params, mc: ModelConfig, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated q [B, T, K, G, H], rotated k [B, T, K, H] and v [B, T, K, H] of one layer's input x [B, T, D]."""
    batch, length = x.shape[:2]
    h = rms_norm(x, p["attn_norm"], mc)
    q, k, v = (_biased(p, "b" + name, _project(p, mc, h, "w" + name)) for name in "qkv")
    q = _split_heads(mc, q, "wq", (batch, length, mc.num_kv_heads, mc.num_groups, mc.head_dim))
    k, v = (_split_heads(mc, y, name, (batch, length, mc.num_kv_heads, mc.head_dim)) for y, name in ((k, "wk"), (v, "wv")))
    if mc.arch.qk_norm:
        q, k = rms_norm(q, p["q_norm"], mc), rms_norm(k, p["k_norm"], mc)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _split_heads(mc: ModelConfig, y: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """y [B, T, heads · H] as `shape`, the key/value heads over the axis that the weight's columns were over.

    The layout is named: with one key/value head it could not be told from the shapes.
    """
    use = use_spec(mc, name)
    if use is None:
        return y.reshape(shape)
    return jnp.reshape(y, shape, out_sharding=activation_spec(shape[0], None, use[-1], *(None,) * (len(shape) - 3)))


def finish_layer(p: Params, mc: ModelConfig, x: jax.Array, attended: jax.Array) -> jax.Array:
    """Output projection and gated MLP with their residuals: x [B, T, D], attended [B, T, K, G, H] -> [B, T, D]."""
    y = _biased(p, "bo", _project(p, mc, attended.reshape(*x.shape[:2], mc.num_heads * mc.head_dim), "wo"))
    x = x + (rms_norm(y, p["attn_post_norm"], mc) if mc.arch.post_norms else y)
    h = rms_norm(x, p["mlp_norm"], mc)
    gate, up = (_biased(p, "b_" + name, _project(p, mc, h, "w_" + name)) for name in ("gate", "up"))
    y = _biased(p, "b_down", _project(p, mc, _gated(mc.arch.activation, gate, up), "w_down"))
    return x + (rms_norm(y, p["mlp_post_norm"], mc) if mc.arch.post_norms else y)


@partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, in float32 and rounded once; for the backward pass only the arguments are kept."""
    return (_ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, mc: ModelConfig) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, or * (1 + scale); in float32, returned in x's dtype."""
    wide, scale = x.astype(jnp.float32), per_row(scale, x).astype(jnp.float32)
    if mc.arch.norm_offset:
        scale = 1.0 + scale
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + mc.rms_eps) * scale).astype(x.dtype)


def _project(p: Params, mc: ModelConfig, x: jax.Array, name: str) -> jax.Array:
    use = use_spec(mc, name)
    y = linear(x, p[name], use=use, out=None if use is None else activation_spec(x.shape[0], None, use[-1]))
    return y if mc.lora is None or name not in mc.lora.targets else y + delta(p, mc, name, x)


def _biased(p: Params, name: str, y: jax.Array) -> jax.Array:
    return y + per_row(p[name], y).astype(y.dtype) if name in p else y


def _initial(mc: ModelConfig, name: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> jax.Array:
    if name.endswith("norm"):
        return jnp.full(shape, 0.0 if mc.arch.norm_offset else 1.0, jnp.float32)
    if name.startswith("b"):
        return jnp.zeros(shape, jnp.float32)
    deviation = mc.hidden_size**-0.5
    if name in ("wo", "w_down"):
        deviation /= (2 * mc.num_layers) ** 0.5
    # The barrier keeps the compiler from folding constants across it, which would change last bits with the mesh.
    return deviation * jax.lax.optimization_barrier(jax.random.normal(rngs.params(), shape, jnp.float32))
