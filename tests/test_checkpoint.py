"""Checkpoints: any mesh, damage, foreign owners; opening students from artifacts and Hugging Face directories."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import TINY, UNTIED, finished, host_params, mesh, params_on, run_config, write_student

from dccot_jax.artifact import ArtifactError, ArtifactWriter, tree_hash
from dccot_jax.model import hf
from dccot_jax.train.abandoned import forget_abandoned_futures
from dccot_jax.train.checkpoint import (
    CheckpointError,
    abstract_params,
    export_hf,
    load_student,
    random_params,
    resolve_checkpoint,
    save_params,
)
from dccot_jax.train.digest import checksums, params_hash
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.states import TrainCheckpoints, kept_steps, remove_all_but_best
from dccot_jax.train.step import abstract_state, init_state

OWNER = {"plan": "a" * 64, "student": "b" * 64}


def _equal(left, right):
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _state(on):
    return init_state(params_on(TINY, on), make_optimizer(run_config().train), on)


def _target(on):
    return abstract_state(abstract_params(TINY, on), make_optimizer(run_config().train), on)


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, 3 and 5, of a (2, 2, 2) mesh; 5 has other parameters."""
    on = mesh(2, 2, 2)
    with jax.set_mesh(on), TrainCheckpoints(tmp_path / "c", OWNER, keep=2, log=print) as saver:
        saver.save(3, _state(on), {"totals": {"tokens": 1.5}})
        saver.save(5, {**_state(on), "params": params_on(TINY, on, seed=1)}, {})
    return tmp_path / "c"


def _restore(path, on, owner=OWNER):
    lines: list[str] = []
    with jax.set_mesh(on), TrainCheckpoints(path, owner, keep=2, log=lines.append) as saver:
        found: Any = saver.restore(_target(on))
    return found, lines


def test_from_eight_shards_of_one_axis_to_two_of_each(tmp_path):
    flat, cube = mesh(1, 8, 1), mesh(2, 2, 2)
    with jax.set_mesh(flat), TrainCheckpoints(tmp_path, OWNER, keep=1, log=print) as saver:
        saver.save(7, _state(flat), {})
    (step, state, _), lines = _restore(tmp_path, cube)
    assert step == 7 and not lines
    _equal(state, jax.device_get(_state(flat)))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {cube}


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1)])
def test_a_state_is_restored_bitwise_onto_another_mesh(saved, shape):
    on = mesh(*shape)
    (step, state, _), lines = _restore(saved, on)
    assert step == 5 and not lines
    _equal(state["params"], host_params(TINY, 1))
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(_target(on)), strict=True):
        assert leaf.sharding == expected.sharding


def _data_files(folder):
    """All of them: which one a read touches depends on how the writer merged them."""
    return [path for path in folder.rglob("*") if path.is_file() and "/d/" in str(path)]


def _truncate(folder):
    for path in _data_files(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_bytes(folder):
    for path in _data_files(folder):
        data = bytearray(path.read_bytes())
        for place in range(len(data) // 3, len(data), 97):
            data[place] ^= 0x55
        path.write_bytes(bytes(data))


def _lose_record(folder):
    shutil.rmtree(folder / "meta")


def _wrong_contents(folder):
    meta = next((folder / "meta").iterdir())
    record = json.loads(meta.read_text())
    record["checksums"][2] ^= 1
    meta.write_text(json.dumps(record).ljust(meta.stat().st_size))  # of the same size


def _lose_files(folder):
    for path in _data_files(folder):
        path.unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip_bytes, _lose_record, _lose_files, _wrong_contents])
