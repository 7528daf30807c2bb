"""A training of adapters as a whole: what it leaves, a kill, an intermediate checkpoint, the export."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from training_cases import TINY, finished, mesh, run_config, write_training

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.config_identity import config_slice
from dccot_jax.context import Context
from dccot_jax.model.hf import load_hf
from dccot_jax.model.lora import init_adapters
from dccot_jax.model.safetensors_io import TensorReader
from dccot_jax.train import loop
from dccot_jax.train.adapters import dropout_seed, fresh, trained_model
from dccot_jax.train.checkpoint import export_hf, load_student
from dccot_jax.train.loop import run
from dccot_jax.train.snapshots import restore_snapshot_params


class Killed(Exception):
    """Stands in for a kill between two steps."""


def _config(**train):
    cfg = run_config(keep_checkpoints=-1, **train)
    cfg.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    cfg.train.lora.update({"rank": 2, "alpha": 8.0, "dropout": 0.25, "targets": ("q_proj", "down_proj"), "frozen_dtype": "bfloat16"})
    return cfg


def _train(inputs, out, *, kill=0, **train):
    def on_step(step):
        if step == kill:
            raise Killed

    return run(_config(**train), inputs, ArtifactWriter(out), Context(out.parent), devices=jax.devices()[:2], on_step=on_step)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_training(tmp_path_factory.mktemp("inputs"), TINY, _config())


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """(its directory, its artifact) of a whole training."""
    out = tmp_path_factory.mktemp("trained") / "train"
    result = _train(inputs, out, snapshots=1)
    return out, finished(out, "train", result.logical_hash, config=config_slice(_config(snapshots=1), ("train",)))


def _read(folder, name, part):
    module = {"wq": "self_attn.q_proj", "w_down": "mlp.down_proj"}[name]
    reader = TensorReader(folder)
    leaves = [f"base_model.model.model.layers.{i}.{module}.lora_{part}.weight" for i in range(TINY.num_layers)]
    return np.stack([reader.read(leaf, (slice(None), slice(None))).T for leaf in leaves]).astype(np.float64)


def test_adapters_are_learned_merged_saved_apart_and_survive_a_kill(inputs, trained, tmp_path):
    out, artifact = trained
    final = json.loads((out / "final.json").read_text())
    assert final["lora"]["targets"] == ["wq", "w_down"] and final["parameters"] == TINY.num_params()
    d, f, n = TINY.hidden_size, TINY.intermediate_size, TINY.num_heads * TINY.head_dim
    assert final["trained_parameters"] == TINY.num_layers * 2 * ((d + n) + (f + d))
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]

    # final/ = bfloat16 weights + 8/2 · A·B of the PEFT directory; everything else is the student's own.
    one = mesh(1, 1, 1)
    base = jax.device_get(load_student(inputs["student"], one, param_dtype="bfloat16").params)
    whole = jax.device_get(load_student(artifact, one).params)
    shutil.copy(out / "adapter" / "adapter_model.safetensors", tmp_path / "model.safetensors")
    for name, leaf in whole["layers"].items():
        expected = np.asarray(base["layers"][name], np.float64)
        if name in ("wq", "w_down"):
            moved = 4.0 * _read(tmp_path, name, "A") @ _read(tmp_path, name, "B")
            assert np.abs(moved).max() > 1e-3
            expected = expected + moved
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole["embed"], np.asarray(base["embed"], np.float32))

    # A checkpoint holds adapters alone and opens as the student it would have become, of the same rounded weights.
    kept = out / "checkpoints" / "8"
    early = jax.device_get(load_student(kept, one).params)
    assert np.abs(early["layers"]["wq"] - whole["layers"]["wq"]).max() > 1e-5
    own = jax.device_get(load_student(inputs["student"], one).params)["layers"]["wk"]
    assert np.any(own != whole["layers"]["wk"])  # not representable in bfloat16
    np.testing.assert_array_equal(early["layers"]["wk"], whole["layers"]["wk"])
    np.testing.assert_array_equal(early["embed"], whole["embed"])

    # The adapters of the last step merge into final/ bit for bit, as a checkpoint and as a snapshot.
    shutil.copytree(out / "snapshots" / "12", out / "checkpoints" / "12" / "state")
    for last in (load_student(out / "checkpoints" / "12", one).params, restore_snapshot_params(artifact, 12, TINY, one)):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(last), whole)

    # Killed between two checkpoints: bit for bit the same end, dropout included.
    with pytest.raises(Killed):
        _train(inputs, tmp_path / "again", kill=6)
    assert _train(inputs, tmp_path / "again").logical_hash == artifact.logical_hash


def test_an_export_holds_the_merged_model_and_its_adapters(trained, tmp_path):
    out, artifact = trained
    export_hf(str(out), tmp_path / "hf")
    one = mesh(1, 1, 1)
    merged, expected = load_hf(tmp_path / "hf", one)[1], load_student(artifact, one).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(merged), jax.device_get(expected))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "hf" / "adapter" / name).read_bytes() == (out / "adapter" / name).read_bytes()
    about = json.loads((tmp_path / "hf" / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] is None  # drawn from a seed
    # These adapters belong to the end of the training, and to it alone.
    export_hf(out / "checkpoints" / "8", tmp_path / "early")
    assert not (tmp_path / "early" / "adapter").exists()


def test_adapters_and_dropout_are_drawn_from_the_runs_seed_apart(inputs):
    mc, one = trained_model(TINY, _config().train), mesh(1, 1, 1)

    def drawn(seed):
        with jax.set_mesh(one):
            return jax.device_get(fresh(inputs["student"], mc, one, seed))["layers"]

    first, again, other = (drawn(seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for name in ("wq_a", "w_down_a"):
        assert np.mean(first[name] == other[name]) < 0.01
    assert len({dropout_seed(seed) for seed in range(9)}) == 9 and dropout_seed(3) == dropout_seed(3)
    with jax.set_mesh(one):
        of_dropout = init_adapters(mc, jax.random.key(dropout_seed(0)))["layers"]
    assert np.mean(first["wq_a"] == of_dropout["wq_a"]) < 0.01  # not one key


def test_a_training_hands_on_its_own_seed(inputs, tmp_path, monkeypatch):
    asked = []

    def drawn(student, mc, on, seed):
        asked.append(seed)
        return fresh(student, mc, on, seed)

    def compiled(mc, on, train, dtype, attention, sizes, seed, *_):
        asked.append(seed)
        raise Killed

    monkeypatch.setattr(loop.adapters, "fresh", drawn)
    monkeypatch.setattr(loop, "_compile", compiled)
    cfg = _config()
    cfg.seed = 7
    with pytest.raises(Killed):
        run(cfg, inputs, ArtifactWriter(tmp_path / "train"), Context(tmp_path), devices=jax.devices()[:2])
    assert asked == [7, dropout_seed(7)]


@pytest.mark.parity
def test_peft_on_the_base_gives_the_logits_of_the_export(inputs, trained, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    export_hf(trained[1], tmp_path / "hf")
    export_hf(inputs["student"], tmp_path / "base")
    tokens = torch.tensor(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12)))

    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens).logits.numpy()

    def adapted(base):
        return logits(peft.PeftModel.from_pretrained(base, tmp_path / "hf" / "adapter"))

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    rounded = base()
    for weight in rounded.parameters():
        weight.data = weight.data.to(torch.bfloat16).to(torch.float32)
    np.testing.assert_allclose(adapted(rounded), expected, atol=1e-4)
    np.testing.assert_allclose(adapted(base()), expected, atol=0.02 * np.abs(expected).max())
    assert np.abs(logits(base()) - expected).max() > 0.1 * np.abs(expected).max()
