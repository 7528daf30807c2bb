"""Tasks of rows that belong to none: a file of traces read by itself. One per answer type, without rows of their own.

Their questions are asked as they stand, and `registry.all_tasks` does not list them.
"""

from __future__ import annotations

from pathlib import Path

from dccot_jax.records import ANSWER_TYPES
from dccot_jax.tasks.base import Item, Task, TaskDataError


def plain_task_name(answer_type: str) -> str:
    """Name of the task of rows with answers of this type."""
    return f"rows:{answer_type}"


def _no_items(split: str, data_dir: Path | None) -> list[Item]:
    raise TaskDataError("rows of a file belong to no task and have no splits")


PLAIN_TASKS = {
    plain_task_name(kind): Task(plain_task_name(kind), kind, "any", "rows of a file", _no_items, splits=()) for kind in ANSWER_TYPES
}
