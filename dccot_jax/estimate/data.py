"""What the data stages ask of teachers: calls and tokens of `traces` and `augment`, from the config.

Calls are those of a run in which every draft can be used: an upper bound for augmentation, exact for traces. Completion
tokens are bounded by the config's limits; prompt tokens are the prompts' characters / 4, where the questions are at hand.
A request that two arms share is asked once (`teachers/cache.py`) and counted once; replayed traces are not asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.records import canonical_json
from dccot_jax.tasks.base import Item
from dccot_jax.tasks.registry import build_prompt, data_at_hand, get_task, load_items

CHARACTERS_PER_TOKEN = 4


def data_totals(config: ConfigDict) -> dict[str, Any]:
    """Totals over all arms.

    Returns:
      {"calls", "completion_tokens_at_most", "prompt_tokens", "parts": [...]}; a total is None where one of its parts is unknown, as with
      ``traces.questions = 0`` and no rows of the task at hand.
    """
    parts: dict[str, dict[str, Any]] = {}
    for arm in config_lib.arms(config).values():
        for part in (*_traces(arm), *_augment(arm)):
            parts.setdefault(canonical_json(part["request"]), part)
    found = [{name: value for name, value in part.items() if name != "request"} for part in parts.values()]
    return {
        "calls": _total(part["calls"] for part in found),
        "completion_tokens_at_most": _total(part["completion_tokens_at_most"] for part in found),
        "prompt_tokens": _total(part["prompt_tokens"] for part in found if part["stage"] == "traces"),
        "parts": found,
    }


def calls_per_question(augment: Any, method: str) -> int:
    """Teacher calls of one augmentation method for one question (docs/teachers.md), when every draft can be used."""
    return {"rephrase": 2 * augment.rephrasings, "question": 1 + augment.votes, "answer": augment.answers, "reverse": 3}[method]


def _traces(arm: ConfigDict) -> list[dict[str, Any]]:
    items = _questions(arm.traces.task, arm.data_dir, arm.traces.questions)
    count = len(items) if items is not None else arm.traces.questions or None
    found = []
    for spec in map(dict, arm.traces.teachers):
        if spec.get("kind") == "replay":
            continue
        calls = None if count is None else count * arm.traces.samples
        shared = {
            name: config_lib.to_plain(arm.traces[name]) for name in ("task", "seed", "questions", "samples", "temperature", "max_tokens")
        }
        found.append(
            {
                "stage": "traces",
                "teacher": _name(spec),
                "questions": count,
                "calls": calls,
                "completion_tokens_at_most": None if calls is None else calls * arm.traces.max_tokens,
                "prompt_tokens": None if items is None else _prompt_tokens(arm.traces.task, items) * arm.traces.samples,
                "request": [config_lib.to_plain(spec), shared],
            }
        )
    return found


def _augment(arm: ConfigDict) -> list[dict[str, Any]]:
    items = _questions(arm.traces.task, arm.data_dir, arm.traces.questions)
    count = len(items) if items is not None else arm.traces.questions or None
    found = []
    for method in dict.fromkeys(arm.augment.methods):
        calls = None if count is None else count * calls_per_question(arm.augment, method)
        found.append(
            {
                "stage": f"augment {method}",
                "teacher": _name(arm.augment.teacher),
                "questions": count,
                "calls": calls,
                "completion_tokens_at_most": None if calls is None else calls * arm.augment.max_tokens,
                "prompt_tokens": None,
                "request": [method, config_lib.to_plain(arm.augment), arm.traces.task, arm.traces.questions, arm.traces.seed],
            }
        )
    return found


@functools.lru_cache(maxsize=8)
def _questions(task_name: str, data_dir: str, limit: int) -> list[Item] | None:
    """The training questions, where they are at hand without the network."""
    root = Path(data_dir).expanduser() if data_dir else None
    if not data_at_hand(get_task(task_name), root):
        return None
    return load_items(task_name, "train", root, limit=limit)


def _prompt_tokens(task_name: str, items: list[Item]) -> int:
    task = get_task(task_name)
    return sum(len(build_prompt(task, item.question, item.choices)) for item in items) // CHARACTERS_PER_TOKEN


def _name(spec: Mapping[str, Any]) -> str:
    return " ".join(str(spec[key]) for key in ("kind", "name", "model", "style") if spec.get(key))


def _total(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total
