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
NAMES = ("el2n", "entropy", "ifd_loss", "ifd_ppl", "margin", "nll", "nll_unconditional", "ppl", "rank_surprisal")


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


def theirs(torch, model, row: Row) -> dict[str, float]:
    def logits(ids: list[int], n: int):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -n - 1 : -1], torch.tensor(ids[-n:])[:, None]

    n = row.completion_tokens
    z, labels = logits(row.input_ids.tolist(), n)
    logp = torch.log_softmax(z.double(), -1)
    p, label = logp.exp(), logp.gather(1, labels)[:, 0]
    one_hot = torch.zeros_like(p).scatter_(1, labels, 1.0)
    top = p.topk(2, -1).values
    rank = 1 + (z > z.gather(1, labels)).sum(-1)
    alone_z, alone_labels = logits([*CONTEXT, *row.input_ids[row.prompt_tokens :].tolist()], n)
    alone = torch.log_softmax(alone_z.double(), -1).gather(1, alone_labels).mean().item()
    conditional = label.mean().item()
    return {
        "el2n": (p - one_hot).norm(dim=-1).mean().item(),
        "entropy": -(p * logp).sum(-1).mean().item(),
        "ifd_loss": conditional / alone,
        "ifd_ppl": np.exp(alone - conditional),
        "margin": (top[:, 0] - top[:, 1]).mean().item(),
        "nll": -conditional,
        "nll_unconditional": -alone,
        "ppl": np.exp(-conditional),
        "rank_surprisal": (rank.clamp(max=100).sum() / -label.sum()).item(),
    }


def assert_equal_to_torch(torch, path, rows: list[Row]) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = [theirs(torch, model, row) for row in rows]
    found = ours(path, rows)
    for place, name in enumerate(NAMES):
        relative, absolute = (1e-4, 0) if name == "ppl" else (0, 1e-4)
        np.testing.assert_allclose(found[:, place], [row[name] for row in expected], rtol=relative, atol=absolute, err_msg=name)


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
