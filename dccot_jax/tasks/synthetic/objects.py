"""Shuffled objects: three or four people hold one thing each, pairs swap, and one person's thing is asked for.

2-5 swaps. The answer is a choice among the things. Noise feature: the last swap is worded as a *trade* and involves the
person asked about. The noisy teacher takes a trade for talk and leaves everything where it was, which is always wrong.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

from dccot_jax.tasks.base import Item
from dccot_jax.tasks.synthetic.family import NAMES, P_FEATURE, Family, generate_item, unit_hash
from dccot_jax.tasks.synthetic.wording import NAME, first_match, other_form, patterns, reworded, sentences

INTROS = ("{name} has the {thing}.", "{name} holds the {thing}.", "{name} starts with the {thing}.")
SWAPS = ("{a} and {b} swap.", "{a} swaps with {b}.", "{a} and {b} switch.")
TRADES = ("{a} and {b} trade.", "{a} trades with {b}.")
CLOSERS = ("What does {name} have now?", "What does {name} have in the end?", "What is {name} left with?")
THINGS = ("ball", "cup", "key", "book", "hat", "pen")
STEPS = (2, 5)

_INTRO_PATTERNS = patterns(INTROS)
_SWAP_PATTERNS = patterns(SWAPS + TRADES)
_CLOSER_PATTERNS = patterns(CLOSERS)
_END = re.compile(f"In the end ({NAME}) has the ([a-z]+)\\.")
_ASK_START = re.compile(f"What did ({NAME}) have at first\\?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """`people` hold `things` in order; `swaps` are (template, a, b) with a and b positions in `people`; `asked` is a position."""

    people: tuple[str, ...]
    things: tuple[str, ...]
    swaps: tuple[tuple[str, int, int], ...]
    asked: int
    intro: int = 0
    closer: int = 0


@dataclasses.dataclass(frozen=True)
class Backward:
    """Known swaps and final holdings (`final` in the order of `people`); what `asked` held at first is unknown."""

    people: tuple[str, ...]
    final: tuple[str, ...]
    swaps: tuple[tuple[str, int, int], ...]
    asked: int


class Objects(Family[Problem, Backward]):
    """The shuffled-objects family; see the module docstring."""

    name = "objects"

    def sample(self, rng: random.Random, task: str) -> Problem:
        n_people = rng.choice((3, 4))
        return self._sample(rng, tuple(rng.sample(THINGS, n_people)), rng.randint(*STEPS), rng.random() < P_FEATURE)

    def _sample(self, rng: random.Random, things: tuple[str, ...], n_steps: int, feature: bool) -> Problem:
        people = tuple(rng.sample(tuple(NAMES), len(things)))
        pairs: list[tuple[int, int]] = []
        while len(pairs) < n_steps:
            a, b = rng.sample(range(len(things)), 2)
            if not pairs or {a, b} != set(pairs[-1]):  # the same pair twice in a row would undo itself
                pairs.append((a, b))
        templates = [rng.choice(SWAPS) for _ in pairs]
        asked = rng.randrange(len(things))
        if feature:
            templates[-1], asked = rng.choice(TRADES), rng.choice(pairs[-1])
        swaps = tuple((template, a, b) for template, (a, b) in zip(templates, pairs))
        return Problem(people, things, swaps, asked, rng.randrange(len(INTROS)), rng.randrange(len(CLOSERS)))

    def skeleton(self, problem: Problem) -> tuple[Any, ...]:
        return (len(problem.people), problem.asked, *(tuple(sorted((a, b))) for _, a, b in problem.swaps))

    def render(self, problem: Problem) -> str:
        holds = [INTROS[problem.intro].format(name=name, thing=thing) for name, thing in zip(problem.people, problem.things)]
        swaps = [template.format(a=problem.people[a], b=problem.people[b]) for template, a, b in problem.swaps]
        return " ".join([*holds, *swaps, CLOSERS[problem.closer].format(name=problem.people[problem.asked])])

    def parse(self, text: str) -> Problem | None:
        parts = sentences(text)
        intro, people, things, rest = 0, [], [], []
        for first, part in enumerate(parts):
            if found := first_match(_INTRO_PATTERNS, part):
                intro, rest = found[0], parts[first + 1 :]
                people.append(found[1]["name"])
                things.append(found[1]["thing"])
        swaps, rest = _read_swaps(rest, people)
        if len(set(people)) < 2 or len(set(people)) != len(people) or len(set(things)) != len(things) or not swaps or not rest:
            return None
        closer = first_match(_CLOSER_PATTERNS, rest[0])
        if closer is None or closer[1]["name"] not in people:
            return None
        return Problem(tuple(people), tuple(things), tuple(swaps), people.index(closer[1]["name"]), intro, closer[0])

    def has_feature(self, problem: Problem) -> bool:
        template, a, b = problem.swaps[-1]
        return template in TRADES and problem.asked in (a, b)

    def answer(self, problem: Problem, misread: bool = False) -> str:
        return _states(problem.things, problem.swaps, misread)[-1][problem.asked]

    def rationale(self, problem: Problem, style: str, path: str = "own", misread: bool = False) -> str:
        if path == "grouped":
            return self._traced_back(problem, misread)
        people = problem.people
        lines = []
        for (template, a, b), state in zip(problem.swaps, _states(problem.things, problem.swaps, misread)):
            changed = path == "chained" or style == "concise"
            shown = (a, b) if changed else range(len(people))
            holdings = ", ".join(f"{people[i]} {state[i]}" for i in shown)
            said = template.format(a=people[a], b=people[b]).rstrip(".")
            if path == "narrated":
                lines.append(f"{said}, so now {holdings}.")
            else:
                lines.append(f"{holdings}." if changed else f"{said}: {holdings}.")
        return " ".join(lines)

    def _traced_back(self, problem: Problem, misread: bool) -> str:
        at = problem.asked
        lines = [f"Follow {problem.people[at]} back."]
        for template, a, b in reversed(problem.swaps):
            if at in (a, b) and not (misread and template in TRADES):
                at = b if at == a else a
            lines.append(f"{template.format(a=problem.people[a], b=problem.people[b]).rstrip('.')}: look at {problem.people[at]}.")
        return " ".join([*lines, f"{problem.people[at]} has the {problem.things[at]} at first."])

    def rephrase(self, problem: Problem, rng: random.Random) -> str:
        swaps = tuple((other_form(rng, template, SWAPS, TRADES), b, a) for template, a, b in problem.swaps)
        return self.render(reworded(problem, rng, INTROS, CLOSERS, swaps=swaps))

    def task_of(self, problem: Problem) -> str:
        return "synth_objects"

    def similar(self, problem: Problem, rng: random.Random) -> Problem:
        things = tuple(rng.sample(problem.things, len(problem.things)))
        return self._sample(rng, things, len(problem.swaps), self.has_feature(problem))

    def backward(self, problem: Problem, rng: random.Random) -> str:
        """The final holdings are given and one person's first thing is asked for; the options stay the same."""
        people, final = problem.people, _states(problem.things, problem.swaps)[-1]
        swaps = [template.format(a=people[a], b=people[b]) for template, a, b in problem.swaps]
        ends = [f"In the end {name} has the {thing}." for name, thing in zip(people, final)]
        return " ".join([*swaps, *ends, f"What did {rng.choice(people)} have at first?"])

    def parse_backward(self, text: str) -> Backward | None:
        parts = sentences(text)
        ends = [(index, match) for index, part in enumerate(parts) if (match := _END.fullmatch(part))]
        people, final = [match[1] for _, match in ends], [match[2] for _, match in ends]
        if len(people) < 2 or len(set(people)) != len(people) or len(set(final)) != len(final) or ends[-1][0] + 1 >= len(parts):
            return None
        ask = _ASK_START.fullmatch(parts[ends[-1][0] + 1])
        first = ends[0][0]
        while first and first_match(_SWAP_PATTERNS, parts[first - 1]):
            first -= 1
        swaps, rest = _read_swaps(parts[first : ends[0][0]], people)
        if ask is None or ask[1] not in people or not swaps or rest:
            return None
        return Backward(tuple(people), tuple(final), tuple(swaps), people.index(ask[1]))

    def solve_backward(self, backward: Backward, style: str, path: str = "own") -> tuple[str, str]:
        people, undone = backward.people, tuple(reversed(backward.swaps))
        states = _states(backward.final, undone)
        lines = []
        for (template, a, b), state in zip(undone, states):
            short = style == "concise" or path == "chained"
            holdings = ", ".join(f"{people[i]} {state[i]}" for i in ((a, b) if short else range(len(people))))
            said = template.format(a=people[a], b=people[b]).rstrip(".")
            lines.append(f"{holdings}." if short else f"Undo {said}: {holdings}.")
        return " ".join(lines), states[-1][backward.asked]

    def same_story(self, problem: Problem, backward: Backward) -> tuple[bool, str]:
        if set(backward.people) != set(problem.people):
            return False, ""
        ours = [{problem.people[a], problem.people[b]} for _, a, b in problem.swaps]
        theirs = [{backward.people[a], backward.people[b]} for _, a, b in backward.swaps]
        final = dict(zip(problem.people, _states(problem.things, problem.swaps)[-1]))
        same = ours == theirs and final == dict(zip(backward.people, backward.final))
        return same, dict(zip(problem.people, problem.things))[backward.people[backward.asked]]


