"""Every family against Hugging Face torch in float32: logits, loss, gradients; exports load there, imports go back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from family_cases import CASES
from test_hf import jax_logits
from test_model import packed_batch, random_params

from dccot_jax.model.config import ModelConfig
from dccot_jax.model.decoder import forward
from dccot_jax.model.head import weighted_nll
from dccot_jax.model.hf import load_hf, save_hf
from dccot_jax.model.hf_names import LAYER, POST_NORMS, TOP

pytestmark = pytest.mark.parity


def loss_and_grads(params: Any, mc: ModelConfig, batch: dict[str, np.ndarray]) -> tuple[float, Any]:
    def loss(params: Any) -> jax.Array:
        hidden = forward(params, mc, batch["tokens"], batch["segment_ids"], batch["positions"], remat="none")
        total, weight = weighted_nll(params, mc, hidden, batch["labels"], batch["weights"])
        return total / weight

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), jax.device_get(grads)


def torch_grads(model: Any, mc: ModelConfig) -> Any:
    """Gradients of a torch model in our tree: by name, transposed, layers stacked."""
    found = {name: weight.grad.numpy() for name, weight in model.named_parameters()}

    def ours(name: str, theirs: tuple[str, bool]) -> np.ndarray:
        inner = POST_NORMS[name] if mc.arch.post_norms and name in POST_NORMS else theirs[0]
        if name in TOP:
            return found[inner].T if theirs[1] else found[inner]
        layers = [found[f"model.layers.{layer}.{inner}"] for layer in range(mc.num_layers)]
        return np.stack([x.T if theirs[1] else x for x in layers])

    shapes = random_params(mc)
    layers = {name: ours(name, LAYER.get(name, ("", False))) for name in shapes["layers"]}
    return {"layers": layers, **{name: ours(name, TOP[name]) for name in shapes if name != "layers"}}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_torch(name: str, tmp_path: Path):
    """Our export there; then a torch model, changed and saved by transformers, here and back."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    mc, params = CASES[name], random_params(CASES[name], deviation=0.17)  # D^-1/2: scores that do not magnify rounding
    save_hf(params, mc, None, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, mc.vocab_size, (2, 300))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jax_logits(params, mc, tokens), expected, rtol=0, atol=1e-4)

    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "theirs")
    found, params = load_hf(tmp_path / "theirs")
    assert found == mc
    batch = packed_batch(mc, [[40], [33]], 40)
    value, grads = loss_and_grads(params, mc, batch)
    logits = model(torch.tensor(batch["tokens"]), attention_mask=torch.tensor(batch["segment_ids"])).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(batch["labels"]).long().flatten(), reduction="none")
    weights = torch.tensor(batch["weights"])
    loss = (nll.view_as(weights) * weights).sum() / weights.sum()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(torch_grads(model, mc)), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs), path

    save_hf(params, found, None, tmp_path / "back")
    theirs, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert theirs.keys() == back.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(back[key], array)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(tokens)).logits, model(torch.tensor(tokens)).logits)


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_either_spelling_of_the_rotary_positions(name: str, tmp_path: Path):
    """What transformers makes of our config.json, and of each spelling in it alone, is what we meant."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    mc = CASES[name]
    save_hf(random_params(mc), mc, None, tmp_path)
    tokens, logits = torch.arange(60)[None], []
    text = json.loads((tmp_path / "config.json").read_text())
    for dropped in ((), ("rope_parameters",), ("rope_theta", "rope_scaling", "rope_local_base_freq")):
        fields = {key: value for key, value in text.items() if key not in dropped}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.model_type == mc.family
        model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