@pytest.mark.parametrize("sizes_known", [True, False])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(saved, damage, sizes_known):
    damage(saved / "5")
    if not sizes_known:
        (saved / "5" / "sizes.json").unlink()
    on = mesh(1, 1, 1)
    (step, state, record), lines = _restore(saved, on)
    assert step == 3 and record == {"totals": {"tokens": 1.5}}
    _equal(state["params"], host_params(TINY, 0))
    assert len(lines) == 1 and "checkpoint 5 is damaged" in lines[0]
    assert (saved / "damaged-5").exists()
    with jax.set_mesh(on), TrainCheckpoints(saved, OWNER, keep=2, log=print) as saver:
        saver.save(5, state, {"again": 1})
        again: Any = saver.restore(_target(on))
        assert again[2] == {"again": 1}


def test_an_unfinished_write_does_not_count(saved):
    shutil.copytree(saved / "5", saved / "8.orbax-checkpoint-tmp-1")
    (step, _, _), _ = _restore(saved, mesh(1, 1, 1))
    assert step == 5


@pytest.mark.parametrize(("keep", "left"), [(1, ["3"]), (2, ["2", "3"]), (-1, ["1", "2", "3"])])
def test_the_newest_are_kept(tmp_path, keep, left):
    on = mesh(1, 1, 1)
    with jax.set_mesh(on), TrainCheckpoints(tmp_path, OWNER, keep=keep, log=print) as saver:
        for step in (1, 2, 3):
            saver.save(step, _state(on), {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == left


def test_which_checkpoints_stay():
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: None, 6: 9.0}
    assert kept_steps(losses, last=2, best=0) == {5, 6}
    assert kept_steps(losses, last=1, best=2) == {2, 4, 6}
    assert kept_steps(losses, last=1, best=1) == {4, 6}  # of equals the newer
    assert kept_steps(losses, last=0, best=0) == {6}  # never none
    assert kept_steps(losses, last=-1, best=1) == set(losses)


def test_the_best_stay_beside_the_newest_even_over_a_restart(tmp_path):
    on = mesh(1, 1, 1)
    state = _state(on)
    for part in ({1: 5.0, 2: 2.0, 3: 3.0}, {4: 4.0, 5: float("nan")}):
        with jax.set_mesh(on), TrainCheckpoints(tmp_path, OWNER, keep=1, keep_best=2, log=print) as saver:
            for step, loss in part.items():
                saver.save(step, state, {}, loss=loss)
    assert _on_disk(tmp_path) == [2, 3, 5]
    remove_all_but_best(tmp_path, 1)
    assert _on_disk(tmp_path) == [2]
    remove_all_but_best(tmp_path, 0)
    assert not tmp_path.exists()


def _on_disk(path):
    return sorted(int(folder.name) for folder in path.iterdir() if folder.name.isdigit())


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path, caplog):
    """A limit on the size of files stands in for the disk: the write fails in the same place."""
    on = mesh(1, 1, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with jax.set_mesh(on), TrainCheckpoints(tmp_path, OWNER, keep=1, log=print) as saver:
        state = _state(on)
        saver.save(1, state, {})
        saver.settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        try:
            with pytest.raises(CheckpointError) as full:
                saver.save(2, state, {})
                saver.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "checkpoint 2 could not be written (File too large); checkpoint 1 is whole. Make room" in str(full.value)
    assert "\n" not in str(full.value) and not [record for record in caplog.records if record.exc_info]
    (step, restored, _), lines = _restore(tmp_path, on)
    assert step == 1 and not lines
    # What was half written gives its room back, at the latest to the next process; it never counts as a checkpoint.
    assert [path.name for path in tmp_path.iterdir() if "tmp" not in path.name] == ["1"]
    _equal(restored, state)


def fill_the_disk(path):
    """Prints the error of a training whose second checkpoint does not fit."""
    on = mesh(1, 1, 1)
    try:
        with jax.set_mesh(on), TrainCheckpoints(path, OWNER, keep=-1, log=print) as saver:
            saver.save(1, _state(on), {})
            saver.settle()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
            saver.save(2, _state(on), {})
    except CheckpointError as full:
        print(full, file=sys.stderr)


def test_all_that_a_full_disk_leaves_on_stderr_is_one_line(tmp_path):
    """Not the tracebacks of the other arrays' writes, which end when Orbax has closed its event loop."""
    command = f"import sys; sys.path[:0] = {sys.path!r}; import test_checkpoint; test_checkpoint.fill_the_disk({str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300, check=True)
    full = (
        f"{tmp_path}: checkpoint 2 could not be written (File too large); checkpoint 1 is whole. Make room and run the same command again"
    )
    assert found.stderr.splitlines() == [full]


def test_other_errors_that_cannot_be_raised_are_still_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(str(unraisable.exc_value)))
    for _ in range(2):
        forget_abandoned_futures()
    loop = asyncio.new_event_loop()
    loop.close()

    class Left:
        def __init__(self, act):
            self.act = act

        def __del__(self):
            self.act()

    def fail(error):
        raise error

    Left(lambda: fail(RuntimeError("Event loop is closed")))  # of somebody else
    Left(lambda: loop.call_soon_threadsafe(print))  # Python code that uses a closed loop
    Left(lambda: fail(OSError("full")))
    assert printed == ["Event loop is closed", "Event loop is closed", "full"]


