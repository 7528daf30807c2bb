"""Snapshots of a training: parameters and AdamW's moments at evenly spaced steps, kept in the artifact (`train.snapshots`).

Checkpoints serve a resume and go when the training ends; snapshots serve what looks back on a training, such as influence
features and loss trajectories.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from dccot_jax.artifact import Artifact, ArtifactError
from dccot_jax.model.config import ModelConfig
from dccot_jax.train.checkpoint import abstract_params, restore_params, save_params
from dccot_jax.train.optimizer import make_schedule

SNAPSHOTS = "snapshots"  # directory in a train artifact; one folder per step


def snapshot_steps(steps: int, count: int) -> tuple[int, ...]:
    """Numbers of finished steps after which a snapshot is taken: `count` evenly spaced ones, the last after the last step."""
    return tuple(sorted({max(1, round(steps * (place + 1) / count)) for place in range(count)}))


def save_snapshot(folder: epath.Path, step: int, state: Any) -> None:
    """Write one snapshot of a training state and wait until it is on disk; with Muon, parameters alone. Every process calls this."""
    first = state["opt"][0]
    moments = {"mu": first.mu, "nu": first.nu} if isinstance(first, optax.ScaleByAdamState) else {}
    save_params(folder / str(step), {"params": state["params"], **moments})


def describe_snapshots(train: Any, steps: int) -> list[dict[str, Any]]:
    """Per snapshot: its step, and the mean learning rate of the steps since the one before it."""
    schedule = make_schedule(train, steps)
    rates = np.asarray(schedule(jnp.arange(steps)), np.float64)
    found, start = [], 0
    for step in snapshot_steps(steps, train.snapshots) if train.snapshots else ():
        found.append({"step": step, "learning_rate": float(rates[start:step].mean())})
        start = step
    return found


def restore_snapshot(artifact: Artifact, step: int, mc: ModelConfig, mesh: Any) -> dict[str, Any]:
    """{"params", "mu", "nu"} of one snapshot on `mesh`, float32; each process reads only its shards.

    Raises ArtifactError if it is not there or does not read.
    """
    path, like = artifact.file(SNAPSHOTS) / str(step), abstract_params(mc, mesh)
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(path, {"params": like, "mu": like, "nu": like})
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: snapshot does not read ({str(error).splitlines()[0][:200]})") from error


def restore_snapshot_params(artifact: Artifact, step: int, mc: ModelConfig, mesh: Any) -> Any:
    """The parameters alone of one snapshot on `mesh`, float32; the moments, which a training with Muon has none of, are not read.

    Raises ArtifactError if it is not there or does not read.
    """
    return restore_params(artifact.file(SNAPSHOTS) / str(step), abstract_params(mc, mesh), inside="params")
