"""What a decoder is: sizes and the few switches that tell its families apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dccot_jax.records import InputError

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")

# Hugging Face fields that must hold one of these values, because another value changes the numbers.
_REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "use_sliding_window": (False, None),
    "pretraining_tp": (1, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
}

_READ_FIELDS = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "tie_word_embeddings",
        "max_position_embeddings",
        "layer_types",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
    }
)

# Fields that do not change a forward pass in evaluation mode.
_HARMLESS_FIELDS = frozenset(
    {
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "max_window_layers",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "sliding_window",  # read by transformers only where use_sliding_window is true
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_version",
        "use_cache",
        "use_mrope",
    }
)


class ModelError(InputError):
    """A model description or a weight file that this decoder cannot represent; names every problem found."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

    Attributes:
      family: "llama" or "qwen2"; decides the exported architecture.
      num_kv_heads: key/value heads K; divides num_heads N.
      head_dim: H; N * H need not equal hidden_size.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      max_positions: longest sequence that may be trained or generated.
      eos_token_ids, bos_token_id, pad_token_id: carried through import and export; the decoder does not read them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    max_positions: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.family not in FAMILIES:
            problems.append(f"family {self.family!r} is not one of {', '.join(FAMILIES)}")
        for name in _SIZES:
            if getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)} must be at least 1")
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}")
        if self.num_heads > 0 and self.hidden_size % self.num_heads:
            problems.append(f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}, which transformers refuses")
        if self.head_dim % 2:
            problems.append(f"head_dim = {self.head_dim} must be even (rotary positions)")
        if self.qkv_bias != (self.family == "qwen2"):
            problems.append(f"qkv_bias = {self.qkv_bias} does not fit family {self.family!r}")
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if problems:
            raise ModelError("model config: " + "; ".join(problems))

    @property
    def num_groups(self) -> int:
        """Query heads per key/value head, G."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; `from_dict` reads them back."""
        return {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Raises ModelError on missing or unknown fields."""
        try:
            return cls(**dict(fields))
        except TypeError as error:
            raise ModelError(f"model config: {error}") from None

    def num_params(self) -> int:
        """Parameters, a tied head counted once."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * h
        layer = 2 * d + d * qkv + (qkv if self.qkv_bias else 0) + self.num_heads * h * d + 3 * d * f
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)


def from_config(model: Mapping[str, Any], vocab_size: int, **token_ids: Any) -> ModelConfig:
    """A ModelConfig from `config.student.model` and the tokenizer's vocabulary size. Raises ModelError."""
    fields = dict(model)
    return ModelConfig.from_dict({**fields, "vocab_size": vocab_size, "qkv_bias": fields.get("family") == "qwen2", **token_ids})


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    Raises:
      ModelError: unknown architecture, a field whose value would change the numbers, or a field nobody here knows; all
        problems are named together.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"model_type {family!r} is not supported; known: {', '.join(FAMILIES)}")
    problems = []
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if hf.get(name) is None:
            problems.append(f"{name} is missing")
    architectures = hf.get("architectures") or [FAMILIES[family]]
    if architectures != [FAMILIES[family]]:
        problems.append(f"architectures = {architectures} is not [{FAMILIES[family]!r}]")
    for name, accepted in _REQUIRED_VALUES.items():
        if name in hf and hf[name] not in accepted:
            problems.append(f"{name} = {hf[name]!r} is not supported (it must be {accepted[0]!r})")
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        problems.append(f"layer_types = {sorted(set(hf['layer_types']))} is not supported (only full_attention)")
    eos = hf.get("eos_token_id")
    ends = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if not all(type(token) is int and 0 <= token < (hf.get("vocab_size") or 0) for token in ends):
        problems.append(f"eos_token_id = {eos!r} (or generation_config.json's) must be a token id of the vocabulary or a list of them")
    theta = _rope_theta(hf, problems)
    known = _REQUIRED_VALUES.keys() | _READ_FIELDS | _HARMLESS_FIELDS
    for name, value in hf.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            problems.append(f"{name} = {value!r} is unknown; it may change the numbers")
    if problems:
        raise ModelError("config.json: " + "; ".join(problems))
    heads = hf["num_attention_heads"]
    return ModelConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope_theta=theta,
        rms_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        max_positions=hf.get("max_position_embeddings", 2048),
        eos_token_ids=ends,
        bos_token_id=hf.get("bos_token_id"),
        pad_token_id=hf.get("pad_token_id"),
    )


def to_hf(mc: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of an export; both spellings of the rotary base, so that transformers 4 and 5 read it alike."""
    eos = list(mc.eos_token_ids)
    fields = {
        "architectures": [FAMILIES[mc.family]],
        "bos_token_id": mc.bos_token_id,
        "dtype": dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "head_dim": mc.head_dim,
        "hidden_act": "silu",
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
        "rope_parameters": {"rope_theta": mc.rope_theta, "rope_type": "default"},
        "rope_theta": mc.rope_theta,
        "tie_word_embeddings": mc.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": mc.vocab_size,
    }
    if mc.family == "llama":
        fields |= {"attention_bias": False, "mlp_bias": False}
    else:
        fields |= {"use_sliding_window": False}
    return fields


def _rope_theta(hf: Mapping[str, Any], problems: list[str]) -> float:
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters.rope_type = {rope['rope_type']!r} is not supported (only default)")
    for name in rope.keys() - {"rope_theta", "rope_type"}:
        if not (name == "partial_rotary_factor" and rope[name] in (1, None)):
            problems.append(f"rope_parameters.{name} = {rope[name]!r} is not supported")
    found = {float(value) for value in (rope.get("rope_theta"), hf.get("rope_theta")) if value is not None}
    if len(found) > 1:
        problems.append(f"rope_theta is given twice with different values: {sorted(found)}")
    return found.pop() if found else 10000.0
