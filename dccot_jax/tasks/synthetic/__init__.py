"""The embedded source: generated tasks with scripted teachers, so that everything runs without downloads.

`TASKS` holds five tasks of three families. Train and test of a family are disjoint by skeleton (see `family.py`);
`disjointness_report` counts it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from dccot_jax.records import canonical_json
from dccot_jax.tasks.base import Item, Task, TaskDataError, unique_items
from dccot_jax.tasks.synthetic.arithmetic import make_arithmetic
from dccot_jax.tasks.synthetic.calendar import make_calendar
from dccot_jax.tasks.synthetic.objects import make_objects

MakeItem = Callable[[str, str, int], Item]

# Number of indices generated per task and split; repeats of a question are removed.
SIZES = {
    "synth_arithmetic": {"train": 24000, "test": 1500},
    "synth_arithmetic_long": {"test": 1500},
    "synth_arithmetic_large": {"test": 1500},
    "synth_objects": {"train": 6000, "test": 1000},
    "synth_calendar": {"train": 6000, "test": 1000},
}
_MAKE: dict[str, MakeItem] = {
    "synth_arithmetic": make_arithmetic,
    "synth_arithmetic_long": make_arithmetic,
    "synth_arithmetic_large": make_arithmetic,
    "synth_objects": make_objects,
    "synth_calendar": make_calendar,
}
ARITHMETIC_OOD = ("synth_arithmetic_long", "synth_arithmetic_large")


def load(task: str, split: str, data_dir: Path | None = None) -> list[Item]:
    """All distinct items of a split, in index order; `data_dir` is not used. Raises TaskDataError for an unknown split."""
    if split not in SIZES[task]:
        raise TaskDataError(f"task {task} has no split {split!r}; it has {', '.join(SIZES[task])}")
    return list(_items(task, split))


@functools.cache
def _items(task: str, split: str) -> tuple[Item, ...]:
    return tuple(unique_items(_MAKE[task](task, split, index) for index in range(SIZES[task][split])))


def _task(name: str, answer_type: str, domain: str, description: str, **relations: tuple[str, ...]) -> Task:
    return Task(
        name=name,
        answer_type=answer_type,
        domain=domain,
        description=description,
        load=functools.partial(load, name),
        splits=tuple(SIZES[name]),
        **relations,  # pyright: ignore[reportArgumentType]
    )


TASKS = (
    _task(
        "synth_arithmetic",
        "number",
        "math",
        "word arithmetic, 2-6 steps, counts 0..19",
        iid=("synth_arithmetic",),
        ood=ARITHMETIC_OOD,
        cross=("synth_objects", "synth_calendar"),
    ),
    _task("synth_arithmetic_long", "number", "math", "word arithmetic, 7-9 steps, counts 0..19"),
    _task("synth_arithmetic_large", "number", "math", "word arithmetic, 2-6 steps, counts 10..99"),
    _task(
        "synth_objects",
        "choice",
        "logic",
        "who holds what after 2-5 swaps",
        iid=("synth_objects",),
        cross=("synth_arithmetic", "synth_calendar"),
    ),
    _task(
        "synth_calendar",
        "date",
        "symbolic",
        "a date moved by days and weeks, 2-4 moves",
        iid=("synth_calendar",),
        cross=("synth_arithmetic", "synth_objects"),
    ),
)


def disjointness_report() -> dict[str, dict[str, int]]:
    """For every test split: rows, distinct skeletons, and how many items and skeletons it shares with its family's train split."""
    report = {}
    for task, sizes in SIZES.items():
        train = _items("synth_arithmetic" if task in ARITHMETIC_OOD else task, "train")
        train_ids, train_skeletons = {item.id for item in train}, {canonical_json(item.meta["skeleton"]) for item in train}
        test = _items(task, "test")
        skeletons = {canonical_json(item.meta["skeleton"]) for item in test}
        report[task] = {
            "train_items": len(train) if "train" in sizes else 0,
            "test_items": len(test),
            "train_skeletons": len(train_skeletons) if "train" in sizes else 0,
            "test_skeletons": len(skeletons),
            "shared_items": len(train_ids & {item.id for item in test}),
            "shared_skeletons": len(train_skeletons & skeletons),
        }
    return report
