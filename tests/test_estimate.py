"""The estimator against real small trees, hand-made sums, its own advice, and the compiler where libtpu is installed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config
from training_cases import TINY, UNTIED, mesh, write_student

from dccot_jax import config as config_lib
from dccot_jax.cli import main
from dccot_jax.config import ConfigError
from dccot_jax.estimate.advise import ALTERS
from dccot_jax.estimate.aot import lowered_step
from dccot_jax.estimate.assess import assess
from dccot_jax.estimate.attention import student_attention
from dccot_jax.estimate.data import calls_per_question, data_totals
from dccot_jax.estimate.flops import executed_flops, forward_per_token, model_flops, muon_flops
from dccot_jax.estimate.memory import (
    batch_bytes,
    fits,
    gradient_bytes,
    head_chunks,
    optimizer_bytes,
    parameter_bytes,
    saved_activations,
    step_memory,
    teacher_bytes,
)
from dccot_jax.estimate.roofline import link_bytes, memory_bytes_moved, predict
from dccot_jax.estimate.student import student_model, teacher_model
from dccot_jax.estimate.tiles import tiled_elements
from dccot_jax.estimate.topologies import GIB, TopologyError, find_topology, larger
from dccot_jax.estimate.training import Training, training_of, weights
from dccot_jax.model.backends.registry import AttentionError
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.hf import from_hf
from dccot_jax.model.lora import with_adapters
from dccot_jax.train.adapters import abstract_trained
from dccot_jax.train.checkpoint import abstract_params
from dccot_jax.train.muon import _newton_schulz
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import abstract_state

ROOT = Path(__file__).parent.parent
STUDENTS = ROOT / "configs" / "students"
EIGHT = ModelConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    tie_embeddings=False, max_positions=131072,
)  # fmt: skip
BASE = Training(
    mc=EIGHT, mesh=(1, 64, 1), rows=64, tokens=4096, microbatches=1, remat="nothing_saveable", optimizer="adamw", compute_dtype="bfloat16"
)  # fmt: skip


def bytes_per_device(tree) -> int:
    """What one device holds of a tree of ShapeDtypeStructs with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- arguments: counted from the state that the trainer itself would make ----------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("mc", [TINY, UNTIED], ids=["tied", "untied, biases"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon", "adamw/bfloat16", "muon/bfloat16"])
@pytest.mark.parametrize("lora", [{}, {"lora__rank": 4, "lora__targets": ("q_proj", "down_proj"), "lora__frozen_dtype": "bfloat16"}])
def test_arguments_are_those_of_the_abstract_state(mc, optimizer, sizes, lora):
    asked, _, dtype = optimizer.partition("/")
    on = mesh(*sizes)
    config = tiny_config(
        train__optimizer=asked, train__moment_dtype=dtype or "float32", **{f"train__{key}": value for key, value in lora.items()}
    )
    training = dataclasses.replace(
        training_of(config, mc, find_topology(f"v5e-{math.prod(sizes)}"), teacher=UNTIED)[0], mesh=sizes, tiled=False
    )
    params, constants = abstract_trained(training.mc, on, config.train)
    state = abstract_state(params, make_optimizer(config.train), on, constants)
    assert parameter_bytes(training) == bytes_per_device([state["params"], state.get("frozen", {})])
    moments = [leaf for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim > 0]
    assert optimizer_bytes(training) == bytes_per_device(moments)
    assert gradient_bytes(training) == bytes_per_device(state["params"])
    assert teacher_bytes(training) == bytes_per_device(abstract_params(UNTIED, on, jnp.bfloat16))
    assert sum(weight.elements for weight in weights(mc, sizes)) == mc.num_params()


def test_batch_bytes_are_those_of_the_batch_on_one_device():
    training = dataclasses.replace(BASE, mesh=(2, 4, 8), rows=64, microbatches=2)
    assert batch_bytes(training) == 5 * (64 // 8) * 4096 * 4


@pytest.mark.parametrize(("top_k", "sizes"), [(0, (1, 1, 1)), (0, (1, 4, 2)), (5, (1, 1, 1)), (5, (2, 2, 1))])
def test_arguments_are_those_of_the_step_with_a_teacher_beside_it_or_stored_ahead(top_k, sizes, tmp_path):
    """Where the teacher's likeliest tokens come with the batch, the program has no teacher."""
    teacher_fields = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 96, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(teacher_fields))
    distill = {"kind": "jsd", "teacher": str(tmp_path), "top_k": top_k, "weight": 0.5}
    config = tiny_config(**{f"train__distill__{name}": value for name, value in distill.items()}, train__microbatches=2)
    mc = dataclasses.replace(TINY, vocab_size=128, max_positions=256)
    topology = find_topology(f"h100x{math.prod(sizes)}")
    training = dataclasses.replace(training_of(config, mc, topology, teacher_model(config))[0], mesh=sizes)
    memory, given = step_memory(training), lowered_step(config, training, mesh(*sizes)).in_avals
    rows = 8 // (sizes[0] * sizes[1])
    assert memory.batch == rows * 192 * (5 + (2 * top_k + 1 if top_k else 0)) * 4
    assert (memory.teacher == 0) == bool(top_k)
    assert memory.arguments == bytes_per_device(given) - 8  # the numbers of steps


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        ((24, 14, 4864), 24 * 14 * 4864),  # the layers are the rows of the tiles
        ((28, 1536, 6), 32 * 1536 * 6),  # 28 layers to 32, six columns outside
        ((151936, 6), 151936 * 8),
        ((24, 128), 24 * 128),
        ((896,), 1024),
        ((4, 4096), 4 * 4096),
        ((3, 100), 8 * 128),
    ],
)
def test_tiles_are_those_of_compiled_programs(shape, padded):
    """Layouts that libtpu chose for arguments: {2,0,1}, {1,0,2}, {0,1}, {1,0}, all T(8,128), T(1024), T(4,128)."""
    assert tiled_elements(shape) == padded


