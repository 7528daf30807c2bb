"""Every family against outputs of Hugging Face torch that are kept in a file, so that no torch is needed; and the file against torch."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from family_cases import CASES
from test_model import random_params
from torch_reference import DEVIATION, FILE, NAMES, POSITIONS, TOKENS, batch_of, torch_outputs

from dccot_jax.model.decoder import forward
from dccot_jax.model.head import logits, weighted_nll
from dccot_jax.model.hf_names import LAYER, POST_NORMS, TOP


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients_equal_torch(name: str):
    mc, expected = CASES[name], json.loads(FILE.read_text())[name]
    batch = batch_of(mc)

    def loss(params):
        hidden = forward(params, mc, batch["tokens"], batch["segment_ids"], batch["positions"], remat="none")
        total, weight = weighted_nll(params, mc, hidden, batch["labels"], batch["weights"])
        return total / weight, logits(params, mc, hidden)

    (value, found), grads = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(random_params(mc, deviation=DEVIATION)))
    found = np.asarray(found)[:, POSITIONS][:, :, TOKENS]
    found[1, np.array(POSITIONS) >= 33] = 0.0
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)
    assert value == pytest.approx(expected["loss"], rel=1e-5)
    norms = {TOP[key][0]: np.linalg.norm(grads[key]) for key in grads if key != "layers"}
    for key, stacked in grads["layers"].items():
        inner = POST_NORMS[key] if mc.arch.post_norms and key in POST_NORMS else LAYER[key][0]
        norms |= {f"model.layers.{layer}.{inner}": np.linalg.norm(one) for layer, one in enumerate(stacked)}
    assert norms == pytest.approx(expected["gradient_norms"], rel=1e-4, abs=1e-6)  # zero: key biases of layers without positions


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_the_file_holds_what_torch_says(name: str, tmp_path: Path):
    pytest.importorskip("torch")
    found, expected = torch_outputs(CASES[name], tmp_path), json.loads(FILE.read_text())[name]
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=2e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=1e-4, abs=1e-6)
