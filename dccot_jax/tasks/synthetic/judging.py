"""Verdicts of scripted teachers as judges: simple rules, the same every time, for runs and tests without a language model.

Correctness is the stated answer against the judge's own (the noisy one misreads some questions); coherence is the share of true
equations, at most the middle where they lead to a wrong answer; clarity falls with length; complexity grows with the numbers a question
gives.
"""

from __future__ import annotations

import json
import re

JUDGE, PROXY = "judge", "complexity and quality"
_NUMBER = r"(?<![\w.])(-?\d+)"
_EQUATION = re.compile(rf"{_NUMBER}\s*([-+*x×/])\s*(\d+)\s*=\s*(-?\d+)")


def verdict(rubric: str, question: str, response: str, correct: bool) -> str:
    """The JSON verdict on a response; `correct`: whether it states the answer that the judge finds."""
    sums = [_holds(*match.groups()) for match in _EQUATION.finditer(response)]
    words = len(response.split())
    if rubric == JUDGE:
        steps = 1 + round(9 * sum(sums) / len(sums)) if sums else 5
        grades = {
            "coherence": steps if correct else min(steps, 5),
            "correctness": 10 if correct else 2,
            "clarity": 9 if words <= 40 else 7 if words <= 80 else 5,
        }
    else:
        numbers = len(re.findall(_NUMBER, question))
        grades = {"complexity": min(6, max(1, numbers)), "quality": (6 if sums else 4) if correct else 2}
    explanation = f"The answer is {'right' if correct else 'wrong'}; {sum(sums)} of {len(sums)} equations hold; {words} words."
    return json.dumps({"explanation": explanation, **grades})


def _holds(a: str, sign: str, b: str, result: str) -> bool:
    x, y, z = int(a), int(b), int(result)
    return {"+": x + y == z, "-": x - y == z, "/": x == y * z}.get(sign, x * y == z)
