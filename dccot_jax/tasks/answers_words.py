"""Reading yes/no answers, choices, dates and strings from the words that state them."""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Sequence

from dccot_jax.records import normalise_question
from dccot_jax.tasks.reading import NO_ANSWER, SEVERAL, Reading, is_negated

LETTERS = "ABCDEFGHIJ"
_POLARITY = re.compile(r"(?<![\w'’-])(yes|no|true|false)(?!\w|['’]\w)", re.I)
_NEGATION_BEFORE = re.compile(r"(?:\bnot|n['’]t)(?:\s+(?:a|the|be|necessarily|entirely|always))?\W*$", re.I)
_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december")
_MONTH = "(" + "|".join(f"{name[:3]}(?:{name[3:]})?" for name in _MONTHS) + r")\.?"
_DATES = (
    (re.compile(r"(?<![\d/])(\d{1,2})/(\d{1,2})/(\d{4})(?![\d/])"), ("month", "day", "year")),
    (re.compile(r"(?<![\d-])(\d{4})-(\d{1,2})-(\d{1,2})(?![\d-])"), ("year", "month", "day")),
    (re.compile(rf"\b{_MONTH}\s+(\d{{1,2}})(?:st|nd|rd|th)?,?\s+(\d{{4}})\b", re.I), ("name", "day", "year")),
    (re.compile(rf"\b(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH},?\s+(\d{{4}})\b", re.I), ("day", "name", "year")),
)


# --- yes / no -----------------------------------------------------------------------------------------------------------


def read_yes_no(statement: str) -> Reading:
    """``yes`` or ``no`` (true and false mean the same); a statement with both ("yes or no") is several answers."""
    if is_negated(statement):
        return NO_ANSWER
    found = list(_POLARITY.finditer(statement))
    if not found:
        return NO_ANSWER
    if any(_NEGATION_BEFORE.search(statement[: match.start()]) for match in found):
        return NO_ANSWER
    values = [_polarity(match) for match in found]
    if re.search(r"\w", statement[: found[0].start()]) is None:  # it starts with the word; a later "no" may be a determiner
        rest = statement[found[0].end() :]
        opposite = re.match(r"(?:\W|\b(?:or|and|maybe|perhaps|possibly|both|also)\b)*(yes|no|true|false)\b(?!\s+\w)", rest, re.I)
        return SEVERAL if opposite and _polarity(opposite) != values[0] else Reading(values[0])
    return Reading(values[0]) if len(set(values)) == 1 else SEVERAL


def last_yes_no(text: str) -> Reading:
    """The last whole word yes, no, true or false; none if it is negated."""
    found = list(_POLARITY.finditer(text))
    if not found or _NEGATION_BEFORE.search(text[: found[-1].start()]):
        return NO_ANSWER
    return Reading(_polarity(found[-1]))


def _polarity(match: re.Match[str]) -> str:
    return "yes" if match.group(1).lower() in ("yes", "true") else "no"


# --- choice -------------------------------------------------------------------------------------------------------------


def read_choice(statement: str, choices: Sequence[str]) -> Reading:
    """The letter of the one option a statement names, by letter within the option range or by option text.

    A letter followed by the text of another option contradicts itself and is several answers.
    """
    text = _unwrap(statement)
    if is_negated(text) and not _named_options(text, choices):
        return NO_ANSWER
    whole = [letter for letter, option in zip(LETTERS, choices) if normalise_question(option) == normalise_question(text) != ""]
    if len(whole) == 1 and not (len(normalise_question(text)) == 1 and _letters(text, len(choices))):
        return Reading(whole[0])
    if is_negated(text):
        return NO_ANSWER
    letters = _letters(text, len(choices))
    if letters:
        return _read_letters(text, letters, choices)
    named = _named_options(text, choices)
    if len(named) == 1:
        return Reading(named[0])
    return SEVERAL if len(named) > 1 else NO_ANSWER


def last_choice(text: str, choices: Sequence[str]) -> Reading:
    """Fallback: the last letter in parentheses, else the last lone capital letter, else the one option text in the last line."""
    body = _unwrap(text)
    span = LETTERS[: len(choices) or len(LETTERS)]
    found = re.findall(rf"\(\s*([{span}{span.lower()}])\s*\)", body) or [
        match.group(1) for match in re.finditer(rf"(?<![\w'’-])([{span}])(?![\w'’-])", body) if not _is_article(match, body)
    ]
    if found:
        return Reading(found[-1].upper())
    lines = [line for line in body.splitlines() if line.strip()]
    named = _named_options(lines[-1], choices) if lines else []
    return Reading(named[0]) if len(named) == 1 else NO_ANSWER


