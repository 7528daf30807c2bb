"""GGUF import: weights as they were before conversion, de-quantised slices, configs, refusals, and the tokenizer."""

from __future__ import annotations

import dataclasses
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from family_cases import CASES
from gguf_files import tokenizer_fields, torch_tensors, write_gguf
from test_hf import jax_logits
from test_model import random_params
from tiny import tiny_config
from training_cases import finished

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.data import student
from dccot_jax.data.gguf_tokenizer import write_gguf_tokenizer
from dccot_jax.data.tokenizer import END, PAD, TokenizerError, embedded_tokenizer_dir, load_tokenizer, tokenizer_hash
from dccot_jax.model.config import ModelConfig, ModelError, RopeScaling
from dccot_jax.model.gguf_io import GgufReader
from dccot_jax.model.hf import load_hf, read_config, save_hf
from dccot_jax.model.sharding import make_mesh
from dccot_jax.preflight import check
from dccot_jax.records import InputError
from dccot_jax.select.settings import check_settings

gguf = pytest.importorskip("gguf")

# 8192 positions and base 5e5 put wavelengths of 12 dimensions on both sides of the bounds and one between.
LLAMA3 = dataclasses.replace(CASES["llama-3"], rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
MODELS = {
    "llama": CASES["llama"],
    "llama-3": LLAMA3,
    "llama-biased": CASES["llama-biased"],
    "qwen2": CASES["qwen2"],
    "qwen3": CASES["qwen3"],
    "gemma": CASES["gemma"],
    "gemma2": dataclasses.replace(CASES["gemma2"], query_scalar=0.0),
    "gemma3": dataclasses.replace(CASES["gemma3"], query_scalar=0.0),
    "gemma3-full": CASES["gemma3-full"],
}
WIDE = ModelConfig("llama", 64, 64, 96, 2, 4, 2, 16, max_positions=128, rms_eps=1e-6)  # rows are whole blocks of 32


@pytest.mark.parametrize("name", MODELS)
def test_float32_weights_and_config_come_back(name: str, tmp_path: Path):
    """Exactly; Gemma's norms, stored as 1 + w, to rounding."""
    mc, params = MODELS[name], random_params(MODELS[name])
    extra = {"attention__sliding_window_pattern": 3} if name == "gemma3" else {}  # without it every sixth layer sees everything
    write_gguf(tmp_path / "m.gguf", params, mc, **extra)
    found, loaded = load_hf(tmp_path / "m.gguf")
    assert found == mc

    def same(path: tuple, ours: np.ndarray, theirs: np.ndarray) -> None:
        rounding = 2e-7 if mc.arch.norm_offset and path[-1].key.endswith("norm") else 0.0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rounding)

    jax.tree_util.tree_map_with_path(same, loaded, params)


def test_windows_of_gemma_by_pattern_or_by_layer(tmp_path: Path):
    mc = MODELS["gemma3"]
    for pattern, layers in ((None, (0, 1, 2)), (2, (0, 2)), ([True, False, True], (0, 2)), (1, ())):
        write_gguf(tmp_path / "m.gguf", random_params(mc), mc, attention__sliding_window_pattern=pattern)
        assert read_config(tmp_path / "m.gguf").window_layers == layers
    large = dataclasses.replace(MODELS["gemma2"], num_layers=46, num_heads=2, num_kv_heads=1, window_layers=tuple(range(0, 46, 2)))
    write_gguf(tmp_path / "m.gguf", random_params(large), large)
    assert read_config(tmp_path / "m.gguf").query_scalar == 16.0  # Gemma 2 27B: D / N, which the file does not say


