"""Signals over time: how a row fared at the snapshots of a training (`train/snapshots.py`), every row scored at every snapshot.

  s2l              vector: mean -log p over the completion at each snapshot, oldest first, nats per token; what the selector `s2l`
                   clusters (S2L, arXiv 2403.07384). A loss that is not finite drops the row, where the published code writes 0.
  forgetting       how often a row goes from learned to not learned between two snapshots that follow each other (Toneva et
                   al., arXiv 1812.05159). A row that is never learned counts as many times as there are snapshots: the paper ranks
                   such rows as forgotten infinitely often, its published code gives them the number of presentations.
  learning_speed   mean over the snapshots of the row's token accuracy: high if learned early. The cumulative accuracy of Jiang et
                   al. (arXiv 2002.03206, learning-speed proxies of the consistency score).

"Correct" in these papers is one class label. Here a row counts as learned where its token accuracy is at least `score.over_time.learned`:
the share of completion tokens that are the student's most probable token given those before, as memorisation is measured for language
models by Tirumala et al. (arXiv 2205.10770). The threshold is our choice. Unlike an accuracy seen in passing, at the row's own update, all
rows are measured at the same steps, also those that the training did not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dccot_jax.artifact import MANIFEST, Artifact, open_artifact
from dccot_jax.config import ConfigError
from dccot_jax.select.signals import OVER_TIME

Curves = dict[str, dict[str, np.ndarray]]


def check_over_time(cfg: ConfigDict) -> None:
    """Check what the requested signals over time need; does nothing where none is requested. Raises ConfigError."""
    names = sorted(set(cfg.score.signals) & set(OVER_TIME))
    if not names:
        return
    count, student = cfg.score.over_time.snapshots, str(cfg.score.student)
    if student == "base":
        raise ConfigError(
            f"config.score.signals: {names[0]!r} looks at snapshots of a training, the untrained student has none; set score.student to"
            " 'warmup' or to a train artifact made with train.snapshots"
        )
    if student == "warmup":
        if count > cfg.score.warmup.steps:
            raise ConfigError(f"config.score.over_time.snapshots: {count} of only score.warmup.steps = {cfg.score.warmup.steps} steps")
        return
    folder = Path(student).expanduser()
    if (folder / MANIFEST).exists():
        snapshot_steps_of(open_artifact(folder), count)


def snapshot_steps_of(artifact: Artifact, count: int) -> list[int]:
    """Steps of the snapshots of a train artifact, oldest first. Raises ConfigError unless there are `count`."""
    steps = [int(snapshot["step"]) for snapshot in artifact.facts.get("snapshots") or ()]
    if len(steps) != count:
        raise ConfigError(
            f"config.score.over_time.snapshots: {count}, but {artifact.path} holds {len(steps)} snapshots (train.snapshots of its config)"
        )
    return steps


def curves(
    steps: Sequence[int], score: Callable[[int], tuple[Mapping[str, Mapping[str, float]], dict[str, Any]]]
) -> tuple[Curves, list[dict[str, Any]]]:
    """({"nll", "token_accuracy": {row id: float32 [C]}}, facts of each of the C passes), oldest snapshot first.

    Args:
      score: step of a snapshot -> ({"nll", "token_accuracy": {row id: value}}, facts).
    """
    found, facts = zip(*(score(step) for step in steps))
    curve = {
        name: {row: np.asarray([columns[name][row] for columns in found], np.float32) for row in found[0][name]}
        for name in ("nll", "token_accuracy")
    }
    return curve, [{"step": step, **about} for step, about in zip(steps, facts)]


def over_time(names: Sequence[str], curve: Curves, learned: float) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, np.ndarray]]]:
    """(columns of numbers, columns of vectors) of the signals `names`; a row with an accuracy that is not finite gets NaN."""
    numbers: dict[str, dict[str, float]] = {}
    for name, make in (("forgetting", lambda a: forgetting_events(a, learned)), ("learning_speed", learning_speed)):
        if name in names:
            numbers[name] = {row: float(make(accuracy)) for row, accuracy in curve["token_accuracy"].items()}
    return numbers, {"s2l": dict(curve["nll"])} if "s2l" in names else {}


def forgetting_events(accuracy: Sequence[float] | np.ndarray, learned: float) -> float:
    """Number of t with accuracy[t] >= learned > accuracy[t + 1]; len(accuracy) if none reaches `learned`; NaN if one is not finite."""
    values = np.asarray(accuracy, np.float32)  # as they are scored: 0.8 must reach 0.8
    if not np.isfinite(values).all():
        return float("nan")
    known = values >= np.float32(learned)
    return float(np.sum(known[:-1] & ~known[1:]) if known.any() else len(known))


def learning_speed(accuracy: Sequence[float] | np.ndarray) -> float:
    """Mean accuracy over the snapshots."""
    return float(np.mean(np.asarray(accuracy, np.float64)))