def _letters(text: str, n_choices: int) -> list[re.Match[str]]:
    """Letters that name an option: (b), B, "option b"; a lower-case letter counts only marked or alone; "A dog" is an article."""
    span = LETTERS[: n_choices or len(LETTERS)]
    both = span + span.lower()
    pattern = re.compile(
        rf"\(\s*(?P<p>[{both}])\s*\)|\b(?:option|choice|letter|answer)\s+(?P<o>[{both}])(?![\w'’-])|^\W*(?P<l>[{both}])(?:\s*[):.,]|\W*$)"
        rf"|(?<![\w'’-])(?P<c>[{span}])(?![\w'’-])",
    )
    return [match for match in pattern.finditer(text) if not (match.lastgroup == "c" and match.start("c") and _is_article(match, text))]


def _read_letters(text: str, letters: list[re.Match[str]], choices: Sequence[str]) -> Reading:
    values = [str(match[match.lastgroup or 0]).upper() for match in letters]
    first, start = values[0], letters[0]
    leads = re.fullmatch(
        r"\W*(?:(?:option|choice|letter|either|both|most|likely|definitely|clearly|probably|is|the)\b\W*)*", text[: start.start()], re.I
    )
    if leads is None and len(set(values)) > 1:
        return SEVERAL
    for (before, value), match in zip(list(zip(letters, values)), letters[1:]):
        between = text[before.end() : match.start()]
        other = str(match[match.lastgroup or 0]).upper()
        joined = re.fullmatch(r"(?:\W|\b(?:or|and|both|maybe|perhaps|possibly|option|choice|also)\b)*", between, re.I)
        if other != value and (joined or re.search(r"\bor\b", between, re.I)):
            return SEVERAL
    rest = text[start.end() :]
    rest_key = normalise_question(rest)
    same = [letter for letter, option in zip(LETTERS, choices) if rest_key and normalise_question(option) == rest_key]
    if same and first not in same:
        return SEVERAL
    return Reading(first)


def _named_options(text: str, choices: Sequence[str]) -> list[str]:
    """Letters of the options whose text occurs as whole words, leaving out options that are only part of a longer one that occurs."""
    body = f" {normalise_question(text)} "
    keys = [normalise_question(option) for option in choices]
    hits = [(letter, key) for letter, key in zip(LETTERS, keys) if key and f" {key} " in body]
    kept = []
    for letter, key in hits:
        without_longer = body
        for _, longer in hits:
            if longer != key and f" {key} " in f" {longer} ":
                without_longer = without_longer.replace(f" {longer} ", "  ")
        if f" {key} " in without_longer:
            kept.append(letter)
    return kept


def _is_article(match: re.Match[str], text: str) -> bool:
    return match.group() == "A" and re.match(r"\s+[a-z]{2,}", text[match.end() :]) is not None


def _unwrap(text: str) -> str:
    """Drop bold marks, dollars and \\text{...} wrappers around a letter or option."""
    text = re.sub(r"\*\*|__|`|\$|\\[()\[\]]", "", text)
    return re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|boxed|fbox)\s*\{([^{}]*)\}", r"\1", text)


# --- dates --------------------------------------------------------------------------------------------------------------


def read_date(statement: str) -> Reading:
    """The one calendar date in a statement, as YYYY-MM-DD; month comes first in slashed dates."""
    if is_negated(statement):
        return NO_ANSWER
    values = {value for _, value in _dates(statement)}
    return Reading(values.pop()) if len(values) == 1 else SEVERAL if values else NO_ANSWER


def last_date(text: str) -> Reading:
    """The last valid date in the text."""
    found = sorted(_dates(text))
    return Reading(found[-1][1]) if found else NO_ANSWER


def _dates(text: str) -> list[tuple[int, str]]:
    found = []
    for pattern, names in _DATES:
        for match in pattern.finditer(text):
            part = dict(zip(names, match.groups()))
            month = int(part["month"]) if "month" in part else [name[:3] for name in _MONTHS].index(part["name"][:3].lower()) + 1
            try:
                found.append((match.start(), datetime.date(int(part["year"]), month, int(part["day"])).isoformat()))
            except ValueError:  # 13/45/2020 is not a date
                continue
    return found


# --- strings ------------------------------------------------------------------------------------------------------------


def read_string(statement: str) -> Reading:
    """The statement itself: NFKC, case-folded, outer quotes and punctuation off, single spaces."""
    text = unicodedata.normalize("NFKC", _unwrap(statement)).casefold()
    text = " ".join(text.split()).strip(" .,;:!?\"'“”‘’")
    return Reading(text) if text else NO_ANSWER


def last_string(text: str) -> Reading:
    """Fallback: the last quoted text of the last line, else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return NO_ANSWER
    quoted = re.findall(r"[\"“]([^\"“”]+)[\"”]", lines[-1])
    return read_string(quoted[-1] if quoted else lines[-1])