def test_tiles_pad_narrow_shards_alone():
    """Six columns of a 1.5B student on 256 chips, as libtpu has it (82.8 MiB); whole tiles of an 8B student on 64 are as they are."""
    config = shipped("qwen2.5-1.5b", train__rows_per_step=256)
    training, _ = training_of(config, student_model(config)[0], find_topology("v6e-256"))
    assert training.tiled and step_memory(training).arguments == pytest.approx(86_848_512, rel=0.001)
    assert parameter_bytes(dataclasses.replace(BASE, tiled=True)) == pytest.approx(parameter_bytes(BASE), rel=1e-4)


# --- an 8B student by hand ---------------------------------------------------------------------------------------------


def test_eight_billion_by_hand():
    """Llama-3.1-8B on 64 chips with FSDP: 8,030,261,248 parameters; 12 bytes each for weights and Adam's moments."""
    memory = step_memory(BASE)
    assert EIGHT.num_params() == 8_030_261_248
    assert memory.parameters == 8_030_261_248 * 4 // 64 + 65 * 4096 * 4 * 63 // 64  # the 65 norms are on every chip
    assert memory.optimizer == 2 * memory.parameters
    # 2 FLOPs per weight: 32 × (2·4096² + 2·4096·1024 + 3·4096·14336) in the layers, 128256·4096 in the head;
    # attention 2 × 2 × 4096 per key and layer, 2,048 keys on average.
    linear, head, attention = 2 * 32 * 218_103_808, 2 * 525_336_576, 32 * 4 * 4096 * 2048
    assert dataclasses.astuple(forward_per_token(EIGHT, 4096)) == (linear, attention, head)
    assert model_flops(BASE) == 3 * (linear + attention + head) * 64 * 4096
    # Six FLOPs per parameter and token, less the table's look-up, is within the attention's share of it.
    assert model_flops(BASE) / (6 * 8.03e9 * 64 * 4096) == pytest.approx(1.0, abs=0.08)
    # Attention: forward, again for the backward pass, 5 products there for the forward pass's 2, over the blocks of eight up to the
    # diagonal; splash has eight blocks of 512 too, and 7 products.
    pairs = 4096**2 * 9 / 16 / (4096**2 / 2)
    for backend, passes in (("xla", 4.5), ("splash", 5.5)):
        found = executed_flops(dataclasses.replace(BASE, attention=backend))["compute"]
        assert found == 4 * (linear + head) * 4096 + passes * pairs * attention * 4096


