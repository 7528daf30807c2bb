"""Snapshots of a training: parameters and AdamW's moments at evenly spaced steps, kept in the artifact (`train.snapshots`).

Checkpoints serve a resume and go when the training ends; snapshots serve what looks back on a training, such as influence
features and loss trajectories.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from dccot_jax.artifact import Artifact, ArtifactError
from dccot_jax.model import lora
from dccot_jax.model.config import ModelConfig
from dccot_jax.train.abandoned import forget_abandoned_futures
from dccot_jax.train.checkpoint import abstract_params, checkpointed_params, first_line, frozen_dtype, save_params, untrained_params
from dccot_jax.train.optimizer import make_schedule

SNAPSHOTS = "snapshots"  # directory in a train artifact; one folder per step


def snapshot_steps(steps: int, count: int) -> tuple[int, ...]:
    """Numbers of finished steps after which a snapshot is taken: `count` evenly spaced ones, the last after the last step."""
    return tuple(sorted({max(1, round(steps * (place + 1) / count)) for place in range(count)}))


def save_snapshot(folder: epath.Path, step: int, state: Any) -> None:
    """Write one snapshot of what is trained and wait until it is on disk; moments are AdamW's, others are left out.

    Every process calls this.
    """
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


def snapshot_model(artifact: Artifact) -> ModelConfig:
    """The model that was trained, with its adapters where these alone were; the student of the artifact has them merged."""
    mc, settings = ModelConfig.from_dict(artifact.json("student")["model"]), artifact.json("final").get("lora")
    return mc if settings is None else dataclasses.replace(mc, lora=settings)


def restore_snapshot(artifact: Artifact, step: int, mesh: Any) -> dict[str, Any]:
    """{"params", "mu", "nu"} of one snapshot on `mesh`, of `snapshot_model`; each process reads only its shards.

    Moments are float32, however they were kept. Where adapters were trained, the moments are of these alone, and the other parameters
    those that they were trained beside.

    Raises ArtifactError if it is not there or does not read.
    """
    mc = snapshot_model(artifact)
    trained = abstract_params(mc, mesh) if mc.lora is None else lora.split(mc, abstract_params(mc, mesh))[0]
    path = artifact.file(SNAPSHOTS) / str(step)
    forget_abandoned_futures()
    try:
        with ocp.StandardCheckpointer() as reader:
            found = reader.restore(path, {"params": trained, "mu": trained, "nu": trained})
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: snapshot does not read ({first_line(error)})") from error
    if mc.lora is not None:
        found["params"] = lora.join(found["params"], untrained_params(artifact, mesh, frozen_dtype(artifact)))
    return found


def restore_snapshot_params(artifact: Artifact, step: int, mc: ModelConfig, mesh: Any) -> Any:
    """The parameters alone of one snapshot on `mesh`, float32, adapters merged; the moments, which only AdamW leaves, are not read.

    Raises ArtifactError if it is not there or does not read.
    """
    return checkpointed_params(artifact.file(SNAPSHOTS) / str(step), artifact, mc, mesh, jnp.float32)
