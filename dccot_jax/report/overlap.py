"""What training data and test questions share: dropped leaks and reported n-grams, read from the verify artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dccot_jax.artifact import ArmRun, Artifact

EXAMPLES = 6


def overlap(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """One entry per distinct verify artifact of the arms' first seeds that looked for overlap.

    Returns [{arms, rows, sizes, tasks, clean, examples}]: `tasks` {task: {items, leaked (rows dropped for it), "<n>": {rows, items,
    rows_half, short}}} of the evaluation tasks that share anything; `clean` names the others; `examples` are the rows that share
    most of a test item's n-grams, the longest n first: {id, part, task, n, item, share, spans}.
    """
    distinct: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for run in runs:
        verify = run.artifacts.get("verify")
        if run.arm in seen or verify is None or "overlap" not in verify.facts:
            continue
        seen.add(run.arm)
        if verify.identity not in distinct:
            distinct[verify.identity] = _entry(verify)
        distinct[verify.identity]["arms"].append(run.arm)
    return list(distinct.values())


def _entry(verify: Artifact) -> dict[str, Any]:
    figures = verify.facts["overlap"]
    dropped = verify.manifest["dropped"]
    sizes = sorted({key for entry in figures.values() for key in entry if key != "items"}, key=int)
    tasks = {}
    for task, entry in figures.items():
        leaked = sum(count for reason, count in dropped.items() if reason.endswith(f":{task}") and reason.startswith(("leak", "overlap_")))
        if leaked or any(entry[n]["rows"] for n in sizes):
            tasks[task] = {**entry, "leaked": leaked}
    return {
        "arms": [],
        "rows": verify.manifest["rows_in"],
        "sizes": sizes,
        "tasks": tasks,
        "clean": [task for task in figures if task not in tasks],
        "examples": _examples(verify) if verify.has("overlap.parquet") else [],
    }


def _examples(verify: Artifact) -> list[dict[str, Any]]:
    """Rows by falling n and share, every test item once."""
    rows = verify.table("overlap").sort_by([("n", "descending"), ("share", "descending"), ("task", "ascending"), ("id", "ascending")])
    found: dict[str, dict[str, Any]] = {}
    for batch in rows.to_batches(max_chunksize=256):
        for row in batch.to_pylist():
            if len(found) == EXAMPLES:
                return list(found.values())
            found.setdefault(row["item"], row)
    return list(found.values())
