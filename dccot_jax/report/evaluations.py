"""Evaluations of a run, read back and lined up: which arm, which seed, which item was right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dccot_jax.artifact import ArmRun, Artifact

BASE = "base"
GROUPS = ("iid", "ood", "cross")
GROUP_TITLES = {"iid": "IID", "ood": "OOD", "cross": "Cross-domain"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one (arm, seed) did on every task.

    Attributes:
      metrics: the artifact's `metrics.json`. samples: rows of `samples.jsonl` by task and item id.
    """

    arm: str
    seed: int
    artifact: Artifact
    metrics: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, Mapping[str, Any]]]


def read_evaluations(runs: Sequence[ArmRun]) -> list[Evaluation]:
    """Evaluations of the runs that have one, in their order."""
    found = []
    for run in runs:
        artifact = run.artifacts.get("evaluate")
        if artifact is None:
            continue
        samples: dict[str, dict[str, Any]] = {}
        with artifact.file("samples.jsonl").open("r") as file:
            for line in file:
                row = json.loads(line)
                samples.setdefault(row["task"], {})[row["item_id"]] = row
        found.append(Evaluation(run.arm, run.seed, artifact, artifact.json("metrics"), samples))
    return found


def arm_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """Arms in order of appearance, the untrained student first."""
    names = list(dict.fromkeys(evaluation.arm for evaluation in evaluations))
    return sorted(names, key=lambda name: name != BASE)


def task_groups(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Tasks per group (IID, OOD, cross-domain) in order of appearance; empty groups are left out."""
    found: dict[str, list[str]] = {}
    for group in GROUPS:
        names = dict.fromkeys(task for item in evaluations for task in item.metrics["groups"].get(group, ()))
        if names:
            found[group] = list(names)
    return found


def of_arm(evaluations: Sequence[Evaluation], arm: str, task: str) -> dict[int, Evaluation]:
    """Evaluations of one arm that cover a task, by seed."""
    return {item.seed: item for item in evaluations if item.arm == arm and item.samples.get(task)}


def aligned(cells: Sequence[Evaluation], task: str, field: str) -> tuple[list[str], np.ndarray]:
    """Item ids that every cell has a value for, sorted, and the values [len(cells), N] of one sample field."""
    common = set.intersection(*({key for key, row in cell.samples[task].items() if row.get(field) is not None} for cell in cells))
    items = sorted(common)
    values = [[float(cell.samples[task][item][field]) for item in items] for cell in cells]
    return items, np.asarray(values, np.float64).reshape(len(cells), len(items))
