"""Fields of a Hugging Face `config.json`: which are read, which must be neutral, which do not matter; all others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SWITCHED_WINDOW = ("use_sliding_window", "sliding_window")
_GEMMA2 = ("hidden_act", "hidden_activation", "attention_bias", "sliding_window", "query_pre_attn_scalar", "final_logit_softcapping")
_GEMMA_REQUIRED = ("num_key_value_heads", "head_dim", "sliding_window", "query_pre_attn_scalar")

# Must be there, in every family.
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

READ = frozenset(
    {
        *REQUIRED,
        "model_type",
        "architectures",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "max_position_embeddings",
        "layer_types",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
    }
)

# What single families read besides.
OWN: Mapping[str, frozenset[str]] = {
    "llama": frozenset({"hidden_act", "attention_bias", "mlp_bias"}),
    "mistral": frozenset({"hidden_act", "sliding_window"}),
    "qwen2": frozenset({"hidden_act", *_SWITCHED_WINDOW}),
    "qwen3": frozenset({"hidden_act", "attention_bias", *_SWITCHED_WINDOW}),
    "gemma": frozenset({"hidden_act", "hidden_activation", "attention_bias"}),
    "gemma2": frozenset({*_GEMMA2, "attn_logit_softcapping", "sliding_window_size"}),  # some say the window twice
    "gemma3_text": frozenset({*_GEMMA2, "sliding_window_pattern", "rope_local_base_freq"}),
    "smollm3": frozenset({"hidden_act", "attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *_SWITCHED_WINDOW}),
}

# Must be there in these families: transformers would fill in a number of its own.
OWN_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "mistral": ("num_key_value_heads", "sliding_window"),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
    "gemma": ("num_key_value_heads", "head_dim"),
    "gemma2": (*_GEMMA_REQUIRED, "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": _GEMMA_REQUIRED,
    "smollm3": ("num_key_value_heads",),
}

# Must hold one of these values where it is there, in a family that does not read it, because another changes the numbers.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "use_sliding_window": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),  # Gemma 3 has the field, and transformers does not apply it
}

# Fields that do not change a forward pass in evaluation mode.
HARMLESS = frozenset(
    {
        "attention_dropout",
        "attn_implementation",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "max_window_layers",  # read where use_sliding_window is true
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",  # the order of sums only
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

# How its authors generate, which older configs hold too: what counts here is the config's own protocol.
GENERATION = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
