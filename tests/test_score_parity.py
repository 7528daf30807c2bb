"""Scores against Hugging Face torch in float32, row by row and unpadded: an independent implementation of every signal."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dccot_jax.model import hf
from dccot_jax.model.sharding import make_mesh
from dccot_jax.select import engine, signals
from dccot_jax.select.views import Row, plan_tiles

pytestmark = pytest.mark.parity
CONTEXT = [1, 5, 6]
NAMES = ("entropy", "ifd_loss", "ifd_ppl", "nll", "nll_unconditional", "ppl")


def ours(path, rows: list[Row]) -> np.ndarray:
    """[N, S] float32 scores in the order of NAMES."""
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    mc, params = hf.load_hf(path, mesh)
    chosen, _ = signals.split_signals(NAMES)
    tiles = plan_tiles(rows, len(CONTEXT), shards=1, tile_tokens=512)
    found = np.zeros((len(rows), len(NAMES)), np.float32)
    for index, values in engine.score_tiles(
        engine.make_program(mc, chosen, "float32"), params, mesh, rows, tiles, signals.VIEWS, CONTEXT, in_flight=2
    ):
        found[index] = values
    return found


def theirs(torch, model, row: Row) -> list[float]:
    def stats(ids: list[int], n: int):
        with torch.no_grad():
            z = model(torch.tensor([ids])).logits[0, -n - 1 : -1].double()
        logp = torch.log_softmax(z, -1)
        label = logp.gather(1, torch.tensor(ids[-n:])[:, None])[:, 0]
        return label.mean().item(), -(logp.exp() * logp).sum(-1).mean().item()

    n = row.completion_tokens
    conditional, entropy = stats(row.input_ids.tolist(), n)
    alone, _ = stats([*CONTEXT, *row.input_ids[row.prompt_tokens :].tolist()], n)
    return [entropy, conditional / alone, np.exp(alone - conditional), -conditional, -alone, np.exp(-conditional)]


def assert_equal_to_torch(torch, path, rows: list[Row]) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = np.array([theirs(torch, model, row) for row in rows])
    names = list(NAMES)
    found = ours(path, rows)
    for name in ("entropy", "ifd_loss", "ifd_ppl", "nll", "nll_unconditional"):
        np.testing.assert_allclose(found[:, names.index(name)], expected[:, names.index(name)], rtol=0, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(found[:, names.index("ppl")], expected[:, names.index("ppl")], rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_equal_torch_on_a_random_model(tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=3000.0,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    lengths = [(5, 1), (20, 12), (40, 60), (280, 30), (3, 200)]
    rows = [Row(f"{i}", rng.integers(0, 211, p + c).astype(np.int32), p) for i, (p, c) in enumerate(lengths)]
    assert_equal_to_torch(torch, tmp_path, rows)


@pytest.mark.realdata
@pytest.mark.slow
def test_scores_equal_torch_on_smollm2(smollm2_dir):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    from dccot_jax.data.template import render_many

    pairs = [
        ("Tom has 3 boxes with 4 pens each. How many pens has he?", "Each box has 4 pens. 3 x 4 = 12\nThe answer is 12."),
        ("Is the sky green?", "The sky is blue. The answer is no."),
        ("What is 17 + 25?", "17 + 25 = 43\nThe answer is 43."),
    ]
    rows = []
    for i, rendered in enumerate(render_many(tokenizer, pairs)):
        assert not isinstance(rendered, Exception)
        rows.append(Row(f"{i}", np.asarray(rendered.input_ids, np.int32), rendered.prompt_tokens))
    assert_equal_to_torch(torch, smollm2_dir, rows)
