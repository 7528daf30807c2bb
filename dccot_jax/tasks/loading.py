"""Building a task and its `load` function from a table of where each split comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dccot_jax.tasks.base import Item, Task, TaskDataError, make_item, unique_items
from dccot_jax.tasks.sources import hub_rows, read_rows

Row = Mapping[str, Any]
RowReader = Callable[[Row], Mapping[str, Any] | None]  # row -> fields of make_item (question, gold, ...); None: not a usable row
LocalLoader = Callable[[str, Path], list[Item]]
TRAIN_TEST: Mapping[str, str] = {"train": "train", "test": "test"}

NUMBER_SUFFIX = "\nReason step by step, then write the last line as 'The answer is N.' where N is a number."
YES_NO_SUFFIX = "\nReason step by step, then write the last line as 'The answer is X.' where X is yes or no."
LATEX_SUFFIX = "\nReason step by step, then write the last line as 'The answer is \\boxed{X}.' where X is the final answer."
STRING_SUFFIX = "\nReason step by step, then write the last line as 'The answer is X.'"


def choice_suffix(n_choices: int) -> str:
    """Prompt suffix of a task with `n_choices` options."""
    last = chr(ord("A") + n_choices - 1)
    return f"\nReason step by step, then write the last line as 'The answer is (X).' where X is a letter from A to {last}."


def build_items(task: str, split: str, rows: list[dict[str, Any]], reader: RowReader, where: str) -> list[Item]:
    """Items of rows, without repeats. Raises TaskDataError for a row the reader cannot use because a field is missing or ill-typed."""
    items = []
    for number, row in enumerate(rows):
        try:
            fields = reader(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise TaskDataError(f"task {task}: {where}: row {number} cannot be used ({type(error).__name__}: {error})") from None
        if fields is not None:
            items.append(make_item(task, split, **fields))
    if not items:
        raise TaskDataError(f"task {task}: {where}: no usable rows for split {split!r}")
    return unique_items(items)


def file_loader(task: str, files: Mapping[str, str], reader: RowReader) -> LocalLoader:
    """The `local` of a task each of whose splits is one file under data_dir; `files` maps splits to paths."""

    def local(split: str, data_dir: Path) -> list[Item]:
        return build_items(task, split, read_rows(data_dir, files[split], task=task), reader, files[split])

    return local


def hub_task(
    name: str,
    *,
    hub: str | None,
    read_hub: RowReader,
    hub_splits: Mapping[str, str] = TRAIN_TEST,
    local: LocalLoader | None = None,
    local_files: tuple[str, ...] = (),
    **fields: Any,
) -> Task:
    """A task with the splits of `hub_splits`, loaded as `loader` says; in distribution with itself if it has a train split.

    Args:
      local, local_files: both or neither; without them one ``<name>/<split>.jsonl`` per split. fields: further fields of Task.
    """
    return Task(
        name=name,
        hub=hub,
        load=loader(name, hub=hub, hub_splits=hub_splits, read_hub=read_hub, local=local),
        splits=tuple(hub_splits),
        iid=(name,) if "train" in hub_splits else (),
        local_files=local_files if local else tuple(f"{name}/{split}.jsonl" for split in hub_splits),
        **fields,
    )


def loader(
    name: str, *, hub: str | None, hub_splits: Mapping[str, str], read_hub: RowReader, local: LocalLoader | None = None
) -> Callable[[str, Path | None], list[Item]]:
    """A task's `load`: local rows with a data_dir, hub rows without.

    Args:
      name: registry name. hub: hub id. hub_splits: our split name -> the hub's. read_hub: reads one hub row.
      local: loads from a data_dir; None reads ``<name>/<split>.jsonl`` (or ``.jsonl.gz``), rows in the hub's schema.
    """

    def load(split: str, data_dir: Path | None) -> list[Item]:
        if split not in hub_splits:
            raise TaskDataError(f"task {name} has no split {split!r}; it has {', '.join(hub_splits)}")
        if data_dir is not None:
            return local(split, Path(data_dir)) if local else _plain_local(name, split, Path(data_dir), read_hub, hub)
        if hub is None:
            raise TaskDataError(f"task {name} has no hub data set; give a data_dir with its files")
        return build_items(name, split, hub_rows(hub, hub_splits[split], task=name), read_hub, f"hub data set {hub}")

    return load


def _plain_local(name: str, split: str, data_dir: Path, reader: RowReader, hub: str | None) -> list[Item]:
    for ending in (".jsonl", ".jsonl.gz"):
        relative = f"{name}/{split}{ending}"
        if (data_dir / relative).exists():
            return build_items(name, split, read_rows(data_dir, relative, task=name), reader, str(data_dir / relative))
    raise TaskDataError(f"task {name}: file {name}/{split}.jsonl is missing under {data_dir} (rows as in the hub data set {hub})")
