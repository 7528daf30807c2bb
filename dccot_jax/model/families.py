"""The families of decoders: what an architecture fixes, and what its Hugging Face config may vary.

Everything else a model is made of stands in its `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
      architecture: its class name.
      qkv_bias: allowed values of `ModelConfig.qkv_bias`. o_bias: the output projection has a bias where they do.
      mlp_bias: the three MLP projections may have biases.
      activation: of the gated MLP, "silu" or "gelu_tanh".
      qk_norm: RMSNorm over each head's query and key, before rotation.
      norm_offset: norms scale by 1 + w, computed in float32. post_norms: attention and MLP are normed again before they are added.
      embed_scale: embeddings are multiplied by sqrt(hidden_size) in the compute dtype.
      query_scalar, attn_softcap, final_softcap: these settings exist.
      windows: layers that may have a sliding window: "none", "all" (all of them or none) or "any".
      full_every: of the layers with windows, every n-th sees everything by default; 0: none does.
      local_theta: default rotary base of layers with a window; 0: the same as elsewhere.
      no_rope_every: every n-th layer has no rotary positions by default, any may have none; 0: all have them.
      theta: default rotary base. tied: default of tie_embeddings.
    """

    architecture: str
    qkv_bias: tuple[bool, ...] = (False, True)
    o_bias: bool = True
    mlp_bias: bool = False
    activation: str = "silu"
    qk_norm: bool = False
    norm_offset: bool = False
    post_norms: bool = False
    embed_scale: bool = False
    query_scalar: bool = False
    attn_softcap: bool = False
    final_softcap: bool = False
    windows: str = "none"
    full_every: int = 0
    local_theta: float = 0.0
    no_rope_every: int = 0
    theta: float = 10000.0
    tied: bool = False


_GEMMA = Family("GemmaForCausalLM", activation="gelu_tanh", norm_offset=True, embed_scale=True, tied=True)
_GEMMA2 = dataclasses.replace(_GEMMA, architecture="Gemma2ForCausalLM", post_norms=True, query_scalar=True, windows="any")

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", mlp_bias=True),
    "mistral": Family("MistralForCausalLM", qkv_bias=(False,), windows="all"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=(True,), o_bias=False, windows="any"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, windows="any"),
    "gemma": _GEMMA,
    "gemma2": dataclasses.replace(_GEMMA2, attn_softcap=True, final_softcap=True, full_every=2),
    "gemma3_text": dataclasses.replace(
        _GEMMA2, architecture="Gemma3ForCausalLM", qk_norm=True, final_softcap=True, full_every=6, local_theta=10000.0, theta=1e6
    ),
    "smollm3": Family("SmolLM3ForCausalLM", mlp_bias=True, windows="any", no_rope_every=4, theta=2e6, tied=True),
}
