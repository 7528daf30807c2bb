"""results.json: a superset of lm-eval's, with every cell, every seed and every paired comparison.

`results`, `n-samples`, `configs`, `versions`, ... have lm-eval's shape and describe one arm (`results_of` says which, its
accuracies are means over its seeds). Everything else about arms is under `arms`, `cells` and `comparisons`.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils.epath import Path

from dccot_jax import __version__
from dccot_jax.artifact import package_versions
from dccot_jax.evaluate.statistics import accuracy_interval, bootstrap_interval, holm, mcnemar_exact, paired_bootstrap, t_interval
from dccot_jax.report.evaluations import BASE, Evaluation, aligned, arm_names, of_arm, task_groups

SCHEMA = "dccot-results/1"
_FILTERS = {"strict": "strict-match", "flexible": "flexible-extract"}
_MEANS = ("accuracy_strict", "accuracy_flexible", "mean_completion_tokens", "median_completion_tokens", "truncation_rate", "no_answer_rate")


def summarise_arms(evaluations: Sequence[Evaluation], *, resamples: int, seed: int) -> dict[str, Any]:
    """Per arm and task: means over seeds, intervals, and the metrics of every seed.

    Returns {arm: {task: {...}}}. `interval` belongs to flexible accuracy; `interval_method` says whether it is Wilson (one
    seed, or all seeds at 0 or 1) or a bootstrap over items x seeds. `seed_interval` is a t interval over seeds.
    """
    found: dict[str, Any] = {}
    for arm in arm_names(evaluations):
        found[arm] = {}
        for task in (task for tasks in task_groups(evaluations).values() for task in tasks):
            cells = of_arm(evaluations, arm, task)
            if not cells:
                continue
            per_seed = {str(key): cell.metrics["tasks"][task] for key, cell in cells.items()}
            _, correct = aligned(list(cells.values()), task, "correct_flexible")
            interval = accuracy_interval(correct, resamples=resamples, seed=seed)
            over_seeds = t_interval([metrics["accuracy_flexible"] for metrics in per_seed.values()])
            first = next(iter(per_seed.values()))
            found[arm][task] = {
                "group": first["group"],
                "n": min(metrics["n"] for metrics in per_seed.values()),
                "n_seeds": len(per_seed),
                "mean": {name: _mean([metrics.get(name) for metrics in per_seed.values()]) for name in _MEANS},
                "interval": [interval.low, interval.high] if interval else None,
                "interval_method": interval.method if interval else None,
                "seed_interval": [over_seeds.low, over_seeds.high] if over_seeds else None,
                "gold_nll": _gold_nll(cells, task, resamples, seed),
                "by_steps": _by_steps(list(per_seed.values())),
                "format_failure": any(metrics["format_failure"] for metrics in per_seed.values()),
                "small_n": first["small_n"],
                "seeds": per_seed,
            }
    return found


def compare_arms(
    evaluations: Sequence[Evaluation], declared: Sequence[Sequence[str]], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Paired comparisons on every task: the declared pairs, then every arm against the first trained arm and the untrained student.

    `kind` is ``declared`` or ``reference``. Holm's adjustment is over the declared comparisons together, and over the
    reference comparisons with the same second arm. A pair without a common seed or item is listed with its reason.
    """
    arms = arm_names(evaluations)
    trained = [arm for arm in arms if arm != BASE]
    pairs = [("declared", first, second) for first, second in declared]
    for reference in [*trained[:1], *([BASE] if BASE in arms else [])]:
        pairs += [("reference", arm, reference) for arm in trained if arm != reference]
    tasks = [task for tasks in task_groups(evaluations).values() for task in tasks]
    found = [
        {"kind": kind, **_compare(evaluations, first, second, task, resamples, seed)} for kind, first, second in pairs for task in tasks
    ]
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        families.setdefault((row["kind"], "" if row["kind"] == "declared" else row["second"]), []).append(row)
    for rows in families.values():
        for row, adjusted in zip(rows, holm([row.get("p_value") for row in rows])):
            row["p_holm"] = adjusted
    return found


