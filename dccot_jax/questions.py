"""What makes two texts ask the same: words without case and punctuation, mathematics with its signs.

`records.normalise_question` joins files to tasks and keeps words only, so "3 + 4" and "3 - 4" are one to it. Here the signs stay
where they mean something: brackets, decimal points, and operators beside a number, a bracket, a single letter or a LaTeX
command. Hyphens of words, dashes and bullets of prose do not count, like other punctuation.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

from dccot_jax.records import fold_text, letters

_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2012\u2013\u2212", "-")
    | dict.fromkeys("\u00b7\u00d7\u2217\u2219\u22c5", "*")
    | dict.fromkeys("\u00f7\u2044\u2215", "/")
)
# NFKC makes 102 of ten squared and 11/2 of one and a half
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u207b]+")
_VULGAR = re.compile("(?=[\u00bc-\u00be\u2150-\u215e])")
_DELIMITERS = re.compile(r"\\[()\[\]]")  # of LaTeX formulas: layout, not brackets
_DASH = re.compile(r"(?<!\S)-{2,}|-{2,}(?!\S)")  # 3--4 is no dash
_BRACKETS = frozenset("()[]{}")
_OPERATORS = frozenset("-+*/^=<>|%")
_NEAR = re.compile("[\\s$\\\\_\"'`\u2018-\u201d]*")  # what may stand between an operator and its operand
_TIGHT = re.compile(r"[$\\]*")
_BRACKET, _NUMBER, _LETTER, _WORD, _NOTHING = range(5)  # neighbours of an operator; the first three are operands


def question_words(text: str) -> tuple[str, ...]:
    """Words, numbers, brackets and operators of a text, in order: the same for texts that ask the same.

    Case, white space, Unicode form (full-width digits, the signs for minus, times and divided by) and punctuation do not count.
    Braces of LaTeX count as parentheses where they hold an operation together: ``x^{a+b}`` is ``x^(a+b)``, ``x^{10}`` is ``x^10``.
    """
    folded = fold_text(_VULGAR.sub(" ", _RAISED.sub(lambda raised: f"^{raised[0]}", text))).translate(_SIGNS)
    folded = _DELIMITERS.sub(" ", _DASH.sub(", ", folded))
    further = "".join(sorted(c for c in set(folded) if not c.isascii() and unicodedata.category(c) == "Sm"))
    operators = _OPERATORS.union(further)
    pieces = _pattern(letters(folded), further).split(folded)
    gaps, found = pieces[0::2], pieces[1::2]
    dropped: set[int] = set()
    end = 0
    for start in [i for i, piece in enumerate(found) if piece in operators]:
        if start < end:
            continue
        end = start + 1
        while end < len(found) and found[end] in operators and _NEAR.fullmatch(gaps[end]):
            end += 1
        left, right = _kind(found, gaps, start - 1, gaps[start]), _kind(found, gaps, end, gaps[end])
        tight = [_TIGHT.fullmatch(gap) is not None for gap in (gaps[start], gaps[end])]
        dropped |= {i for i in range(start, end) if not _means(found[i], left, right, *tight)}
    kept = [piece for i, piece in enumerate(found) if i not in dropped]
    if "{" in kept or "}" in kept:
        kept = _grouped(kept, operators)
    # commands without their backslash, and a nought before a decimal point
    return tuple(piece[1:] if piece[0] == "\\" else f"0{piece}" if piece[0] == "." else piece for piece in kept)


def question_key(question: str, choices: Sequence[str] = ()) -> str:
    """Equal keys: the same question with the same options."""
    return "\n".join(" ".join(question_words(part)) for part in (question, *choices))


@functools.lru_cache(maxsize=256)
def _pattern(letter: str, operators: str) -> re.Pattern[str]:
    """Splits a text into gaps and, between them, words (with a backslash before them: commands), operators and brackets."""
    word = rf"[^\W_]{letter}*(?:(?<=\d)\.(?=\d){letter}+)*"
    return re.compile(rf"({word}|[-+*/^=<>|%()\[\]{{}}{operators}]|\\{word}|(?<![\w.])\.(?=\d){word})")


def _kind(found: Sequence[str], gaps: Sequence[str], i: int, between: str) -> int:
    """What stands at place `i`, beside an operator with `between` in the middle."""
    if not 0 <= i < len(found) or not _NEAR.fullmatch(between):
        return _NOTHING
    piece = found[i]
    if piece in _BRACKETS:
        return _BRACKET
    if piece.startswith("\\") or any(c.isdigit() for c in piece):
        return _NUMBER
    # the s of "Ann's" is no variable
    return _LETTER if len(piece) == 1 and gaps[i] not in ("'", "\u2019") else _WORD


def _means(sign: str, left: int, right: int, tight_left: bool, tight_right: bool) -> bool:
    """Whether an operator between these neighbours is mathematics, not prose or layout."""
    if sign == "*":  # emphasis and bullets of Markdown have no operand on one side
        return left <= _LETTER and right <= _LETTER
    if sign == "-":
        if tight_left and tight_right and max(left, right) == _WORD and min(left, right) != _BRACKET:
            return False  # a hyphen: 12-year-old, x-axis
        if (left <= _LETTER and right <= _LETTER) or min(left, right) <= _NUMBER:
            return True
        return tight_right and right == _LETTER  # "-x" is a sign, "Ann - a girl" a dash
    return min(left, right) <= _LETTER


def _grouped(pieces: Sequence[str], operators: frozenset[str]) -> list[str]:
    """The pieces, with parentheses for those braces that hold an operation and none for the others."""
    out: list[str] = []
    open_: list[int] = []
    for piece in pieces:
        if piece == "{":
            open_.append(len(out))
            out.append("(")
        elif piece != "}":
            out.append(piece)
        elif open_:
            start = open_.pop()
            if not operators.isdisjoint(out[start + 2 :]):  # a sign in front needs no brackets
                out.append(")")
            else:
                del out[start]
    for start in reversed(open_):
        del out[start]
    return out
