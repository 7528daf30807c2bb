"""Scoring never holds [B, T, V]: what compilers reserve for the scoring program, on the CPU and on a TPU slice (libtpu, no TPU)."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from dccot_jax.model import head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import batch_spec, make_mesh
from dccot_jax.select import engine
from dccot_jax.select.signals import required_stats, split_signals
from dccot_jax.select.views import TILE_TOKENS_ACCELERATOR, Bucket, Tile, tile_slots, view_arrays
from dccot_jax.train.checkpoint import abstract_params

SIGNALS = split_signals(("nll", "entropy", "ifd_loss", "ifd_ppl"))[0]
VOCAB = 151_936
# The shape of Qwen3-8B.
EIGHT = ModelConfig(
    family="qwen3", vocab_size=VOCAB, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128,
    tie_embeddings=False, max_positions=40960,
)  # fmt: skip
SMALL = ModelConfig(
    family="qwen3", vocab_size=32_003, hidden_size=96, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32,
    tie_embeddings=False, max_positions=2048,
)  # fmt: skip


def compiled_scoring(mc: ModelConfig, mesh: jax.sharding.Mesh, bucket: Bucket, slots: int, dtype: str) -> jax.stages.Compiled:
    """The engine's program for one tile of a bucket, compiled from shapes alone."""
    tile = Tile(bucket, (), slots)
    views = {
        view: {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, batch_spec(slots, x.ndim, mesh)))
            for name, x in view_arrays(view, (), tile, ()).items()
        }
        for view in required_stats(SIGNALS)
    }
    with jax.set_mesh(mesh):
        program = engine.make_program.__wrapped__(mc, SIGNALS, dtype)  # not kept: a test changes what it is made of
        return program.lower(abstract_params(mc, mesh, jnp.dtype(dtype)), views).compile()


def largest_over_vocabulary(text: str, vocab: int, weights: int) -> int:
    """Elements of the largest array of a compiled program that has the vocabulary as a dimension and is not of the tables' size."""
    found = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", text)}
    return max(math.prod(shape) for shape in found if vocab in shape and math.prod(shape) != weights)


def test_scoring_on_cpu_holds_one_chunk_of_logits(monkeypatch):
    rows, length = 2, 1024
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    everything = rows * length * SMALL.vocab_size
    monkeypatch.setattr(head, "_BLOCKS", {"cpu": (everything // 32, SMALL.vocab_size)})
    compiled = compiled_scoring(SMALL, mesh, Bucket(length, length), rows, "float32")
    assert compiled.memory_analysis().temp_size_in_bytes < everything * 4 / 3
    tables = SMALL.vocab_size * SMALL.hidden_size
    assert largest_over_vocabulary(compiled.as_text(), SMALL.vocab_size, tables) <= everything // 32
    monkeypatch.setattr(head, "_BLOCKS", {"cpu": (everything, SMALL.vocab_size)})  # the same figures see [B, T, V] where there is one
    compiled = compiled_scoring(SMALL, mesh, Bucket(length, length), rows, "float32")
    assert compiled.memory_analysis().temp_size_in_bytes > everything * 4
    assert largest_over_vocabulary(compiled.as_text(), SMALL.vocab_size, tables) == everything


@pytest.mark.slow
def test_scoring_8b_with_150k_vocabulary_on_v5e_16():
    """Figures in docs/scale.md. Rows of 512 tokens: with longer ones the attention scores, T² of them per head, hide the head."""
    pytest.importorskip("libtpu")
    from dccot_jax.estimate.aot import tpu_devices
    from dccot_jax.estimate.topologies import find_topology

    topology = find_topology("v5e-16")
    mesh = make_mesh({"fsdp": -1}, tpu_devices(topology))
    bucket = Bucket(512, 512)
    rows = tile_slots(bucket, TILE_TOKENS_ACCELERATOR)  # of one chip
    compiled = compiled_scoring(EIGHT, mesh, bucket, rows * topology.chips, "bfloat16")
    stats, everything = compiled.memory_analysis(), rows * bucket.scored * VOCAB
    print(
        f"B·T·V·4 {4 * everything:,}, arguments {stats.argument_size_in_bytes:,}, temporaries {stats.temp_size_in_bytes:,} bytes per chip"
    )
    assert stats.temp_size_in_bytes < everything * 4 / 2
    assert largest_over_vocabulary(compiled.as_text(), VOCAB, VOCAB * EIGHT.hidden_size) <= everything // 32
