"""GGUF files of small models, written as llama.cpp's converter writes them (convert_hf_to_gguf.py), with the package gguf."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dccot_jax.model.config import ModelConfig

ARCHITECTURE = {"gemma3_text": "gemma3"}
BLOCK = {
    "wq": "attn_q.weight", "wk": "attn_k.weight", "wv": "attn_v.weight", "wo": "attn_output.weight",
    "bq": "attn_q.bias", "bk": "attn_k.bias", "bv": "attn_v.bias", "bo": "attn_output.bias",
    "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight", "attn_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight",
    "w_gate": "ffn_gate.weight", "w_up": "ffn_up.weight", "w_down": "ffn_down.weight",
    "b_gate": "ffn_gate.bias", "b_up": "ffn_up.bias", "b_down": "ffn_down.bias",
    "attn_post_norm": "post_attention_norm.weight", "mlp_post_norm": "post_ffw_norm.weight",
}  # fmt: skip


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def torch_tensors(params: Any, mc: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters as the converter leaves them: torch's layout, llama's q and k permuted, Gemma's norms with 1 added."""
    shift = 1.0 if mc.arch.norm_offset else 0.0
    host = jax.device_get(params)
    found = {"token_embd.weight": host["embed"], "output_norm.weight": host["final_norm"] + np.float32(shift)}
    if "head" in host:
        found["output.weight"] = host["head"].T
    for layer in range(mc.num_layers):
        for name, leaf in host["layers"].items():
            x = leaf[layer].T
            if mc.family == "llama" and name in ("wq", "bq", "wk", "bk"):
                x = permute(x, mc.num_heads if name in ("wq", "bq") else mc.num_kv_heads)
            found[f"blk.{layer}.{BLOCK[name]}"] = np.ascontiguousarray(x + np.float32(shift) if name.endswith("norm") else x)
    return found


def write_gguf(
    path: Path, params: Any, mc: ModelConfig, quant: str = "F32", tokenizer: Mapping[str, Any] | None = None, **extra: Any
) -> dict[str, np.ndarray]:
    """Matrices in type `quant`, all else in float32. Returns what was written, before quantisation.

    tokenizer: keys below "tokenizer.", see `tokenizer_fields`. extra: more keys of the architecture, dots as "__"; None drops one.
    """
    import gguf

    architecture = ARCHITECTURE.get(mc.family, mc.family)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    own: dict[str, Any] = {
        "context_length": mc.max_positions, "embedding_length": mc.hidden_size, "feed_forward_length": mc.intermediate_size,
        "block_count": mc.num_layers, "attention__head_count": mc.num_heads, "attention__head_count_kv": mc.num_kv_heads,
        "attention__layer_norm_rms_epsilon": mc.rms_eps, "rope__freq_base": mc.rope_theta,
        "attention__key_length": mc.head_dim, "attention__value_length": mc.head_dim,
    }  # fmt: skip
    if mc.family == "llama":
        own |= {"rope__dimension_count": mc.head_dim, "vocab_size": mc.vocab_size}
    scaling = mc.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        own |= {"rope__scaling__type": "linear", "rope__scaling__factor": scaling.factor}
    if mc.sliding_window:
        own["attention__sliding_window"] = mc.sliding_window
    own |= {"attn_logit_softcapping": mc.attn_softcap} if mc.attn_softcap else {}
    own |= {"final_logit_softcapping": mc.final_softcap} if mc.final_softcap else {}
    own |= {"rope__freq_base_swa": mc.rope_local_theta} if mc.rope_local_theta else {}
    for key, value in {**own, **extra}.items():
        _add(writer, f"{architecture}.{key.replace('__', '.')}", value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.{key}", value)
    found = torch_tensors(params, mc)
    if scaling is not None and scaling.kind == "llama3":
        found["rope_freqs.weight"] = llama3_factors(mc)
    for name, array in found.items():
        kind = gguf.GGMLQuantizationType[quant if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(array, kind) if kind.name != "F32" else array.astype(np.float32), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def llama3_factors(mc: ModelConfig) -> np.ndarray:
    """rope_freqs.weight of the converter (`LlamaModel.generate_extra_tensors`), one wavelength at a time."""
    s, factors = mc.rope_scaling, []
    assert s is not None
    for i in range(0, mc.head_dim, 2):
        length = 2 * np.pi * mc.rope_theta ** (i / mc.head_dim)
        if length < s.original_positions / s.high_freq_factor:
            factors.append(1.0)
        elif length > s.original_positions / s.low_freq_factor:
            factors.append(s.factor)
        else:
            smooth = (s.original_positions / length - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            factors.append(1 / ((1 - smooth) / s.factor + smooth))
    return np.array(factors, np.float32)


def tokenizer_fields(folder: Path, pre: str, special: Mapping[str, str]) -> dict[str, Any]:
    """A byte-level BPE tokenizer directory as llama.cpp's keys. special: {"eos": token, ...}."""
    text, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    added = {token["content"]: token["id"] for token in text["added_tokens"]}
    ids = text["model"]["vocab"] | added
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in text["model"]["merges"]]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in added else 1 for token in tokens],
        "ggml.merges": merges,
        "chat_template": config.get("chat_template"),
        **{f"ggml.{name}_token_id": ids[token] for name, token in special.items()},
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
