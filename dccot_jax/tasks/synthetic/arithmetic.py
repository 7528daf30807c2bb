"""Word arithmetic: a running count changed by one short clause per step.

Number domain. ``synth_arithmetic`` and ``synth_arithmetic_long``: start 2..19, changes 1..9, every running count in
0..19; 2-6 and 7-9 steps. ``synth_arithmetic_large``: start 30..90, changes 11..40, running counts in 10..99; 2-6 steps.
Each clause of the question maps, in order, to one step of the rationale, which carries the running count explicitly.

Noise feature: exactly one clause tells of an *accident* (`ACCIDENTS`: loses, drops, breaks). The noisy teacher reads it
as a gain: "He drops 4: 9+4=13." The answer is then off by twice the number, so it is always wrong.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

from dccot_jax.tasks.base import Item
from dccot_jax.tasks.synthetic.family import NAMES, P_FEATURE, Family, generate_item
from dccot_jax.tasks.synthetic.wording import first_match, other_form, patterns, read_story, reworded

GAINS = (
    "finds {} more", "buys {} more", "wins {} more", "picks {} more", "makes {} more", "gets {} more",
    "earns {} more", "takes {} more", "adds {} more", "is given {} more", "borrows {} more", "collects {} more",
)  # fmt: skip
LOSSES = (
    "gives away {}", "sells {}", "lends {}", "throws away {}", "uses {}", "trades {}",
    "sends away {}", "puts away {}", "hides {}", "returns {}",
)  # fmt: skip
ACCIDENTS = ("loses {}", "drops {}", "breaks {}")
TEMPLATES = GAINS + LOSSES + ACCIDENTS

INTROS = ("{name} has {start} {item}.", "{name} starts with {start} {item}.", "At first {name} has {start} {item}.")
CLOSERS = (
    "How many {item} does {name} have now?",
    "How many {item} does {name} have in the end?",
    "How many {item} are left for {name}?",
)
THINGS = ("shells", "cards", "pens", "cups", "beads", "toys")

STEPS = {"synth_arithmetic": (2, 6), "synth_arithmetic_long": (7, 9), "synth_arithmetic_large": (2, 6)}

_SIGN = {template: (1 if template in GAINS else -1) for template in TEMPLATES}
_NUMBER = re.compile(r"\b(\d+|x)\b")
_CLAUSE = re.compile(r"(?:Then )?(?:She|He|she|he) (.+)\.")
_INTRO_PATTERNS = patterns(INTROS)
_CLOSER_PATTERNS = patterns(CLOSERS)
_RESULT = re.compile(r"Now (?P<name>[A-Z][a-z]+) has (?P<result>\d+) (?P<item>[a-z]+)\.")
_BACKWARD_ASK = re.compile(r"What is x\?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """`steps` are (template, number); `intro` and `closer` index `INTROS` and `CLOSERS`."""

    name: str
    item: str
    start: int
    steps: tuple[tuple[str, int], ...]
    intro: int = 0
    closer: int = 0


@dataclasses.dataclass(frozen=True)
class Backward:
    """A problem whose start (``masked == 0``) or step ``masked - 1`` is unknown (stored as 0) and whose `result` is given."""

    problem: Problem
    masked: int
    result: int


class Arithmetic(Family[Problem, Backward]):
    """The arithmetic family; see the module docstring."""

    name = "arithmetic"

    def sample(self, rng: random.Random, task: str) -> Problem:
        low, high = STEPS[task]
        return self._sample(rng, large=task == "synth_arithmetic_large", n_steps=rng.randint(low, high), feature=rng.random() < P_FEATURE)

    def _sample(self, rng: random.Random, *, large: bool, n_steps: int, feature: bool) -> Problem:
        floor, top = (10, 99) if large else (0, 19)
        least, most = (11, 40) if large else (1, 9)
        accident = rng.randrange(n_steps) if feature else -1
        while True:  # a start near an end of the domain can leave no room for the accident
            start = rng.randint(30, 90) if large else rng.randint(2, 19)
            steps: list[tuple[str, int]] = []
            count = start
            for index in range(n_steps):
                changes = [sign * n for n in range(least, most + 1) for sign in (1, -1) if floor <= count + sign * n <= top]
                if index == accident:
                    changes = [change for change in changes if change < 0]
                if not changes:
                    break
                change = rng.choice(changes)
                pool = GAINS if change > 0 else ACCIDENTS if index == accident else LOSSES
                steps.append((rng.choice(pool), abs(change)))
                count += change
            if len(steps) == n_steps:
                break
        return Problem(
            rng.choice(tuple(NAMES)), rng.choice(THINGS), start, tuple(steps), rng.randrange(len(INTROS)), rng.randrange(len(CLOSERS))
        )

    def skeleton(self, problem: Problem) -> tuple[Any, ...]:
        return (problem.start, *(_SIGN[template] * n for template, n in problem.steps))

    def render(self, problem: Problem) -> str:
        return " ".join([*_story(problem), CLOSERS[problem.closer].format(name=problem.name, item=problem.item)])

    def parse(self, text: str) -> Problem | None:
        story = _read_story(text)
        if story is None:
            return None
        problem, masked, rest = story
        match = first_match(_CLOSER_PATTERNS, rest[0]) if rest else None
        if match is None or masked or not problem.steps or match[1]["name"] != problem.name or match[1]["item"] != problem.item:
            return None
        return dataclasses.replace(problem, closer=match[0])

    def has_feature(self, problem: Problem) -> bool:
        return any(template in ACCIDENTS for template, _ in problem.steps)

    def answer(self, problem: Problem, misread: bool = False) -> str:
        return str(problem.start + sum(_changes(problem, misread)))

    def rationale(self, problem: Problem, style: str, path: str = "own", misread: bool = False) -> str:
        changes = _changes(problem, misread)
        if path == "grouped":
            return _grouped(problem.start, changes)
        if path == "chained":
            total = problem.start + sum(changes)
            return f"{problem.start}{''.join(f'{change:+d}' for change in changes)}={total}."
        lines = [f"Start with {problem.start}."] if path == "own" and style != "concise" else []
        lines += [f"{problem.name} has {problem.start} at first."] if path == "narrated" else []
        count = problem.start
        for (template, n), change in zip(problem.steps, changes):
            equation = f"{count}{change:+d}={count + change}"
            said = f"{NAMES.get(problem.name, 'She')} {template.format(n)}"
            if path == "narrated":
                lines.append(f"{said}, which makes {equation}.")
            else:
                lines.append(f"{equation}." if style == "concise" else f"{said}: {equation}.")
            count += change
        return " ".join(lines)

    def rephrase(self, problem: Problem, rng: random.Random) -> str:
        steps = tuple((other_form(rng, template, GAINS, LOSSES, ACCIDENTS), n) for template, n in problem.steps)
        return self.render(reworded(problem, rng, INTROS, CLOSERS, steps=steps))

    def task_of(self, problem: Problem) -> str:
        counts = [problem.start]
        for change in _changes(problem):
            counts.append(counts[-1] + change)
        large = max(n for _, n in problem.steps) > 9 or max(counts) > 19
        return "synth_arithmetic_large" if large else "synth_arithmetic_long" if len(problem.steps) > 6 else "synth_arithmetic"

    def similar(self, problem: Problem, rng: random.Random) -> Problem:
        large = self.task_of(problem) == "synth_arithmetic_large"
        return self._sample(rng, large=large, n_steps=len(problem.steps), feature=self.has_feature(problem))

    def backward(self, problem: Problem, rng: random.Random) -> str:
        masked = rng.randint(0, len(problem.steps))
        story = _story(problem, masked)
        return " ".join([*story, f"Now {problem.name} has {self.answer(problem)} {problem.item}.", "What is x?"])

    def parse_backward(self, text: str) -> Backward | None:
        story = _read_story(text)
        if story is None:
            return None
        problem, masked, rest = story
        if len(masked) != 1 or len(rest) < 2 or not problem.steps:
            return None
        result = _RESULT.fullmatch(rest[0])
        if result is None or not _BACKWARD_ASK.fullmatch(rest[1]) or result["name"] != problem.name or result["item"] != problem.item:
            return None
        return Backward(problem, masked[0], int(result["result"]))

    def solve_backward(self, backward: Backward, style: str, path: str = "own") -> tuple[str, str]:
        problem, masked, after = backward.problem, backward.masked, backward.result
        changes = _changes(problem)
        verbose = style != "concise" or path == "narrated"
        lines = [f"Go back from {after}."] if verbose else []
        for index in range(len(changes) - 1, max(masked - 1, -1), -1):  # undo the steps after the masked one
            template, n = problem.steps[index]
            equation = f"{after}{-changes[index]:+d}={after - changes[index]}."
            lines.append(f"Undo {template.format(n)}: {equation}" if verbose else equation)
            after -= changes[index]
        if masked == 0:
            return " ".join([*lines, f"So x={after}."]), str(after)
        before = problem.start
        lines += [f"Start with {before}."] if verbose else []
        for (template, n), change in zip(problem.steps[: masked - 1], changes):
            equation = f"{before}{change:+d}={before + change}."
            lines.append(f"{NAMES.get(problem.name, 'She')} {template.format(n)}: {equation}" if verbose else equation)
            before += change
        gain = _SIGN[problem.steps[masked - 1][0]] > 0
        x = after - before if gain else before - after
        lines.append(f"So x={after}-{before}={x}." if gain else f"So x={before}-{after}={x}.")
        return " ".join(lines), str(x)

    def same_story(self, problem: Problem, backward: Backward) -> tuple[bool, str]:
        told, masked = backward.problem, backward.masked
        ours = [problem.start, *_changes(problem)]
        theirs = [told.start, *_changes(told)]
        known = len(ours) == len(theirs) and all(a == b for i, (a, b) in enumerate(zip(ours, theirs)) if i != masked)
        if not known or (told.name, told.item) != (problem.name, problem.item):
            return False, ""
        if masked and _SIGN[told.steps[masked - 1][0]] * ours[masked] <= 0:
            return False, ""
        return backward.result == sum(ours), str(abs(ours[masked]))


ARITHMETIC = Arithmetic()


def make_arithmetic(task: str, split: str, index: int) -> Item:
    """Item `index` of ``synth_arithmetic``, ``synth_arithmetic_long`` or ``synth_arithmetic_large``."""
    return generate_item(ARITHMETIC, task, split, index, _describe)


def _describe(problem: Problem) -> dict[str, Any]:
    meta = {
        "feature": ARITHMETIC.has_feature(problem),
        "skeleton": list(ARITHMETIC.skeleton(problem)),
        "templates": [template for template, _ in problem.steps],
    }
    return {"gold": ARITHMETIC.answer(problem), "n_steps": len(problem.steps), "meta": meta}


def _changes(problem: Problem, misread: bool = False) -> list[int]:
    """Signed changes; with `misread` the accidents count as gains."""
    return [n if misread and template in ACCIDENTS else _SIGN[template] * n for template, n in problem.steps]


def _grouped(start: int, changes: list[int]) -> str:
    """All gains first, then all losses, each summed."""
    lines, count = [], start
    for word, sign in (("Gains", 1), ("Losses", -1)):
        numbers = [abs(change) for change in changes if change * sign > 0]
        if numbers:
            total = sum(numbers)
            added = "+".join(map(str, numbers)) + f"={total}" if len(numbers) > 1 else str(total)
            lines += [f"{word}: {added}.", f"{count}{sign * total:+d}={count + sign * total}."]
            count += sign * total
    return " ".join(lines)


def _story(problem: Problem, masked: int | None = None) -> list[str]:
    """Intro and clauses; part `masked` (0 the start, i the i-th step) is written as x."""
    numbers = [str(n) for n in (problem.start, *(n for _, n in problem.steps))]
    if masked is not None:
        numbers[masked] = "x"
    intro = INTROS[problem.intro].format(name=problem.name, start=numbers[0], item=problem.item)
    who = NAMES.get(problem.name, "She")
    return [intro, *(f"{who} {template.format(number)}." for (template, _), number in zip(problem.steps, numbers[1:]))]


def _read_story(text: str) -> tuple[Problem, list[int], list[str]] | None:
    """Problem told by the last story in `text`, which of its numbers are x, and the sentences after it."""
    story = read_story(text, _INTRO_PATTERNS, _CLAUSE, _NUMBER, _SIGN)
    if story is None:
        return None
    written = [story.intro["start"], *(number[1] for _, number in story.clauses)]
    start, *changes = (0 if number == "x" else int(number) for number in written)
    steps = tuple((template, n) for (template, _), n in zip(story.clauses, changes))
    masked = [place for place, number in enumerate(written) if number == "x"]
    return Problem(story.intro["name"], story.intro["item"], start, steps, story.form), masked, story.rest
