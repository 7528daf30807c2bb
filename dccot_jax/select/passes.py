"""What signals cost: the passes of the scoring student that they declare, counted once where signals share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dccot_jax.config import ConfigError
from dccot_jax.select.signals import JUDGED, OVER_TIME, SENTENCES, TWO_MODEL, required_stats, split_signals


@dataclasses.dataclass(frozen=True)
class Passes:
    """Passes that one signal needs.

    Attributes:
      forward, backward: names of its passes over every row; signals that name the same one share it.
      generations: greedy answers of the student per question. draws: sampled answers besides, as many as the config says.
      snapshots: the passes are made with every snapshot of a training.
    """

    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    generations: int = 0
    draws: bool = False
    snapshots: bool = False


# Signals that are not forward signals; those declare their views (`select/signals.py`), one forward pass each.
OTHERS: Mapping[str, Passes] = {
    "student_error": Passes(generations=1),
    "student_entropy": Passes(generations=1),
    "pass_rate": Passes(draws=True),
    "grape": Passes(("conditional",)),
    "embedding_prompt": Passes(("conditional",)),
    "embedding_rationale": Passes(("conditional",)),
    "answer_gain": Passes(("answer after the rationale", "answer alone")),
    "local_naturalness": Passes(("steps (a short pass for each)",)),
    "grand": Passes(("norm of the gradient",), ("norm of the gradient",)),
    "less": Passes(("projected gradient",), ("projected gradient",), snapshots=True),
    "deita_complexity": Passes(("complexity prompt",)),
    "deita_quality": Passes(("quality prompt",)),
    **{name: Passes(("conditional", f"conditional ({role} model)")) for name, role in TWO_MODEL.items()},
    **dict.fromkeys(OVER_TIME, Passes(("conditional",), snapshots=True)),
    **dict.fromkeys(JUDGED, Passes()),  # requests to teachers, no pass
    **dict.fromkeys(SENTENCES, Passes()),  # of another model
}


def declared_passes(names: Iterable[str], snapshots: int = 1, draws: int = 1) -> dict[str, Any]:
    """Passes of all `names` together, with so many `snapshots` of the student and `draws` per question where a signal needs them.

    Returns {forward, backward: per row; generations: per question; views: names of the forward passes; undeclared: names that declare
    nothing, such as columns of the user's own tables}.
    """
    views: dict[str, None] = {}
    backward: dict[str, None] = {}
    generations = drawn = 0
    undeclared = []
    for name in sorted(set(names)):
        found = OTHERS.get("less" if name.startswith("less_") else name) or _forward_signal(name)
        if found is None:
            undeclared.append(name)
            continue
        marks = [f", snapshot {n + 1}" for n in range(snapshots)] if found.snapshots else [""]
        views |= {name + mark: None for name in found.forward for mark in marks}
        backward |= {name + mark: None for name in found.backward for mark in marks}
        generations = max(generations, found.generations)  # signals of one sample share it
        drawn = draws if found.draws else drawn
    return {
        "forward": len(views),
        "backward": len(backward),
        "generations": generations + drawn,
        "views": list(views),
        "undeclared": undeclared,
    }


def _forward_signal(name: str) -> Passes | None:
    try:
        signals, _ = split_signals([name])
    except ConfigError:
        return None
    return Passes(tuple(required_stats(signals))) if signals else None