def test_roofline_by_hand():
    """The same step on v5p-128: compute binds, 4/3 for recomputing and what attention computes in vain are not in MFU."""
    found = predict(BASE, find_topology("v5p-128"))
    forward = forward_per_token(EIGHT, 4096)
    executed = (4 * (forward.linear + forward.head) + 4.5 * 9 / 8 * forward.attention) * 4096
    assert found["seconds"]["compute"] == pytest.approx(executed / 459e12)
    assert found["step_seconds"] == max(found["seconds"].values())
    useful = 3 * forward.total * 4096
    assert found["mfu"] == pytest.approx(useful / 459e12 / found["step_seconds"])
    # The layers gathered twice and scattered, the head gathered and scattered once, one row exchanged twice, the norms' gradients.
    head, row, norms = 128256 * 4096, 4096 * 4096, 65 * 4096
    layers = 32 * 218_103_808
    expected = 63 / 64 * (layers * (2 + 2 + 4) + head * (2 + 4) + row * (2 + 2) + norms * 8)
    assert link_bytes(BASE) == pytest.approx(expected)
    assert link_bytes(dataclasses.replace(BASE, mesh=(1, 1, 1))) == 0


def test_forward_flops_are_what_the_compiler_counts():
    """One layer, so that the scan's body counts once; matrix products only, which is nearly all of it at this size."""
    from dccot_jax.model import decoder, head

    mc = dataclasses.replace(
        TINY, vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=1, head_dim=32, tie_embeddings=False, max_positions=128
    )
    shapes = jax.eval_shape(lambda: decoder.init_params(mc, 0))
    rows = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def forward(params, tokens, segments, positions):
        return head.logits(params, mc, decoder.forward(params, mc, tokens, segments, positions, remat="none"))

    cost = jax.jit(forward).lower(shapes, rows, rows, rows).compile().cost_analysis()
    found = forward_per_token(mc, 128)
    assert cost["flops"] == pytest.approx(256 * (found.linear + 2 * found.attention + found.head), rel=0.05)


def test_a_teachers_flops_are_what_the_compiler_counts(monkeypatch):
    """What a wider teacher adds to the loss and its gradient, of one layer and two chunks of the head, which are made twice, in loops
    whose body counts once. MFU is without it.
    """
    from dccot_jax.model import decoder, head
    from dccot_jax.train.losses import Distillation, weighted_loss

    mc = dataclasses.replace(TINY, vocab_size=512, num_layers=1, max_positions=128)
    wide = dataclasses.replace(mc, hidden_size=128, intermediate_size=384, head_dim=32)
    rows = {name: jax.ShapeDtypeStruct((2, 128), jnp.int32) for name in ("tokens", "labels", "segment_ids", "positions", "weights")}

    def flops(teacher: ModelConfig) -> float:
        def total(params, theirs, batch):
            return weighted_loss(params, mc, batch, remat="none", distill=Distillation(teacher, 0.0, 1.0, 1.0), teacher=theirs)[0]

        shapes = [jax.eval_shape(lambda model=model: decoder.init_params(model, 0)) for model in (mc, teacher)]
        return jax.jit(jax.value_and_grad(total)).lower(*shapes, rows).compile().cost_analysis()["flops"]

    alone = dataclasses.replace(BASE, mc=mc, mesh=(1, 1, 1), rows=2, tokens=128, compute_dtype="float32", remat="none")
    beside = [dataclasses.replace(alone, teacher=teacher) for teacher in (mc, wide)]
    small, large = (executed_flops(training)["compute"] for training in beside)
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 64 * 2 * 512)
    added = 256 * 2 * 512 * (wide.hidden_size - mc.hidden_size)  # to one pass of the head: half of two is counted
    assert flops(wide) - flops(mc) == pytest.approx(large - small - added, rel=0.03)
    forward = forward_per_token(mc, 128)
    assert small - executed_flops(alone)["compute"] == 256 * (forward.linear + 2 * forward.attention + 2 * forward.head)
    assert model_flops(beside[1]) == model_flops(alone)


def test_a_teachers_share_of_the_roofline_by_hand():
    """The same model as its teacher on 64 chips: read and gathered once, its head read twice per chunk, nothing scattered."""
    beside = dataclasses.replace(BASE, teacher=EIGHT)
    layers, head, row = 32 * 218_103_808, 128256 * 4096, 4096 * 4096
    assert link_bytes(beside) - link_bytes(BASE) == pytest.approx(63 / 64 * (layers + head + row) * 2)
    around = 32 * 4096 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    scores = 32 * 4096**2 * 9 / 16 * 32 * 2 * 6
    logits = 2 * 4096 * 128256 * 2 * 4
    moved = (layers + around + 2 * head_chunks(BASE)[0] * head) * 2 + scores + logits
    assert memory_bytes_moved(beside) - memory_bytes_moved(BASE) == pytest.approx(moved)
    alone, both = (predict(training, find_topology("v5p-128")) for training in (BASE, beside))
    assert both["step_seconds"] > alone["step_seconds"] and both["mfu"] < alone["mfu"]