OBJECTS = Objects()


def make_objects(task: str, split: str, index: int) -> Item:
    """Item `index` of ``synth_objects``; the options are the things in an order that the question's content fixes."""
    return generate_item(OBJECTS, task, split, index, _describe)


def _describe(problem: Problem) -> dict[str, Any]:
    choices = sorted(problem.things, key=lambda thing: unit_hash("option order", problem.people, problem.things, problem.asked, thing))
    gold = "ABCD"[choices.index(OBJECTS.answer(problem))]
    skeleton = [list(part) if isinstance(part, tuple) else part for part in OBJECTS.skeleton(problem)]
    meta = {"feature": OBJECTS.has_feature(problem), "skeleton": skeleton, "templates": [template for template, _, _ in problem.swaps]}
    return {"choices": choices, "gold": gold, "n_steps": len(problem.swaps), "meta": meta}


def _states(things: tuple[str, ...], swaps: tuple[tuple[str, int, int], ...], misread: bool = False) -> list[tuple[str, ...]]:
    """Holdings after each swap; with `misread` a last swap worded as a trade changes nothing."""
    states, state = [], list(things)
    for index, (template, a, b) in enumerate(swaps):
        if not (misread and template in TRADES and index == len(swaps) - 1):
            state[a], state[b] = state[b], state[a]
        states.append(tuple(state))
    return states


def _read_swaps(parts: list[str], people: list[str]) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Leading swaps of `parts` and the sentences after them; stops at the first sentence that is no swap of known people."""
    swaps: list[tuple[str, int, int]] = []
    for index, part in enumerate(parts):
        found = first_match(_SWAP_PATTERNS, part)
        if found is None or not {found[1]["a"], found[1]["b"]} <= set(people):
            return swaps, parts[index:]
        form, match = found
        swaps.append(((SWAPS + TRADES)[form], people.index(match["a"]), people.index(match["b"])))
    return swaps, []
