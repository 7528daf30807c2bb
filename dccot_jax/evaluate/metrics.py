"""Metrics of one student on one task, from its judged samples.

A *sample* is one row of `samples.jsonl` (see `evaluate/stage.py`). Rates are shares of all n samples: an answer that could
not be read, a reply cut off at the token budget, or an answer whose comparison with the gold one ran out of time (`reasons`:
``timeout``) counts as wrong and is also counted apart.
"""

from __future__ import annotations

import statistics as python_statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dccot_jax.evaluate.statistics import ratio_mean, wilson

FORMAT_FAILURE_RATE = 0.2  # above this share of unreadable answers a low accuracy says little about reasoning
SMALL_N = 200  # below this an accuracy cell must say why

Sample = Mapping[str, Any]


def task_metrics(
    samples: Sequence[Sample], *, group: str, available: int, limit: int, dropped: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """All metrics of one task.

    Args:
      samples: judged rows of the task. group: ``iid``, ``ood`` or ``cross``.
      available: usable items in the task's test split. limit: items asked for (0: all). dropped: items lost per reason; both
        for the note on small n.
    Returns JSON-able values; what cannot be told is None. `accuracy_*_interval` is Wilson's 95 % interval,
    `accuracy_*_stderr` the sample standard error (None for n < 2), `gold_nll` in nats per token.
    """
    n = len(samples)
    tokens = [int(row["completion_tokens"]) for row in samples]
    found: dict[str, Any] = {"group": group, "n": n, "items_available": available}
    for mode in ("strict", "flexible"):
        found.update(_accuracy(samples, mode))
    found |= {
        "mean_completion_tokens": sum(tokens) / n if n else None,
        "median_completion_tokens": float(python_statistics.median(tokens)) if n else None,
        "truncation_rate": _share(samples, lambda row: row["finish_reason"] == "length"),
        "no_answer_rate": _share(samples, lambda row: row["answer_flexible"] is None),
        "no_answer_rate_strict": _share(samples, lambda row: row["answer_strict"] is None),
        "unterminated_thinking_rate": _share(samples, lambda row: row["reason"] == "thinking_unclosed"),
        "reasons": dict(sorted(Counter(row["reason"] for row in samples).items())),
        "by_steps": by_steps(samples),
        "gold_nll": gold_nll_mean(samples),
        "small_n": small_n_note(n, available, limit, dropped),
    }
    rate = found["no_answer_rate"]
    found["format_failure"] = rate is not None and rate > FORMAT_FAILURE_RATE
    return found


def by_steps(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Accuracy by number of reasoning steps, for the items whose number is known; [] if none is."""
    groups: dict[int, list[Sample]] = {}
    for row in samples:
        if row.get("n_steps") is not None:
            groups.setdefault(int(row["n_steps"]), []).append(row)
    return [{"n_steps": steps, "n": len(rows)} | _accuracy(rows, "flexible") for steps, rows in sorted(groups.items())]


def gold_nll_mean(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Mean negative log-likelihood of the gold rationale, nats per token over all its tokens; None if no item has one."""
    rows = [row for row in samples if row.get("gold_nll_tokens")]
    found = ratio_mean([row["gold_nll_nats"] for row in rows], [row["gold_nll_tokens"] for row in rows])
    if found is None:
        return None
    return {"mean": found[0], "stderr": found[1], "items": len(rows), "tokens": int(sum(row["gold_nll_tokens"] for row in rows))}


def small_n_note(n: int, available: int, limit: int, dropped: Mapping[str, int] | None = None) -> str | None:
    """Why a cell has fewer than 200 items, or None: a small split, a limit, and what was dropped, as far as each applies."""
    if n >= SMALL_N:
        return None
    why = []
    if available < SMALL_N:
        why.append(f"the test split holds {available} {'usable ' if dropped else ''}items")
    if 0 < limit < available and (limit < SMALL_N or dropped):
        why.append(f"limited by evaluate.limit = {limit}")
    if dropped:
        why.append("dropped: " + ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())))
    return f"n = {n}: {'; '.join(why)}" if why else f"n = {n} of {available} items"


def _accuracy(samples: Sequence[Sample], mode: str) -> dict[str, Any]:
    n = len(samples)
    right = sum(bool(row[f"correct_{mode}"]) for row in samples)
    interval = wilson(right, n)
    mean = right / n if n else None
    return {
        f"correct_{mode}": right,
        f"accuracy_{mode}": mean,
        f"accuracy_{mode}_interval": [interval.low, interval.high] if interval else None,
        f"accuracy_{mode}_stderr": (mean * (1 - mean) / (n - 1)) ** 0.5 if mean is not None and n > 1 else None,
    }


def _share(samples: Sequence[Sample], test: Any) -> float | None:
    return sum(bool(test(row)) for row in samples) / len(samples) if samples else None
