"""The traces of a finished run as a file in a format that other trainers read.

Every trace is written with its whole target, and, in the formats that have a user message, with the prompt it is trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from etils import epath

from dccot_jax.artifact import ArmRun
from dccot_jax.data.tokenize import training_prompt
from dccot_jax.formats import export_traces
from dccot_jax.records import InputError, Trace, table_to_traces
from dccot_jax.run_record import load_runs

STAGES = ("traces", "augment", "verify", "select")


def export_run(workdir: epath.Path, out: str | Path, format: str, *, stage: str = "select", arm: str = "") -> int:
    """Write the traces that a stage of a run left, in that stage's order, and return the number of rows written.

    Args:
      workdir: where the run is. out, format: as in `formats.export_traces`. stage: one of `STAGES`; ``select``: the kept ones.
      arm: an arm's name, or ``name/seed``; may be left out where all arms and seeds of the run have the same traces.

    Raises:
      InputError: no run there, a stage it has not made, an unknown arm, or arms to choose from.
    """
    runs = [run for run in load_runs(workdir)[1] if "traces" in run.artifacts]  # not the untrained student
    if not runs:
        raise InputError(f"--workdir={workdir}: an evaluation, which holds no traces")
    run = _choose(runs, stage, arm)
    return export_traces(_traces(run, stage), out, format, prompt_of=lambda trace: training_prompt(trace, suffix=_suffix(run)))


def _choose(runs: Sequence[ArmRun], stage: str, arm: str) -> ArmRun:
    named = [run for run in runs if arm in ("", run.arm, _label(run))]
    if not named:
        raise InputError(f"--arm={arm}: no such arm in this run; it has {_listing(runs)}")
    found = {_meaning(run, stage): run for run in reversed(named) if stage in run.artifacts}
    if not found:
        made = [name for name in STAGES if any(name in run.artifacts for run in named)]
        raise InputError(f"--stage={stage}: not made by this run; it has {', '.join(made)}")
    if len(found) > 1:
        raise InputError(f"--arm=NAME or NAME/SEED is needed: the traces of {_listing(named)} are not the same")
    return next(iter(found.values()))


def _meaning(run: ArmRun, stage: str) -> tuple[str, ...]:
    """What decides the file: arms and seeds that agree in it need not be told apart."""
    reads = ("verify", "select") if stage == "select" else (stage,)
    return (*(run.artifacts[name].logical_hash for name in reads), str(_suffix(run)))


def _traces(run: ArmRun, stage: str) -> list[Trace]:
    if stage != "select":
        return table_to_traces(run.artifacts[stage].table("traces"))
    kept = set(run.artifacts["select"].table("kept")["id"].to_pylist())
    table = run.artifacts["verify"].table("traces")
    return table_to_traces(table.filter(pa.array([identity in kept for identity in table["id"].to_pylist()])))


def _suffix(run: ArmRun) -> bool:
    return bool(run.config["tokens"]["train_suffix"])


def _label(run: ArmRun) -> str:
    return f"{run.arm}/{run.seed}"


def _listing(runs: Sequence[ArmRun]) -> str:
    return ", ".join(map(_label, runs))
