"""The fixed text on which the embedded tokenizer is trained: every family, style, answer path and augmenter request.

Its questions are drawn at indices beyond those of the tasks' train splits and from train skeletons only, so the
tokenizer depends neither on an arm's own traces nor on any test question.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from dccot_jax.tasks.base import Item
from dccot_jax.tasks.synthetic.arithmetic import ARITHMETIC, make_arithmetic
from dccot_jax.tasks.synthetic.calendar import CALENDAR, make_calendar
from dccot_jax.tasks.synthetic.family import PATHS, Family
from dccot_jax.tasks.synthetic.noise import is_misread
from dccot_jax.tasks.synthetic.objects import OBJECTS, make_objects
from dccot_jax.tasks.synthetic.teachers import (
    ANSWER,
    ANSWER_1,
    ANSWER_2,
    BACKWARD_QUESTION,
    BACKWARD_REPLY,
    CONSISTENCY,
    NEW_QUESTION,
    NEW_REPLY,
    QUESTION,
    QUESTION_1,
    QUESTION_2,
    REPHRASE,
    REPHRASED_REPLY,
    TASK_LINE,
    new_question,
)

FIRST_INDEX = 1_000_000
SHARES: tuple[tuple[str, int], ...] = (  # task, number of questions
    ("synth_arithmetic", 480),
    ("synth_arithmetic_long", 40),
    ("synth_arithmetic_large", 40),
    ("synth_objects", 120),
    ("synth_calendar", 120),
)
_MAKE = {"synth_objects": make_objects, "synth_calendar": make_calendar}
_FAMILY: dict[str, Family[Any, Any]] = {"synth_objects": OBJECTS, "synth_calendar": CALENDAR}


def corpus() -> Iterator[str]:
    """Texts in a fixed order, about 1 MB in all; the same on every machine."""
    for task, count in SHARES:
        family, make = _FAMILY.get(task, ARITHMETIC), _MAKE.get(task, make_arithmetic)
        for index in range(FIRST_INDEX, FIRST_INDEX + count):
            item = make(task, "train", index)
            yield from _texts(family, item, random.Random(index))


def _texts(family: Family[Any, Any], item: Item, rng: random.Random) -> Iterator[str]:
    """Question, answers in every style and path, and the augmenters' requests and replies for one item."""
    problem = family.parse(item.question)
    if problem is None:
        raise ValueError(f"{item.task} does not read its own question: {item.question}")
    question = item.question
    if item.choices:
        question += "\n" + " ".join(f"({letter}) {text}" for letter, text in zip("ABCD", item.choices))
    stated = f"The answer is ({item.gold})." if item.choices else f"The answer is {item.gold}."
    yield question
    yield f"{item.rationale}\n{stated}"
    yield f"{family.rationale(problem, 'concise')}\n{stated}"
    if is_misread(family, problem):
        yield f"{family.rationale(problem, 'noisy', misread=True)}\nThe answer is {family.answer(problem, misread=True)}."
    path = rng.choice(PATHS[1:])
    yield f"{family.rationale(problem, 'verbose', path)}\n{stated}"
    other, new, back = family.rephrase(problem, rng), new_question(family, problem, rng), family.backward(problem, rng)
    backward = family.parse_backward(back)
    if backward is None:
        raise ValueError(f"{item.task} does not read its own backward question: {back}")
    reasoning, answer = family.solve_backward(backward, "verbose")
    yield f"{REPHRASED_REPLY} {other}"
    yield f"{NEW_REPLY} {new}"
    yield f"{BACKWARD_REPLY} {back}"
    yield f"{reasoning}\nThe answer is {answer}."
    if rng.random() < 0.1:
        for kind in (REPHRASE, NEW_QUESTION):
            yield f"{TASK_LINE} {kind}\n{QUESTION} {question}"
        yield f"{TASK_LINE} {BACKWARD_QUESTION}\n{QUESTION} {question}\n{ANSWER} {item.gold}"
        yield (
            f"{TASK_LINE} {CONSISTENCY}\n{QUESTION_1} {question}\n{ANSWER_1} {item.gold}\n"
            f"{QUESTION_2} {back}\n{ANSWER_2} {answer}\nTrue or False"
        )
