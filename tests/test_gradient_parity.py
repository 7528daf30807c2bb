"""Gradient norms of every family against Hugging Face torch in float64, row by row and unpadded."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from family_cases import CASES
from test_families_parity import torch_grads
from test_grand import squares_program
from test_model import random_params

from dccot_jax.model import hf
from dccot_jax.model.sharding import make_mesh
from dccot_jax.select.gradients.layout import measure_streams, plan_streams
from dccot_jax.select.gradients.subset import weight_names
from dccot_jax.select.views import Row

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", CASES)
def test_norms_equal_torch_in_float64(name: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    mc = CASES[name]
    hf.save_hf(random_params(mc, deviation=0.17), mc, None, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    sizes = [(20, 12), (30, 30), (3, 55)]
    rows = [Row(f"{i}", rng.integers(0, mc.vocab_size, p + c).astype(np.int32), p) for i, (p, c) in enumerate(sizes)]
    tiles = plan_streams(rows, shards=1, tile_tokens=256)
    expected = []
    for row in rows:
        model.zero_grad()
        ids = torch.tensor([row.input_ids.tolist()])
        model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < row.prompt_tokens, -100)).loss.backward()
        grads = torch_grads(model, mc)
        expected.append([float(np.linalg.norm((grads["layers"] | grads)[weight])) for weight in weight_names(mc)])
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    _, params = hf.load_hf(tmp_path, mesh)
    for index, squares in measure_streams(squares_program(mc), params, mesh, rows, tiles, in_flight=1):
        for i, found in zip(index, squares):
            whole = np.linalg.norm(expected[i])
            np.testing.assert_allclose(np.sqrt(found), expected[i], rtol=0, atol=1e-5 * whole)
            np.testing.assert_allclose(np.sqrt(found.sum()), whole, rtol=1e-5)
