"""Exact value of arithmetic written in plain or LaTeX notation, as a Fraction; None for anything else.

Floats never enter, so 1/2^99 and 1/2^98 differ. Powers are bounded in bits before they are computed.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_BITS = 100_000
MAX_DIGITS = 1_000  # of one number; a longer one is no number (Python refuses to convert 4300)
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\\[dt]?frac|\\cdot|\\times|\\div|[-+*/^(){}]))")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])")


def exact(text: str) -> Fraction | None:
    """Value of an expression over + - * / ^, fractions and parentheses; None if it is not one, divides by 0 or is too large."""
    cleaned = text.translate(str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/"}))
    cleaned = re.sub(r"\\left|\\right|\\[!,;: ]|~", "", cleaned)
    cleaned = _THOUSANDS.sub(lambda match: match.group().replace("{,}", "").replace(",", ""), cleaned)
    tokens = _tokens(cleaned)
    if not tokens:
        return None
    try:
        value, rest = _sum(tokens, 0, 0)
    except (_NotArithmetic, ZeroDivisionError):
        return None
    return value if rest == len(tokens) else None


class _NotArithmetic(Exception):
    """The text is not plain arithmetic, or too large to evaluate."""


def _tokens(text: str) -> list[str] | None:
    tokens, position = [], 0
    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match or len(tokens) > 500:
            return None
        if match.end() - match.start() > MAX_DIGITS:
            return None
        tokens.append(match.group(1) or match.group(2))
        position = match.end()
    return tokens


def _peek(tokens: list[str], at: int) -> str:
    return tokens[at] if at < len(tokens) else ""


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if depth > 50:
        raise _NotArithmetic
    value, at = _product(tokens, at, depth)
    while _peek(tokens, at) in ("+", "-"):
        sign = 1 if tokens[at] == "+" else -1
        term, at = _product(tokens, at + 1, depth)
        value = _bounded(value + sign * term)
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _signed(tokens, at, depth)
    while True:
        token = _peek(tokens, at)
        if token in ("*", "\\cdot", "\\times"):
            factor, at = _signed(tokens, at + 1, depth)
            value = _bounded(value * factor)
        elif token in ("/", "\\div"):
            factor, at = _signed(tokens, at + 1, depth)
            value = _bounded(value / factor)
        elif token == "(":  # 2(3), an implied product
            factor, at = _power(tokens, at, depth)
            value = _bounded(value * factor)
        else:
            return value, at


def _signed(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if _peek(tokens, at) in ("+", "-"):
        value, end = _signed(tokens, at + 1, depth + 1)
        return (value if tokens[at] == "+" else -value), end
    if depth > 50:
        raise _NotArithmetic
    return _power(tokens, at, depth)


def _power(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    base, at = _atom(tokens, at, depth)
    if _peek(tokens, at) != "^":
        return base, at
    if _peek(tokens, at + 1) == "-":
        exponent, at = _power(tokens, at + 2, depth + 1)
        exponent = -exponent
    else:
        exponent, at = _power(tokens, at + 1, depth + 1)
    if exponent.denominator != 1:
        raise _NotArithmetic
    power = exponent.numerator
    if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
        raise _NotArithmetic
    return base**power, at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if depth > 50:
        raise _NotArithmetic
    token = _peek(tokens, at)
    if token in ("(", "{"):
        value, at = _sum(tokens, at + 1, depth + 1)
        if _peek(tokens, at) != (")" if token == "(" else "}"):
            raise _NotArithmetic
        return value, at + 1
    if token.endswith("frac"):
        top, at = _group(tokens, at + 1, depth)
        bottom, at = _group(tokens, at, depth)
        return _bounded(top / bottom), at
    if token and (token[0].isdigit() or token[0] == "."):
        whole = Fraction(token)
        if _peek(tokens, at + 1).endswith("frac") and whole.denominator == 1:  # 2\frac{1}{3}, a mixed number
            part, end = _atom(tokens, at + 1, depth + 1)
            return whole + part, end
        return whole, at + 1
    raise _NotArithmetic


def _group(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    """Argument of \\frac: a braced group, or the single digits of \\frac12."""
    token = _peek(tokens, at)
    if token == "{":
        return _atom(tokens, at, depth + 1)
    if token.isdigit() and len(token) == 2 and at and _peek(tokens, at - 1).endswith("frac"):
        tokens[at : at + 1] = [token[0], token[1]]
        return Fraction(int(token[0])), at + 1
    if token.isdigit() and len(token) == 1:
        return Fraction(int(token)), at + 1
    raise _NotArithmetic


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotArithmetic
    return value