def test_muon_flops_are_what_the_compiler_counts():
    x = jax.ShapeDtypeStruct((3, 96, 192), jnp.float32)
    cost = jax.jit(lambda x: _newton_schulz(x, 1e-8)).lower(x).compile().cost_analysis()
    mc = dataclasses.replace(TINY, num_layers=3)
    expected = 3 * 5 * (4 * 96 * 96 * 192 + 2 * 96**3)
    assert cost["flops"] == pytest.approx(expected, rel=0.03)
    square = [weight.matrix for weight in weights(mc, (1, 1, 1)) if weight.stacked and weight.matrix]
    by_hand = sum(3 * 5 * (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m in square)
    assert muon_flops(dataclasses.replace(BASE, mc=mc, mesh=(1, 1, 1))) == by_hand
    assert muon_flops(dataclasses.replace(BASE, mc=mc, mesh=(1, 8, 1))) == by_hand // 3  # eight devices, three layers: one each


# --- memory moves as it must -------------------------------------------------------------------------------------------


def test_memory_follows_the_settings():
    total = lambda **changes: step_memory(dataclasses.replace(BASE, rows=512, **changes)).allocated  # noqa: E731
    assert total(microbatches=8) < total(microbatches=2) < total()
    assert total() < total(remat="dots") < total(remat="none")
    assert total(tokens=2048) < total()
    assert total(mesh=(64, 1, 1)) > total(mesh=(8, 8, 1)) > total()
    assert total(compute_dtype="float32") > total()
    teacher = dataclasses.replace(EIGHT, num_layers=16)
    assert total() + teacher_bytes(dataclasses.replace(BASE, teacher=teacher)) <= total(teacher=teacher) < total(teacher=EIGHT)
    assert total(mc=with_adapters(EIGHT, 16, 32.0, 0.0, ("q_proj", "v_proj")), frozen_dtype="bfloat16") < total()
    assert total(optimizer="adafactor") < total()
    assert step_memory(BASE).phases[step_memory(BASE).peak] == max(step_memory(BASE).phases.values())


@pytest.mark.parametrize("remat", ["nothing_saveable", "dots", "none"])
@pytest.mark.parametrize("tokens", [64, 512], ids=["one block of queries", "four"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])  # two norms; four and the heads'; four
def test_activations_are_what_the_layers_keep_for_the_backward_pass(family, tokens, remat):
    """Residuals that the forward pass hands the backward pass, stacked by the scan over layers: [L, R, ...]."""
    from dccot_jax.model import decoder

    rows, mc = 5, dataclasses.replace(TINY, family=family, num_layers=3, max_positions=512)
    training = dataclasses.replace(BASE, mc=mc, mesh=(1, 1, 1), rows=rows, tokens=tokens, remat=remat)

    def kept(params, *batch):
        return jax.vjp(lambda p: decoder.forward(p, mc, *batch, remat=remat, compute_dtype=jnp.bfloat16), params)[1]

    batch = [jax.ShapeDtypeStruct((rows, tokens), jnp.int32)] * 3
    found = jax.eval_shape(kept, jax.eval_shape(lambda: decoder.init_params(mc, 0)), *batch)
    stacked = [leaf for leaf in jax.tree.leaves(found) if leaf.shape[:2] == (3, rows)]
    assert saved_activations(training) == sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stacked)


@pytest.mark.parametrize("microbatches", [1, 8])
def test_attention_of_a_flash_backend_by_hand(microbatches):
    """Splash pads 4,000 positions to 4,096 and a head's 80 dimensions to 128: eight arrays like q or k and two float32 sums, each eight
    times; nothing grows with the square of a row. Whole scores are a hundred times that.
    """
    mc = dataclasses.replace(EIGHT, head_dim=80)
    training = dataclasses.replace(BASE, mc=mc, rows=512, microbatches=microbatches, tokens=4000, attention="splash")
    rows = 8 // microbatches
    found = student_attention(training)
    assert found.backward_bytes() == rows * 4096 * ((4 * 32 + 4 * 8) * 128 * 2 + 32 * 16 * 4)
    assert found.forward_bytes() == rows * 4096 * ((2 * 32 + 2 * 8) * 128 * 2 + 32 * 128 * 4)
    assert found.kept_bytes() == rows * 4096 * ((2 * 32 + 2 * 8) * 128 * 2 + 32 * 4)
    assert found.pairs() == 36 * 512**2  # eight blocks of queries and of keys
    longer = dataclasses.replace(found, tokens=8 * 4096)
    assert longer.backward_bytes() == 8 * found.backward_bytes() and longer.pairs() == 64 * 65 / 2 * 512**2
    scores = student_attention(dataclasses.replace(training, attention="xla"))
    assert scores.backward_bytes() == rows * 4000**2 * 32 * 12 > 30 * found.backward_bytes()
    packed = student_attention(dataclasses.replace(training, attention="cudnn"))
    assert packed.backward_bytes() == rows * 4000 * ((4 * 32 + 4 * 8) * 80 * 2 + 32 * 2 * 4 + 4000 * 3)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_kernels_need_less_than_scores(backend):
    scores, kernel = (dataclasses.replace(BASE, tokens=16384, attention=name) for name in ("xla", backend))
    assert step_memory(kernel).phases["layers"] < step_memory(scores).phases["layers"]
    assert predict(kernel, find_topology("v5p-128"))["seconds"]["memory"] < predict(scores, find_topology("v5p-128"))["seconds"]["memory"]


