r"""Comparing answers in LaTeX: structure here, exactly; single expressions by math-verify in a killable child process.

math-verify alone accepts wrong answers: it takes a list for one of its members, both sides of an unparsed equation for 0, ``50\%`` for 50,
``555_{10}`` for ``555_7``, and tiny numbers for each other. So number of answers, brackets, relations, percent signs and number bases
are compared here, plain arithmetic as exact fractions, and only what is left goes to the child.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction

from dccot_jax.tasks import answers_number
from dccot_jax.tasks.rational import exact
from dccot_jax.tasks.reading import NO_ANSWER, Reading

_MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.S)
_RELATIONS = re.compile(r"\\(?:leq?|geq?|lt|gt|neq|ne|in|equiv|approx|sim)(?![A-Za-z])|<=|>=|[=<>≤≥≠∈]")
_RELATION_NAMES = {"\\leq": "<=", "\\le": "<=", "≤": "<=", "\\geq": ">=", "\\ge": ">=", "≥": ">=", "\\lt": "<", "\\gt": ">", "\\neq": "!=",
                   "\\ne": "!=", "≠": "!=", "∈": "\\in"}  # fmt: skip
_MIRROR = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_ASSIGNED = re.compile(r"(?:\\?[A-Za-z]+|[A-Za-z])(?:_\{?\w+\}?)?(?:\(\\?[A-Za-z]+\))?")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?([0-9]+|\\?(?:text)?\{?[a-z]+\}?)\}?")
_UNIT = re.compile(
    r"(.*[0-9)}\]])\s*\\(?:text|mbox|mathrm)\{\s*([A-Za-z][^{}]*)\}(\s*\^\s*\{?[0-9]\}?)?"
    r"|(.*[0-9)}\]])\s+([A-Za-z]{2,}(?:[ /][A-Za-z]+)*\.?)",
    re.S,
)
_NOT_UNITS = (
    "pi",
    "sqrt",
    "sin",
    "cos",
    "tan",
    "log",
    "ln",
    "exp",
    "or",
    "and",
    "inf",
    "infty",
    "theta",
    "mod",
    "times",
    "div",
    "pm",
    "percent",
)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.S)
_OPEN, _CLOSE = ("(", "[", "\\{", "{"), (")", "]", "\\}", "}")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.S)


@dataclasses.dataclass
class Budget:
    """Seconds of child-process work that one comparison may still use."""

    seconds: float


class TimedOut(Exception):
    """A symbolic comparison used up its time."""


def read_latex(statement: str, *, boxed: bool) -> Reading:
    """The answer in a box or a statement, normalised. Prose around a single formula or number is dropped; several formulas are a list."""
    if not boxed:
        formulas = [next(part for part in match.groups() if part is not None) for match in _MATH.finditer(statement)]
        if formulas:
            statement = " or ".join(formulas)
        elif re.search(r"[A-Za-z]{3,}\s+[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", statement)):
            number = answers_number.read_number(statement)
            if number.value is not None:
                return number
    text = normalise(statement)
    return Reading(text) if text else NO_ANSWER


def last_latex(text: str) -> Reading:
    """Fallback: the last formula (its last side, if it is a chain of equations), else the last number."""
    formulas = list(_MATH.finditer(text))
    if not formulas:
        return answers_number.last_number(text)
    formula = next(part for part in formulas[-1].groups() if part is not None)
    value = normalise(formula.rsplit("=", 1)[-1])
    return Reading(value) if value else NO_ANSWER


def normalise(text: str) -> str:
    """One spelling for what looks the same: spacing, delimiters, \\dfrac, degrees, currency, a final period."""
    text = text.translate(
        str.maketrans({"−": "-", "–": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "°": "", "∪": "\\cup "})
    )
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|limits)(?![A-Za-z])\.?", "", text)
    text = text.replace("\\$", "").replace("$", "").replace("\\!", "").replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"(?<!\\)\\[,;: ]|\\quad|\\qquad|~|\\\(|\\\)|\\\[|\\\](?![A-Za-z])", " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|\bdegrees?\b", "", text)
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\{\s*([A-Za-z0-9]|and|or)\s*\}", r" \1 ", text)
    text = re.sub(r"\\text(?:bf|it|rm)\{", r"\\text{", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".;,").strip()
    whole = re.fullmatch(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", text)
    return (whole.group(1) if whole else text).strip()


def compare(left: str, right: str, time_limit: float) -> str:
    """``correct``, ``wrong`` or ``timeout`` for two normalised answers; both directions give the same."""
    if left == right:
        return "correct"
    budget = Budget(time_limit)
    try:
        return "correct" if _equal(left, right, budget, 0) else "wrong"
    except TimedOut:
        return "timeout"


def _equal(left: str, right: str, budget: Budget, depth: int) -> bool:
    left, right = _strip_outer(left), _strip_outer(right)
    if _squash(left) == _squash(right):
        return True
    if not left or not right or depth > 20:
        return False
    left_parts, right_parts = _alternatives(left), _alternatives(right)
    if len(left_parts) > 1 or len(right_parts) > 1:
        return _match_unordered(left_parts, right_parts, budget, depth)
    left_sides, right_sides = _sides(left), _sides(right)
    if len(left_sides) > 1 or len(right_sides) > 1:
        return _equal_relations(left_sides, right_sides, budget, depth)
    for whole in (_bracketed, _matrix):
        a, b = whole(left), whole(right)
        if a is not None or b is not None:
            if a is None or b is None or a[0] != b[0] or len(a[1]) != len(b[1]):
                return False
            if a[0] == "\\{\\}":
                return _match_unordered(a[1], b[1], budget, depth)
            return all(_equal(x, y, budget, depth + 1) for x, y in zip(a[1], b[1]))
    left_union, right_union = _split(left, ("\\cup",)), _split(right, ("\\cup",))
    if len(left_union) > 1 or len(right_union) > 1:
        return _match_unordered(left_union, right_union, budget, depth)
    return _equal_single(left, right, budget)


def _equal_single(left: str, right: str, budget: Budget) -> bool:
    """Two answers that are neither lists nor relations."""
    left, left_percent = _percent(left)
    right, right_percent = _percent(right)
    if left_percent != right_percent:
        return False
    left, left_unit = _unit(left)
    right, right_unit = _unit(right)
    if left_unit and right_unit and left_unit != right_unit:
        return False
    left_base, right_base = _BASED.fullmatch(left), _BASED.fullmatch(right)
    if left_base and right_base and left[0].isdigit() and right[0].isdigit():
        a, b = _in_base(left_base), _in_base(right_base)
        return a is not None and a == b
    if (left_base and left[0].isdigit()) or (right_base and right[0].isdigit()):
        return False
    if _squash(left) == _squash(right):
        return True
    a, b = exact(left), exact(right)
    if a is not None and b is not None:
        if "." in left or "." in right:
            return abs(a - b) <= answers_number.TOLERANCE * min(Fraction(1), max(abs(a), abs(b)))
        return a == b
    words = re.compile(r"[A-Za-z]{2,}(?:[\s'-]+[A-Za-z]+)*")
    if words.fullmatch(left) or words.fullmatch(right):
        return left.casefold() == right.casefold()
    if "\\pm" in left or "\\pm" in right:
        if left.count("\\pm") != 1 or right.count("\\pm") != 1:
            return False
        return all(_symbolic(left.replace("\\pm", sign), right.replace("\\pm", sign), budget) for sign in "+-")
    return _symbolic(left, right, budget)


def _symbolic(left: str, right: str, budget: Budget, *, proportional: bool = False) -> bool:
    from dccot_jax.tasks.latex_worker import ask  # starts a process on first use only

    answer, used = ask({"left": left, "right": right, "proportional": proportional}, budget.seconds)
    budget.seconds -= used
    if answer is None or budget.seconds <= 0:
        raise TimedOut
    return answer


def _equal_relations(left: Sequence[str], right: Sequence[str], budget: Budget, depth: int) -> bool:
    """Relations given as [side, sign, side, ...]. "x = 5" equals a bare 5; two equations may differ by a constant factor."""
    if len(left) == 1 or len(right) == 1:
        relation, value = (right, left[0]) if len(left) == 1 else (left, right[0])
        if len(relation) == 3 and relation[1] in ("=", "\\in") and _ASSIGNED.fullmatch(relation[0].strip()):
            return _equal(relation[2], value, budget, depth + 1)
        return False
    if len(left) != len(right):
        return False
    orders = [list(right)]
    if all(sign in _MIRROR for sign in right[1::2]):
        orders.append([_MIRROR[part] if index % 2 else part for index, part in enumerate(reversed(right))])
    for order in orders:
        if list(left[1::2]) == order[1::2] and all(_equal(a, b, budget, depth + 1) for a, b in zip(left[::2], order[::2])):
            return True
    if len(left) == 3 and left[1] == right[1] == "=" and not _ASSIGNED.fullmatch(left[0].strip()):
        return _symbolic(f"({left[0]})-({left[2]})", f"({right[0]})-({right[2]})", budget, proportional=True)
    return False


def _match_unordered(left: Sequence[str], right: Sequence[str], budget: Budget, depth: int) -> bool:
    if len(left) != len(right):
        return False
    rest = list(right)
    for part in left:
        index = next((i for i, other in enumerate(rest) if _equal(part, other, budget, depth + 1)), None)
        if index is None:
            return False
        rest.pop(index)
    return True


# --- structure ----------------------------------------------------------------------------------------------------------


def _alternatives(text: str) -> list[str]:
    """Members of a bare list: separated by commas, semicolons, "and", "or" outside all brackets; 10,000 is one number."""
    if "(" not in text and "[" not in text:
        text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda match: match.group().replace(",", ""), text)
    parts = _split(text, (",", ";"))
    return [part for piece in parts for part in _split_words(piece)]


def _split_words(text: str) -> list[str]:
    marked = re.sub(r"\\text\{\s*(and|or)\s*\}", r" \1 ", text)
    spans = [match for match in re.finditer(r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", marked) if _depth(marked[: match.start()]) == 0]
    edges = [0, *(edge for match in spans for edge in match.span()), len(marked)]
    return [part for part in (marked[a:b].strip() for a, b in zip(edges[::2], edges[1::2])) if part]


def _split(text: str, separators: Sequence[str]) -> list[str]:
    parts, depth, current = [], 0, ""
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if token.startswith(("\\begin", "\\end")):
            depth += 1 if token == "\\begin" else -1
        if depth == 0 and token in separators:
            parts.append(current.strip())
            current = ""
        else:
            current += token
    parts.append(current.strip())
    return [part for part in parts if part]


def _depth(text: str) -> int:
    return sum((token in _OPEN) - (token in _CLOSE) for token in _TOKEN.findall(text))


def _sides(text: str) -> list[str]:
    """[side, sign, side, ...] of a relation outside all brackets; [text] if there is none."""
    sides, last = [], 0
    for match in _RELATIONS.finditer(text):
        if _depth(text[: match.start()]) == 0:
            sides += [text[last : match.start()].strip(), _RELATION_NAMES.get(match.group(), match.group())]
            last = match.end()
    return [*sides, text[last:].strip()]


def _bracketed(text: str) -> tuple[str, list[str]] | None:
    """Bracket pair and members of a tuple, interval or set that makes up the whole text; None for a mere parenthesis."""
    tokens = _TOKEN.findall(text)
    if not tokens or tokens[0] not in ("(", "[", "\\{") or tokens[-1] not in (")", "]", "\\}") or _wraps(tokens) is False:
        return None
    members = _split("".join(tokens[1:-1]), (",", ";"))
    if len(members) < 2 and tokens[0] == "(" and tokens[-1] == ")":
        return None
    return tokens[0] + tokens[-1], members


def _wraps(tokens: Sequence[str]) -> bool:
    """Whether the first bracket closes only at the last token."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _matrix(text: str) -> tuple[str, list[str]] | None:
    match = _MATRIX.fullmatch(text.strip())
    if match is None:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in re.split(r"\\\\(?:\[[^\]]*\])?", match.group(2)) if row.strip()]
    kind = match.group(1)[0].lower() if match.group(1)[0] in "vV" else ""  # |A| is a number, round and square brackets mean the same
    return f"{kind}matrix {len(rows)}x{'.'.join(str(len(row)) for row in rows)}", [cell for row in rows for cell in row]


