"""Names and layout of the weights in Hugging Face files: torch keeps a projection as [out, in], we keep [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import weight_shapes

# Our name -> (Hugging Face name, transposed).
TOP: Mapping[str, tuple[str, bool]] = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
LAYER: Mapping[str, tuple[str, bool]] = {
    "attn_norm": ("input_layernorm.weight", False),
    "wq": ("self_attn.q_proj.weight", True),
    "wk": ("self_attn.k_proj.weight", True),
    "wv": ("self_attn.v_proj.weight", True),
    "bq": ("self_attn.q_proj.bias", False),
    "bk": ("self_attn.k_proj.bias", False),
    "bv": ("self_attn.v_proj.bias", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
    "wo": ("self_attn.o_proj.weight", True),
    "bo": ("self_attn.o_proj.bias", False),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "w_gate": ("mlp.gate_proj.weight", True),
    "w_up": ("mlp.up_proj.weight", True),
    "w_down": ("mlp.down_proj.weight", True),
    "b_gate": ("mlp.gate_proj.bias", False),
    "b_up": ("mlp.up_proj.bias", False),
    "b_down": ("mlp.down_proj.bias", False),
}
# Where there are norms on both sides, theirs have other names: what they call "post_attention" is then just that.
POST_NORMS: Mapping[str, str] = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}


class Source(NamedTuple):
    """Where a tensor of a file belongs: leaf `name`, and its layer where it is one of the stacked ones.

    shape: as torch keeps it. transposed: ours is its transpose.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def tensors(mc: ModelConfig) -> dict[str, Source]:
    """Every tensor of the model by its Hugging Face name, in the order of an export."""
    shapes = weight_shapes(mc)
    found = {}
    for name in ("embed", "layers", "final_norm", "head"):
        if name == "layers":
            for layer in range(mc.num_layers):
                for inner, (_, *shape) in shapes["layers"].items():
                    found[layer_name(mc, layer, inner)] = _source(inner, layer, tuple(shape))
        elif name in shapes:
            found[TOP[name][0]] = _source(name, None, shapes[name])
    return found


def layer_name(mc: ModelConfig, layer: int, name: str) -> str:
    """Hugging Face name of one layer's tensor."""
    inner = POST_NORMS[name] if mc.arch.post_norms and name in POST_NORMS else LAYER[name][0]
    return f"model.layers.{layer}.{inner}"


def transposed(name: str) -> bool:
    """Whether a leaf is the transpose of what the files hold."""
    return (LAYER.get(name) or TOP.get(name) or ("", False))[1]


def _source(name: str, layer: int | None, shape: tuple[int, ...]) -> Source:
    return Source(name, layer, shape[::-1] if transposed(name) else shape, transposed(name))