def test_loops_are_what_the_layers_keep_the_heads_gradient_and_sums():
    kept, head = 32 * 4096 * 4096 * 2, 128256 * 4096 * 4
    assert step_memory(BASE).loops == kept + head
    several = dataclasses.replace(BASE, rows=128, microbatches=2)
    assert step_memory(several).loops == kept + head + gradient_bytes(several)


def test_layers_add_their_inputs_and_their_gradients():
    """One more layer costs, with everything thrown away but its input, its float32 gradient, a copy of its share and [rows, T, D]."""
    deeper = dataclasses.replace(BASE, mc=dataclasses.replace(EIGHT, num_layers=33))
    layer = 218_103_808 // 64 * (4 + 2) + 2 * 4096 * 4
    added = step_memory(deeper).phases["layers"] - step_memory(BASE).phases["layers"]
    assert added == layer + 4096 * 4096 * 2


# --- machines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "shape"),
    [("v5e-16", 16, 4, (4, 4)), ("v5e-8", 8, 1, (2, 4)), ("v5p-128", 64, 16, (4, 4, 4)), ("v6e-256", 256, 64, (16, 16)),
     ("v5litepod-16", 16, 4, (4, 4)), ("v5p-8", 4, 1, (2, 2, 1)), ("h100x8", 8, 1, ()), ("h100x32", 32, 4, ()), ("cpu", 1, 1, ())],
)  # fmt: skip
def test_topologies_count_chips(name, chips, hosts, shape):
    found = find_topology(name)
    assert (found.chips, found.hosts, found.shape) == (chips, hosts, shape)
    assert not found.shape or math.prod(found.shape) == chips


@pytest.mark.parametrize("name", ["v5e-17", "v5p-7", "v9-8", "h100x3", "h100-8", "gpu", ""])
def test_unknown_topology_is_one_line_with_what_is_accepted(name, capsys):
    with pytest.raises(TopologyError) as caught:
        find_topology(name)
    assert "v5e-N" in str(caught.value) and "h100" in str(caught.value) and "\n" not in str(caught.value)
    if name:
        assert main(["estimate", f"--config={ROOT}/configs/quickstart.py", f"--topology={name}"]) == 2
        assert f"--topology={name}" in capsys.readouterr().err


def test_larger_slices_grow():
    assert [slice_.name for slice_ in larger(find_topology("v5e-64"))] == ["v5e-128", "v5e-256"]
    assert [slice_.name for slice_ in larger(find_topology("h100x8"))] == ["h100x16", "h100x32", "h100x64", "h100x128"]
    assert larger(find_topology("cpu")) == []


# --- students ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-3b", 3_085_938_688), ("llama-3.1-8b", 8_030_261_248),
     ("qwen2.5-32b", 32_763_876_352)],
)  # fmt: skip
def test_shipped_shapes_have_the_published_number_of_parameters(name, parameters):
    config = config_lib.override(config_lib.default_config(), {"student.path": str(STUDENTS / name)})
    assert student_model(config)[0].num_params() == parameters
    config = config_lib.override(config, {"student.path": str(STUDENTS / name / "config.json")})
    assert student_model(config)[0].num_params() == parameters


def test_a_student_the_trainer_refuses_for_its_rotary_positions_is_estimated_with_a_remark(tmp_path):
    fields = json.loads((STUDENTS / "qwen2.5-0.5b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_scaling": {"rope_type": "longest", "factor": 4.0}}))
    config = config_lib.override(config_lib.default_config(), {"student.path": str(tmp_path)})
    model, remarks = student_model(config)
    assert model == from_hf(fields) and len(remarks) == 1 and "longest" in remarks[0]
    (tmp_path / "config.json").write_text(json.dumps(fields | {"hidden_act": "relu"}))
    with pytest.raises(ConfigError, match="relu"):
        student_model(config)


