"""From a model's text to the words that state its answer, before any answer type is considered.

Order of preference: the last ``\\boxed{}``, then the last "the answer is". Nothing inside the thinking is ever read.

Every function takes time linear in its text. What reads an answer type afterwards gets at most `MAX_STATEMENT` characters.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Reading:
    """An answer in canonical form, or None and why there is none (``no_answer`` or ``several_answers``)."""

    value: str | None
    problem: str = ""


MAX_TEXT = 20_000  # characters after the thinking; of longer texts the tail is read
MAX_STATEMENT = 2_000  # characters of a box or statement; a longer one is no answer
MAX_FALLBACK = 4_000  # characters at the end of the text in which a fallback looks

NO_ANSWER = Reading(None, "no_answer")
SEVERAL = Reading(None, "several_answers")

_THINK_TAG = re.compile(r"<\s{0,4}(/?)\s{0,4}(?:think|thinking|reasoning)\s{0,4}>", re.I)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_ANSWER_IS = re.compile(
    r"\banswers?\b(?:\s+(?:to|for|of)\b[^.\n]{0,80}?)?(?:['’]s|\s+(?:is|are|was|would\s+be|will\s+be)\b)(?!\s*n['’]t)"
    r"|^\W{0,4}(?:final\s+)?answer\W{0,3}:",
    re.I | re.M,
)
_SENTENCE_END = re.compile(r"(?:[.?]|(?<![0-9])!)(?=[\s*\"'”’)\]]|$)")
_JOINED_BOXES = re.compile(r"[\s$.,;&(){}]*(?:(?:and|or|\\text\{\s*(?:and|or)\s*\})[\s$.,;&(){}]*)?\Z", re.I)


def visible(text: str) -> str | None:
    """The part of `text` after the reasoning channel; None if a ``<think>`` is never closed."""
    tags = list(_THINK_TAG.finditer(text))
    if not tags:
        return text
    if not tags[-1].group(1):
        return None
    return text[tags[-1].end() :]


def last_box(text: str) -> tuple[str, str | None]:
    """State and content of the final box: ``("none", None)``, ``("unterminated", None)`` or ``("box", content)``.

    Boxes that stand side by side ("\\boxed{5} or \\boxed{7}") are one statement of several answers: contents joined by " or ".
    """
    starts = [match.span() for match in _BOX.finditer(text)]
    if not starts:
        return "none", None
    content = _braced(text, starts[-1][1], len(text))[1]
    if content is None:
        return "unterminated", None
    contents = [content]
    for (_, opening), (after, _) in zip(starts[-2::-1], starts[:0:-1]):
        end, content = _braced(text, opening, after)  # looks no further than the next box, so that all looks together are one scan
        if content is None or not _JOINED_BOXES.match(text[end:after]) or "\n\n" in text[end:after]:
            break
        contents.append(content)
    distinct = list(dict.fromkeys(part.strip() for part in reversed(contents)))
    return "box", " or ".join(distinct)


def answer_statement(text: str) -> str | None:
    """What follows the last "the answer is" (or a line's "Answer:"), up to the end of its sentence; None if it is not there.

    If the line ends right after the words, the next non-empty line is the statement.
    """
    found = list(_ANSWER_IS.finditer(text))
    if not found:
        return None
    tail = re.sub(r"</?[A-Za-z]{1,20}>", " ", text[found[-1].end() :]).lstrip(" \t\r\n:*_.…")
    line = tail.split("\n", 1)[0]
    if line.strip() in ("\\[", "$$", "\\("):
        line = tail.split("\n", 2)[1] if tail.count("\n") else ""
    line = line[: 2 * MAX_STATEMENT]
    end = _first_sentence_end(line)
    return line[:end].strip()


def is_negated(statement: str) -> bool:
    """True for statements that deny an answer ("not 5", "neither A nor B") instead of giving one."""
    return bool(re.match(r"\W*(?:not|neither|never)\b", statement, re.I))


def _first_sentence_end(line: str) -> int:
    depth = 0
    position = 0
    for match in _SENTENCE_END.finditer(line):
        depth += line.count("{", position, match.start()) - line.count("}", position, match.start())
        position = match.start()
        before = line[: match.start()].rstrip()
        if depth <= 0 and before and not before.endswith("\\right") and not before.endswith("\\left"):
            return match.start()
    return len(line)


def _braced(text: str, start: int, limit: int) -> tuple[int, str | None]:
    """End position and content of the brace group that opens at `start`; content None if there is none or it is open at `limit`."""
    if not text.startswith("{", start):
        return start, None
    depth, position = 0, start
    while position < limit:
        char = text[position]
        if char == "\\":
            position += 2
            continue
        depth += (char == "{") - (char == "}")
        position += 1
        if depth == 0:
            return position, text[start + 1 : position - 1]
    return limit, None
