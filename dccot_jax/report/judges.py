"""What judges said of the data: verdicts, lost rows, and how far two judges agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dccot_jax.artifact import ArmRun
from dccot_jax.report.data import by_arm


def judges(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """[{arms, seed, rubrics: {name: {judges, agreement}}}], one entry per distinct judged score artifact of the arms' first seeds;
    the contents are the facts of `select/judged.py`."""
    found: dict[str, dict[str, Any]] = {}
    for run in (group[0] for group in by_arm(runs).values()):
        score = run.artifacts.get("score")
        if score is None or "judged" not in score.facts:
            continue
        entry = found.setdefault(score.logical_hash, {"arms": [], "seed": run.seed, "rubrics": dict(score.facts["judged"])})
        entry["arms"].append(run.arm)
    return list(found.values())