@pytest.mark.parametrize("kind", ["student", "train:warmup"])
def test_a_teacher_may_be_an_artifact(kind, tmp_path):
    folder = write_student(tmp_path / "teacher", UNTIED).path
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"kind": kind}))
    asked = {"train__distill__kind": "reverse_kl", "train__distill__teacher": str(folder)}
    assert teacher_model(tiny_config(**asked)) == UNTIED
    assert teacher_model(tiny_config(**asked, train__distill__top_k=4)) is None
    (folder / "manifest.json").write_text(json.dumps(manifest | {"kind": "plan"}))
    with pytest.raises(ConfigError, match=r"train\.distill\.teacher: .*an artifact of stage plan"):
        teacher_model(tiny_config(**asked))


def test_rows_beyond_the_students_positions_are_refused():
    config = tiny_config(train__row_tokens=2048)
    with pytest.raises(ConfigError, match=r"train\.row_tokens: 2048 .* 1024"):
        student_model(config)


@pytest.mark.parametrize(
    ("asked", "topology", "changes", "taken"),
    [
        ("auto", "v6e-256", {}, "splash"),
        ("auto", "a100x8", {}, "cudnn"),
        ("auto", "cpu", {}, "xla"),
        ("xla", "v6e-256", {}, "xla"),
        ("auto", "v5p-128", {"compute_dtype": "float32"}, "xla"),
        ("auto", "v5e-16", {"train__row_tokens": 256, "tokens__max_length": 256}, "xla"),
    ],
)
def test_attention_is_that_of_the_trainer_on_that_machine(asked, topology, changes, taken):
    config = shipped("qwen2.5-1.5b", attention=asked, **changes)
    assert assess(config, topology, compile_for=False)["training"]["attention"] == taken


def test_a_backend_that_the_machine_does_not_have_is_refused(capsys):
    with pytest.raises(AttentionError, match=r"'cudnn' needs an NVIDIA GPU; this is TPU v5 lite.*'splash'"):
        assess(shipped("qwen2.5-1.5b", attention="cudnn"), "v5e-16", compile_for=False)
    command = ["estimate", f"--config={ROOT}/configs/llama3_1_svamp.py", "--topology=h100x8", "--config.attention=splash"]
    assert main(command) == 2 and "'splash' needs a TPU" in capsys.readouterr().err


# --- the verdict and the advice ----------------------------------------------------------------------------------------


