"""The decoder again in float64 numpy, one document at a time, with loops where the model has einsums: a test's oracle."""

from __future__ import annotations

from typing import Any

import numpy as np

from dccot_jax.model.config import ModelConfig


def reference_logits(params: dict[str, Any], mc: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """float64 logits [T, V] of one document, tokens [T], positions 0..T-1."""
    table = params["embed"].T if mc.tie_embeddings else params["head"]
    return _cap(reference_hidden(params, mc, tokens) @ np.asarray(table, np.float64), mc.final_softcap)


def reference_hidden(params: dict[str, Any], mc: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """float64 hidden states [T, D] after the final norm."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items() if name != "layers"}
    x = p["embed"][tokens] * (np.sqrt(mc.hidden_size) if mc.arch.embed_scale else 1.0)
    for layer in range(mc.num_layers):
        w = {name: np.asarray(v[layer], np.float64) for name, v in params["layers"].items()}
        y = _attention(w, mc, layer, _norm(mc, x, w["attn_norm"]))
        x = x + (_norm(mc, y, w["attn_post_norm"]) if mc.arch.post_norms else y)
        h = _norm(mc, x, w["mlp_norm"])
        gate, up = h @ w["w_gate"] + w.get("b_gate", 0.0), h @ w["w_up"] + w.get("b_up", 0.0)
        y = (_activation(mc, gate) * up) @ w["w_down"] + w.get("b_down", 0.0)
        x = x + (_norm(mc, y, w["mlp_post_norm"]) if mc.arch.post_norms else y)
    return _norm(mc, x, p["final_norm"])


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _norm(mc: ModelConfig, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + mc.rms_eps) * (1 + scale if mc.arch.norm_offset else scale)


def _activation(mc: ModelConfig, x: np.ndarray) -> np.ndarray:
    if mc.arch.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _cap(z: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(z / cap) if cap else z


def _frequency(mc: ModelConfig, layer: int, i: int) -> float:
    """Radians per position of the i-th pair of a head's dimensions."""
    local = mc.rope_local_theta > 0 and layer in mc.window_layers
    frequency = (mc.rope_local_theta if local else mc.rope_theta) ** (-2 * i / mc.head_dim)
    scaling = None if local else mc.rope_scaling
    if layer in mc.no_rope_layers:
        return 0.0
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength, original = 2 * np.pi / frequency, scaling.original_positions
    if wavelength < original / scaling.high_freq_factor:
        return frequency
    if wavelength > original / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _rotate(mc: ModelConfig, layer: int, x: np.ndarray) -> np.ndarray:
    length, size = x.shape
    out = np.empty_like(x)
    for i in range(size // 2):
        frequency = _frequency(mc, layer, i)
        for t in range(length):
            a, b = x[t, i], x[t, i + size // 2]
            out[t, i] = a * np.cos(t * frequency) - b * np.sin(t * frequency)
            out[t, i + size // 2] = b * np.cos(t * frequency) + a * np.sin(t * frequency)
    return out


def _attention(w: dict[str, np.ndarray], mc: ModelConfig, layer: int, x: np.ndarray) -> np.ndarray:
    length, size = x.shape[0], mc.head_dim
    q, k, v = (x @ w["w" + name] + w.get("b" + name, 0.0) for name in "qkv")
    window = mc.sliding_window if layer in mc.window_layers else length
    heads = []
    for n in range(mc.num_heads):
        kv = n // mc.num_groups
        qn, kn = q[:, n * size : (n + 1) * size], k[:, kv * size : (kv + 1) * size]
        if mc.arch.qk_norm:
            qn, kn = _norm(mc, qn, w["q_norm"]), _norm(mc, kn, w["k_norm"])
        qn, kn = _rotate(mc, layer, qn), _rotate(mc, layer, kn)
        scores = _cap(qn @ kn.T / np.sqrt(mc.query_scalar or size), mc.attn_softcap)
        for t in range(length):
            scores[t, t + 1 :] = -np.inf
            scores[t, : max(0, t + 1 - window)] = -np.inf
        heads.append(np.exp(log_softmax(scores)) @ v[:, kv * size : (kv + 1) * size])
    return np.concatenate(heads, axis=-1) @ w["wo"] + w.get("bo", 0.0)
