"""Adapters on disk: the layout, and PEFT with torch gives the same logits, adapters apart and merged."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import TINY, UNTIED, host_params

from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelError
from dccot_jax.model.hf import save_hf
from dccot_jax.model.lora import merge, split, with_adapters
from dccot_jax.model.peft import save_peft
from dccot_jax.model.safetensors_io import TensorReader

TARGETS = {"qv": ("q_proj", "v_proj"), "all": ("all-linear",)}


def _write(tmp_path, mc, targets):
    adapted = with_adapters(mc, 3, 6.0, 0.1, targets)
    params = jax.tree.map(jnp.asarray, host_params(adapted))
    adapters, base = split(adapted, params)
    save_hf(base, mc, None, tmp_path / "base")
    save_peft(adapters, adapted, str(tmp_path / "base"), tmp_path / "adapter")
    return adapted, params


def test_layout(tmp_path):
    _, params = _write(tmp_path, TINY, TARGETS["qv"])
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "model.safetensors")
    reader = TensorReader(tmp_path / "adapter")
    assert len(reader.names) == 2 * 2 * TINY.num_layers
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    np.testing.assert_array_equal(reader.read(name, (slice(None), slice(None))), np.asarray(params["layers"]["wv_b"][1]).T)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 6.0, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    with pytest.raises(ModelError, match="has no adapters"):
        save_peft({}, TINY, "x", tmp_path / "none")


@pytest.mark.parity
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("mc", [TINY, UNTIED], ids=["tied", "untied"])
def test_peft_gives_the_same_logits_apart_and_merged(tmp_path, mc, targets):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    adapted, params = _write(tmp_path, mc, targets)
    merged, plain = merge(params, adapted)
    save_hf(merged, plain, None, tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(0, mc.vocab_size, (2, 12))
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(12), tokens.shape)
    hidden = decoder.forward(params, adapted, jnp.asarray(tokens), jnp.asarray(ones), jnp.asarray(positions))
    expected = np.asarray(head.logits(params, adapted, hidden))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apart = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        for model in (apart, whole):
            np.testing.assert_allclose(model(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)
