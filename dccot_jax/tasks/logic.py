"""Dates and BIG-Bench-Hard. These files carry a canary: evaluation only, there is no train split."""

from __future__ import annotations

from typing import Any

from dccot_jax.records import content_hash, normalise_question
from dccot_jax.tasks.base import Task
from dccot_jax.tasks.loading import NUMBER_SUFFIX, YES_NO_SUFFIX, Row, choice_suffix, file_loader, hub_task
from dccot_jax.tasks.sources import split_options

# name -> (answer type, number of options, description)
BBH = {
    "boolean_expressions": ("yes_no", 0, "Value of a boolean expression"),
    "date_understanding": ("choice", 6, "Dates from a short story; 250 of the 369 questions of date_understanding"),
    "logical_deduction_three_objects": ("choice", 3, "Order of three objects from clues"),
    "multistep_arithmetic_two": ("number", 0, "Nested arithmetic on small integers"),
    "object_counting": ("number", 0, "Counting the members of a category"),
    "tracking_shuffled_objects_three_objects": ("choice", 3, "Who holds what after a series of swaps"),
}
_DATE_FILE = "date_understanding/date_understanding.json.gz"


def _read_date(row: Row) -> dict[str, Any]:
    """Options in an order that depends on question and option only: in the file the right one stands first."""
    if "target_scores" in row:
        scores, question = dict(row["target_scores"]), row["input"]
    else:
        scores, question = (
            dict(zip(row["multiple_choice_targets"], row["multiple_choice_scores"])),
            row["inputs"].split("\n", 1)[0].removeprefix("Q: "),
        )
    key = normalise_question(question)
    options = sorted(scores, key=lambda option: content_hash("option", key, option))
    right = [index for index, option in enumerate(options) if scores[option] == 1]
    if len(right) != 1:
        raise ValueError(f"{len(right)} right options")
    return {"question": question.strip(), "choices": options, "gold": chr(ord("A") + right[0])}


def _read_bbh(row: Row) -> dict[str, Any]:
    question, choices = split_options(row["input"])
    target = row["target"].strip()
    if choices:
        return {"question": question, "choices": choices, "gold": target.strip("()")}
    return {"question": question, "gold": {"True": "yes", "False": "no"}.get(target, target)}


def _bbh(name: str) -> Task:
    answer_type, n_choices, description = BBH[name]
    task, file = f"bbh_{name}", f"bbh/{name}.json.gz"
    suffix = {"yes_no": YES_NO_SUFFIX.replace("yes or no", "True or False"), "number": NUMBER_SUFFIX}.get(answer_type)
    return hub_task(
        task,
        answer_type=answer_type,
        domain="logic",
        description=description,
        hub=f"lukaemon/bbh:{name}",
        hub_splits={"test": "test"},
        read_hub=_read_bbh,
        local=file_loader(task, {"test": file}, _read_bbh),
        local_files=(file,),
        prompt_suffix=suffix or choice_suffix(n_choices),
    )


TASKS: tuple[Task, ...] = (
    hub_task(
        "date_understanding",
        answer_type="choice",
        domain="logic",
        description="Dates from a short story (BIG-bench, 369 questions)",
        hub="tasksource/bigbench:date_understanding",
        hub_splits={"test": "train"},
        read_hub=_read_date,
        local=file_loader("date_understanding", {"test": _DATE_FILE}, _read_date),
        local_files=(_DATE_FILE,),
        prompt_suffix=choice_suffix(6),
    ),
    *(_bbh(name) for name in BBH),
)
