"""Calendar arithmetic: a date is moved forward and back by days and weeks.

Start dates in 2023-2025; 2-4 moves of 2-9 days, or of 1-3 weeks. Dates are written MM/DD/YYYY, in question and answer.
Noise feature: exactly one move is in *weeks*. The noisy teacher takes a week for 5 days, so its answer is always wrong.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import re
from typing import Any

from dccot_jax.tasks.base import Item
from dccot_jax.tasks.synthetic.family import NAMES, P_FEATURE, Family, generate_item
from dccot_jax.tasks.synthetic.wording import Story, first_match, other_form, patterns, read_story, reworded

INTROS = ("{name} is at {date}.", "{name} starts at {date}.", "The calendar of {name} shows {date}.")
AHEAD = ("moves {} ahead", "counts {} ahead", "goes {} forward")
BACK = ("moves {} back", "counts {} back", "goes {} earlier")
CLOSERS = ("What date does {name} reach?", "At what date is {name} now?", "What is the date of {name} in the end?")
STEPS = (2, 4)
EPOCH, SPAN = datetime.date(2023, 1, 1), 1096  # first start date, number of start dates

_SIGN = {template: (1 if template in AHEAD else -1) for template in AHEAD + BACK}
_CLAUSE = re.compile(r"(?:She|He|she|he) (.+)\.")
_AMOUNT = re.compile(r"(\d+) (day|week)s?\b")
_INTRO_PATTERNS = patterns(INTROS)
_CLOSER_PATTERNS = patterns(CLOSERS)
_RESULT = re.compile(r"Now (?P<name>[A-Z][a-z]+) is at (?P<date>\d\d/\d\d/\d{4})\.")
_BACKWARD_ASK = re.compile(r"What date is x\?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """`moves` are (template, number, unit), unit being ``day`` or ``week``."""

    name: str
    start: datetime.date
    moves: tuple[tuple[str, int, str], ...]
    intro: int = 0
    closer: int = 0


@dataclasses.dataclass(frozen=True)
class Backward:
    """Known moves and the date they end at; the start is unknown."""

    name: str
    moves: tuple[tuple[str, int, str], ...]
    result: datetime.date


class Calendar(Family[Problem, Backward]):
    """The calendar family; see the module docstring."""

    name = "calendar"

    def sample(self, rng: random.Random, task: str) -> Problem:
        return self._sample(rng, rng.randint(*STEPS), rng.random() < P_FEATURE)

    def _sample(self, rng: random.Random, n_steps: int, feature: bool) -> Problem:
        week = rng.randrange(n_steps) if feature else -1
        moves = tuple(
            (rng.choice(AHEAD + BACK), rng.randint(1, 3) if index == week else rng.randint(2, 9), "week" if index == week else "day")
            for index in range(n_steps)
        )
        start = EPOCH + datetime.timedelta(days=rng.randrange(SPAN))
        return Problem(rng.choice(tuple(NAMES)), start, moves, rng.randrange(len(INTROS)), rng.randrange(len(CLOSERS)))

    def skeleton(self, problem: Problem) -> tuple[Any, ...]:
        return (_written(problem.start), *_changes(problem.moves))

    def render(self, problem: Problem) -> str:
        return " ".join([*_story(problem, _written(problem.start)), CLOSERS[problem.closer].format(name=problem.name)])

    def parse(self, text: str) -> Problem | None:
        story = _read_story(text)
        if story is None or story.intro["date"] == "x" or not story.rest:
            return None
        start, closer = _read_date(story.intro["date"]), first_match(_CLOSER_PATTERNS, story.rest[0])
        if start is None or closer is None or closer[1]["name"] != story.intro["name"] or not story.clauses:
            return None
        return Problem(story.intro["name"], start, _moves(story), story.form, closer[0])

    def has_feature(self, problem: Problem) -> bool:
        return any(unit == "week" for _, _, unit in problem.moves)

    def answer(self, problem: Problem, misread: bool = False) -> str:
        return _written(_shift(problem.start, sum(_changes(problem.moves, misread))))

    def rationale(self, problem: Problem, style: str, path: str = "own", misread: bool = False) -> str:
        changes = _changes(problem.moves, misread)
        date, lines = problem.start, []
        if path in ("grouped", "chained"):
            total = sum(changes)
            if path == "grouped":
                ahead, back = sum(c for c in changes if c > 0), -sum(c for c in changes if c < 0)
                lines.append(f"Ahead: {ahead} days. Back: {back} days. {ahead}-{back}={total}.")
            else:
                lines.append(f"{changes[0]}{''.join(f'{c:+d}' for c in changes[1:])}={total}.")
            return " ".join([*lines, f"{_equation(date, total)}."])
        if style == "concise" and path != "narrated":
            chain = _written(date)
            for change in changes:
                date = _shift(date, change)
                chain += f" {change:+d} days = {_written(date)}"
            return f"{chain}."
        lines.append(f"Start at {_written(date)}.")
        for move, change in zip(problem.moves, changes):
            date = _shift(date, change)
            said = f"{NAMES.get(problem.name, 'She')} {_said(move)}"
            weeks = f" {move[1]} {_unit(move)} = {abs(change)} days," if move[2] == "week" else ""
            lines.append(f"{said}{', that is' if path == 'narrated' else ':'}{weeks} {change:+d} days = {_written(date)}.")
        return " ".join(lines)

    def rephrase(self, problem: Problem, rng: random.Random) -> str:
        moves = tuple((other_form(rng, template, AHEAD, BACK), n, unit) for template, n, unit in problem.moves)
        return self.render(reworded(problem, rng, INTROS, CLOSERS, moves=moves))

    def task_of(self, problem: Problem) -> str:
        return "synth_calendar"

    def similar(self, problem: Problem, rng: random.Random) -> Problem:
        return self._sample(rng, len(problem.moves), self.has_feature(problem))

    def backward(self, problem: Problem, rng: random.Random) -> str:
        """The start is masked (the only date in the question) and the date reached is given."""
        return " ".join([*_story(problem, "x"), f"Now {problem.name} is at {self.answer(problem)}.", "What date is x?"])

    def parse_backward(self, text: str) -> Backward | None:
        story = _read_story(text)
        if story is None or story.intro["date"] != "x" or len(story.rest) < 2:
            return None
        name, moves, result = story.intro["name"], _moves(story), _RESULT.fullmatch(story.rest[0])
        date = _read_date(result["date"]) if result and result["name"] == name else None
        return Backward(name, moves, date) if date and moves and _BACKWARD_ASK.fullmatch(story.rest[1]) else None

    def solve_backward(self, backward: Backward, style: str, path: str = "own") -> tuple[str, str]:
        date = backward.result
        verbose = style != "concise" or path == "narrated"
        lines = [f"Go back from {_written(date)}."] if verbose else []
        for move, change in reversed(list(zip(backward.moves, _changes(backward.moves)))):
            equation = f"{_equation(date, -change)}."
            lines.append(f"Undo {_said(move)}: {equation}" if verbose else equation)
            date = _shift(date, -change)
        return " ".join(lines), _written(date)

    def same_story(self, problem: Problem, backward: Backward) -> tuple[bool, str]:
        same = problem.name == backward.name and _changes(problem.moves) == _changes(backward.moves)
        return same and self.answer(problem) == _written(backward.result), _written(problem.start)


CALENDAR = Calendar()


def make_calendar(task: str, split: str, index: int) -> Item:
    """Item `index` of ``synth_calendar``."""
    return generate_item(CALENDAR, task, split, index, _describe)


def _describe(problem: Problem) -> dict[str, Any]:
    meta = {
        "feature": CALENDAR.has_feature(problem),
        "skeleton": list(CALENDAR.skeleton(problem)),
        "templates": [template for template, _, _ in problem.moves],
    }
    return {"gold": CALENDAR.answer(problem), "n_steps": len(problem.moves), "meta": meta}


def _changes(moves: tuple[tuple[str, int, str], ...], misread: bool = False) -> list[int]:
    """Signed days; with `misread` a week counts 5 days."""
    week = 5 if misread else 7
    return [_SIGN[template] * n * (week if unit == "week" else 1) for template, n, unit in moves]


def _written(date: datetime.date) -> str:
    return f"{date:%m/%d}/{date.year:04d}"


def _read_date(text: str) -> datetime.date | None:
    month, day, year = map(int, text.split("/"))
    try:
        return datetime.date(year, month, day)
    except ValueError:  # no such day
        return None


def _shift(date: datetime.date, days: int) -> datetime.date:
    return date + datetime.timedelta(days=days)


def _equation(date: datetime.date, days: int) -> str:
    return f"{_written(date)} {days:+d} days = {_written(_shift(date, days))}"


def _unit(move: tuple[str, int, str]) -> str:
    return move[2] if move[1] == 1 else f"{move[2]}s"


def _said(move: tuple[str, int, str]) -> str:
    return move[0].format(f"{move[1]} {_unit(move)}")


def _story(problem: Problem, date: str) -> list[str]:
    who = NAMES.get(problem.name, "She")
    return [INTROS[problem.intro].format(name=problem.name, date=date), *(f"{who} {_said(move)}." for move in problem.moves)]


def _read_story(text: str) -> Story | None:
    return read_story(text, _INTRO_PATTERNS, _CLAUSE, _AMOUNT, _SIGN)


def _moves(story: Story) -> tuple[tuple[str, int, str], ...]:
    return tuple((template, int(amount[1]), amount[2]) for template, amount in story.clauses)
