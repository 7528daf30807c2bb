"""Hugging Face import and export: bit-exact round trips, bytes read, clear errors, and parity with torch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from family_cases import CASES
from test_model import TIED, UNTIED, random_params

from dccot_jax.model import hf_export
from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.decoder import forward
from dccot_jax.model.head import logits, token_stats
from dccot_jax.model.hf import load_hf, save_hf
from dccot_jax.model.hf_export import layer_program
from dccot_jax.model.hf_names import tensors, transposed
from dccot_jax.model.hf_read import file_sharding, fill_program
from dccot_jax.model.safetensors_io import SafetensorsFile, TensorReader
from dccot_jax.model.sharding import make_mesh, param_shardings, weight_shapes

SENTENCE = (
    "The capital of France is Paris. The Eiffel Tower is one of the most visited monuments in the world, and it was completed in 1889."
)


def jax_logits(params: dict, mc: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    run = jax.jit(lambda p, t: logits(p, mc, forward(p, mc, t, jnp.ones_like(t), positions)))
    return np.asarray(run(params, tokens.astype(np.int32)))


@pytest.mark.parametrize("mc", [TIED, UNTIED], ids=["tied", "untied"])
def test_export_import_is_bit_exact_over_files_and_meshes(mc: ModelConfig, tmp_path: Path):
    params = random_params(mc)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    save_hf(params, mc, tmp_path / "tok", tmp_path / "one")
    found, alone = load_hf(tmp_path / "one")
    assert found == mc and (tmp_path / "one" / "tokenizer.json").exists()
    jax.tree.map(np.testing.assert_array_equal, alone, params)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    _, sharded = load_hf(tmp_path / "one", mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, sharded, param_shardings(mc, mesh)))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
    save_hf(sharded, mc, None, tmp_path / "many", max_shard_bytes=9000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "many")[1], params)


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_byte_for_byte_from_a_mesh(name: str, tmp_path: Path):
    mc = CASES[name]
    save_hf(random_params(mc), mc, None, tmp_path / "a")
    found, params = load_hf(tmp_path / "a", make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert found == mc
    save_hf(params, found, None, tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bfloat16_files_survive_a_float32_round_trip(tmp_path: Path):
    save_hf(random_params(TIED), TIED, None, tmp_path / "a", dtype="bfloat16")
    mc, params = load_hf(tmp_path / "a")
    assert params["embed"].dtype == jnp.float32
    save_hf(params, mc, None, tmp_path / "b", dtype="bfloat16")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert load_hf(tmp_path / "a", dtype=jnp.bfloat16)[1]["embed"].dtype == jnp.bfloat16
    with pytest.raises(ModelError, match="int8"):
        save_hf(params, mc, None, tmp_path / "c", dtype="int8")


def test_safetensors_library_reads_what_we_write(tmp_path: Path):
    from safetensors.numpy import load_file

    params = random_params(UNTIED)
    save_hf(params, UNTIED, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], np.asarray(params["layers"]["wq"][1]).T)
    np.testing.assert_array_equal(tensors["lm_head.weight"], np.asarray(params["head"]).T)


def test_each_slice_is_read_once_and_never_a_whole_tensor(tmp_path: Path):
    """Every 2-D weight is split 8 ways: a fetch is an eighth of a tensor, and all fetches together are the file, once."""
    mc = ModelConfig("llama", 64, 16, 32, 2, 4, 2, 8)
    save_hf(random_params(mc), mc, None, tmp_path)
    reader = TensorReader(tmp_path)
    load_hf(tmp_path, make_mesh({"data": 1, "fsdp": 4, "tensor": 2}), reader=reader)
    whole = {name: int(np.prod(reader.shape(name))) * 4 for name in reader.names}
    assert dict(reader.bytes_read) == whole
    assert reader.largest == max(whole.values()) // 8
    reader = TensorReader(tmp_path)
    load_hf(tmp_path, make_mesh({"data": 8, "fsdp": 1, "tensor": 1}), reader=reader)  # replicas share one read
    assert dict(reader.bytes_read) == whole


MESHES = [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]


@pytest.mark.parametrize(("sizes", "block_bytes"), [(None, 1), (None, 200), (MESHES[1], 1), (MESHES[2], 600)], ids=str)
def test_block_by_block_equals_at_once(sizes: dict | None, block_bytes: int, tmp_path: Path):
    """Rows one at a time, and a few with a rest; every byte of the file is read once. bfloat16 bits become float32 exactly."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    everything = jnp.asarray(bits[np.isfinite(bits.view(ml_dtypes.bfloat16).astype(np.float32))].view(ml_dtypes.bfloat16))
    mc = dataclasses.replace(UNTIED, num_heads=4, num_kv_heads=2)
    params = jax.tree.map(lambda x: jnp.resize(everything, x.shape).astype(jnp.float32), random_params(mc))
    save_hf(params, mc, None, tmp_path, dtype="bfloat16")
    reader = TensorReader(tmp_path)
    mesh = None if sizes is None else make_mesh(sizes)
    _, found = load_hf(tmp_path, mesh, reader=reader, block_bytes=block_bytes)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)), found, params)
    assert dict(reader.bytes_read) == {name: 2 * math.prod(reader.shape(name)) for name in reader.names}
    if mesh is not None:
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, found, param_shardings(mc, mesh)))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_compiled_layouts_move_nothing_between_devices_on_import_and_one_tensor_each_on_export(sizes: dict):
    """From the compiled programs. Small leaves are put together on the host: nothing is compiled for them at all."""
    mc = ModelConfig("llama", 64, 32, 64, 4, 4, 2, 8, tie_embeddings=False)
    mesh, shapes = make_mesh(sizes), weight_shapes(mc)
    shardings = param_shardings(mc, mesh)
    leaves = {name: (shapes["layers"][name], shardings["layers"][name], 1) for name in ("wq", "wo", "w_down", "mlp_norm")}
    leaves |= {name: (shapes[name], shardings[name], 0) for name in ("embed", "head", "final_norm")}
    for name, (shape, sharding, stacked) in leaves.items():
        theirs = file_sharding(sharding, len(shape), len(shape) - stacked, transposed(name))
        rows = (shape[stacked:][::-1] if transposed(name) else shape[stacked:]) if len(shape) > stacked + 1 else shape[stacked:]
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        block = jax.ShapeDtypeStruct(rows, jnp.bfloat16, sharding=theirs)
        compiled = (
            fill_program(sharding, len(shape), stacked, transposed(name)).lower(leaf, block, np.zeros(len(shape), np.int32)).compile()
        )
        assert not collectives(compiled), name
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == memory.output_size_in_bytes and memory.temp_size_in_bytes == 0, name  # in place
        if stacked:
            sent = layer_program(sharding).lower(leaf, np.zeros(8, np.int32)).compile()
            moved = any(mesh.shape[axis] > 1 for axis in sharding.spec if axis)
            assert collectives(sent) == ({"all-to-all"} if moved else set()), name
            assert sent.memory_analysis().output_size_in_bytes == 4 * math.prod(shape[1:]), name  # one whole tensor per device


