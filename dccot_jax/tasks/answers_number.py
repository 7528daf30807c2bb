"""Reading and comparing numbers: signs, thousands, decimals, fractions, mixed numbers, currency, units, percent.

A statement must name one number. A list or range ("5 or 7", "5-7") and a quantity in two units ("5 hours 30 minutes") are
`several_answers`; arithmetic that was not worked out, in signs or in words ("3 times 5", "half of 10", "2 dozen"), bounds
("more than 5"), factorials, roots and multiples of pi are no answer.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dccot_jax.tasks.rational import MAX_DIGITS, exact
from dccot_jax.tasks.reading import NO_ANSWER, SEVERAL, Reading, is_negated

TOLERANCE = Fraction(1, 10**6)

_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^{\\])"
    r"(?P<sign>(?:negative|minus)\s+|[-+])?"
    rf"(?P<head>{_UNSIGNED})"
    rf"(?:\s+(?P<top>[0-9]+)/(?P<bottom>[0-9]+)(?![0-9])|\s*/\s*(?P<over>{_UNSIGNED}))?"
    r"(?:\s*(?:×|x|\*|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<power>[-+]?[0-9]{1,3})\s*\}?(?![0-9])|[eE](?P<exponent>[-+]?[0-9]{1,3})(?![A-Za-z0-9]))?"
    r"(?:\s*(?P<percent>%|percent\b|per\s+cent\b)|(?P<k>[kK])(?![A-Za-z])|\s+(?P<scale>hundred|thousand|million|billion|trillion)\b)?",
    re.I,
)
_SCALE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_RANGE_AFTER = re.compile(r"\s*(?:[-–—±]|\\pm\b|(?:[A-Za-z]+\s+)?(?:to|through)\b)\s*[-+]?\s*[0-9(]|\s+[-+]?[0-9]", re.I)
_EXPRESSION_AFTER = re.compile(
    r"\s*(?:[+*/×·÷^_:]|\\[A-Za-z]+|[xX](?=\s*[0-9(]))\s*[-+({]*\s*[0-9({\\]|\s*[π√∞!^]|\s*\\[A-Za-z]|[xyzn]\b|\.[0-9]|,[0-9]"
)
_BOUND_BEFORE = re.compile(r"(?:\bthan|\bleast|\bmost|[<>≤≥]|\\[lg](?:e|eq|t))\s*$", re.I)
_NOT_BEFORE = re.compile(r"\b(?:not|n['’]t)(?:\s+\w+)?\s*$", re.I)
_CLAUSE = re.compile(r"(\bor\b|\band\b|&|;|,(?![0-9]{3}(?![0-9])))", re.I)
_LEAD_IN = re.compile(
    r"\W*(?:(?:is|are|was|be|about|around|approximately|approx|roughly|exactly|only|just|nearly|equals?|either|both|maybe|perhaps|possibly|"
    r"also|then|it|its|it's|to|could|might|total|of|the|therefore|thus|so|i\.e|namely|simply)\b[\s.:]*)*",
    re.I,
)
_TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|boxed|fbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9.]+)\s*\}\s*\{\s*([0-9.]+)\s*\}")
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TEN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_UNITS.split())}
_TENS = {word: 10 * value for value, word in enumerate(_TEN_WORDS.split(), start=2)}
_OPERAND = rf"(?:[-+$(]*\.?[0-9]|(?:{'|'.join((*_UNITS.split(), *_TEN_WORDS.split()))})\b)"
_COMPARED = "less|more|fewer|greater|larger|smaller|bigger|higher|lower|older|younger|longer|shorter|taller|heavier|lighter"
_OPERATION_AFTER = re.compile(
    rf"\s*(?:(?:[A-Za-z]+\s+){{0,3}}?(?:(?:{_COMPARED})(?:\s+[A-Za-z]+){{0,3}}?\s+than|times|plus|minus|added\s+to|subtracted\s+from|taken\s+from|"
    r"(?:increased|decreased|reduced|multiplied|divided)\s+by)"
    rf"|less|over|by|into|raised\s+to|to\s+the\s+power(?:\s+of)?)\s+{_OPERAND}"
    r"|\s*(?:dozens?|squared|cubed|factorial)\b",
    re.I,
)
_PART_AFTER = re.compile(rf"\s*of\s+{_OPERAND}", re.I)  # behind a percentage or a fraction
_OPERATION_BEFORE = re.compile(
    rf"(?:\b(?:twice|thrice|half|thirds?|quarters?|double|triple|quadruple|squared?|cubed?|root|sqrt|factorial)|\b(?:sum|product|difference|quotient|"
    rf"square|cube)\s+of|√)(?:\s*\b(?:of|the|as|many|much|an?|root|between)\b)*[\s({{\[]*{_OPERAND}",
    re.I,
)
_JOINING = (
    "in|of|to|for|at|by|after|before|because|since|with|without|from|on|per|not|than|over|out|within|during|every|each|when|if|as|"
    "is|are|was|were|until|till|about|around|equals?|and|or|but|so|thus|hence|then|where|while|times|plus|minus"
)
_SECOND_UNIT_AFTER = re.compile(
    rf"\s*(?!(?:{_JOINING})\b)[A-Za-z]+\.?"
    rf"(?:\s+{_UNSIGNED}\s*[A-Za-z]|{_UNSIGNED}[A-Za-z])",
    re.I,
)
_WORD_UNITS_AFTER = re.compile(rf"\s+(?!(?:{_JOINING})\b)[A-Za-z]+\s+{_OPERAND}", re.I)
_SUPERSCRIPTS = str.maketrans({digit: f"^{value}" for value, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_VULGAR = {
    "½": "1/2",
    "⅓": "1/3",
    "⅔": "2/3",
    "¼": "1/4",
    "¾": "3/4",
    "⅕": "1/5",
    "⅖": "2/5",
    "⅗": "3/5",
    "⅘": "4/5",
    "⅙": "1/6",
    "⅛": "1/8",
}


def read_number(statement: str) -> Reading:
    """The one number a statement gives, in canonical form: ``72``, ``-1.5``, ``1/3``, ``50%``."""
    text = plain(statement)
    if is_negated(text):
        return NO_ANSWER
    clauses = _clauses(text)
    if not clauses:
        return NO_ANSWER
    first = _lead(clauses[0][1])
    if isinstance(first, Reading) and first.problem:
        return first
    if first is None and "=" not in text and _OPERATION_BEFORE.search(text):
        return NO_ANSWER  # arithmetic in words ("twice 5", "the square root of 25") without a result
    if first is None:
        return _only_number(text, clauses)
    for joint, clause in clauses[1:]:
        if joint == "or" and any(value != first.value for value in _values(clause)):
            return SEVERAL
        other = _lead(clause)
        if other is None or other.value == first.value:
            continue
        if other.value is None and _same_value(clause, first.value):
            continue
        return SEVERAL
    return first


def last_number(text: str) -> Reading:
    """The last number in free text (the flexible fallback)."""
    cleaned = plain(text)
    found = list(_NUMBER.finditer(cleaned))
    if not found:
        return NO_ANSWER
    last = found[-1]
    if _EXPRESSION_AFTER.match(cleaned, last.end()):
        return NO_ANSWER
    value = _canonical(last, cleaned)
    return NO_ANSWER if value is None else Reading(value)


def equal_numbers(left: str, right: str) -> bool:
    """Equality of two canonical numbers: exact, or within 1e-6 (absolute above 1, relative below). A percent never equals a bare number."""
    if left.endswith("%") != right.endswith("%"):
        return False
    a, b = Fraction(left.rstrip("%")), Fraction(right.rstrip("%"))
    return a == b or abs(a - b) <= TOLERANCE * min(Fraction(1), max(abs(a), abs(b)))


def plain(text: str) -> str:
    """Text with typographic and LaTeX spellings of plain numbers undone: minus signs, currency, spaces, fractions, bold, \\text."""
    for char, spelled in _VULGAR.items():
        text = text.replace(char, f" {spelled}")
    text = text.translate(_SUPERSCRIPTS).translate(str.maketrans({"−": "-", "‑": "-", "\u00a0": " ", "°": " degrees", "≈": "=", "，": ","}))
    text = re.sub(r"(?<=[0-9])(?:[\u2009\u202f]|\\,)(?=[0-9]{3}(?![0-9]))", ",", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", " degrees", text)
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\approx", "=")
    text = re.sub(r"\\left|\\right|\\!|\\displaystyle|\*\*|__|`", "", text)
    text = re.sub(r"\\[,;: ()\[\]]|~|\u2009|\u202f", " ", text)
    text = re.sub(r"\\?[$€£]", "", text)
    for _ in range(8):  # deeper nesting is no answer
        if "{" not in text:
            break
        text = _TEXT_COMMAND.sub(r" \1 ", text)
    text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text)  # a mixed number
    return _FRACTION.sub(r"\1/\2", text)


def _value(match: re.Match[str], text: str) -> Fraction | None:
    if match.end() - match.start() > MAX_DIGITS:
        return None
    sign = (match["sign"] or "").strip().lower()
    if sign in ("-", "+") and re.search(r"[0-9)%]\s*$", text[: match.start()]):
        sign = ""  # a binary operator, not a sign
    value = Fraction(match["head"].replace(",", ""))
    if match["top"]:
        if not int(match["bottom"]):
            return None
        value += Fraction(int(match["top"]), int(match["bottom"]))
    elif match["over"]:
        divisor = Fraction(match["over"].replace(",", ""))
        if not divisor:
            return None
        value /= divisor
    value *= Fraction(10) ** int(match["power"] or match["exponent"] or 0)
    value *= _SCALE.get((match["scale"] or "").lower(), 1000 if match["k"] else 1)
    return -value if sign in ("-", "negative", "minus") else value


def _canonical(match: re.Match[str], text: str) -> str | None:
    value = _value(match, text)
    return None if value is None else _write(value) + ("%" if match["percent"] else "")


def _write(value: Fraction) -> str:
    """Integer, terminating decimal or p/q, whichever is exact."""
    rest = value.denominator
    twos = fives = 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1 or max(twos, fives) > 30:
        return str(value)
    digits = max(twos, fives)
    if not digits:
        return str(value.numerator)
    scaled = abs(value.numerator) * 10**digits // value.denominator
    text = str(scaled).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{text[:-digits]}.{text[-digits:]}"


def _lead(clause: str) -> Reading | None:
    """The number a clause starts with; a Reading with a problem if what starts there is a range, an expression or a bound."""
    start = _LEAD_IN.match(clause)
    match = None
    for position in {start.end() if start else 0, _sign_back(clause, start.end() if start else 0)}:
        match = match or _NUMBER.match(clause, position)
    if match is None:
        return None
    return _checked(match, clause)


def _sign_back(clause: str, position: int) -> int:
    """Step back over a sign or dot that the lead-in pattern took for punctuation."""
    while position and clause[position - 1] in "+-.":
        position -= 1
    return position


def _checked(match: re.Match[str], clause: str) -> Reading:
    after = clause[match.end() :]
    if _RANGE_AFTER.match(after):
        return SEVERAL
    if _SECOND_UNIT_AFTER.match(after):
        return SEVERAL
    partial = bool(match["percent"] or match["over"] or match["top"])
    if _OPERATION_AFTER.match(after) or (partial and _PART_AFTER.match(after)):
        return NO_ANSWER
    if _EXPRESSION_AFTER.match(after) or _BOUND_BEFORE.search(clause[: match.start()]):
        return NO_ANSWER
    value = _canonical(match, clause)
    return NO_ANSWER if value is None else Reading(value)


def _clauses(text: str) -> list[tuple[str, str]]:
    """(joining word, clause) pairs: parts of a list, of each its result, and what stands in parentheses behind it."""
    pieces = _CLAUSE.split(text)
    found = []
    for joint, piece in [("", pieces[0]), *zip((word.lower() for word in pieces[1::2]), pieces[2::2])]:
        for part in re.split(r"[()]", _result_side(piece)):
            found.append((joint, part))
            joint = ""
    return [(joint, part) for joint, part in found if part.strip(" .:")]


def _result_side(clause: str) -> str:
    """Of a chain of equations outside parentheses, the side that is a plain number: the last one, else the first."""
    depth, sides = 0, [""]
    for char in clause:
        depth += (char == "(") - (char == ")")
        if char == "=" and depth <= 0:
            sides.append("")
        else:
            sides[-1] += char
    for side in (sides[-1], sides[0]):
        lead = _lead(side)
        if lead is not None and lead.value is not None:
            return side
    return clause


def _values(clause: str) -> list[str | None]:
    return [_canonical(match, clause) for match in _NUMBER.finditer(clause) if not _NOT_BEFORE.search(clause[: match.start()])]


def _only_number(text: str, clauses: list[tuple[str, str]]) -> Reading:
    """For statements that do not start with a number: the number, if there is exactly one value in it."""
    readings: dict[str | None, Reading] = {}
    for _, clause in clauses:
        for match in _NUMBER.finditer(clause):
            if not _NOT_BEFORE.search(clause[: match.start()]):
                reading = _checked(match, clause)
                if "\\" in clause[: match.start()]:
                    reading = NO_ANSWER
                readings.setdefault(reading.value, reading)
    if len(readings) > 1:
        return SEVERAL
    if readings:
        return next(iter(readings.values()))
    return _number_word(text)


def _number_word(text: str) -> Reading:
    match = re.match(r"\W*([a-z]+)(?:[- ]([a-z]+))?", text, re.I)
    if match is None:
        return NO_ANSWER
    head, tail = match.group(1).lower(), (match.group(2) or "").lower()
    if re.search(r"\b(?:or|and)\b", text, re.I):
        return NO_ANSWER
    compound = head in _TENS and 0 < _WORDS.get(tail, 0) < 10
    after = text[match.end(2 if compound else 1) :]
    if _OPERATION_AFTER.match(after) or _WORD_UNITS_AFTER.match(after):
        return NO_ANSWER
    if head in _TENS:
        return Reading(str(_TENS[head] + (_WORDS[tail] if compound else 0)))
    if head in _WORDS and tail not in ("of", "hundred", "thousand", "million", "billion", "half", "third", "quarter"):
        return Reading(str(_WORDS[head]))
    return NO_ANSWER


def _same_value(clause: str, value: str | None) -> bool:
    result = exact(clause.strip(" ."))
    return result is not None and value is not None and not value.endswith("%") and result == Fraction(value)