def test_a_checkpoint_is_written_behind_the_trainings_back(tmp_path, monkeypatch):
    """`save` returns while the write cannot end, and what it writes is the state of that moment, whatever becomes of the arrays."""
    on = mesh(1, 2, 1)
    gate, waited = threading.Event(), []
    rename = os.rename

    def held(source, target, **kwargs):
        if Path(target).name == "1":
            waited.append(gate.wait(120))
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", held)
    with jax.set_mesh(on), TrainCheckpoints(tmp_path, OWNER, keep=1, log=print) as saver:
        state = _state(on)
        expected = jax.device_get(state)
        saver.save(1, state, {})
        assert not (tmp_path / "1").exists()
        jax.tree.map(lambda leaf: leaf.delete(), state)  # as donation does
        gate.set()
    assert waited == [True]
    (step, restored, _), _ = _restore(tmp_path, on)
    assert step == 1
    _equal(restored, expected)


def test_a_record_that_changes_while_it_is_written_is_stored_as_it_was(tmp_path, monkeypatch):
    """The loop goes on adding to its sums; what a slow write stores is what they were when the state was."""
    on = mesh(1, 2, 1)
    gate = threading.Event()
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: dumps(*args, **kwargs) if gate.wait(120) else "")
    with jax.set_mesh(on), TrainCheckpoints(tmp_path, OWNER, keep=1, log=print) as saver:
        record = {"window": {"steps": 1, "sums": {"loss": [3.0, 2.0]}}, "skipped_in_a_row": [7]}
        saver.save(1, _state(on), record)
        record["window"]["sums"]["loss"][0] += 1.0
        record["skipped_in_a_row"].append(8)
        gate.set()
    (_, _, stored), _ = _restore(tmp_path, on)
    assert stored == {"window": {"steps": 1, "sums": {"loss": [3.0, 2.0]}}, "skipped_in_a_row": [7]}


def test_nothing_to_restore(tmp_path):
    assert _restore(tmp_path / "none", mesh(1, 1, 1)) == (None, [])


def test_a_checkpoint_of_another_plan_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"another plan \(aaaaaaaaaaaaaaaa\); this training's plan is cccccccccccccccc"):
        _restore(saved, mesh(1, 1, 1), {**OWNER, "plan": "c" * 64})
    assert (saved / "5").exists()


