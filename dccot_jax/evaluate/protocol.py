"""Protocol `sound`: which items a student is asked, and how; the same for every arm.

The student's own chat template, one prompt per task, one token budget, greedy decoding, stop at any of the student's end
tokens, one reply per item. What a method was trained on never changes what it is asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.config import ConfigError
from dccot_jax.data.template import render_prompt
from dccot_jax.records import Dropped
from dccot_jax.tasks.answers import canonical
from dccot_jax.tasks.base import Item, Task
from dccot_jax.tasks.registry import build_prompt, evaluation_tasks, get_task, load_items, split_hash

NAME = "sound"
SPLIT = "test"
GROUPS = ("iid", "ood", "cross")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One task as evaluated.

    Attributes:
      task, group: the task and ``iid``, ``ood`` or ``cross``. items: the chosen items, sorted by id.
      available: usable items in the test split. limit: how many were asked for (0: all). dropped: items that cannot be asked, with reasons.
      task_hash: hash of the chosen items.
    """

    task: Task
    group: str
    items: tuple[Item, ...]
    available: int
    limit: int
    dropped: tuple[Dropped, ...]
    task_hash: str


@dataclasses.dataclass(frozen=True)
class Question:
    """One item ready to be asked: its task, its user message and the token ids of the rendered prompt."""

    panel: Panel
    item: Item
    user: str
    prompt_ids: tuple[int, ...]


def evaluation_groups(cfg: ConfigDict) -> dict[str, tuple[str, ...]]:
    """Task names per group: those of the config, or the training task's own relations where all three are empty.

    Raises ConfigError if a task is listed twice or no task is left.
    """
    groups = evaluation_tasks(cfg.traces.task, cfg.evaluate.iid, cfg.evaluate.ood, cfg.evaluate.cross)
    names = [name for group in groups.values() for name in group]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"config.evaluate: {twice[0]!r} is listed more than once")
    return groups


def load_panels(cfg: ConfigDict, data_dir: Path | None) -> list[Panel]:
    """Every task to evaluate, in order of groups.

    Raises TaskDataError or UnknownTaskError if a task cannot be had, ConfigError if `evaluate.limits` names another task.
    """
    groups = evaluation_groups(cfg)
    limits = dict(cfg.evaluate.limits)
    names = [name for group in groups.values() for name in group]
    stray = sorted(set(limits) - set(names))
    if stray:
        raise ConfigError(f"config.evaluate.limits: {stray[0]!r} is not evaluated; evaluated are {', '.join(names)}")
    return [
        make_panel(get_task(name), group, load_items(name, SPLIT, data_dir), int(limits.get(name, cfg.evaluate.limit)))
        for group, members in groups.items()
        for name in members
    ]


def make_panel(task: Task, group: str, items: Sequence[Item], limit: int) -> Panel:
    """Choose the `limit` items with the smallest ids (ids are hashes; 0 takes all) among those whose gold answer can be read."""
    usable: dict[str, Item] = {}
    dropped = []
    for item in items:
        if item.gold is None:
            dropped.append(Dropped(item.id, "missing_gold", f"{task.name}: {item.question[:80]}"))
        elif canonical(item.gold, task.answer_type, item.choices) is None:
            dropped.append(Dropped(item.id, "bad_gold", f"{task.name}: gold {item.gold!r} is no {task.answer_type}"))
        elif item.id in usable:
            dropped.append(Dropped(item.id, "duplicate", f"{task.name}: {item.question[:80]}"))
        else:
            usable[item.id] = item
    chosen = tuple(usable[key] for key in sorted(usable)[: limit or None])
    return Panel(task, group, chosen, len(usable), limit, tuple(dropped), split_hash(chosen))


def make_questions(
    panels: Sequence[Panel], tokenizer: Any, *, max_positions: int, max_new_tokens: int
) -> tuple[list[Question], list[Dropped]]:
    """Render every item; within a task shorter prompts come first, so that prompts of a batch are of similar length.

    An item whose prompt and token budget exceed the student's positions is dropped (``prompt_too_long``), not cut.
    """
    found, dropped = [], []
    for panel in panels:
        questions = []
        for item in panel.items:
            user = build_prompt(panel.task, item.question, item.choices)
            ids = tuple(render_prompt(tokenizer, user))
            if len(ids) + max_new_tokens > max_positions:
                detail = f"{panel.task.name}: {len(ids)} prompt tokens + {max_new_tokens} new > {max_positions} positions"
                dropped.append(Dropped(item.id, "prompt_too_long", detail))
            else:
                questions.append(Question(panel, item, user, ids))
        found += sorted(questions, key=lambda question: (len(question.prompt_ids), question.item.id))
    return found, dropped


def describe(cfg: ConfigDict, tokenizer: Any, stop_ids: Sequence[int], panels: Sequence[Panel]) -> dict[str, Any]:
    """The protocol as recorded beside its results; `stop_ids` are the student's."""
    template = str(tokenizer.chat_template)
    return {
        "name": NAME,
        "decoding": "greedy",
        "replies_per_item": 1,
        "max_new_tokens": cfg.evaluate.max_new_tokens,
        "compute_dtype": cfg.compute_dtype,
        "prompt": "the question, its options, the task's suffix; rendered by the student's own chat template",
        "stop": [tokenizer.convert_ids_to_tokens(token) for token in stop_ids],
        "items": {panel.task.name: f"{len(panel.items)} of {panel.available}, the smallest ids (ids are hashes)" for panel in panels},
        "prompt_suffixes": {panel.task.name: panel.task.prompt_suffix for panel in panels},
        "chat_template": template,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