def shipped(name: str, **changes) -> config_lib.ConfigDict:
    settings = {"student.path": str(STUDENTS / name), "compute_dtype": "bfloat16", "train.row_tokens": 4096, "train.rows_per_step": 64}
    return config_lib.override(config_lib.default_config(), settings | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def laptop(monkeypatch):
    """The CPU of --topology=cpu: 24 GiB, whatever runs the tests."""
    here = find_topology("cpu")
    machine = dataclasses.replace(here, chip=dataclasses.replace(here.chip, memory=24 * GIB))
    monkeypatch.setattr("dccot_jax.estimate.topologies._this_cpu", lambda: machine)


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(
    ("config", "topology"),
    [
        (shipped("qwen2.5-1.5b", train__remat="none"), "v5e-16"),  # too many rows at a time
        (shipped("qwen2.5-32b"), "v5e-16"),  # no setting is enough: a larger slice
        (shipped("llama-3.1-8b", mesh__data=8, mesh__fsdp=1), "h100x8"),  # replicas are too large
        (shipped("qwen2.5-0.5b", train__rows_per_step=8), "v5e-16"),  # fewer rows than chips
        (shipped("qwen2.5-0.5b", mesh__fsdp=4, mesh__tensor=2), "v5e-16"),  # the mesh is for another number of chips
        (shipped("llama-3.1-8b"), "h100x2"),  # first moments are too large
        (shipped("qwen2.5-1.5b"), "cpu"),  # adapters alone, and there is no larger machine
        (shipped("llama-3.1-8b"), "v5e-4"),  # adapters, or a larger slice
        (shipped("qwen2.5-32b"), "v5e-1"),  # not even adapters here, but on a smaller slice than all weights
        (shipped("llama-3.1-8b", train__lora__preset="r16_qv"), "v6e-1"),  # adapters already
    ],
    ids=["rows", "32B", "replicas", "few rows", "mesh", "moments", "cpu", "adapters or a slice", "adapters and a slice", "frozen"],
)
def test_advice_fits_when_it_is_followed(config, topology):
    result = assess(config, topology, compile_for=False)
    assert not result["fits"] and result["advice"]
    for option in result["advice"]:
        followed = assess(config_lib.override(config, option["change"]), option["topology"], compile_for=False)
        assert followed["fits"] and followed["advice"] == []
        assert followed["memory"]["allocated"] == option["allocated_bytes"]
        assert followed["prediction"]["step_seconds"] == option["step_seconds"]


ADAPTERS = {"train.lora.preset", "train.lora.frozen_dtype"}
LORA = ["the weights beside the adapters are rounded to bfloat16", "adapters are trained in place of all weights"]


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(
    ("config", "topology", "expected"),
    [
        (shipped("qwen2.5-1.5b"), "cpu", [("cpu", ADAPTERS, LORA)]),
        (shipped("llama-3.1-8b"), "v5e-4", [("v5e-16", set(), []), ("v5e-4", ADAPTERS, LORA)]),
        (shipped("qwen2.5-32b"), "v5e-1", [("v5e-64", set(), []), ("v5e-8", ADAPTERS, LORA)]),
        (
            shipped("llama-3.1-8b"),
            "h100x2",
            [
                ("h100x4", set(), []),
                ("h100x2", {"train.moment_dtype"}, ["first moments are rounded to bfloat16"]),
                ("h100x2", ADAPTERS, LORA),
            ],
        ),
        (shipped("llama-3.1-8b", train__optimizer="adafactor"), "a100x1", [("a100x2", set(), []), ("a100x1", ADAPTERS, LORA)]),
        (
            shipped("llama-3.1-8b", train__lora__preset="r16_qv"),
            "v6e-1",
            [("v6e-4", set(), []), ("v6e-1", {"train.lora.frozen_dtype"}, LORA[:1])],
        ),
        (shipped("llama-3.1-8b", mesh__data=8, mesh__fsdp=1), "h100x8", [("h100x8", set(), []), ("h100x16", set(), [])]),
    ],
    ids=["adapters only", "or a slice", "on a smaller slice", "moments", "adafactor has none", "adapters already", "not needed"],
)
def test_what_changes_the_learning_comes_last_and_says_so(config, topology, expected):
    """Only where nothing else does on the machine asked about; the micro-batches, remat and mesh beside it are not looked at."""
    advice = assess(config, topology, compile_for=False)["advice"]
    found = [(option["topology"], {key for key in option["change"] if key in ALTERS}, option["alters"]) for option in advice]
    assert found == expected


@pytest.mark.usefixtures("laptop")
def test_what_fits_gets_no_advice_and_what_cannot_fit_gets_none():
    assert assess(shipped("qwen2.5-0.5b", train__rows_per_step=16), "v5p-32", compile_for=False)["advice"] == []
    hopeless = assess(shipped("qwen2.5-32b"), "cpu", compile_for=False)
    assert not hopeless["fits"] and hopeless["advice"] == []


def test_the_limit_is_the_chips_memory():
    topology = find_topology("v5e-16")
    training, _ = training_of(shipped("qwen2.5-0.5b"), student_model(shipped("qwen2.5-0.5b"))[0], topology)
    total = step_memory(training).allocated
    at = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=total))
    below = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=total - 1))
    assert fits(step_memory(training), at) and not fits(step_memory(training), below)


# --- teachers ----------------------------------------------------------------------------------------------------------


def test_teacher_calls_and_tokens_by_hand():
    config = tiny_config(
        traces__samples=3, traces__max_tokens=100, augment__methods=("rephrase", "question", "answer", "reverse"), augment__max_tokens=50
    )
    totals = data_totals(config)
    # 48 questions: 3 samples each; 2 + (1 + 5) + 3 + 3 calls of augmentation each.
    assert totals["calls"] == 48 * 3 + 48 * (2 + 6 + 3 + 3)
    assert totals["completion_tokens_at_most"] == 48 * 3 * 100 + 48 * 14 * 50
    assert totals["prompt_tokens"] > 48 * 3 * 10


