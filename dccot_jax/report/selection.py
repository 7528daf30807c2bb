"""What selection did in a run: signals per pool, recipes, and how far the recipes of a workdir agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils.epath import Path

from dccot_jax.artifact import MANIFEST, ArmRun, Artifact, ArtifactError, open_artifact
from dccot_jax.report.data import by_arm
from dccot_jax.report.distributions import QUANTILES, distributions, overlaps, spearman
from dccot_jax.report.pools import Pool, read_pool
from dccot_jax.report.recipes import add_texts, recipe, steps_of
from dccot_jax.select.candidates import describe

MOST_SETS = 24  # kept sets side by side in the matrix


def selection(runs: Sequence[ArmRun], workdir: Path) -> dict[str, Any]:
    """The part `selection` of results.json, JSON-able.

    Returns:
      pools: one per distinct set of rows and scores of the arms' first seeds: {arms, seed, rows, groups {label: {value: rows}},
        same_groups (all labels cut the rows alike), signals {name: `distributions`}, vectors {name: {dimension, norm}},
        spearman {signals, rho, n}, notes, quantiles}.
      recipes: one per distinct selection on a pool (first seeds): {arms, seed, pool, ... of `recipes.recipe`}, examples with texts.
      overlap: the kept sets of all arms and seeds and of other selections in the workdir, see `kept_overlap`.
    """
    pools: dict[tuple[str, ...], tuple[dict[str, Any], Pool]] = {}
    recipes: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in (group[0] for group in by_arm(runs).values()):
        tokenize, select = run.artifacts.get("tokenize"), run.artifacts.get("select")
        if tokenize is None or not tokenize.has("tokens.parquet"):
            continue
        key = _pool_key(run)
        if key not in pools:
            pool = read_pool(run)
            pools[key] = ({"arms": [], "seed": run.seed, **_pool_facts(pool)}, pool)
        entry, pool = pools[key]
        entry["arms"].append(run.arm)
        if select is None:
            continue
        same = (key, select.logical_hash, *(describe(step) for step in steps_of(select)))
        if same not in recipes:
            found, shown = recipe(run, pool)
            if shown and "verify" in run.artifacts:
                add_texts(run.artifacts["verify"], shown)
            recipes[same] = {"arms": [], "seed": run.seed, "pool": list(pools).index(key), **found, "examples": list(shown.values())}
        recipes[same]["arms"].append(run.arm)
    return {"pools": [entry for entry, _ in pools.values()], "recipes": list(recipes.values()), "overlap": kept_overlap(runs, workdir)}


def _pool_key(run: ArmRun) -> tuple[str, ...]:
    parts = [run.artifacts[name].identity if name in run.artifacts else "" for name in ("tokenize", "score")]
    select = run.artifacts.get("select")
    inputs = select.manifest["inputs"] if select is not None else {}
    return (*parts, *(f"{role}={inputs[role]['hash']}" for role in sorted(inputs) if role.startswith("table:")))


def _pool_facts(pool: Pool) -> dict[str, Any]:
    signals = {name: distributions(values, pool.groups) for name, values in pool.signals.items()}
    shown = [name for name, found in signals.items() if found is not None]
    rho, n = spearman([pool.signals[name] for name in shown])
    return {
        "rows": len(pool.ids),
        "groups": {label: {name: len(rows) for name, rows in found.items()} for label, found in pool.groups.items()},
        "same_groups": _same([list(found.values()) for found in pool.groups.values()]),
        "quantiles": list(QUANTILES),
        "signals": {name: found for name, found in signals.items() if found is not None},
        "scored": list(pool.scored),
        "vectors": {name: {"dimension": size, "norm": distributions(norms, pool.groups)} for name, (size, norms) in pool.norms.items()},
        "spearman": {"signals": shown, "rho": rho, "n": n},
        "notes": list(pool.notes),
    }


def _same(partitions: Sequence[Sequence[np.ndarray]]) -> bool:
    """Whether all labels put the same rows together."""
    cut = [sorted(rows.tobytes() for rows in groups) for groups in partitions]
    return all(found == cut[0] for found in cut)


# --- overlap ------------------------------------------------------------------------------------------------------------


def kept_overlap(runs: Sequence[ArmRun], workdir: Path) -> dict[str, Any]:
    """How much the kept sets of a workdir share, each distinct set once.

    Returns {sets: [{label, arms, steps, of_this_run, kept, pool}], shared, expected, jaccard, jaccard_expected (see `overlaps`),
    left_out: labels of sets beyond `MOST_SETS`, unreadable: artifacts that could not be read}.
    """
    sets: dict[tuple[str, int], dict[str, Any]] = {}
    known: set[str] = set()
    for run in runs:
        select = run.artifacts.get("select")
        if select is not None:
            known.add(select.identity)
            _entry(sets, select)["seeds"].setdefault(run.arm, []).append(run.seed)
    unreadable = []
    for path in _select_folders(workdir):
        try:
            select = open_artifact(path)
        except ArtifactError:
            unreadable.append(path.name)
            continue
        if select.identity not in known:
            _entry(sets, select)["others"].append(path.name)
    seeds = {arm: len({run.seed for run in runs if run.arm == arm and "select" in run.artifacts}) for arm in {run.arm for run in runs}}
    entries = list(sets.values())
    shown = entries[:MOST_SETS]
    kept, pools = _memberships([entry["artifact"] for entry in shown])
    return {
        "sets": [
            {
                "label": _label(entry, seeds),
                "seeds": entry["seeds"],
                "steps": [describe(step) for step in steps_of(entry["artifact"])],
                "of_this_run": bool(entry["seeds"]),
                "kept": int(kept[index].sum()),
                "pool": int(pools[index].sum()),
            }
            for index, entry in enumerate(shown)
        ],
        **overlaps(kept, pools),
        "left_out": [_label(entry, seeds) for entry in entries[MOST_SETS:]],
        "unreadable": unreadable,
    }


def _entry(sets: dict[tuple[str, int], dict[str, Any]], select: Artifact) -> dict[str, Any]:
    """Selections that kept the same rows of as many are one set."""
    return sets.setdefault((select.logical_hash, select.manifest["rows_in"]), {"artifact": select, "seeds": {}, "others": []})


def _select_folders(workdir: Path) -> list[Path]:
    folder = workdir / "artifacts"
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith("select-") and (path / MANIFEST).exists())


def _label(entry: dict[str, Any], seeds: dict[str, int]) -> str:
    """`a, b (seed 1)` for arms of the run; a seed is named where others of the arm kept other rows."""
    if entry["seeds"]:
        return ", ".join(
            arm if len(found) == seeds[arm] else f"{arm} (seed {', '.join(map(str, found))})" for arm, found in entry["seeds"].items()
        )
    steps = " → ".join(describe(step) for step in steps_of(entry["artifact"])) or "everything"
    return f"{steps} (seed {entry['artifact'].manifest['config'].get('seed', '?')}, not of this run)"


def _memberships(selects: Sequence[Artifact]) -> tuple[np.ndarray, np.ndarray]:
    """(kept, pools), each [M, N] bool over the N ids that occur in any of them; a selection lists every id as kept or dropped."""
    lists = []
    for select in selects:
        kept = select.table("kept")["id"]
        dropped = [batch.column("id") for batch in select.batches("dropped", ["id"])] if select.has("dropped.parquet") else []
        lists.append((kept.combine_chunks(), pa.chunked_array(dropped, pa.string()).combine_chunks()))
    every = pa.chunked_array([part for pair in lists for part in pair], pa.string()).unique() if lists else pa.array([], pa.string())
    kept, pools = (np.zeros((len(selects), len(every)), bool) for _ in range(2))
    for index, (chosen, gone) in enumerate(lists):
        kept[index, _places(every, chosen)] = True
        pools[index] = kept[index]
        pools[index, _places(every, gone)] = True
    return kept, pools


def _places(every: pa.Array, ids: pa.Array) -> np.ndarray:
    return np.asarray(pc.call_function("index_in", [ids], pc.SetLookupOptions(every)))