def collectives(compiled: Any) -> set[str]:
    return set(
        re.findall(r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)\b", compiled.as_text())
    )


@pytest.mark.parametrize("sizes", MESHES[1:3], ids=str)
def test_what_processes_send_each_other_is_what_one_writes(sizes: dict, tmp_path: Path):
    """The transport between processes, here within one: more layers than devices, and the largest tensors in several blocks."""
    mc = dataclasses.replace(TIED, num_layers=9, tie_embeddings=False)
    params = jax.device_put(random_params(mc), param_shardings(mc, make_mesh(sizes)))
    save_hf(params, mc, None, tmp_path / "one")
    transport = hf_export._Transport(params, mc)
    assert set(transport.owners.values()) == {0} and len(set(transport._slots.values())) == 8  # every device has tensors
    shapes = {name: source.shape for name, source in tensors(mc).items()}
    (tmp_path / "sent").mkdir()
    file = SafetensorsFile(tmp_path / "sent" / "model.safetensors", shapes, np.dtype(np.float32))
    transport.send(dict.fromkeys(shapes, file), block_bytes=4000)
    assert (tmp_path / "sent" / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()


TWO_PROCESSES = """
import sys, pathlib, jax
jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[1]))
from dccot_jax.model.hf import load_hf, save_hf
from dccot_jax.model.safetensors_io import TensorReader
from dccot_jax.model.sharding import make_mesh
root = pathlib.Path(sys.argv[3])
mesh = make_mesh({"fsdp": -1})
for block_bytes in (0, 1000):
    reader = TensorReader(root / "in")
    mc, params = load_hf(root / "in", mesh, reader=reader, block_bytes=block_bytes)
    for name in reader.names:
        shape = reader.shape(name)
        whole = 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        assert reader.bytes_read[name] == (whole // 2 if len(shape) == 2 else whole), (name, reader.bytes_read[name], whole)
for leaf in jax.tree.leaves(params["layers"]):
    assert sum(s.data.nbytes for s in leaf.addressable_shards) == (leaf.nbytes // 2 if leaf.ndim == 3 else leaf.nbytes)
save_hf(params, mc, root / "in", root / "out", max_shard_bytes=20000)
save_hf(params, mc, None, root / "bf16", dtype="bfloat16")
"""


def test_two_processes_read_half_each_and_each_writes_its_part(tmp_path: Path):
    """Bytes read are the shards' bytes; every tensor written is byte for byte that of one process, and old files are gone."""
    params = random_params(TIED)
    save_hf(params, TIED, None, tmp_path / "in")
    save_hf(params, TIED, None, tmp_path / "one", dtype="bfloat16")
    save_hf(jax.tree.map(jnp.zeros_like, params), TIED, None, tmp_path / "out", max_shard_bytes=9000)  # an earlier export
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, "-c", TWO_PROCESSES, str(i), port, str(tmp_path)] for i in range(2)]
    runs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for run in runs:
            _, errors = run.communicate(timeout=300)
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()
    for ours, theirs in (("in", "out"), ("one", "bf16")):
        expected, found = TensorReader(tmp_path / ours), TensorReader(tmp_path / theirs)
        assert found.names == expected.names
        for name in expected.names:
            everything = (slice(None),) * len(expected.shape(name))
            assert found.read(name, everything).tobytes() == expected.read(name, everything).tobytes(), name
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*"))
    count = len(files)
    assert count > 2 and files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert load_hf(tmp_path / "out")[0] == TIED and not list(tmp_path.rglob("*.part"))


