"""A workdir on an object store: checkpoints, logs and every stage, with a bucket in memory behind epath and tensorstore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath
from object_store import OBJECTS, put, serving
from tiny import tiny_config
from training_cases import TINY, run_config, write_training

from dccot_jax import pipeline
from dccot_jax.artifact import ArtifactWriter, walk, write_atomic
from dccot_jax.context import Context
from dccot_jax.data.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from dccot_jax.external import train_files
from dccot_jax.stopping import Stopped
from dccot_jax.train.logs import TrainLog, read_log
from dccot_jax.train.loop import run


@pytest.fixture
def bucket(monkeypatch):
    with serving(monkeypatch):
        yield epath.Path("gs://bucket")


def test_a_file_is_replaced_whole_and_a_directory_is_walked(bucket):
    for data in (b"old", b"new"):
        write_atomic(bucket / "a" / "b.txt", data)
    write_atomic(bucket / "a" / "c" / "d.txt", b"d")
    assert OBJECTS == {"bucket/a/b.txt": b"new", "bucket/a/c/d.txt": b"d"}
    assert sorted(str(path) for path in walk(bucket / "a")) == ["gs://bucket/a/b.txt", "gs://bucket/a/c/d.txt"]


def test_a_model_in_a_bucket_counts_by_its_files(bucket):
    def identity(teacher):
        return train_files(tiny_config(train__distill__kind="forward_kl", train__distill__teacher=teacher))

    for name, data in (("one", b"{}"), ("two", b"[]")):
        put(f"bucket/{name}/config.json", data)
        put(f"bucket/{name}/model.safetensors", b"weights")
    one, two = identity("gs://bucket/one"), identity("gs://bucket/two")
    assert one.keys() == two.keys() == {"teacher:config.json", "teacher:model.safetensors"}
    assert {name for name in one if one[name] != two[name]} == {"teacher:config.json"}


def test_listings_are_not_remembered(bucket, monkeypatch):
    from fsspec import config

    monkeypatch.setattr(config, "conf", {})
    Context(bucket / "run")
    assert config.conf["gcs"] == {"use_listings_cache": False}


def test_the_log_without_append(bucket):
    with TrainLog(bucket / "train", 0) as log:
        log.write({"step": 2, "loss": 2.0})
        log.flush()
        assert [line["step"] for line in read_log(bucket / "train")] == [2]  # before a checkpoint
        log.write({"step": 4, "loss": 1.0})
    assert [line["step"] for line in read_log(bucket / "train")] == [2, 4]
    TrainLog(bucket / "train", 2).close()
    assert [line["step"] for line in read_log(bucket / "train")] == [2]
    (events,) = [data for name, data in OBJECTS.items() if "/tensorboard/events.out.tfevents" in name]
    assert events.count(b"train/loss") == 1


def test_a_tokenizer_is_read(bucket):
    write_tokenizer(bucket / "tokenizer", train_tokenizer(["one two", "three"], 300))
    assert load_tokenizer(bucket / "tokenizer").decode(load_tokenizer(bucket / "tokenizer")("three").input_ids) == "three"


def test_a_training_is_stopped_and_resumed_past_a_damaged_checkpoint(bucket, tmp_path):
    """The checkpoint that the stop leaves is torn; the one before it is whole, and so is the log up to it."""
    cfg = run_config(keep_checkpoints=2)
    inputs = write_training(tmp_path, TINY, cfg)
    one = jax.devices()[:1]
    local = run(cfg, inputs, ArtifactWriter(tmp_path / "train"), Context(tmp_path), devices=one)
    asked = Context(bucket)
    with pytest.raises(Stopped, match="saved after step 10"):
        run(cfg, inputs, ArtifactWriter(bucket / "train"), asked, devices=one, on_step=lambda step: step == 9 and asked.stop.ask("test"))
    torn = [name for name in OBJECTS if name.startswith("bucket/train/checkpoints/10/state/") and "/d/" in name]
    assert torn
    for name in torn:
        put(name, OBJECTS[name][: len(OBJECTS[name]) // 2])
    steps: list[int] = []
    far = run(cfg, inputs, ArtifactWriter(bucket / "train"), Context(bucket), devices=one, on_step=steps.append)
    assert steps[0] == 9 and far.logical_hash == local.logical_hash
    assert [line["loss"] for line in read_log(bucket / "train")] == [line["loss"] for line in read_log(tmp_path / "train")]
    assert not [name for name in OBJECTS if "/checkpoints/" in name]


@pytest.mark.slow
def test_a_whole_run_equals_one_on_a_disk(bucket, tmp_path):
    config = tiny_config(train__steps=8, train__checkpoint_every=3, train__log_every=2)
    hashes: list[dict[str, Any]] = []
    for workdir in (epath.Path(tmp_path / "run"), bucket / "run"):
        pipeline.run(config, Context(workdir))
        manifests = {path.parent.name: json.loads(path.read_text()) for path in walk(workdir) if path.name == "manifest.json"}
        hashes.append({name: manifest["logical_hash"] for name, manifest in manifests.items()})
        assert (workdir / "report" / "report.html").exists()
    assert hashes[0] == hashes[1]
    assert "bucket/run/report/results.json" in OBJECTS
    assert not any(Path.cwd().glob("gs:*")), "a path lost its scheme"
