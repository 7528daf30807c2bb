"""Snapshots of a training: what they hold, where they are taken, and that a kill leaves no trace in them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from etils import epath
from training_cases import TINY, mesh, run_config, write_training

from dccot_jax.artifact import Artifact, ArtifactError, ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.train.checkpoint import abstract_params, restore_params
from dccot_jax.train.loop import run
from dccot_jax.train.snapshots import describe_snapshots, restore_snapshot, restore_snapshot_params, snapshot_steps


class Killed(Exception):
    """Stands in for a kill between two steps."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_training(tmp_path_factory.mktemp("inputs"), TINY, run_config())


def train(inputs, out, cfg, on_step=None):
    return run(cfg, inputs, ArtifactWriter(out), Context(out.parent), devices=jax.devices()[:1], on_step=on_step)


@pytest.mark.slow
def test_a_killed_training_leaves_the_same_snapshots(inputs, tmp_path):
    cfg = run_config(snapshots=3)
    result = train(inputs, tmp_path / "whole", cfg)
    assert [s["step"] for s in result.facts["snapshots"]] == [4, 8, 12] == list(snapshot_steps(12, 3))

    def kill(done):
        if done == 10:
            raise Killed

    with pytest.raises(Killed):
        train(inputs, tmp_path / "killed", cfg, on_step=kill)
    again = train(inputs, tmp_path / "killed", cfg)
    assert again.logical_hash == result.logical_hash and again.facts == result.facts
    whole, killed = (Artifact(epath.Path(tmp_path / name), {}) for name in ("whole", "killed"))
    on = mesh(1, 2, 1)
    for step in (4, 8, 12):
        first, second = (restore_snapshot(a, step, on) for a in (whole, killed))
        jax.tree.map(np.testing.assert_array_equal, first, second)
        jax.tree.map(np.testing.assert_array_equal, first["params"], restore_snapshot_params(whole, step, TINY, on))
        assert set(first) == {"params", "mu", "nu"}
        assert all((np.asarray(leaf) >= 0).all() and np.asarray(leaf).any() for leaf in jax.tree.leaves(first["nu"]))
        assert first["mu"]["layers"]["wq"].sharding == first["params"]["layers"]["wq"].sharding
    last = restore_snapshot(whole, 12, on)["params"]
    jax.tree.map(np.testing.assert_array_equal, last, restore_params(tmp_path / "whole" / "final", abstract_params(TINY, on)))
    with pytest.raises(ArtifactError, match=r"snapshots/5: snapshot does not read"):
        restore_snapshot(whole, 5, on)
    with pytest.raises(ArtifactError, match=r"snapshots/5: parameters do not read"):
        restore_snapshot_params(whole, 5, TINY, on)


@pytest.mark.slow
def test_a_training_with_muon_keeps_parameters_alone(inputs, tmp_path):
    train(inputs, tmp_path / "muon", run_config(snapshots=2, optimizer="muon"))
    artifact = Artifact(epath.Path(tmp_path / "muon"), {})
    last = restore_snapshot_params(artifact, 12, TINY, mesh(1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, last, restore_params(tmp_path / "muon" / "final", abstract_params(TINY, mesh(1, 1, 1))))


def test_steps_and_learning_rates():
    assert snapshot_steps(12, 4) == (3, 6, 9, 12) and snapshot_steps(5, 2) == (2, 5) and snapshot_steps(2, 4) == (1, 2)
    cfg = run_config(snapshots=2, schedule="linear", warmup_steps=0, final_lr_share=0.0, learning_rate=1.0)
    found = describe_snapshots(cfg.train, 4)
    assert [s["step"] for s in found] == [2, 4]
    np.testing.assert_allclose([s["learning_rate"] for s in found], [(1 + 0.75) / 2, (0.5 + 0.25) / 2], rtol=1e-6)
    assert describe_snapshots(run_config().train, 4) == []