def test_a_missing_file_of_another_process_is_noticed(tmp_path: Path):
    owners = {name: int(i < 3) for i, name in enumerate(tensors(TIED))}
    files = hf_export._files(tensors(TIED), owners, 4, 1 << 30)
    assert [(file.owner, len(file.shapes)) for file in files] == [(0, len(tensors(TIED)) - 3), (1, 3)]
    with pytest.raises(ModelError, match=r"lacks model-00001-of-00002.*give a directory that all share"):
        hf_export._check_whole(tmp_path, files, np.dtype(np.float32))


def test_conversion_problems_of_every_kind_are_named_together(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    save_hf(random_params(TIED), TIED, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # a tied model's copy is not a problem
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load_hf(tmp_path)
    for text in ("model.norm.weight is missing", "has shape [3, 3], the config says [48, 36]", "q_norm.weight is unexpected"):
        assert text in str(error.value)
    assert "lm_head" not in str(error.value)


def test_torn_and_absent_files(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_hf(tmp_path)
    save_hf(random_params(TIED), TIED, None, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="torn"):
        load_hf(tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match="neither"):
        load_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.5}))
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        load_hf(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("mc", [TIED, UNTIED], ids=["llama-tied", "qwen2-untied"])
def test_logits_equal_torch_both_ways(mc: ModelConfig, tmp_path: Path):
    """A torch model imported here, and our export loaded there; 300 positions."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_hf(random_params(mc), mc, None, tmp_path / "ours", max_shard_bytes=20000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, mc.vocab_size, (2, 300))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jax_logits(random_params(mc), mc, tokens), expected, atol=1e-4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        expected = model(torch.tensor(tokens)).logits.numpy()
    model.save_pretrained(tmp_path / "theirs")
    found, params = load_hf(tmp_path / "theirs")
    assert (found.rope_theta, found.head_dim, found.tie_embeddings) == (mc.rope_theta, mc.head_dim, mc.tie_embeddings)
    np.testing.assert_allclose(jax_logits(params, found, tokens), expected, atol=1e-4)


@pytest.mark.realdata
def test_smollm2_likelihood_of_a_known_sentence(smollm2_dir: Path):
    from tokenizers import Tokenizer

    mc, params = load_hf(smollm2_dir)
    ids = np.array([Tokenizer.from_file(str(smollm2_dir / "tokenizer.json")).encode(SENTENCE).ids], np.int32)
    assert ids.shape[1] == 33 and mc.num_params() == 134_515_008 and mc.eos_token_ids == (2,)
    positions = np.arange(33, dtype=np.int32)[None]
    hidden = forward(params, mc, ids, np.ones_like(ids), positions)
    stats = token_stats(params, mc, hidden[:, :-1], ids[:, 1:])
    assert -float(jnp.mean(stats["label_logp"])) == pytest.approx(1.477, abs=2e-3)


@pytest.mark.realdata
@pytest.mark.parity
def test_smollm2_logits_equal_torch(smollm2_dir: Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2_dir)(SENTENCE, return_tensors="np")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    mc, params = load_hf(smollm2_dir)
    np.testing.assert_allclose(jax_logits(params, mc, ids), expected, atol=1e-3)
