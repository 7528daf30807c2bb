"""Every family against a float64 reference, packed; on a mesh; generation; initial values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from reference_decoder import reference_logits
from test_model import check_on_mesh, packed_batch, random_params

from dccot_jax.generate.sampler import Sampler
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.decoder import forward, init_params, layer_differences, rms_norm
from dccot_jax.model.head import logits


def run(mc: ModelConfig, params: dict, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: logits(p, mc, forward(p, mc, tokens, segment_ids, positions, remat="none")))(params))


# The others differ from these in the table of parameters only; all of them are compared with torch in test_families_parity.py.
FORWARD = sorted(CASES.keys() - {"llama", "mistral-full", "qwen2", "gemma-biased", "gemma3-full", "smollm3"})


@pytest.mark.parametrize("name", FORWARD)
def test_packed_documents_equal_the_float64_reference(name: str):
    mc = CASES[name]
    params = random_params(mc)
    batch = packed_batch(mc, [[9, 20, 7], [31]], 40)
    found = run(mc, params, batch["tokens"], batch["segment_ids"], batch["positions"])
    assert np.isfinite(found).all()
    for row, start, length in [(0, 0, 9), (0, 9, 20), (0, 29, 7), (1, 0, 31)]:
        here = slice(start, start + length)
        np.testing.assert_allclose(found[row, here], reference_logits(params, mc, batch["tokens"][row, here]), atol=1e-4, rtol=1e-4)


def test_beyond_256_positions():
    mc = CASES["gemma3"]
    params, tokens = random_params(mc), np.random.default_rng(1).integers(0, 96, 270)
    found = run(mc, params, tokens[None], np.ones((1, 270), np.int32), np.arange(270)[None])
    np.testing.assert_allclose(found[0], reference_logits(params, mc, tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "smollm3-window"])
def test_gradients_on_eight_devices_equal_those_on_one(name: str):
    check_on_mesh(CASES[name], packed_batch(CASES[name], [[9, 7], [16], [15], [8, 8]], 16), {"data": 2, "fsdp": 2, "tensor": 2}, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm3-window"])
def test_greedy_tokens_are_the_argmax_of_the_whole_forward_pass(name: str):
    """Prompts and answers longer than the windows; slots are filled again."""
    mc = CASES[name]
    params, rng = random_params(mc), np.random.default_rng(5)
    prompts = [rng.integers(0, mc.vocab_size, length).tolist() for length in (5, 30, 1, 17, 12, 9)]
    results = Sampler(mc, params, batch_rows=4, eos_id=[3, 77]).generate(prompts, 20)
    assert max(len(result.tokens) for result in results) == 20
    tokens, segment_ids = np.zeros((6, 50), np.int32), np.zeros((6, 50), np.int32)
    for row, (prompt, result) in enumerate(zip(prompts, results)):
        length = len(prompt) + len(result.tokens)
        tokens[row, :length], segment_ids[row, :length] = prompt + result.tokens, 1
    best = run(mc, params, tokens, segment_ids, np.broadcast_to(np.arange(50), (6, 50))).argmax(-1)
    for row, (prompt, result) in enumerate(zip(prompts, results)):
        assert best[row, len(prompt) - 1 : len(prompt) + len(result.tokens) - 1].tolist() == result.tokens


def test_norm_offset_is_added_in_float32():
    """1 + 2^-9 is 1 in bfloat16: the sum must not be made there, whatever the weights are stored in."""
    x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
    weight = jnp.asarray([2.0**-9, 2.0**-7] * 16, jnp.bfloat16)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + np.asarray(weight, np.float64))
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), weight, CASES["gemma"]), expected, rtol=1e-6)
    assert rms_norm(jnp.asarray(x, jnp.bfloat16), weight, CASES["gemma"]).dtype == jnp.bfloat16


def test_initial_parameters_are_neutral_norms_and_zero_biases():
    for name in ("gemma2", "smollm3-window"):
        mc = CASES[name]
        for weight, value in init_params(mc, 0)["layers"].items():
            if weight.endswith("norm"):
                assert (np.asarray(value) == (0.0 if mc.arch.norm_offset else 1.0)).all(), weight
            else:
                assert (np.asarray(value) == 0).all() == weight.startswith("b"), weight


def test_layers_that_are_alike_add_nothing_to_the_scan():
    for name in ("llama-3", "mistral", "qwen3", "gemma"):
        assert layer_differences(CASES[name]) == {}
    assert layer_differences(CASES["gemma2"]).keys() == {"window"}
    assert layer_differences(CASES["smollm3"]).keys() == {"rope"}
    assert layer_differences(CASES["gemma3"]).keys() == {"rope", "window"}