def test_digests_do_not_depend_on_the_mesh_and_see_every_change():
    host = host_params(UNTIED)
    for shape in ((1, 1, 1), (2, 2, 2)):
        on = mesh(*shape)
        assert params_hash(params_on(UNTIED, on), on) == tree_hash(host)
    on = mesh(2, 2, 2)
    with jax.set_mesh(on):
        run = jax.jit(checksums)
        plain = np.asarray(run(params_on(UNTIED, on)))
    bits = np.asarray([[1.0, -2.0], [3.0, 4.0]], np.float32)
    changes = {
        "sign": bits * [[1, 1], [1, -1]],
        "swapped": bits[:, ::-1],
        "transposed": bits.T,
        "last bit": np.nextafter(bits, np.float32(9)),
        "zeroed": bits * 0,
    }
    sums = {name: int(checksums({"x": jnp.asarray(x, jnp.float32)})[0]) for name, x in {"as is": bits, **changes}.items()}
    assert len(set(sums.values())) == len(sums)
    halves = [int(checksums({"x": jnp.asarray(x, jnp.bfloat16)})[0]) for name, x in changes.items() if name != "last bit"]
    assert len(set(halves)) == len(halves)
    leaves = jax.tree.leaves(host)
    assert [int(checksums({"x": jnp.asarray(x)})[0]) for x in leaves[:3]] == plain[:3].tolist()


# --- students ---------------------------------------------------------------------------------------------------------


def test_a_random_student_is_a_function_of_its_seed(tmp_path):
    student = write_student(tmp_path / "s", TINY, seed=11)
    loaded = load_student(student, mesh(2, 2, 2))
    _equal(loaded.params, random_params(TINY, mesh(2, 2, 2), 11))
    assert loaded.mc == TINY and (loaded.eos_id, loaded.stop_ids, loaded.pad_id) == (1, (1,), 0)
    other = random_params(TINY, mesh(2, 2, 2), 12)
    assert not np.array_equal(np.asarray(other["embed"]), np.asarray(jax.device_get(loaded.params["embed"])))


@pytest.fixture
def trained(tmp_path):
    """A train artifact, as the loop leaves it, with a real tokenizer."""
    from dccot_jax.data.tokenizer import train_tokenizer, write_tokenizer

    student = write_student(tmp_path / "student", UNTIED)
    out = ArtifactWriter(tmp_path / "train")
    save_params(out.file("final"), params_on(UNTIED, mesh(2, 2, 2)))
    out.write_bytes("student.json", student.file("student.json").read_bytes())
    write_tokenizer(out.file("tokenizer"), train_tokenizer(["one two", "three"], 300))
    return finished(tmp_path / "train", "train:warmup", "x")


def test_a_train_artifact_opens_by_itself_on_any_mesh(trained, tmp_path):
    shutil.rmtree(tmp_path / "student")
    for shape in ((1, 1, 1), (1, 2, 2)):
        student = load_student(trained, mesh(*shape))
        _equal(student.params, host_params(UNTIED))
    half = load_student(trained.path, mesh(1, 4, 2), param_dtype=jnp.bfloat16).params
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert half["layers"]["wq"].addressable_shards[0].data.shape == (2, 4, 12)


def test_damaged_parameters_are_an_artifact_error(trained):
    shutil.rmtree(trained.file("final") / "d")
    with pytest.raises(ArtifactError, match="parameters do not read"):
        load_student(trained, mesh(1, 1, 1))


def test_export_and_open_a_hugging_face_directory(trained, tmp_path):
    export_hf(trained, tmp_path / "hf")
    _equal(hf.load_hf(tmp_path / "hf")[1], host_params(UNTIED))
    student = load_student(tmp_path / "hf", mesh(1, 2, 1))
    _equal(student.params, host_params(UNTIED))
    assert student.eos_id == 1  # <|end|>
    (tmp_path / "adapter").mkdir()  # somebody's, beside the directory
    export_hf(tmp_path / "hf", tmp_path / "again")
    _equal(hf.load_hf(tmp_path / "again")[1], host_params(UNTIED))
    assert not (tmp_path / "again" / "adapter").exists()


def test_a_path_that_holds_no_student_is_refused(tmp_path):
    ArtifactWriter(tmp_path / "plan")
    finished(tmp_path / "plan", "plan", "x")
    with pytest.raises(CheckpointError, match="an artifact of stage plan"):
        resolve_checkpoint(tmp_path / "plan")
    with pytest.raises(CheckpointError, match="neither an artifact"):
        load_student(tmp_path, mesh(1, 1, 1))
