"""The metadata of a GGUF file as a ModelConfig.

What a `config.json` says is put together from llama.cpp's keys and goes through `from_hf`. Nothing is guessed beyond what
llama.cpp itself fixes per architecture; a key that is set and not known here is refused by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.gguf_io import ROPE_FACTORS, TENSORS, GgufFile, open_gguf
from dccot_jax.model.hf_config import from_hf
from dccot_jax.model.hf_fields import OWN

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",  # and Mistral, without its window
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_TABLE = TENSORS["embed"]
_REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_READ = frozenset(
    {
        *_REQUIRED.values(),
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
    }
)
_WINDOWS = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
_OWN = {
    "gemma2": _WINDOWS | {"attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": _WINDOWS | {"final_logit_softcapping", "rope.freq_base_swa"},
}
_HARMLESS = frozenset({"vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"})
_NEUTRAL: Mapping[str, Any] = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}
# Layers of the models (Gemma 2 27B, Gemma 3 27B) whose scores llama.cpp divides by sqrt(D / N); the file does not say.
_BY_HIDDEN_SIZE = {"gemma2": 46, "gemma3": 62}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of every published model


def read_gguf_config(path: str | os.PathLike) -> ModelConfig:
    """Raises ModelError: the file does not read, its architecture is another, or it is a model that cannot be represented."""
    file = open_gguf(path)
    architecture, kind = file.metadata.get("general.architecture"), file.metadata.get("general.type", "model")
    if architecture not in ARCHITECTURES or kind != "model":
        what = f"architecture {architecture!r}" if kind == "model" else f"general.type {kind!r}"
        raise ModelError(f"{path}: GGUF {what} is not supported; known: models of {', '.join(ARCHITECTURES)}")
    try:
        return from_hf(config_fields(file))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def config_fields(file: GgufFile) -> dict[str, Any]:
    """The `config.json` of a file of a known architecture. Raises ModelError, all problems named together."""
    architecture = file.metadata["general.architecture"]
    own = {
        key.removeprefix(architecture + "."): _scalar(value) for key, value in file.metadata.items() if key.startswith(architecture + ".")
    }
    family, problems = ARCHITECTURES[architecture], _key_problems(architecture, own)
    if _TABLE not in file.tensors:
        problems.append(f"{_TABLE} is missing")
    if problems:
        raise ModelError("; ".join(problems))
    heads, hidden = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length") or hidden // heads
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    fields: dict[str, Any] = {
        "model_type": family,
        **{ours: own[theirs] for ours, theirs in _REQUIRED.items()},
        "vocab_size": file.tensors[_TABLE].shape[0],
        "num_key_value_heads": own.get("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "rope_theta": own.get("rope.freq_base", 1e6 if architecture == "gemma3" else 10000.0),
        "tie_word_embeddings": TENSORS["head"] not in file.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": [token for token in dict.fromkeys((ids["eos"], ids["eot"])) if token is not None] or None,
        "pad_token_id": ids["padding"],
    }
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head_dim) != head_dim:
            problems.append(f"{architecture}.{name} = {own[name]} is not the head size {head_dim}")
    optional = {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "attn_logit_softcapping": own.get("attn_logit_softcapping"),
        "final_logit_softcapping": own.get("final_logit_softcapping"),
        "query_pre_attn_scalar": hidden / heads if own["block_count"] == _BY_HIDDEN_SIZE.get(architecture) else head_dim,
        "rope_local_base_freq": own.get("rope.freq_base_swa"),
    }
    fields |= {name: value for name, value in optional.items() if name in OWN[family]}
    scaling = _rope_scaling(file, own, fields, problems)
    if scaling:
        fields["rope_scaling"] = scaling
    if architecture in _OWN:
        fields |= _windows(own, own["block_count"])
    if problems:
        raise ModelError("; ".join(problems))
    return fields


def _key_problems(architecture: str, own: Mapping[str, Any]) -> list[str]:
    problems = [f"{architecture}.{name} is missing" for name in _REQUIRED.values() if name not in own]
    for name, value in own.items():
        if isinstance(value, list) and name in _READ:
            problems.append(f"{architecture}.{name} = {value} differs between layers, which is not supported")
        known = name in _READ or name in _HARMLESS or name in _OWN.get(architecture, ()) or _NEUTRAL.get(name) == value
        if not known and value not in (None, False, 0):
            problems.append(f"{architecture}.{name} = {value!r} is unknown; it may change the numbers")
    return problems


def _rope_scaling(file: GgufFile, own: Mapping[str, Any], fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any] | None:
    kind, factor = own.get("rope.scaling.type", "linear"), own.get("rope.scaling.factor") or 1.0
    stretched = file.tensors.get(ROPE_FACTORS)
    if kind not in ("linear", "none"):
        problems.append(f"rope.scaling.type = {kind!r} is not supported (only none, linear)")
        return None
    linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else None
    if stretched is None:
        return linear
    found = np.asarray(stretched.data, np.float64)
    scaling = {"rope_type": "llama3", "factor": float(found.max()), **_LLAMA3}
    expected = _llama3_factors(scaling, fields["rope_theta"], fields["head_dim"])
    if linear is not None or found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        problems.append(f"{ROPE_FACTORS} is not the llama3 stretching over 8192 positions with factors 1 and 4, the only one supported")
    return scaling


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """By what `attention.rope_divisors` stretches each wavelength, [head_dim / 2], in float64."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (kept + (1 - kept) / scaling["factor"])


def _windows(own: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The window and, where the file says it, which layers have it: every n-th has none, or one flag per layer."""
    window, pattern = own.get("attention.sliding_window"), own.get("attention.sliding_window_pattern")
    if not window:
        return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    if pattern is None:
        return {"sliding_window": window}
    given = pattern if isinstance(pattern, list) else [bool((layer + 1) % pattern) if pattern else True for layer in range(layers)]
    return {"sliding_window": window, "layer_types": ["sliding_attention" if flag else "full_attention" for flag in given]}


def _scalar(value: Any) -> Any:
    """A list of equal numbers, one per layer, as that number; flags stay a list."""
    if isinstance(value, list) and value and not isinstance(value[0], bool) and len(set(value)) == 1:
        return value[0]
    return value
