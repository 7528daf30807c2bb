"""A Hugging Face `config.json` to a ModelConfig and back.

Nothing is guessed: a field that is set and not known (`model/hf_fields.py`) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dccot_jax.model.config import ModelConfig, ModelError, RopeScaling, no_rope_by_default, windows_by_default
from dccot_jax.model.families import FAMILIES, Family
from dccot_jax.model.hf_fields import GENERATION, HARMLESS, NEUTRAL, OWN, OWN_REQUIRED, READ, REQUIRED

_FULL, _SLIDING = "full_attention", "sliding_attention"
_HF_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}
_SCALING_FIELDS = {  # ours: theirs
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_positions": "original_max_position_embeddings",
    },
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json`, in the spelling of transformers 4 or 5.

    Raises:
      ModelError: unknown architecture, a missing field, a field whose value would change the numbers, or a field nobody
        here knows; all problems are named together.
    """
    family = hf.get("model_type", "")
    if family not in FAMILIES:
        inside = (hf.get("text_config") or {}).get("model_type")
        hint = f" (save its language model, {inside!r}, by itself)" if inside in FAMILIES else ""
        raise ModelError(f"model_type {family!r} is not supported{hint}; known: {', '.join(FAMILIES)}")
    arch, problems, layers = FAMILIES[family], _field_problems(hf, family), hf.get("num_hidden_layers") or 0
    theta, scaling, local_theta = _read_rope(hf, arch, problems)
    no_rope = _read_no_rope(hf, arch, layers, problems)
    window, window_layers = _read_windows(hf, arch, layers, no_rope, problems)
    eos = hf.get("eos_token_id")
    ends = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if not all(type(token) is int and 0 <= token < (hf.get("vocab_size") or 0) for token in ends):
        problems.append(f"eos_token_id = {eos!r} (or generation_config.json's) must be a token id of the vocabulary or a list of them")
    if problems:
        raise ModelError("config.json: " + "; ".join(problems))
    heads = hf["num_attention_heads"]
    return ModelConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope_theta=theta,
        rms_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", arch.tied)),
        qkv_bias=bool(hf.get("attention_bias")) or arch.qkv_bias == (True,),
        max_positions=hf.get("max_position_embeddings", 2048),
        eos_token_ids=ends,
        bos_token_id=hf.get("bos_token_id"),
        pad_token_id=hf.get("pad_token_id"),
        mlp_bias=bool(hf.get("mlp_bias")),
        sliding_window=window,
        window_layers=window_layers,
        no_rope_layers=no_rope,
        rope_scaling=scaling,
        rope_local_theta=local_theta if window_layers else 0.0,
        query_scalar=hf.get("query_pre_attn_scalar") or 0.0,
        attn_softcap=hf.get("attn_logit_softcapping") or 0.0,
        final_softcap=hf.get("final_logit_softcapping") or 0.0,
    )


