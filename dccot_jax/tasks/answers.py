"""Judging answers: the one place that reads an answer from a model's text and compares it with the gold answer.

Two readings of every text. *strict*: the last terminated ``\\boxed{}``, else what the last "the answer is" states. *flexible*:
the same, and if there is neither, the answer type's own fallback (last number, last yes/no, last letter, ...). A statement of several
different answers is no answer in either reading, and so is an unterminated final box or a thinking channel that never closes.
A fallback never overrules a stated answer: where a statement cannot be read as one answer, there is none.

Reading takes bounded time for every answer type. Of what follows the thinking the last `reading.MAX_TEXT` characters are looked at,
fallbacks look at the last `reading.MAX_FALLBACK`; a box or statement of more than `reading.MAX_STATEMENT` characters and a number of
more than `rational.MAX_DIGITS` digits are no answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dccot_jax.records import ANSWER_TYPES
from dccot_jax.tasks import answers_number, answers_words, latex
from dccot_jax.tasks.reading import (
    MAX_FALLBACK,
    MAX_STATEMENT,
    MAX_TEXT,
    NO_ANSWER,
    Reading,
    answer_statement,
    last_box,
    visible,
)

NO_VERDICT = ("timeout", "bad_gold")  # reasons of a `Judgement` that say nothing about the text


@dataclasses.dataclass(frozen=True)
class Extraction:
    """Canonical answers of both readings (None: none) and why the flexible one is missing.

    reason: ``ok``, ``no_answer``, ``several_answers``, ``unterminated_box`` or ``thinking_unclosed``.
    """

    strict: str | None
    flexible: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Verdicts and canonical answers of both readings.

    reason belongs to the flexible reading: ``correct``, ``wrong``, ``timeout``, ``bad_gold`` (the gold answer cannot be read), or a
    reason of `Extraction` for a missing answer. Those of `NO_VERDICT` are no verdict on the text, though both readings are False then.
    """

    strict: bool
    flexible: bool
    answer_strict: str | None
    answer_flexible: str | None
    reason: str


def judge(text: str, gold: str | None, answer_type: str, choices: Sequence[str] = (), *, time_limit: float = 5.0) -> Judgement:
    """Judge `text` against `gold`.

    Args:
      text: everything the model wrote after the prompt. gold: canonical gold answer; for ``choice`` a letter or an option's text.
      answer_type: one of `records.ANSWER_TYPES`. choices: option texts in order, needed for answers by text.
      time_limit: seconds of work for symbolic comparison (``latex`` only; start-up and queueing do not count). Safe in any thread.

    Raises:
      ValueError: unknown answer type.
    """
    extraction = extract(text, answer_type, choices)
    reference = canonical(gold, answer_type, choices)
    if reference is None:
        return Judgement(False, False, extraction.strict, extraction.flexible, "bad_gold")
    if extraction.flexible is None:
        return Judgement(False, False, None, None, extraction.reason)
    verdict = _compare(extraction.flexible, reference, answer_type, time_limit)
    strict = extraction.strict is not None and verdict == "correct"
    return Judgement(strict, verdict == "correct", extraction.strict, extraction.flexible, verdict)


def extract(text: str, answer_type: str, choices: Sequence[str] = ()) -> Extraction:
    """The answers `text` gives, in canonical form. Raises ValueError on an unknown answer type.

    Where a strict answer exists the flexible one is the same: a fallback never overrules a stated answer.
    """
    _check_type(answer_type)
    body = visible(text)
    if body is None:
        return Extraction(None, None, "thinking_unclosed")
    body = body[-MAX_TEXT:]
    state, content = last_box(body)
    if state == "unterminated":
        return Extraction(None, None, "unterminated_box")
    statement = content if state == "box" else answer_statement(body)
    if state == "box" or statement:  # "the answer is" with nothing behind it states none
        assert statement is not None
        reading = _read(statement, answer_type, choices, boxed=state == "box")
        return Extraction(reading.value, reading.value, "ok" if reading.value is not None else reading.problem)
    fallback = _fallback(body[-MAX_FALLBACK:], answer_type, choices)
    return Extraction(None, fallback.value, "ok" if fallback.value is not None else fallback.problem)


def equal(prediction: str, gold: str, answer_type: str, choices: Sequence[str] = (), *, time_limit: float = 5.0) -> bool:
    """Whether two bare answers (no surrounding text) mean the same. What cannot be read, or timed out, is not equal to anything."""
    left, right = canonical(prediction, answer_type, choices), canonical(gold, answer_type, choices)
    return left is not None and right is not None and _compare(left, right, answer_type, time_limit) == "correct"


def canonical(answer: str | None, answer_type: str, choices: Sequence[str] = ()) -> str | None:
    """Canonical form of a bare answer, or None if it cannot be read as one. Raises ValueError on an unknown answer type."""
    _check_type(answer_type)
    if answer is None or not answer.strip() or len(answer) > MAX_TEXT:
        return None
    state, content = last_box(answer)
    if state == "unterminated":
        return None
    return _read(content if content is not None else answer, answer_type, choices, boxed=True).value


def _check_type(answer_type: str) -> None:
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r} is not one of {', '.join(ANSWER_TYPES)}")


def _read(statement: str, answer_type: str, choices: Sequence[str], *, boxed: bool) -> Reading:
    if not statement.strip() or len(statement) > MAX_STATEMENT:
        return NO_ANSWER
    if answer_type == "number":
        return answers_number.read_number(statement)
    if answer_type == "yes_no":
        return answers_words.read_yes_no(statement)
    if answer_type == "choice":
        return answers_words.read_choice(statement, choices)
    if answer_type == "date":
        return answers_words.read_date(statement)
    if answer_type == "latex":
        return latex.read_latex(statement, boxed=boxed)
    return answers_words.read_string(statement)


def _fallback(body: str, answer_type: str, choices: Sequence[str]) -> Reading:
    if answer_type == "number":
        return answers_number.last_number(body)
    if answer_type == "yes_no":
        return answers_words.last_yes_no(body)
    if answer_type == "choice":
        return answers_words.last_choice(body, choices)
    if answer_type == "date":
        return answers_words.last_date(body)
    if answer_type == "latex":
        return latex.last_latex(body)
    return answers_words.last_string(body)


def _compare(left: str, right: str, answer_type: str, time_limit: float) -> str:
    """``correct``, ``wrong`` or ``timeout`` for two canonical answers."""
    if left == right:
        return "correct"
    if answer_type == "number":
        return "correct" if answers_number.equal_numbers(left, right) else "wrong"
    if answer_type == "latex":
        return latex.compare(left, right, time_limit)
    return "wrong"