def test_quantised_weights_within_their_step_on_any_mesh(tmp_path: Path):
    """Q8_0 keeps 32 numbers as bytes times max |x| / 127 (in float16): half a step and the rounding of the scale."""
    params = random_params(WIDE)
    written = write_gguf(tmp_path / "m.gguf", params, WIDE, "Q8_0")
    mc, loaded = load_hf(tmp_path / "m.gguf")
    after = torch_tensors(loaded, mc)
    for name, before in written.items():
        if before.ndim == 1:
            np.testing.assert_array_equal(after[name], before)
            continue
        largest = np.abs(before.reshape(len(before), -1, 32)).max(axis=-1, keepdims=True)
        step = np.broadcast_to(largest / 127, (*largest.shape[:2], 32)).reshape(before.shape)
        assert (np.abs(after[name] - before) <= 0.5 * step + 127 * step * 2**-11).all(), name
        assert (after[name] != before).any()
        kind = gguf.GGMLQuantizationType.Q8_0
        np.testing.assert_array_equal(after[name], gguf.dequantize(gguf.quantize(before, kind), kind))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for block_bytes in (0, 500):
        reader = GgufReader(tmp_path / "m.gguf", mc)
        _, sharded = load_hf(tmp_path / "m.gguf", mesh, reader=reader, block_bytes=block_bytes)
        jax.tree.map(np.testing.assert_array_equal, sharded, loaded)
        assert reader.bytes_read["model.layers.0.mlp.up_proj.weight"] == 96 * (64 // 32) * 34  # each block of 34 bytes once
    assert load_hf(tmp_path / "m.gguf", dtype="bfloat16")[1]["embed"].dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_a_slice_is_that_of_the_whole_tensor(kind: str, tmp_path: Path):
    """Any bytes are a tensor of any type, also of those the package reads only; slices begin and end inside blocks."""
    mc = ModelConfig("llama", 40, 512, 32, 1, 2, 2, 256)
    path = tmp_path / "m.gguf"
    type_ = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[type_]
    held = np.random.default_rng(0).integers(0, 60, (40, 512 // block * width), np.uint8)  # small bytes: finite scales
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", held.view(np.float16) if kind == "F16" else held, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = gguf.dequantize(held.view(np.float16) if kind == "F16" else held, type_)
    reader = GgufReader(path, mc)
    assert reader.shape("model.embed_tokens.weight") == whole.shape == (40, 512) and np.isfinite(whole).all()
    for rows, columns in ((slice(0, 40), slice(0, 512)), (slice(3, 11), slice(100, 300)), (slice(39, 40), slice(511, 512))):
        np.testing.assert_array_equal(reader.read("model.embed_tokens.weight", (rows, columns)), whole[rows, columns])


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path):
    mc, params, path = CASES["llama"], random_params(CASES["llama"]), tmp_path / "m.gguf"

    def message(**extra) -> str:
        write_gguf(path, params, mc, **extra)
        with pytest.raises(ModelError) as error:
            load_hf(path)
        path.unlink()
        return str(error.value)

    assert "llama.expert_count = 8 is unknown" in message(expert_count=8)
    assert "rope.scaling.type = 'yarn'" in message(rope__scaling__type="yarn")
    assert "llama.rope.dimension_count = 6 is not the head size 12" in message(rope__dimension_count=6)
    both = message(context_length=None, block_count=None)
    assert "llama.context_length is missing" in both and "llama.block_count is missing" in both
    assert "feed_forward_length = [48, 32] differs between layers" in message(feed_forward_length=[48, 32])
    assert "gate_proj.weight has shape [48, 32], the config says [40, 32]" in message(feed_forward_length=40)
    assert "layers.2.input_layernorm.weight is missing" in message(block_count=3)
    assert "blk.1.attn_k.weight is unexpected" in message(block_count=1)
    write_gguf(path, params, dataclasses.replace(mc, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 2.0, 128)))
    with pytest.raises(ModelError, match=r"rope_freqs.weight is not the llama3 stretching"):
        read_config(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ModelError, match="does not read as GGUF"):
        read_config(path)
    with pytest.raises(ModelError, match="no such file"):
        read_config(tmp_path / "none.gguf")
    write_gguf(path, params, mc)
    whole, name = path.read_bytes(), b"blk.0.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8  # behind the rank and two sizes: the type
    types = {9: "blk.0.ffn_up.weight has type Q8_1, which the package gguf does not de-quantise", 99: r"99\)? is not a valid"}
    for kind, refusal in types.items():
        path.write_bytes(whole[:at] + struct.pack("<I", kind) + whole[at + 4 :])
        with pytest.raises(ModelError, match=refusal) as error:
            read_config(path)
        assert "\n" not in str(error.value)
    writer = gguf.GGUFWriter(path, "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"GGUF architecture 'phi3' is not supported; known: models of llama, qwen2, qwen3, gemma"):
        read_config(path)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    embedded_tokenizer_dir(folder)
    return folder


TEXTS = ("There are 12 apples, 345 pears and 7 plums.\n\nHow many?", "  x = 3.14;\tnaïve “quotes” 日本 🙂", "<|user|>hi<|end|>")


def test_a_gguf_file_is_a_student_with_its_tokenizer(embedded: Path, tmp_path: Path):
    """student.path = a .gguf file: same ids and template as the tokenizer it was made from, same logits as the model."""
    mc = ModelConfig("llama", 512, 32, 64, 2, 4, 2, 8, max_positions=1024)
    params, path = random_params(mc, deviation=0.1), tmp_path / "m.gguf"
    write_gguf(path, params, mc, tokenizer=tokenizer_fields(embedded, "smollm", {"eos": END, "padding": PAD}))
    config = tiny_config(student__path=str(path))
    check(config, devices=False)
    out = ArtifactWriter(tmp_path / "student")
    student.run(config, {}, out, Context(tmp_path))
    ours, theirs = load_tokenizer(out.file("tokenizer")), load_tokenizer(embedded)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert (ours.eos_token, ours.pad_token, ours.chat_template) == (END, PAD, theirs.chat_template)
    found, loaded = load_hf(path)
    assert found == dataclasses.replace(mc, eos_token_ids=(1,), pad_token_id=0)
    tokens = np.random.default_rng(0).integers(0, 512, (1, 40))
    np.testing.assert_array_equal(jax_logits(loaded, found, tokens), jax_logits(params, mc, tokens))


def test_a_gguf_student_is_exported_by_two_processes_as_by_one(embedded: Path, tmp_path: Path):
    """`dccot export` on each of two processes with two devices: every tensor as `load_hf` reads it, the tokenizer, one config."""
    mc = ModelConfig("llama", 512, 32, 64, 3, 4, 2, 8, max_positions=256)
    write_gguf(tmp_path / "m.gguf", random_params(mc), mc, "Q8_0", tokenizer_fields(embedded, "smollm", {"eos": END, "padding": PAD}))
    out, ctx = ArtifactWriter(tmp_path / "student"), Context(tmp_path)
    cfg = tiny_config(student__path=str(tmp_path / "m.gguf"))
    result = student.run(cfg, {}, out, ctx)
    finished(out.path, "student", result.logical_hash, dict(result.facts))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "dccot_jax", "export", f"--checkpoint={out.path}", f"--out={tmp_path / 'hf'}"]
    command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    runs = [subprocess.Popen([*command, f"--process_id={i}"], env=environment, stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        said = [run.communicate(timeout=300)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], said
    assert ["wrote" in text for text in said] == [True, False]
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert files == ["config.json", "generation_config.json", *weights, "tokenizer.json", "tokenizer_config.json"]
    found, loaded = load_hf(tmp_path / "hf")
    assert found == read_config(tmp_path / "m.gguf")
    jax.tree.map(np.testing.assert_array_equal, loaded, load_hf(tmp_path / "m.gguf")[1])
    assert tokenizer_hash(tmp_path / "hf") == tokenizer_hash(out.file("tokenizer"))


def test_pre_tokenizers_split_merge_and_normalise_as_named(embedded: Path, tmp_path: Path):
    """What llama.cpp's names stand for, on texts where they differ; an unknown name is refused."""
    fields = tokenizer_fields(embedded, "", {"eos": END, "bos": PAD})
    fields["ggml.tokens"] = [*fields["ggml.tokens"], "zq", "123", "12"]  # no merges lead there
    fields["ggml.token_type"] = [*fields["ggml.token_type"], 1, 1, 1]
    mc = ModelConfig("llama", 515, 16, 16, 1, 2, 2, 8)

    def tokens(pre: str, text: str, **changes) -> list[str]:
        path = tmp_path / f"{pre}.gguf"
        write_gguf(path, random_params(mc), mc, tokenizer={**fields, "ggml.pre": pre, **changes})
        write_gguf_tokenizer(path, tmp_path / "tok")
        path.unlink()
        tokenizer = load_tokenizer(tmp_path / "tok")
        return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))

    assert tokens("llama-bpe", "zq") == ["zq"]  # whole tokens skip the merges
    assert tokens("llama-bpe", "12345") == ["123", "4", "5"]  # three digits, then two
    assert tokens("qwen2", "zq") == ["z", "q"] and tokens("smollm", "12") == ["1", "2"]
    assert tokens("qwen2", "e\u0301") == tokens("qwen2", "é") != tokens("smollm", "e\u0301")  # NFC
    assert tokens("gpt-2", "zq", **{"ggml.add_bos_token": True}) == [PAD, "z", "q"]
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.pre = 'viking' is not supported; known: gpt-2, smollm"):
        tokens("viking", "x")
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.model = 'bert'"):
        tokens("qwen2", "x", **{"ggml.model": "bert"})


def sentencepiece_fields() -> dict[str, Any]:
    """A vocabulary of letters and words with scores, all bytes, and three tokens that are no text."""
    letters = [*"abcdehlorw ".replace(" ", "▁")]
    words = ["he", "ll", "hell", "hello", "▁w", "or", "▁wor", "ld", "▁world", "▁hello"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *letters, *words]
    scores = [0.0] * 259 + [-100.0] * len(letters) + [-float(i) for i in range(len(words))]
    return {
        "ggml.model": "llama", "ggml.tokens": tokens, "ggml.scores": scores,
        "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0,
    }  # fmt: skip


def test_sentencepiece_vocabularies(tmp_path: Path):
    """Merges follow the scores; bytes stand in for what is unknown; llama.cpp puts <s> in front unless told otherwise."""
    fields = sentencepiece_fields()
    mc = ModelConfig("llama", len(fields["ggml.tokens"]), 16, 16, 1, 2, 2, 8)
    write_gguf(tmp_path / "m.gguf", random_params(mc), mc, tokenizer=fields)
    write_gguf_tokenizer(tmp_path / "m.gguf", tmp_path / "tok")
    tokenizer = load_tokenizer(tmp_path / "tok")
    ids = tokenizer("hello world é</s>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁hello", "▁world", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world é"
    assert read_config(tmp_path / "m.gguf").eos_token_ids == (2,)


def test_other_models_are_compared_with_the_tokenizer_in_the_file(embedded: Path, tmp_path: Path):
    """The check before any work: the holdout model's tokenizer is the file's, or it is refused; it cannot be a GGUF file itself."""
    mc, path = ModelConfig("llama", 512, 32, 64, 1, 4, 2, 8, max_positions=1024), tmp_path / "m.gguf"
    write_gguf(path, random_params(mc), mc, tokenizer=tokenizer_fields(embedded, "smollm", {"eos": END, "padding": PAD}))
    changes = {"student__path": str(path), "score__signals": ("rho",), "score__student": "base"}
    for pad, refused in ((PAD, False), (END, True)):
        other = tmp_path / f"other{refused}"
        write_gguf(
            path.with_name("o.gguf"), random_params(mc), mc, tokenizer=tokenizer_fields(embedded, "smollm", {"eos": END, "padding": pad})
        )
        write_gguf_tokenizer(path.with_name("o.gguf"), other)
        save_hf(random_params(mc), mc, None, other)
        config = tiny_config(**changes, score__models__holdout=str(other))
        if refused:
            with pytest.raises(InputError, match=r"config.score.models.holdout: .* has tokenizer"):
                check_settings(config)
        else:
            check_settings(config)
    with pytest.raises(InputError, match=r"config.score.models.holdout: .*o.gguf: a GGUF file is read as student.path alone"):
        check_settings(tiny_config(**changes, score__models__holdout=str(path.with_name("o.gguf"))))


def test_a_student_that_cannot_be_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(InputError, match=r"config.student.path: .*no such file"):
        check(tiny_config(student__path=str(tmp_path / "none.gguf")), devices=False)


WINDOWS = {"sliding_window": 6, "rms_eps": 1e-6}
AGAINST_TRANSFORMERS = {  # where it does not read the size of a head or the base, it is the one it takes
    "llama": {"rope_theta": 700.0, "tie_embeddings": False},
    "qwen2": {"rope_theta": 700.0, "tie_embeddings": False, "qkv_bias": True},
    "qwen3": {"rope_theta": 700.0, "tie_embeddings": False, "head_dim": 128},
    "gemma2": {**WINDOWS, "head_dim": 256, "window_layers": (0, 2), "attn_softcap": 50.0, "final_softcap": 30.0},
    "gemma3_text": {**WINDOWS, "head_dim": 256, "window_layers": (0, 1, 2, 3, 4, 6), "rope_theta": 1e6, "rope_local_theta": 1e4},
}


@pytest.mark.parity
@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", AGAINST_TRANSFORMERS)
def test_logits_equal_transformers_reading_the_same_file(family: str, quant: str, embedded: Path, tmp_path: Path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # transformers reads no GGUF file without
    from transformers import AutoModelForCausalLM

    layers = {"gemma2": 3, "gemma3_text": 7}.get(family, 2)
    mc = ModelConfig(family, 512, 64, 96, layers, 4, 2, **{"head_dim": 16, "rms_eps": 1e-6, **AGAINST_TRANSFORMERS[family]})
    fields = tokenizer_fields(embedded, "smollm", {"eos": END})
    write_gguf(tmp_path / "m.gguf", random_params(mc, deviation=0.1), mc, quant, fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, mc.vocab_size, (2, 60))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    found, params = load_hf(tmp_path / "m.gguf")
    np.testing.assert_allclose(jax_logits(params, found, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(("family", "pre"), [("llama", "llama-bpe"), ("llama", "gpt-2"), ("qwen2", "qwen2"), ("llama", ""), ("gemma2", "")])
def test_tokens_equal_those_of_transformers_reading_the_same_file(family: str, pre: str, embedded: Path, tmp_path: Path):
    """Byte-level by the split it names, SentencePiece where `pre` is empty; text is cut at the control tokens."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    fields = tokenizer_fields(embedded, pre, {"eos": END}) if pre else sentencepiece_fields()
    if family == "gemma2":
        fields["ggml.add_space_prefix"] = False
    window = {"sliding_window": 8, "window_layers": (0,)} if family == "gemma2" else {}
    mc = ModelConfig(family, len(fields["ggml.tokens"]), 16, 16, 1, 2, 2, 8, qkv_bias=family == "qwen2", **window)
    write_gguf(tmp_path / "m.gguf", random_params(mc), mc, tokenizer=fields)
    write_gguf_tokenizer(tmp_path / "m.gguf", tmp_path / "tok")
    ours, theirs = load_tokenizer(tmp_path / "tok"), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in (*TEXTS, "hello world, hello  worldé", "</s>hell<s> world", " hello"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert ours.eos_token == theirs.eos_token
