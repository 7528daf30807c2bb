"""A tiny model of every family: grouped heads, a head size that is not D / N, no default base, windows shorter than a document."""

from __future__ import annotations

from typing import Any

from dccot_jax.model.config import ModelConfig, RopeScaling


def tiny(family: str, layers: int = 3, **fields: Any) -> ModelConfig:
    return ModelConfig(family, 96, 32, 48, layers, 4, 2, 12, **{"rope_theta": 700.0, "rms_eps": 1e-6, "max_positions": 512, **fields})


# Wavelengths of 12 dimensions at base 700 are 6.3 * 700^(i/6): with these bounds two are kept, one lies between, the rest are stretched.
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 128)

CASES = {
    "llama": tiny("llama", 2, tie_embeddings=False),
    "llama-3": tiny("llama", 2, rope_scaling=LLAMA3, rms_eps=1e-5),
    "llama-biased": tiny("llama", 2, qkv_bias=True, mlp_bias=True, rope_scaling=RopeScaling("linear", 2.5)),
    "mistral": tiny("mistral", 2, tie_embeddings=False, sliding_window=7, window_layers=(0, 1)),
    "mistral-full": tiny("mistral", 2),
    "qwen2": tiny("qwen2", 2, qkv_bias=True, tie_embeddings=False),
    "qwen2-window": tiny("qwen2", qkv_bias=True, sliding_window=9, window_layers=(2,)),
    "qwen3": tiny("qwen3", 2),
    "qwen3-biased": tiny("qwen3", 2, qkv_bias=True, tie_embeddings=False, sliding_window=5, window_layers=(1,)),
    "gemma": tiny("gemma", 2),
    "gemma-biased": tiny("gemma", 2, qkv_bias=True, tie_embeddings=False),
    "gemma2": tiny("gemma2", sliding_window=6, window_layers=(0, 2), query_scalar=20.0, attn_softcap=1.5, final_softcap=4.0),
    "gemma3": tiny(
        "gemma3_text",
        sliding_window=6,
        window_layers=(0, 1),
        rope_local_theta=50.0,
        rope_scaling=RopeScaling("linear", 4.0),
        query_scalar=20.0,
    ),
    "gemma3-full": tiny("gemma3_text", 2, final_softcap=4.0),
    "smollm3": tiny("smollm3", no_rope_layers=(1,)),
    "smollm3-window": tiny(
        "smollm3", qkv_bias=True, mlp_bias=True, no_rope_layers=(0, 2), sliding_window=8, window_layers=(0, 2), tie_embeddings=False
    ),
}
