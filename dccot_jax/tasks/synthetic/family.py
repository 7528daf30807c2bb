"""What every synthetic family offers: generate, render, parse, solve, and answer the augmenters' requests.

A *problem* is a parsed question. Rendering a problem and parsing the text again gives the same problem, so the scripted
teachers work from request text alone. A *skeleton* is a problem with its names and wording stripped (operations and
numbers only); its hash decides whether it belongs to train or to test, so no test skeleton can occur in train.
"""

from __future__ import annotations

import abc
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from dccot_jax.records import content_hash, derive_seed
from dccot_jax.tasks.base import Item, make_item

P = TypeVar("P")  # the family's forward problem
B = TypeVar("B")  # the family's backward problem: one quantity masked, the answer given as a condition

NAMES = {"Mia": "She", "Ann": "She", "Eva": "She", "Zoe": "She", "Ben": "He", "Tom": "He", "Sam": "He", "Max": "He"}

TEST_SHARE = 0.2  # share of all skeletons that belong to test
P_FEATURE = 0.48  # share of questions that carry the family's noise feature; see noise.py

PATHS = ("own", "grouped", "narrated", "chained")  # answer paths; "own" is the teacher's own style

_OPTION = re.compile(r"\(([A-J])\)\s*([^()\n]+)")


class Family(abc.ABC, Generic[P, B]):
    """One synthetic family. Every method is a pure function of its arguments."""

    name: str

    @abc.abstractmethod
    def sample(self, rng: random.Random, task: str) -> P:
        """Draw a problem for `task` (one of the family's tasks), from either split."""

    @abc.abstractmethod
    def skeleton(self, problem: P) -> tuple[Any, ...]:
        """Operations and numbers of a problem, names and wording stripped; JSON-able."""

    @abc.abstractmethod
    def render(self, problem: P) -> str:
        """The question text."""

    @abc.abstractmethod
    def parse(self, text: str) -> P | None:
        """The problem in `text`, whatever surrounds it; None if there is none that can be read completely."""

    @abc.abstractmethod
    def has_feature(self, problem: P) -> bool:
        """Whether the noise feature (the wording that the noisy teacher misreads) is present."""

    @abc.abstractmethod
    def answer(self, problem: P, misread: bool = False) -> str:
        """The answer; with `misread`, the noisy teacher's wrong one."""

    @abc.abstractmethod
    def rationale(self, problem: P, style: str, path: str = "own", misread: bool = False) -> str:
        """A checkable rationale: `style` is verbose or concise, `path` one of `PATHS`."""

    @abc.abstractmethod
    def rephrase(self, problem: P, rng: random.Random) -> str:
        """The same problem in other words: same skeleton, same answer, same noise feature."""

    @abc.abstractmethod
    def task_of(self, problem: P) -> str:
        """The task whose number domain a problem belongs to; a new parallel question is drawn from it."""

    @abc.abstractmethod
    def similar(self, problem: P, rng: random.Random) -> P:
        """Draw a parallel problem: other names and numbers, as many steps, the same answer options."""

    @abc.abstractmethod
    def backward(self, problem: P, rng: random.Random) -> str:
        """A backward question: a quantity of `problem` masked, its answer given as a condition."""

    @abc.abstractmethod
    def parse_backward(self, text: str) -> B | None:
        """The backward problem in `text`, or None."""

    @abc.abstractmethod
    def solve_backward(self, backward: B, style: str, path: str = "own") -> tuple[str, str]:
        """Rationale and answer of a backward problem."""

    @abc.abstractmethod
    def same_story(self, problem: P, backward: B) -> tuple[bool, str]:
        """Whether `backward` tells `problem` with one quantity masked, and the masked quantity's true value."""


def skeleton_split(family: str, skeleton: Sequence[Any]) -> str:
    """``train`` or ``test``: a function of the skeleton alone, so that the two splits share none."""
    return "test" if unit_hash("split", family, skeleton) < TEST_SHARE else "train"


def unit_hash(*parts: Any) -> float:
    """A number in [0, 1) from the content of `parts`."""
    return int(content_hash(*parts, digits=13), 16) / 16**13


def generate_item(
    family: Family[P, Any],
    task: str,
    split: str,
    index: int,
    describe: Callable[[P], dict[str, Any]],
) -> Item:
    """Item `index` of a task's split, a pure function of (task, split, index).

    Problems are drawn until one's skeleton belongs to `split`. `describe` gives gold, choices, n_steps and meta.
    """
    rng = random.Random(derive_seed(0, "synthetic/1", task, split, index))
    problem = family.sample(rng, task)
    while skeleton_split(family.name, family.skeleton(problem)) != split:
        problem = family.sample(rng, task)
    return make_item(task, split, family.render(problem), rationale=family.rationale(problem, "verbose"), **describe(problem))


def options(text: str) -> dict[str, str]:
    """Answer options written as ``(A) ball (B) cup`` anywhere in `text`: option text to letter."""
    return {body.strip(" .,;"): letter for letter, body in _OPTION.findall(text)}
