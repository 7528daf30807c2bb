"""The train stage as a whole: learning, logs, and a resume that leaves no trace."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from training_cases import TINY, finished, mesh, place, run_config, write_training

from dccot_jax.artifact import Artifact, ArtifactWriter, tree_hash
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data.loader import PlanSource
from dccot_jax.stopping import Stopped, StopRequest
from dccot_jax.train.checkpoint import CheckpointError, abstract_params, load_student, restore_params
from dccot_jax.train.logs import TrainLog, Window, read_log
from dccot_jax.train.loop import run
from dccot_jax.train.losses import weighted_loss
from dccot_jax.train.snapshots import restore_snapshot

STEPS = 12


class Killed(Exception):
    """Stands in for a kill between two steps."""


def _kill_at(step):
    def on_step(done):
        if done == step:
            raise Killed

    return on_step


def _train(inputs, out, cfg, *, devices=1, on_step=None):
    return run(cfg, inputs, ArtifactWriter(out), Context(out.parent), devices=jax.devices()[:devices], on_step=on_step)


def _plain_log(folder):
    times = ("seconds", "tokens_per_second", "time")  # the only fields in which a resumed run's log differs
    return [{name: value for name, value in line.items() if name not in times} for line in read_log(folder)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_training(tmp_path_factory.mktemp("inputs"), TINY, run_config())


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "train"
    return out, _train(inputs, out, run_config())


def test_what_a_training_leaves_behind(undisturbed, inputs):
    out, result = undisturbed
    assert not (out / "checkpoints").exists()
    assert {"final", "final.json", "student.json", "tokenizer", "train_log.jsonl", "tensorboard"} <= {path.name for path in out.iterdir()}
    lines = read_log(out)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    plan, pool = inputs["plan"].table("plan"), inputs["tokenize"].table("tokens")
    lengths = [len(pool["input_ids"][row].as_py()) for row in plan["token_row"].to_pylist()]
    assert sum(line["tokens"] for line in lines) == sum(lengths) == result.facts["tokens"]  # padding is not counted
    assert lines[-1]["epoch"] == pytest.approx(len(plan) / len(pool), abs=1e-6)
    assert result.facts["steps"] == STEPS and result.facts["skipped_steps"] == 0 and result.rows_in == len(plan)


def test_the_logical_hash_names_the_parameters(undisturbed, inputs):
    from dccot_jax.train.loop import _logical_hash

    out, result = undisturbed
    params = jax.device_get(restore_params(out / "final", abstract_params(TINY, mesh(1, 2, 1))))
    assert result.logical_hash == _logical_hash(tree_hash(params), inputs["student"], inputs["plan"].json("plan"))


@pytest.mark.parametrize("kills", [(2,), (5,), (4, 9, 10)])
def test_a_killed_training_ends_bit_for_bit_like_an_undisturbed_one(undisturbed, inputs, tmp_path, kills):
    for step in kills:
        with pytest.raises(Killed):
            _train(inputs, tmp_path / "train", run_config(), on_step=_kill_at(step))
    result = _train(inputs, tmp_path / "train", run_config())
    out, expected = undisturbed
    assert result.logical_hash == expected.logical_hash and result.facts == expected.facts
    assert _plain_log(tmp_path / "train") == _plain_log(out)


def test_rounded_first_moments_resume_bit_for_bit_too(undisturbed, inputs, tmp_path):
    """Checkpoints hold them as they are; snapshots are read as float32."""
    cfg = run_config(moment_dtype="bfloat16", snapshots=1)
    expected = _train(inputs, tmp_path / "whole", cfg)
    assert expected.logical_hash != undisturbed[1].logical_hash
    with pytest.raises(Killed):
        _train(inputs, tmp_path / "train", cfg, on_step=_kill_at(6))
    steps: list[int] = []
    result = _train(inputs, tmp_path / "train", cfg, on_step=steps.append)
    assert steps[0] == 5 and result.logical_hash == expected.logical_hash
    first, second = (restore_snapshot(Artifact(epath.Path(tmp_path / name), {}), STEPS, mesh(1, 2, 1)) for name in ("whole", "train"))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for leaf in jax.tree.leaves(first["mu"]):
        assert leaf.dtype == jnp.float32 and np.array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))


def test_asked_to_stop_it_saves_the_step_and_goes_on_bit_for_bit(undisturbed, inputs, tmp_path):
    """SIGTERM inside a window and between two checkpoints."""
    with StopRequest().on_signals() as stop:
        ctx = Context(tmp_path, stop=stop)
        cfg = run_config(checkpoint_every=100)
        kill = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match=r"saved after step 6 of 12") as stopped:
            writer = ArtifactWriter(tmp_path / "train")
            run(cfg, inputs, writer, ctx, devices=jax.devices()[:1], on_step=lambda step: kill() if step == 5 else None)
    steps: list[int] = []
    result = _train(inputs, tmp_path / "train", run_config(), on_step=steps.append)
    assert f"after step {steps[0] - 1} of" in str(stopped.value)
    assert result.logical_hash == undisturbed[1].logical_hash and result.facts == undisturbed[1].facts
    assert _plain_log(tmp_path / "train") == _plain_log(undisturbed[0])


def test_asked_to_stop_at_the_last_step_it_finishes(undisturbed, inputs, tmp_path):
    ctx = Context(tmp_path)
    writer = ArtifactWriter(tmp_path / "train")
    result = run(
        run_config(), inputs, writer, ctx, devices=jax.devices()[:1], on_step=lambda step: ctx.stop.ask("test") if step == STEPS else None
    )
    assert result.logical_hash == undisturbed[1].logical_hash


def test_the_log_window_survives_where_checkpoints_and_lines_do_not_meet(undisturbed, inputs, tmp_path):
    """A checkpoint after step 4 lies inside the window of steps 4 to 6."""
    first: list[int] = []
    with pytest.raises(Killed):
        _train(inputs, tmp_path / "train", run_config(), on_step=_kill_at(6))
    _train(inputs, tmp_path / "train", run_config(), on_step=first.append)
    assert first[0] == 5
    assert _plain_log(tmp_path / "train") == _plain_log(undisturbed[0])


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_result(undisturbed, inputs, tmp_path):
    with pytest.raises(Killed):
        _train(inputs, tmp_path / "train", run_config(), on_step=_kill_at(10))
    for path in (tmp_path / "train" / "checkpoints" / "8" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    steps: list[int] = []
    result = _train(inputs, tmp_path / "train", run_config(), on_step=steps.append)
    assert steps[0] == 5
    assert result.logical_hash == undisturbed[1].logical_hash


def test_a_finished_training_is_not_repeated(undisturbed, inputs, tmp_path):
    """Killed after the last step and before the manifest."""
    shutil.copytree(undisturbed[0], tmp_path / "train")
    (tmp_path / "train" / "checkpoints" / "8").mkdir(parents=True)
    result = _train(inputs, tmp_path / "train", run_config(), on_step=_kill_at(1))
    assert result == undisturbed[1]
    assert not (tmp_path / "train" / "checkpoints").exists()


def test_the_best_checkpoint_stays_and_opens_as_a_student(inputs, tmp_path):
    out = tmp_path / "train"
    _train(inputs, out, run_config(keep_best=1, keep_checkpoints=1, checkpoint_every=5))
    (best,) = (out / "checkpoints").iterdir()
    assert best.name == "10"
    finished(out, "train", "x")
    on = mesh(1, 2, 1)
    student = load_student(best, on)
    assert student.mc == TINY and student.source == str(best)
    # The loss of the next step is the loss of these parameters.
    batch = PlanSource.from_artifacts(inputs["plan"], inputs["tokenize"])[10]
    with jax.set_mesh(on):
        total, weight = weighted_loss(student.params, TINY, place(batch, on), compute_dtype="float32", remat="none")
    again = _train(inputs, tmp_path / "again", run_config(log_every=1))
    assert read_log(tmp_path / "again")[10]["loss"] == pytest.approx(float(total) / float(weight), rel=1e-5)
    assert again.facts["steps"] == STEPS


def test_a_training_of_another_plan_is_refused(inputs, tmp_path):
    with pytest.raises(Killed):
        _train(inputs, tmp_path / "train", run_config(), on_step=_kill_at(6))
    other = write_training(tmp_path / "other", TINY, run_config(), seed=1)
    hashes = (inputs["plan"].json("plan")["hash"][:16], other["plan"].json("plan")["hash"][:16])
    with pytest.raises(CheckpointError, match=rf"another plan \({hashes[0]}\).*{hashes[1]}"):
        _train(other, tmp_path / "train", run_config())
    with pytest.raises(CheckpointError, match="another config"):
        _train(inputs, tmp_path / "train", run_config(learning_rate=0.5))
    cfg = run_config(checkpoint_every=100)  # recorded, not hashed
    assert _train(inputs, tmp_path / "train", cfg).facts["steps"] == STEPS


def test_rows_longer_than_the_models_positions_are_refused(tmp_path):
    cfg = run_config(row_tokens=TINY.max_positions + 8)
    with pytest.raises(ConfigError, match=r"train.row_tokens: 72 exceeds the student's 64 positions"):
        _train(write_training(tmp_path, TINY, cfg), tmp_path / "train", cfg)


def test_sixty_steps_on_eight_devices_and_resumes_on_other_meshes(tmp_path):
    """The lag-1 loop neither hangs with many fake devices nor depends on the mesh that a checkpoint was made on."""
    cfg = run_config(steps=60, checkpoint_every=15, log_every=20, microbatches=1)
    cfg.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    inputs = write_training(tmp_path, TINY, cfg)
    whole = _train(inputs, tmp_path / "whole", cfg, devices=8)
    lines = read_log(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    for sizes, last in (((1, 8, 1), 20), ((2, 2, 2), 50)):
        cfg.mesh = dict(zip(("data", "fsdp", "tensor"), sizes))
        with pytest.raises(Killed):
            _train(inputs, tmp_path / "moved", cfg, devices=8, on_step=_kill_at(last))
    cfg.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    steps: list[int] = []
    moved = _train(inputs, tmp_path / "moved", cfg, on_step=steps.append)
    assert steps[0] == 46
    assert moved.facts["loss"] == pytest.approx(whole.facts["loss"], rel=2e-3)
    for name in ("step", "epoch", "tokens", "trained_tokens"):  # every step saw the same rows
        assert [line[name] for line in read_log(tmp_path / "moved")] == [line[name] for line in lines]


def test_log_window_and_torn_line(tmp_path):
    window = Window()
    window.add({"loss": (6.0, 2.0), "tokens": (10.0, 1.0), "learning_rate": (0.5, 1.0)})
    window = Window(json.loads(json.dumps(window.state())))
    window.add({"loss": (1.0, 5.0), "tokens": (4.0, 1.0), "learning_rate": (0.25, 1.0)})
    assert window.values() == {"loss": 1.0, "learning_rate": 0.25, "tokens": 14}
    log = TrainLog(tmp_path, 0)
    for step in (2, 4):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    TrainLog(tmp_path, 2).close()
    assert [line["step"] for line in read_log(tmp_path)] == [2]
