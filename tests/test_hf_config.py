"""config.json of every family: round trips, published ones, spellings, refused and missing fields; the student's own config group."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from family_cases import CASES, tiny

from dccot_jax.config import default_config, override
from dccot_jax.config_identity import config_slice
from dccot_jax.model.config import ModelConfig, ModelError, from_config
from dccot_jax.model.families import FAMILIES
from dccot_jax.model.hf_config import from_hf, to_hf
from dccot_jax.model.sharding import WEIGHT_AXES, weight_shapes


@pytest.mark.parametrize("name", CASES)
def test_configs_and_parameters_of_every_family(name: str):
    mc = CASES[name]
    assert from_hf(json.loads(json.dumps(to_hf(mc)))) == mc
    assert ModelConfig.from_dict(json.loads(json.dumps(mc.to_dict()))) == mc
    shapes = weight_shapes(mc)
    assert sum(int(np.prod(shape)) for shape in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))) == mc.num_params()
    for weight, (_, *shape) in shapes["layers"].items():
        assert len(WEIGHT_AXES[weight]) == len(shape)


# Published configs, less what is plainly harmless.
GEMMA = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "rms_norm_eps": 1e-6}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"}
GEMMA3 = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window_pattern": 6,
}
SMOLLM3 = {
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pretraining_tp": 2,
    "rope_scaling": None,
    "rope_theta": 5e6,
}
WINDOW_TWICE = {"sliding_window": 4096, "sliding_window_size": 4096}
UNUSED_WINDOW = {"use_sliding_window": False, "sliding_window": 32768}


def published(model_type: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, **fields) -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    act = "gelu_pytorch_tanh" if model_type.startswith("gemma") else "silu"
    return {"model_type": model_type, **dict(zip(names, (vocab, hidden, inner, layers, heads, kv))), "hidden_act": act, **fields}


# Each with the number of parameters that its checkpoint has.
PUBLISHED = {
    "Llama-2-7b": (
        6_738_415_616,
        published("llama", 32000, 4096, 11008, 32, 32, 32, pretraining_tp=1, rope_scaling=None),
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        published("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, rope_scaling=LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True),
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        8_030_261_248,
        published("llama", 128256, 4096, 14336, 32, 32, 8, rope_scaling=LLAMA3, attention_bias=False, mlp_bias=False),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        published("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        published("qwen2", 151936, 896, 4864, 24, 14, 2, **UNUSED_WINDOW, max_window_layers=24, tie_word_embeddings=True),
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        1_777_088_000,
        published("qwen2", 151936, 1536, 8960, 28, 12, 2, **UNUSED_WINDOW, max_window_layers=21, use_mrope=False),
    ),
    "Qwen3-0.6B": (
        596_049_920,
        published(
            "qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, attention_bias=False, sliding_window=None, tie_word_embeddings=True
        ),
    ),
    "gemma-2b": (
        2_506_172_416,
        published("gemma", 256000, 2048, 16384, 18, 8, 1, **(GEMMA | {"hidden_act": "gelu", "hidden_activation": None})),
    ),
    "gemma-2-2b": (
        2_614_341_888,
        published("gemma2", 256000, 2304, 9216, 26, 8, 4, **GEMMA, **CAPS, query_pre_attn_scalar=256, sliding_window=4096),
    ),
    "gemma-2-9b-it": (
        9_241_705_984,
        published("gemma2", 256000, 3584, 14336, 42, 16, 8, **GEMMA, **CAPS, **WINDOW_TWICE, query_pre_attn_scalar=256),
    ),
    "gemma-3-1b-it": (
        999_885_952,
        published("gemma3_text", 262144, 1152, 6912, 26, 4, 1, **GEMMA, **GEMMA3, query_pre_attn_scalar=256, sliding_window=512),
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        published("smollm3", 128256, 2048, 11008, 36, 16, 4, **SMOLLM3, use_sliding_window=False, sliding_window=None),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str):
    count, fields = PUBLISHED[name]
    mc = from_hf(fields)
    assert mc.num_params() == count
    if name == "gemma-2-2b":
        assert mc.window_layers == tuple(range(0, 26, 2)) and (mc.attn_softcap, mc.final_softcap, mc.sliding_window) == (50, 30, 4096)
    if name == "gemma-3-1b-it":
        assert [layer for layer in range(26) if layer not in mc.window_layers] == [5, 11, 17, 23]
        assert [rope.theta for rope in mc.layer_ropes[4:6]] == [1e4, 1e6] and mc.attn_scale == 1 / 16
    if name == "SmolLM3-3B":
        assert mc.no_rope_layers == tuple(range(3, 36, 4)) and mc.tie_embeddings


def test_both_spellings_of_rotary_positions_are_read_and_must_agree():
    for name in ("llama-3", "llama-biased", "gemma3", "smollm3"):
        mc, both = CASES[name], to_hf(CASES[name])
        old = {key: value for key, value in both.items() if key != "rope_parameters"}
        new = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
        assert from_hf(old) == from_hf(new) == mc
        with pytest.raises(ModelError, match="rope_theta is given twice"):
            from_hf({**new, "rope_theta": 1.0})
    with pytest.raises(ModelError, match=r"rope_scaling = .* does not agree with rope_parameters"):
        from_hf({**to_hf(CASES["llama-3"]), "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (
        from_hf({**to_hf(CASES["qwen3"]), "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}).rope_scaling.factor
        == 2
    )


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = [
    ("llama", {"rope_scaling": YARN}, "rope_scaling.rope_type"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_scaling.rope_type"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}, "rope_parameters.mrope_section"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 700.0}}}, "rope_parameters.full_attention"),
    ("llama-3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ("llama", {"sliding_window": 4096}, "sliding_window"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("llama", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
    ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"attention_multiplier": 0.1}, "attention_multiplier"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("qwen2", {"use_sliding_window": True}, "sliding_window is missing"),
    ("qwen2-window", {"use_sliding_window": False}, "layer_types"),
    ("qwen2-window", {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, "layer_types"),
    ("qwen3", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
    ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types"),
    ("gemma2", {"sliding_window_size": 7}, "sliding_window_size"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}, "rope_parameters.rope_theta"),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "rope_parameters.sliding_attention"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
]
MISSING = [
    ("mistral", "sliding_window"), ("qwen3", "head_dim"), ("gemma2", "attn_logit_softcapping"), ("gemma2", "query_pre_attn_scalar"),
    ("gemma3", "sliding_window"), ("smollm3", "num_key_value_heads"), ("llama", "intermediate_size"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "field"), REFUSED, ids=[f"{name}-{field}" for name, _, field in REFUSED])
def test_what_would_change_the_numbers_is_refused_by_name(name: str, change: dict, field: str):
    with pytest.raises(ModelError) as error:
        from_hf({**to_hf(CASES[name]), **change})
    assert field in str(error.value) and "\n" not in str(error.value)


def test_missing_fields_are_named_and_harmless_ones_are_not():
    for name, field in MISSING:
        with pytest.raises(ModelError, match=f"{field} is missing"):
            from_hf({key: value for key, value in to_hf(CASES[name]).items() if key != field})
    for name in CASES:
        harmless = {
            "cache_implementation": "hybrid",
            "attention_dropout": 0.1,
            "pretraining_tp": 2,
            "_name_or_path": "x",
            "unheard_of": None,
            "nothing": {},
            "max_length": 4096,
            "temperature": 0.6,
            "top_p": 0.9,
            "do_sample": True,
        }
        assert from_hf({**to_hf(CASES[name]), **harmless}) == CASES[name]
    with pytest.raises(ModelError, match="model_type 'gemma3' is not supported; known: llama, mistral"):
        from_hf({"model_type": "gemma3"})
    with pytest.raises(ModelError, match=r"model_type 'gemma3' is not supported \(save its language model, 'gemma3_text', by itself\)"):
        from_hf({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})


def test_settings_that_do_not_fit_a_family_are_refused():
    for family, fields, name in [
        ("llama", {"sliding_window": 4, "window_layers": (0, 1, 2)}, "sliding_window"),
        ("mistral", {"sliding_window": 4, "window_layers": (0,)}, "window_layers"),
        ("qwen2", {}, "qkv_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"sliding_window": 4}, "sliding_window"),
        ("qwen3", {"sliding_window": 4, "window_layers": (3,)}, "window_layers"),
        ("gemma", {"final_softcap": 30.0}, "final_softcap"),
        ("gemma3_text", {"attn_softcap": 50.0}, "attn_softcap"),
        ("gemma3_text", {"sliding_window": 4, "window_layers": (0,)}, "rope_local_theta"),
        ("llama", {"no_rope_layers": (1,)}, "no_rope_layers"),
        ("llama", {"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_scaling": {"kind": "llama3", "factor": 2.0}}, "rope_scaling"),
    ]:
        with pytest.raises(ModelError, match=name):
            tiny(family, **fields)


def test_the_students_config_describes_every_family():
    for family, arch in FAMILIES.items():
        config = override(default_config(), {"student.model.family": family, "student.model.num_layers": 7})
        mc = from_config(config.student.model, 300)
        assert mc.arch is arch and not mc.window_layers and mc.no_rope_layers == ((3,) if family == "smollm3" else ())
        config = override(config, {"student.model.sliding_window": 16})
        if arch.windows == "none":
            with pytest.raises(ModelError, match="sliding_window = 16 does not fit"):
                from_config(config.student.model, 300)
        else:
            expected = {"gemma2": (0, 2, 4, 6), "gemma3_text": (0, 1, 2, 3, 4, 6), "smollm3": (3,)}.get(family, tuple(range(7)))
            mc = from_config(config.student.model, 300)
            assert mc.window_layers == expected and mc.rope_local_theta == arch.local_theta
            assert from_hf(to_hf(mc)) == mc
    capped = override(
        default_config(), {"student.model.family": "gemma2", "student.model.attn_softcap": 50.0, "student.model.final_softcap": 30.0}
    )
    assert from_config(capped.student.model, 300).final_softcap == 30


def test_settings_that_are_off_leave_the_identity_of_older_runs_alone():
    old = {
        "family",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "rope_theta",
        "tie_embeddings",
        "max_positions",
    }
    keys = {key.rsplit(".", 1)[1] for key in config_slice(default_config(), ("student",)) if key.startswith("student.model.")}
    assert keys == old
    changed = override(default_config(), {"student.model.sliding_window": 8})
    assert config_slice(changed, ("student",))["student.model.sliding_window"] == 8
    assert tiny("llama").to_dict().keys() == {field.name for field in dataclasses.fields(ModelConfig)[:16]}