def to_hf(mc: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of an export; both spellings of the rotary positions, so that transformers 4 and 5 read it alike."""
    eos, own = list(mc.eos_token_ids), OWN[mc.family]
    fields = {
        "architectures": [mc.arch.architecture],
        "bos_token_id": mc.bos_token_id,
        "dtype": dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "head_dim": mc.head_dim,
        "hidden_size": mc.hidden_size,
        "initializer_range": mc.hidden_size**-0.5,
        "intermediate_size": mc.intermediate_size,
        "max_position_embeddings": mc.max_positions,
        "model_type": mc.family,
        "num_attention_heads": mc.num_heads,
        "num_hidden_layers": mc.num_layers,
        "num_key_value_heads": mc.num_kv_heads,
        "pad_token_id": mc.pad_token_id,
        "rms_norm_eps": mc.rms_eps,
        "tie_word_embeddings": mc.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": mc.vocab_size,
        **_write_rope(mc),
    }
    activation = _HF_ACTIVATIONS[mc.arch.activation][0]
    optional = {
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": mc.qkv_bias,
        "mlp_bias": mc.mlp_bias,
        "query_pre_attn_scalar": _whole(mc.query_scalar or mc.head_dim),
        "attn_logit_softcapping": mc.attn_softcap or None,
        "final_logit_softcapping": mc.final_softcap or None,
        "no_rope_layers": [int(layer not in mc.no_rope_layers) for layer in range(mc.num_layers)],
    }
    return fields | {name: value for name, value in optional.items() if name in own} | _write_windows(mc, own)


def _field_problems(hf: Mapping[str, Any], family: str) -> list[str]:
    """One line per field that is missing, unknown, or holds what this decoder does not do; rotary and window fields excepted."""
    arch, own = FAMILIES[family], OWN[family]
    problems = [f"{name} is missing" for name in REQUIRED if hf.get(name) is None]
    problems += [f"{name} is missing" for name in OWN_REQUIRED.get(family, ()) if name not in hf]
    architectures = hf.get("architectures") or [arch.architecture]
    if architectures != [arch.architecture]:
        problems.append(f"architectures = {architectures} is not [{arch.architecture!r}]")
    accepted = {name: values for name, values in NEUTRAL.items() if name not in own}
    accepted["hidden_act"] = accepted["hidden_activation"] = (*_HF_ACTIVATIONS[arch.activation], None)
    if family == "gemma":
        accepted["hidden_act"] += ("gelu",)  # as its first configs spell the tanh form
    for name, value in hf.items():
        if name in accepted and value not in accepted[name]:
            problems.append(f"{name} = {value!r} is not supported (it must be {accepted[name][0]!r})")
        known = name.startswith("_") or any(name in names for names in (accepted, own, READ, HARMLESS, GENERATION))
        if not known and value not in (None, False, "", [], {}):
            problems.append(f"{name} = {value!r} is unknown for {family}; it may change the numbers")
    return problems


def _read_windows(
    hf: Mapping[str, Any], arch: Family, layers: int, no_rope: tuple[int, ...], problems: list[str]
) -> tuple[int, tuple[int, ...]]:
    """The window and the layers that have it; (0, ()) where none has."""
    switch = "use_sliding_window"
    off = arch.windows == "none" or (switch in OWN[hf["model_type"]] and not hf.get(switch))
    window = None if off else hf.get("sliding_window")
    if hf.get("sliding_window_size") not in (None, hf.get("sliding_window")):
        problems.append(f"sliding_window_size = {hf['sliding_window_size']!r} does not agree with sliding_window = {window!r}")
    if not off and window is None and hf.get(switch):
        problems.append(f"sliding_window is missing beside {switch} = True")
    if window is not None and window < 1:
        problems.append(f"sliding_window = {window!r} must be at least 1")
    chosen = () if window is None else windows_by_default(arch, layers, no_rope, hf.get("sliding_window_pattern"))
    if hf.get(switch) and not arch.no_rope_every:  # Qwen
        chosen = tuple(range(hf.get("max_window_layers", 28), layers))
    types = hf.get("layer_types")
    if types is not None:
        given = tuple(layer for layer, kind in enumerate(types) if kind == _SLIDING)
        unknown = len(types) != layers or set(types) - {_FULL, _SLIDING}
        if unknown or (given and window is None) or (arch.windows == "all" and given != chosen):
            problems.append(f"layer_types = {types} is not supported (for {layers} layers and a window of {window})")
        chosen = given
    return (window or 0, chosen) if chosen else (0, ())


def _write_windows(mc: ModelConfig, own: frozenset[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "use_sliding_window" in own:
        fields["use_sliding_window"] = mc.sliding_window > 0
        if not mc.sliding_window:
            return fields
    if mc.arch.windows != "none":
        # Gemma wants a window even where no layer uses it.
        fields["sliding_window"] = mc.sliding_window or (None if mc.arch.windows == "all" else mc.max_positions)
    if mc.arch.windows == "any":
        fields["layer_types"] = [_SLIDING if layer in mc.window_layers else _FULL for layer in range(mc.num_layers)]
    return fields


def _read_no_rope(hf: Mapping[str, Any], arch: Family, layers: int, problems: list[str]) -> tuple[int, ...]:
    given = hf.get("no_rope_layers") if arch.no_rope_every else None
    if given is None:
        return no_rope_by_default(arch, layers, hf.get("no_rope_layer_interval"))
    if len(given) < layers:
        problems.append(f"no_rope_layers = {given} is shorter than num_hidden_layers = {layers}")
    return tuple(layer for layer, rotated in enumerate(given[:layers]) if not rotated)


def _read_rope(hf: Mapping[str, Any], arch: Family, problems: list[str]) -> tuple[float, RopeScaling | None, float]:
    """Rotary base, scaling, and the base of the layers with a window; from every spelling, which must agree."""
    whole, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    where, new, local = "rope_parameters", whole, {}
    nested = whole.keys() & {_FULL, _SLIDING}
    wrong = whole.keys() - nested if arch.local_theta else nested
    problems += [f"rope_parameters.{name} = {whole[name]!r} is not supported for {hf['model_type']}" for name in sorted(wrong)]
    if arch.local_theta:
        where, new, local = f"rope_parameters.{_FULL}", whole.get(_FULL) or {}, whole.get(_SLIDING) or {}
        stretched = _read_scaling(f"rope_parameters.{_SLIDING}", local, problems)
        if stretched is not None:
            problems.append(f"rope_parameters.{_SLIDING}.rope_type = {stretched.kind!r} is not supported (only default)")
    scalings = {_read_scaling(name, entry, problems) for name, entry in (("rope_scaling", old), (where, new)) if entry}
    if len(scalings) > 1:
        problems.append(f"rope_scaling = {old} does not agree with {where} = {new}")
    theta = _agreed("rope_theta", (old.get("rope_theta"), new.get("rope_theta"), hf.get("rope_theta")), arch.theta, problems)
    local_theta = _agreed("rope_local_base_freq", (local.get("rope_theta"), hf.get("rope_local_base_freq")), arch.local_theta, problems)
    return theta, next(iter(scalings), None), local_theta


def _read_scaling(where: str, entry: Mapping[str, Any], problems: list[str]) -> RopeScaling | None:
    kind = entry.get("rope_type") or entry.get("type") or "default"
    if kind != "default" and kind not in _SCALING_FIELDS:
        problems.append(f"{where}.rope_type = {kind!r} is not supported (only default, {', '.join(_SCALING_FIELDS)})")
        return None
    names = _SCALING_FIELDS.get(kind, {})
    found = len(problems)
    for name, value in entry.items():
        neutral = {"type": (kind, None), "partial_rotary_factor": (1, None)}.get(name, (None,))
        if name not in ("rope_theta", "rope_type", *names.values()) and value not in neutral:
            problems.append(f"{where}.{name} = {value!r} is not supported beside rope_type = {kind!r}")
    problems += [f"{where}.{name} is missing beside rope_type = {kind!r}" for name in names.values() if entry.get(name) is None]
    return RopeScaling(kind, **{ours: entry[theirs] for ours, theirs in names.items()}) if names and len(problems) == found else None


def _agreed(name: str, given: tuple[Any, ...], default: float, problems: list[str]) -> float:
    found = {float(value) for value in given if value is not None}
    if len(found) > 1:
        problems.append(f"{name} is given twice with different values: {sorted(found)}")
    return found.pop() if found else default


def _write_rope(mc: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_theta": mc.rope_theta}
    stretched: dict[str, Any] = {"rope_type": "default"}
    if mc.rope_scaling is not None:
        names = _SCALING_FIELDS[mc.rope_scaling.kind]
        stretched = {"rope_type": mc.rope_scaling.kind, **{theirs: getattr(mc.rope_scaling, ours) for ours, theirs in names.items()}}
        fields["rope_scaling"] = stretched
    whole = {**stretched, "rope_theta": mc.rope_theta}
    if not mc.arch.local_theta:
        return {**fields, "rope_parameters": whole}
    local = mc.rope_local_theta or mc.arch.local_theta
    nested = {_FULL: whole, _SLIDING: {"rope_type": "default", "rope_theta": local}}
    return {**fields, "rope_parameters": nested, "rope_local_base_freq": local}


def _whole(value: float) -> float:
    """A whole number without its point: transformers wants an int."""
    return int(value) if value == int(value) else value