def _strip_outer(text: str) -> str:
    """Drop parentheses or braces around a whole single answer: ((x+1)) -> x+1, (C) -> C."""
    text = text.strip()
    for _ in range(20):  # deeper nesting is left as it is
        tokens = _TOKEN.findall(text)
        if len(tokens) > 2 and (tokens[0], tokens[-1]) in (("(", ")"), ("{", "}")) and _wraps(tokens):
            inner = "".join(tokens[1:-1]).strip()
            if len(_split(inner, (",", ";"))) == 1:
                text = inner
                continue
        break
    return text


def _percent(text: str) -> tuple[str, bool]:
    bare = re.sub(r"\s*(?:%|\\(?:text|mathrm)\{\s*(?:percent|%)\s*\}|\bper\s?cent\b)\s*$", "", text)
    return bare.strip(), bare != text or "%" in text


def _unit(text: str) -> tuple[str, str]:
    """Value and unit ("5\\text{ cm}^2" -> ("5", "cm2")); unit "" if there is none."""
    match = _UNIT.fullmatch(text)
    if match is None:
        return text, ""
    value = match.group(1) or match.group(4)
    name = (match.group(2) or match.group(5)).strip(" .")
    if name.lower() in _NOT_UNITS:
        return text, ""
    return value.strip(), re.sub(r"[\s{}^]", "", name.lower().removesuffix("s") + (match.group(3) or ""))


def _in_base(match: re.Match[str]) -> int | None:
    try:
        return int(match.group(1), int(match.group(2)))
    except ValueError:  # no such base, or a digit too large for it
        return None


def _squash(text: str) -> str:
    return re.sub(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])", "", text)
