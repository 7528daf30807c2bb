"""The decoder again in float64 numpy, one document at a time, with loops where the model has einsums: a test's oracle."""

from __future__ import annotations

from typing import Any

import numpy as np

from dccot_jax.model.config import ModelConfig


def reference_logits(params: dict[str, Any], mc: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """float64 logits [T, V] of one document, tokens [T], positions 0..T-1."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items() if name != "layers"}
    x = p["embed"][tokens]
    for layer in range(mc.num_layers):
        w = {name: np.asarray(v[layer], np.float64) for name, v in params["layers"].items()}
        x = x + _attention(w, mc, _norm(x, w["attn_norm"], mc.rms_eps))
        h = _norm(x, w["mlp_norm"], mc.rms_eps)
        gate = h @ w["w_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w_up"])) @ w["w_down"]
    x = _norm(x, p["final_norm"], mc.rms_eps)
    return x @ (p["embed"].T if mc.tie_embeddings else p["head"])


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotate(x: np.ndarray, theta: float) -> np.ndarray:
    length, size = x.shape
    out = np.empty_like(x)
    for t in range(length):
        for i in range(size // 2):
            angle = t * theta ** (-2 * i / size)
            a, b = x[t, i], x[t, i + size // 2]
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + size // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def _attention(w: dict[str, np.ndarray], mc: ModelConfig, x: np.ndarray) -> np.ndarray:
    length, size = x.shape[0], mc.head_dim
    q, k, v = (x @ w["w" + name] + w.get("b" + name, 0.0) for name in "qkv")
    heads = []
    for n in range(mc.num_heads):
        kv = n // mc.num_groups
        qn = _rotate(q[:, n * size : (n + 1) * size], mc.rope_theta)
        kn = _rotate(k[:, kv * size : (kv + 1) * size], mc.rope_theta)
        scores = qn @ kn.T / np.sqrt(size)
        scores[np.triu_indices(length, 1)] = -np.inf
        heads.append(np.exp(log_softmax(scores)) @ v[:, kv * size : (kv + 1) * size])
    return np.concatenate(heads, axis=-1) @ w["wo"]