def lm_eval_results(evaluations: Sequence[Evaluation], arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """lm-eval's top-level keys for one arm, averaged over `seeds`; `..._stderr` is over items of one seed's size."""
    cells = [item for item in evaluations if item.arm == arm and item.seed in seeds]
    results: dict[str, Any] = {}
    samples, configs, hashes = {}, {}, {}
    for task in dict.fromkeys(task for cell in cells for task in cell.metrics["tasks"]):
        rows = [cell.metrics["tasks"][task] for cell in cells if task in cell.metrics["tasks"]]
        protocol = cells[0].metrics["protocol"]
        entry: dict[str, Any] = {"alias": task}
        for mode, name in _FILTERS.items():
            entry[f"exact_match,{name}"] = _mean([row[f"accuracy_{mode}"] for row in rows])
            stderr = _mean([row[f"accuracy_{mode}_stderr"] for row in rows])
            entry[f"exact_match_stderr,{name}"] = "N/A" if stderr is None else stderr
        for name in _MEANS[2:]:
            entry[f"{name},none"] = _mean([row[name] for row in rows])
        nll = [row["gold_nll"]["mean"] for row in rows if row["gold_nll"]]
        if nll:
            entry["gold_nll,none"] = _mean(nll)
        results[task] = entry
        samples[task] = {"original": rows[0]["items_available"], "effective": rows[0]["n"]}
        hashes[task] = rows[0].get("task_hash")
        configs[task] = {
            "task": task,
            "test_split": rows[0].get("split", "test"),
            "output_type": "generate_until",
            "num_fewshot": 0,
            "answer_type": rows[0].get("answer_type"),
            "prompt_suffix": rows[0].get("prompt_suffix"),
            "generation_kwargs": {"max_gen_toks": protocol["max_new_tokens"], "do_sample": False, "temperature": 0.0},
            "metadata": {"version": 1},
        }
    return {
        "results": results,
        "group_subtasks": task_groups(cells),
        "configs": configs,
        "versions": dict.fromkeys(results, 1),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": {task: _directions(entry) for task, entry in results.items()},
        "n-samples": samples,
        "task_hashes": hashes,
    }


def build_results(
    evaluations: Sequence[Evaluation],
    config: Mapping[str, Any],
    arms: Mapping[str, Any],
    comparisons: Sequence[Mapping[str, Any]],
    workdir: Path,
) -> dict[str, Any]:
    """The whole of results.json, JSON-able; `data`, `training` and `lineage` are added by `report/build.py`."""
    trained = [arm for arm in arm_names(evaluations) if arm != BASE] or arm_names(evaluations)
    primary = trained[0] if trained else ""
    seeds = sorted({item.seed for item in evaluations if item.arm == primary})
    protocol = dict(evaluations[0].metrics["protocol"]) if evaluations else {}
    return {
        "schema": SCHEMA,
        **lm_eval_results(evaluations, primary, seeds),
        "results_of": {"arm": primary, "seeds": seeds, "mean_over_seeds": True},
        "config": dict(config),
        "model_name": f"{config.get('name', '')}/{primary}",
        "date": time.time(),
        "date_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_hash": git_hash(),
        "dccot_jax_version": __version__,
        "package_versions": package_versions(),
        "chat_template": protocol.get("chat_template"),
        "chat_template_sha": protocol.get("chat_template_sha256"),
        "system_instruction": None,
        "system_instruction_sha": None,
        "protocol": protocol,
        "groups": task_groups(evaluations),
        "arm_order": list(arms),
        "arms": dict(arms),
        "cells": [
            {"arm": item.arm, "seed": item.seed, "task": task, "artifact": _relative(item.artifact.path, workdir), **metrics}
            for item in evaluations
            for task, metrics in item.metrics["tasks"].items()
        ],
        "comparisons": list(comparisons),
    }


def git_hash() -> str | None:
    """Commit of the checkout this package runs from, or None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _compare(evaluations: Sequence[Evaluation], first: str, second: str, task: str, resamples: int, seed: int) -> dict[str, Any]:
    """One paired comparison. The untrained student may have fewer seeds; its cells then stand beside every seed of the other arm."""
    row: dict[str, Any] = {"first": first, "second": second, "task": task, "metric": "accuracy_flexible", "p_value": None}
    a, b = of_arm(evaluations, first, task), of_arm(evaluations, second, task)
    shared = sorted(set(a) & set(b))
    if BASE in (first, second) and a and b:
        seeds = sorted(b if first == BASE else a)
        fallback = next(iter((a if first == BASE else b).values()))
        left = [a.get(key, fallback) if first == BASE else a[key] for key in seeds]
        right = [b.get(key, fallback) if second == BASE else b[key] for key in seeds]
    else:
        seeds, left, right = shared, [a[key] for key in shared], [b[key] for key in shared]
    if not seeds:
        missing = [arm for arm, cells in ((first, a), (second, b)) if not cells]
        return row | {"undefined": f"no evaluation of {' or '.join(missing)} on this task" if missing else "no seed in common"}
    items, correct = aligned([*left, *right], task, "correct_flexible")
    if not items:
        return row | {"undefined": "no item in common"}
    k = len(seeds)
    test = paired_bootstrap(correct[:k], correct[k:], resamples=resamples, seed=seed)
    if test.low is None or test.high is None:
        verdict = "equal" if test.difference == 0 else "undefined"
    else:
        verdict = "higher" if test.low > 0 else "lower" if test.high < 0 else "no difference shown"
    return row | {
        "difference": test.difference,
        "low": test.low,
        "high": test.high,
        "p_value": test.p_value,
        "per_seed": dict(zip(map(str, seeds), test.per_seed)),
        "mcnemar_p": {str(key): mcnemar_exact(correct[i] > 0.5, correct[k + i] > 0.5) for i, key in enumerate(seeds)},
        "n_items": test.n_items,
        "n_seeds": test.n_seeds,
        "verdict": verdict,
        "gold_nll": _compare_nll(left, right, task, resamples, seed),
    }


def _compare_nll(left: Sequence[Evaluation], right: Sequence[Evaluation], task: str, resamples: int, seed: int) -> dict[str, Any] | None:
    """Difference in gold-trace NLL (nats per token), paired over items; None unless both have it on the same tokens."""
    items, nats = aligned([*left, *right], task, "gold_nll_nats")
    if not items:
        return None
    weights = np.asarray([[cell.samples[task][item]["gold_nll_tokens"] for item in items] for cell in (*left, *right)], np.float64)
    if (weights != weights[0]).any() or weights[0].sum() <= 0:
        return None  # another tokenizer: nats per token do not compare
    per_token = nats / weights[0]
    k = len(left)
    test = paired_bootstrap(per_token[:k], per_token[k:], weights=weights[0], resamples=resamples, seed=seed)
    return {"difference": test.difference, "low": test.low, "high": test.high, "p_value": test.p_value, "n_items": test.n_items}


def _gold_nll(cells: Mapping[int, Evaluation], task: str, resamples: int, seed: int) -> dict[str, Any] | None:
    means = {str(key): cell.metrics["tasks"][task]["gold_nll"] for key, cell in cells.items()}
    if any(value is None for value in means.values()):
        return None
    items, nats = aligned(list(cells.values()), task, "gold_nll_nats")
    interval = None
    if items:
        tokens = np.asarray([next(iter(cells.values())).samples[task][item]["gold_nll_tokens"] for item in items], np.float64)
        interval = bootstrap_interval(nats / tokens, weights=tokens, resamples=resamples, seed=seed)
    first = next(iter(means.values()))
    return {
        "mean": _mean([value["mean"] for value in means.values()]),
        "interval": [interval.low, interval.high] if interval else None,
        "items": first["items"],
        "per_seed": {key: value["mean"] for key, value in means.items()},
    }


def _by_steps(per_seed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy by number of steps, averaged over seeds; the interval is Wilson's on one seed's n at the mean accuracy."""
    from dccot_jax.evaluate.statistics import wilson

    found = []
    for position, entry in enumerate(per_seed[0]["by_steps"]):
        rows = [seed["by_steps"][position] for seed in per_seed if len(seed["by_steps"]) > position]
        mean = _mean([row["accuracy_flexible"] for row in rows])
        interval = wilson(round((mean or 0.0) * entry["n"]), entry["n"])
        found.append(
            {
                "n_steps": entry["n_steps"],
                "n": entry["n"],
                "accuracy": mean,
                "interval": [interval.low, interval.high] if interval else None,
            }
        )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _directions(entry: Mapping[str, Any]) -> dict[str, bool]:
    return {name.split(",")[0]: name.startswith("exact_match") for name in entry if "," in name and "_stderr" not in name}


def _relative(path: Any, workdir: Path) -> str:
    return str(path.relative_to(workdir)) if path.is_relative_to(workdir) else path.name
