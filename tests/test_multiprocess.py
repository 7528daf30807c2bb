"""Two real processes train as one does, and each holds only its shards and builds only its rows."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training_cases import TINY, mesh, params_on, place, run_config, write_training

PROCESSES = 2
MESH = {"data": 1, "fsdp": 4, "tensor": 1}
CHANGES = {"steps": 4, "checkpoint_every": 2, "log_every": 1, "microbatches": 2, "clip_norm": 0.0}


def _config():
    cfg = run_config(**CHANGES)
    cfg.mesh = MESH
    return cfg


def _worker(folder: Path, index: int, port: int) -> None:
    """One of the processes; prints a JSON report as its last line."""
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, index)
    from jax.experimental import multihost_utils

    from dccot_jax.artifact import ArtifactWriter, open_artifact
    from dccot_jax.config import to_plain
    from dccot_jax.context import Context
    from dccot_jax.data.loader import PlanSource
    from dccot_jax.model.sharding import make_mesh
    from dccot_jax.records import canonical_json
    from dccot_jax.stopping import Stopped
    from dccot_jax.train import loop, states
    from dccot_jax.train.checkpoint import load_student
    from dccot_jax.train.feed import local_rows, to_global
    from dccot_jax.train.optimizer import make_optimizer
    from dccot_jax.train.step import init_state
    from dccot_jax.train.votes import VOTE, cast_vote

    cfg, on = _config(), make_mesh(MESH)
    inputs = {name: open_artifact(folder / name) for name in ("student", "tokenize", "plan")}
    ctx = Context(folder, process_index=index, process_count=PROCESSES)

    # One step: Adam's first moment is (1 - b1) · gradient.
    rows = local_rows(on, cfg.train.rows_per_step)
    source = PlanSource.from_artifacts(inputs["plan"], inputs["tokenize"], rows=rows)
    batch = to_global(source[0], on, rows, cfg.train.rows_per_step)
    sizes = (4, cfg.train.rows_per_step, cfg.train.row_tokens)
    step = loop._compile(TINY, on, canonical_json(to_plain(cfg.train)), "float32", "xla", sizes, 0, None, True)
    with jax.set_mesh(on):
        state = init_state(params_on(TINY, on), make_optimizer(cfg.train), on)
        held = {
            jax.tree_util.keystr(path): [leaf.size, sum(shard.data.size for shard in leaf.addressable_shards)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        }
        batch_held = sum(shard.data.shape[0] for shard in batch["tokens"].addressable_shards)
        state, metrics = step(state, {**batch, VOTE: cast_vote(on, index == 1)})
        grads = multihost_utils.process_allgather(state["opt"][0].mu, tiled=True)
    if index == 0:
        flat = {jax.tree_util.keystr(path): leaf / (1 - cfg.train.b1) for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
        np.savez(folder / "grads.npz", **flat)

    # The whole stage, once through and once stopped, asked on process 1 only. Then process 1 cannot read the newest checkpoint.
    whole = loop.run(cfg, inputs, ArtifactWriter(folder / "whole"), ctx)
    asking = Context(folder, process_index=index, process_count=PROCESSES)
    stopped = ""
    try:
        loop.run(cfg, inputs, ArtifactWriter(folder / "stopped"), asking, on_step=lambda _: asking.stop.ask("test") if index == 1 else None)
    except Stopped as error:
        stopped = str(error)
    read = states._read_state

    def torn(path, target):
        if index == 1 and path.name == "3":
            raise ValueError("torn")
        return read(path, target)

    states._read_state = torn
    resumed_at: list[int] = []
    resumed = loop.run(cfg, inputs, ArtifactWriter(folder / "stopped"), ctx, on_step=resumed_at.append)
    elsewhere = load_student(open_artifact(folder / "student"), on).params["embed"]
    report = {
        "loss": [float(x) for x in jax.device_get(metrics["loss"])],
        "rows": rows,
        "built": sorted(int(x) for x in np.flatnonzero(source[0]["segment_ids"].sum(axis=1) > 0)),
        "batch_held": batch_held,
        "held": held,
        "random_embed_held": sum(shard.data.size for shard in elsewhere.addressable_shards),
        "whole": [whole.logical_hash, whole.facts["loss"]],
        "resumed": [resumed.logical_hash, resumed.facts["loss"]],
        "first_step_after_resume": resumed_at[0],
        "stopped": stopped,
        "votes": [float(x) for x in jax.device_get(metrics[VOTE])],
    }
    print(json.dumps(report), flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    inputs = write_training(folder, TINY, _config())
    port = _free_port()
    here = Path(__file__)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent)]),
        # Compiling is most of this test's time, so the workers do without optimisation.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // PROCESSES} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(here), str(folder), str(index), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(PROCESSES)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs):
        assert process.returncode == 0, errors[-3000:]
    return folder, inputs, [json.loads(text.splitlines()[-1]) for text, _ in outputs]


def test_loss_and_gradients_equal_one_process(reports):
    from dccot_jax.data.loader import PlanSource
    from dccot_jax.train.step import loss_and_grads

    folder, inputs, found = reports
    one = mesh(1, 1, 1)
    batch = PlanSource.from_artifacts(inputs["plan"], inputs["tokenize"])[0]
    with jax.set_mesh(one):
        run = jax.jit(functools.partial(loss_and_grads, mc=TINY, microbatches=1, remat="none"))
        total, weight, grads = run(params_on(TINY, one), batch=place(batch, one))
    assert found[0]["loss"] == found[1]["loss"] == pytest.approx([float(total), float(weight)], rel=1e-5)
    stored = np.load(folder / "grads.npz")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        expected = np.asarray(leaf) / float(weight)
        np.testing.assert_allclose(stored[jax.tree_util.keystr(path)], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_each_process_builds_its_rows_and_holds_its_shards(reports):
    _, _, found = reports
    assert [report["rows"] for report in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for report in found:
        assert report["batch_held"] == 4
        assert report["built"] == [0, 1, 2, 3]  # as many as it holds, and none of the other process
        for path, (size, held) in report["held"].items():
            # Norms, counters and the step are small and replicated on both devices; every matrix is split four ways.
            whole = "norm" in path or size == 1
            assert held == (2 * size if whole else size // 2), path
        assert report["random_embed_held"] == TINY.vocab_size * TINY.hidden_size // 2


def test_the_stage_runs_stops_together_and_resumes_on_two_processes(reports):
    folder, _, found = reports
    first, second = found
    assert first["whole"] == second["whole"] == first["resumed"] == second["resumed"]
    for report in found:
        assert report["votes"] == [2.0, 1.0]  # both devices of the process that was asked
        assert report["stopped"] == "training saved after step 3 of 4"
        assert report["first_step_after_resume"] == 3  # checkpoint 3 counts as damaged on both
    for name in ("whole", "stopped"):
        assert json.loads((folder / name / "final.json").read_text())["logical_hash"] == first["whole"][0]
        assert len((folder / name / "train_log.jsonl").read_text().splitlines()) == 4
        assert not (folder / name / "checkpoints").exists()


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
