"""The forms that questions are worded in: drawing another form, and reading sentences back through them."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

NAME = "[A-Z][a-z]+"
_FIELDS = {  # what a {field} of a form may be
    **dict.fromkeys(("name", "a", "b"), NAME),
    **dict.fromkeys(("item", "thing"), "[a-z]+"),
    "start": r"\d+|x",
    "date": r"\d\d/\d\d/\d{4}|x",
}
_SENTENCE = re.compile(r"[^.?!\n]+[.?!]")
_TAG = re.compile(r"^(?:Question|Problem|Q)(?: \d)?\s*:\s*")


def other_form(rng: random.Random, template: str, *pools: Sequence[str]) -> str:
    """Another template of the pool that holds `template`."""
    pool = next(pool for pool in pools if template in pool)
    return rng.choice([form for form in pool if form != template])


def reworded(problem: Any, rng: random.Random, intros: Sequence[str], closers: Sequence[str], **changes: Any) -> Any:
    """`problem` with another intro and another closer (fields ``intro`` and ``closer`` number them), and with `changes`."""
    intro = (problem.intro + rng.randint(1, len(intros) - 1)) % len(intros)
    closer = (problem.closer + rng.randint(1, len(closers) - 1)) % len(closers)
    return dataclasses.replace(problem, intro=intro, closer=closer, **changes)


def sentences(text: str) -> list[str]:
    """Sentences of `text` with their closing mark, without a leading ``Question:``; line ends separate sentences too."""
    return [_TAG.sub("", match.strip()) for match in _SENTENCE.findall(text)]


def patterns(forms: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """A pattern per form, with a group of the same name per ``{field}``."""
    return tuple(re.compile(re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", re.escape(form))) for form in forms)


def first_match(forms: Sequence[re.Pattern[str]], text: str) -> tuple[int, re.Match[str]] | None:
    """(number, match) of the first form that all of `text` is."""
    return next(((form, match) for form, pattern in enumerate(forms) if (match := pattern.fullmatch(text))), None)


class Story(NamedTuple):
    """An intro (the number of its form, and its match), (template, match of the amount) per clause, the sentences after them."""

    form: int
    intro: re.Match[str]
    clauses: tuple[tuple[str, re.Match[str]], ...]
    rest: list[str]


def read_story(
    text: str, intros: Sequence[re.Pattern[str]], clause: re.Pattern[str], amount: re.Pattern[str], templates: Collection[str]
) -> Story | None:
    """The last story in `text`; None if there is none or one of its clauses is not of `templates`.

    Args:
      intros: forms of the first sentence. clause: group 1 is a template, filled in. amount: what fills a template's ``{}``.
    """
    parts = sentences(text)
    starts = ((first, found) for first in reversed(range(len(parts))) if (found := first_match(intros, parts[first])))
    first, found = next(starts, (0, None))
    if found is None:
        return None
    clauses: list[tuple[str, re.Match[str]]] = []
    rest = parts[first + 1 :]
    while rest:
        told = clause.fullmatch(rest[0])
        filling = amount.search(told[1]) if told else None
        if told is None or filling is None:
            break
        template = told[1][: filling.start()] + "{}" + told[1][filling.end() :]
        if template not in templates:
            return None
        clauses.append((template, filling))
        rest = rest[1:]
    return Story(*found, tuple(clauses), rest)