def test_equal_requests_of_two_arms_count_once_and_replays_not_at_all():
    teacher, other = {"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "noisy"}
    arms = ({"name": "a"}, {"name": "b", "train.steps": 5}, {"name": "c", "traces.teachers": (teacher, other)})
    assert data_totals(tiny_config(arms=arms))["calls"] == 2 * 48
    replayed = {"kind": "replay", "name": "x", "files": ("x.json",)}
    assert data_totals(tiny_config(traces__teachers=(replayed,)))["calls"] == 0


def test_questions_that_are_not_at_hand_make_totals_unknown():
    config = tiny_config(traces__task="gsm8k", traces__questions=0)
    assert data_totals(config)["calls"] is None
    assert data_totals(config_lib.override(config, {"traces.questions": 100}))["calls"] == 100


def test_calls_per_question_are_those_of_the_methods(tmp_path):
    """What the augment stage really asks a teacher that is always right, per method."""
    from dccot_jax.augment.stage import augment
    from dccot_jax.context import Context
    from dccot_jax.tasks.registry import get_task, load_items
    from dccot_jax.tasks.synthetic.teachers import ScriptedTeacher
    from dccot_jax.teachers.cache import RequestCache
    from dccot_jax.teachers.client import Usage
    from dccot_jax.teachers.stage import _generate

    config = tiny_config(traces__questions=6)
    ctx = Context(workdir=tmp_path)
    items = load_items("synth_arithmetic", "train", None, limit=6)
    with RequestCache(tmp_path) as cache:
        originals, _ = _generate(
            ScriptedTeacher(style="verbose"), get_task("synth_arithmetic"), items, config, "train", cache, Usage(), ctx
        )
        for method in config_lib.AUGMENT_METHODS:
            _, _, facts = augment(originals, config_lib.override(config, {"augment.methods": (method,)}), cache, ctx)
            assert facts[method]["requests"] == len(items) * calls_per_question(config.augment, method), method


# --- the command -------------------------------------------------------------------------------------------------------

KEYS = {
    **dict.fromkeys(("config", "arm"), str),
    **dict.fromkeys(("topology", "student", "training", "memory", "prediction", "data"), dict),
    **dict.fromkeys(("advice", "remarks"), list),
    **dict.fromkeys(("flops_per_step", "tokens_per_step"), int),
    "fits": bool,
    "problem": (str, type(None)),
    "compiler": (dict, type(None)),
}
ARGUMENTS = ("parameters", "optimizer", "teacher", "batch")
TEMPORARIES = ("gradients", "activations", "copies", "logits", "temporaries")
TOTALS = ("arguments", "peak_temporaries", "allocated", "loops", "total", "available")


@pytest.mark.parametrize(
    ("config", "topology", "attention"),
    [
        ("quickstart.py", "cpu", "xla"),
        ("quickstart.py", "v5e-16", "xla"),
        ("tiny_arms.py", "h100x8", "xla"),
        ("qwen2_5_svamp.py:0.5b", "v5e-16", "splash"),
        ("qwen2_5_svamp.py:0.5b", "h100x8", "cudnn"),
        ("llama3_1_svamp.py", "v5p-128", "splash"),
    ],
)
def test_json_schema(config, topology, attention, capsys):
    assert main(["estimate", f"--config={ROOT}/configs/{config}", f"--topology={topology}", "--json", "--noaot"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {name: type(value) for name, value in result.items() if not isinstance(value, KEYS[name])} == {} and set(result) == set(KEYS)
    assert all(isinstance(result["memory"][name], int) and result["memory"][name] >= 0 for name in (*ARGUMENTS, *TEMPORARIES, *TOTALS))
    assert sum(result["memory"][name] for name in ARGUMENTS) == result["memory"]["arguments"]
    assert result["topology"]["name"] == topology and result["memory"]["allocated"] > 0
    assert result["training"]["attention"] == attention
    assert 0 < result["prediction"]["mfu"] < 1
    assert result["fits"] or result["advice"] or result["problem"]


def test_tables_are_printed(capsys):
    assert main(["estimate", f"--config={ROOT}/configs/llama3_1_svamp.py", "--topology=v5e-8", "--noaot"]) == 0
    shown = capsys.readouterr().out
    assert "changes what is learned: " + " and ".join(LORA) in shown
    for words in ("does not fit", "smallest change that fits", "--topology=v5e-", "optimizer state", "MFU", "8,030,261,248", "splash"):
        assert words in shown


def test_what_is_missing_is_one_line(capsys):
    config = f"--config={ROOT}/configs/quickstart.py"
    assert main(["estimate", config]) == 2 and "--topology=NAME is needed" in capsys.readouterr().err
    assert main(["estimate", config, "--topology=h100x8", "--config.student.path=/nowhere"]) == 2
    assert "config.student.path: no config.json in /nowhere" in capsys.readouterr().err
