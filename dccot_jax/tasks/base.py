"""Item and Task: one question of a task, and everything the framework knows about a task."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dccot_jax.records import ANSWER_TYPES, InputError, content_hash

DOMAINS = ("math", "commonsense", "science", "logic", "nli", "symbolic", "any")


class TaskDataError(InputError):
    """A task's rows cannot be had or are not what they should be; one line naming the file or hub id."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
      id: content hash of (task, `item_key` of question and choices); the same in every split, so a leak has the same id on both sides.
      task, split: registry name and split.
      question: the question as asked, without options and without the prompt suffix.
      choices: option texts in order A, B, ...; empty if the task has none.
      gold: canonical answer text (for ``choice`` the letter), or None when the source has none.
      rationale: gold rationale without an answer line, where the source has one.
      n_steps: number of reasoning steps where known.
      meta: free form, JSON-able.
    """

    id: str
    task: str
    split: str
    question: str
    choices: tuple[str, ...] = ()
    gold: str | None = None
    rationale: str | None = None
    n_steps: int | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: where its rows come from, how it is asked, how it is answered, and what it is related to.

    Attributes:
      name, answer_type, domain, description: registry name, one of `records.ANSWER_TYPES`, one of `DOMAINS`, one line.
      load: ``(split, data_dir or None) -> items``; raises `TaskDataError`. With ``data_dir`` None rows come from ``hub`` (or own code).
      hub: Hugging Face id as ``owner/name`` or ``owner/name:config``; None for generated tasks.
      splits: split names `load` accepts. prompt_suffix: text after question and options, with its own leading new line; may be empty.
      iid, ood, cross: names of tasks to evaluate on when this one is trained on.
      local_files: paths relative to ``data_dir`` that local loading needs.
    """

    name: str
    answer_type: str
    domain: str
    description: str
    load: Callable[[str, Path | None], list[Item]]
    hub: str | None = None
    splits: tuple[str, ...] = ("train", "test")
    prompt_suffix: str = ""
    iid: tuple[str, ...] = ()
    ood: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()
    local_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.answer_type not in ANSWER_TYPES:
            raise ValueError(f"task {self.name}: answer_type {self.answer_type!r} is not one of {', '.join(ANSWER_TYPES)}")
        if self.domain not in DOMAINS:
            raise ValueError(f"task {self.name}: domain {self.domain!r} is not one of {', '.join(DOMAINS)}")


def item_key(text: str) -> str:
    """What makes a question itself: case, spacing and punctuation do not count, operators and brackets do.

    So "not (a or b)" is not "not a or b", which `records.normalise_question`, the join key for files, does not tell apart. Ids of
    items hang on it, so it stays as it is; everything that compares questions of traces uses `questions.question_key`.
    """
    return " ".join(re.findall(r"[^\W_]+|[-+*/^=<>%()]", unicodedata.normalize("NFKC", text).casefold()))


def make_item(task: str, split: str, question: str, *, choices: Sequence[str] = (), **fields: Any) -> Item:
    """An Item with its content id filled in; `fields` are the remaining Item attributes."""
    options = tuple(choices)
    identity = content_hash("item/1", task, item_key(question), [item_key(option) for option in options])
    return Item(id=identity, task=task, split=split, question=question, choices=options, **fields)


def unique_items(items: Iterable[Item]) -> list[Item]:
    """Items without repeats of an id; the first of each stays, order is kept."""
    return list({item.id: item for item in reversed(list(items))}.values())[::-1]
