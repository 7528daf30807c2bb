"""Low-rank adapters (LoRA, arXiv 2106.09685) on the layers' matrices: y = x·W + (alpha / rank) · drop(x)·A·B.

W [D, F] stays as it is; A [D, r] and B [r, F] are trained. They live beside W in the layers' tree, under its name with
"_a" and "_b", stacked over the layers; `ModelConfig.lora` says which matrices have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from dccot_jax.model.config import Lora, ModelConfig
from dccot_jax.model.linear import linear
from dccot_jax.model.sharding import ADAPTED, activation_spec, explicit_mesh, param_specs, use_spec, weight_shapes

Params = dict[str, Any]

# Names of the matrices in Hugging Face models and in PEFT's `target_modules`.
MODULES: Mapping[str, str] = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w_gate",
    "up_proj": "w_up",
    "down_proj": "w_down",
}
ALL = "all-linear"
DROPOUT = "dropout"  # key of a layer's random key in its tree, while training


def with_adapters(mc: ModelConfig, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> ModelConfig:
    """`mc` with adapters on `targets`: names of `MODULES`, or "all-linear". Raises ModelError on what cannot be."""
    names = tuple(MODULES) if ALL in targets else targets
    chosen = {MODULES.get(name, name) for name in names}
    ordered = [name for name in ADAPTED if name in chosen] + sorted(chosen - set(ADAPTED))
    return replace(mc, lora=Lora(rank=rank, alpha=alpha, dropout=dropout, targets=tuple(ordered)))


def adapter_names(mc: ModelConfig) -> tuple[str, ...]:
    return () if mc.lora is None else tuple(name + part for name in mc.lora.targets for part in ("_a", "_b"))


def split(mc: ModelConfig, tree: Params) -> tuple[Params, Params]:
    """(adapters, everything else) of a tree shaped like the parameters."""
    names = set(adapter_names(mc))
    adapters = {"layers": {name: leaf for name, leaf in tree["layers"].items() if name in names}}
    return adapters, {**tree, "layers": {name: leaf for name, leaf in tree["layers"].items() if name not in names}}


def join(params: Params, frozen: Params | None) -> Params:
    """Adapters and the weights that they leave alone, as one tree; `params` itself where nothing is frozen."""
    return params if frozen is None else {**frozen, "layers": {**frozen["layers"], **params["layers"]}}


def init_adapters(mc: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 adapters: A uniform in ±D^-1/2 (PEFT's Kaiming initialisation), B zero; the model is unchanged by them.

    The values do not depend on the mesh, which must be in use if there is one.
    """
    shapes, specs = weight_shapes(mc)["layers"], param_specs(mc)["layers"] if explicit_mesh() is not None else {}
    made = {}
    for i, name in enumerate(adapter_names(mc)):
        shape = shapes[name]
        if name.endswith("_b"):
            leaf = jnp.zeros(shape, jnp.float32)
        else:
            bound = shape[1] ** -0.5
            leaf = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        made[name] = jax.reshard(leaf, specs[name]) if specs else leaf
    return {"layers": made}


def delta(p: Mapping[str, jax.Array], mc: ModelConfig, name: str, x: jax.Array) -> jax.Array:
    """(alpha / rank) · drop(x)·A·B of one layer: x [B, T, D] -> [B, T, F], in x's dtype. Drops only where the layer has a key."""
    assert mc.lora is not None
    first, second = use_spec(mc, name + "_a"), use_spec(mc, name + "_b")
    if DROPOUT in p and mc.lora.dropout:
        key = jax.random.fold_in(p[DROPOUT], ADAPTED.index(name))
        spec = jax.typeof(x).sharding.spec if explicit_mesh() is not None else None
        kept = jax.random.bernoulli(key, 1.0 - mc.lora.dropout, x.shape, out_sharding=spec)
        x = jnp.where(kept, x / (1.0 - mc.lora.dropout), 0).astype(x.dtype)
    low = linear(x, p[name + "_a"], use=first, out=None if first is None else activation_spec(x.shape[0], None, None))
    high = linear(low, p[name + "_b"], use=second, out=None if second is None else activation_spec(x.shape[0], None, second[-1]))
    return high * jnp.asarray(mc.lora.scale, high.dtype)


def merge(params: Params, mc: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same model without adapters: W + (alpha / rank)·A·B in float32 and in W's sharding, and its config."""
    if mc.lora is None:
        return params, mc
    adapters, rest = split(mc, params)
    layers = {name: leaf.astype(jnp.float32) for name, leaf in rest["layers"].items()}
    for name in mc.lora.targets:
        spec = jax.typeof(layers[name]).sharding.spec if explicit_mesh() is not None else None
        a, b = adapters["layers"][name + "_a"], adapters["layers"][name + "_b"]
        product = jnp.einsum("ldr,lrf->ldf", a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=spec)
        layers[name] = layers[name] + mc.lora.scale * product
    merged = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), {**rest, "layers": layers})
    return merged, replace(mc, lora=None)
