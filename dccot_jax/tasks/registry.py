"""The tasks by name, and what every room asks about them: prompts, targets, rows, split hashes.

All access to task rows goes through `load_items`. A split is part of a task's identity: `split_hash` names it and
`check_traces_split` refuses traces made on another public split than the one whose test set is used.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from dccot_jax.records import InputError, Trace, content_hash, normalise_question
from dccot_jax.tasks.answers_words import LETTERS
from dccot_jax.tasks.base import Item, Task, TaskDataError
from dccot_jax.tasks.plain import PLAIN_TASKS

_TASKS: dict[str, Task] = {}


class UnknownTaskError(InputError):
    """No task of that name; the message names the nearest one."""


class SplitMismatchError(InputError):
    """Traces were made on another split of a task than the one whose test set they would meet."""


def register(task: Task) -> Task:
    """Add a task. Raises ValueError if the name is taken."""
    if task.name in _TASKS:
        raise ValueError(f"task {task.name} is registered twice")
    _TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task of that name, or one of `PLAIN_TASKS`. Raises UnknownTaskError naming the nearest."""
    if name in PLAIN_TASKS:
        return PLAIN_TASKS[name]
    _register_all()
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(_TASKS))}"
        raise UnknownTaskError(f"unknown task {name!r}{hint}")
    return _TASKS[name]


def all_tasks() -> list[Task]:
    """Every task, sorted by name."""
    _register_all()
    return [_TASKS[name] for name in sorted(_TASKS)]


def build_prompt(task: Task, question: str, choices: Sequence[str] = ()) -> str:
    """User message: the question, options as "(A) foo (B) bar" on a line of their own, the task's suffix."""
    if len(choices) > len(LETTERS):
        raise ValueError(f"task {task.name}: {len(choices)} options, at most {len(LETTERS)} can be lettered")
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return f"{question}\n{options}{task.prompt_suffix}" if options else f"{question}{task.prompt_suffix}"


def build_target(task: Task, rationale: str, answer: str) -> str:
    """What a student should write: the rationale, then the answer line in the form the judge reads strictly."""
    shown = {"choice": f"({answer})", "latex": f"\\boxed{{{answer}}}"}.get(task.answer_type, answer)
    line = f"The answer is {shown}."
    return f"{rationale.rstrip()}\n{line}" if rationale.strip() else line


def load_items(task_name: str, split: str, data_dir: Path | str | None = None, limit: int = 0) -> list[Item]:
    """Rows of a split in the source's order; with `limit` the rows of the `limit` smallest ids (ids are hashes), whatever their order.

    Args:
      data_dir: folder of local files; None or "" asks the hub (generated tasks need neither).

    Raises:
      UnknownTaskError, TaskDataError: no such task; its rows cannot be had (one line naming file or hub id).
    """
    task = get_task(task_name)
    if split not in task.splits:
        raise TaskDataError(f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    items = task.load(split, Path(data_dir).expanduser() if data_dir else None)
    if limit <= 0 or limit >= len(items):
        return items
    chosen = set(sorted(item.id for item in items)[:limit])
    return [item for item in items if item.id in chosen]


def split_hash(items: Iterable[Item]) -> str:
    """Hash of a split: of its items, whatever their order."""
    return content_hash("split/1", sorted({item.id for item in items}))


def evaluation_tasks(task: str, iid: Sequence[str] = (), ood: Sequence[str] = (), cross: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Names of the tasks to evaluate on when `task` is trained on, per group ``iid``, ``ood``, ``cross``.

    The given names; where all three are empty the task's own relations, and itself as ``iid`` if it names none. Raises UnknownTaskError.
    """
    trained = get_task(task)
    if not (iid or ood or cross):
        iid, ood, cross = trained.iid or (trained.name,), trained.ood, trained.cross
    return {"iid": tuple(iid), "ood": tuple(ood), "cross": tuple(cross)}


def local_files(task: Task, data_dir: Path | str) -> dict[str, Path]:
    """The files under `data_dir` that a task's rows are read from, by relative name; those that are not there are left out.

    A task that declares none is read from ``<task>/<split>.jsonl``. Where ``<name>`` is absent ``<name>.gz`` stands for it.
    """
    root = Path(data_dir).expanduser()
    declared = task.local_files or (tuple(f"{task.name}/{split}.jsonl" for split in task.splits) if task.hub else ())
    found = (next((name for name in (declaration, f"{declaration}.gz") if (root / name).exists()), None) for declaration in declared)
    return {name: root / name for name in found if name is not None}


def data_at_hand(task: Task, data_dir: Path | str | None) -> bool:
    """Whether rows can be loaded without the network: generated, or every local file is there (plain or .gz)."""
    if not task.local_files:
        return task.hub is None
    if not data_dir:
        return False
    return len(local_files(task, data_dir)) == len(task.local_files)


def check_traces_split(traces: Iterable[Trace], train: Sequence[Item], test: Sequence[Item], *, max_overlap: float = 0.02) -> None:
    """Refuse traces of a task that were made on another public split than the one `test` belongs to.

    A handful of test questions among the traces is a leak, to be dropped and counted; so is a file over the whole pool (it covers
    the test set). A larger partial overlap means that somebody else's split was used.

    Args:
      traces: traces of any tasks; those of other tasks than the test's are not looked at. train, test: both splits of one source.
      max_overlap: largest share of distinct questions that may stand in the test set.

    Raises:
      SplitMismatchError: a trace's split tag ("train-<hash>") is of another split, or the overlap is too large.
    """
    if not test:
        return
    task = test[0].task
    own = [trace for trace in traces if trace.task == task]
    if not own:
        return
    if train:
        expected = split_hash(train)
        tags = {trace.split for trace in own if "-" in trace.split}
        foreign = sorted(tag for tag in tags if not expected.startswith(tag.rsplit("-", 1)[1]))
        if foreign:
            raise SplitMismatchError(
                f"task {task}: traces were made on split {foreign[0]}, but the test set belongs to train split {expected[:12]}; "
                "load both from one source (the same data_dir or the same hub id)"
            )
    asked = [trace.question for trace in own if trace.part == "forward" and not trace.parent_ids]
    check_questions_split(asked, test, max_overlap=max_overlap)


def check_questions_split(asked: Iterable[str], test: Sequence[Item], *, source: str = "", max_overlap: float = 0.02) -> None:
    """The part of `check_traces_split` that needs questions alone, for rows that have not become traces yet.

    Args:
      asked: the original questions of one source. test: the test split they must stay out of. source: names the rows in the message.

    Raises:
      SplitMismatchError: more than `max_overlap` of the distinct questions stand in the test set, and they do not cover it.
    """
    held_out = {normalise_question(item.question) for item in test}
    questions = {normalise_question(question) for question in asked}
    shared = questions & held_out
    if len(shared) > max_overlap * len(questions) and len(shared) < 0.99 * len(held_out):
        raise SplitMismatchError(
            f"task {test[0].task}: {source}{len(shared)} of {len(questions)} trace questions stand in the test set of {len(held_out)}; "
            "the traces were made on another public split. Use the test set of their own split"
        )


@functools.cache
def _register_all() -> None:
    """Register the tasks of every domain file; later, so that those files may import this one."""
    from dccot_jax.tasks import commonsense, logic, math, nli, symbolic, synthetic

    for domain in (math, commonsense, logic, nli, symbolic, synthetic):
        for task in domain.TASKS:
            register(task)
