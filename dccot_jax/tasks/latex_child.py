r"""Child process that compares single LaTeX expressions; talks JSON lines over stdin and stdout.

Run as a script, so that it imports neither the package nor jax. Accepts only if math-verify accepts and our own reading of the
whole strings does not contradict it at high precision or at random points. It may hang or be killed at any moment.
"""

from __future__ import annotations

import json
import logging
import random
import signal
import sys
from typing import Any

DIGITS = 40
POINTS = 4


def main() -> None:
    """Say ready, then answer one request per line: {"left", "right", "proportional", "limit"} -> {"equal"}."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to every process; the parent ends this one
    logging.disable(logging.CRITICAL)
    channel, sys.stdout = sys.stdout, sys.stderr
    _limit_memory()
    import latex2sympy2_extended
    import math_verify

    modules = (math_verify, latex2sympy2_extended)
    _compare({"left": r"\sqrt{2}x", "right": r"x\sqrt{2}", "proportional": False}, modules)  # late imports happen before the clock runs
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        _die_after(request["limit"] * 2 + 5)
        try:
            equal = _compare(request, modules)
        except Exception:  # third-party parsers raise anything on bad input; what cannot be parsed is not equal
            equal = False
        _die_after(0)
        print(json.dumps({"equal": bool(equal)}), file=channel, flush=True)


def _compare(request: dict[str, Any], modules: tuple[Any, Any]) -> bool:
    math_verify, latex2sympy2_extended = modules
    left, right = request["left"], request["right"]
    a, b = latex2sympy2_extended.latex2sympy(left), latex2sympy2_extended.latex2sympy(right)
    decimal = "." in left or "." in right
    if request["proportional"]:
        return _proportional(a, b)
    agrees = _numerically_equal(a, b, 1e-6 if decimal else 1e-25)
    if agrees is False:
        return False
    parsed = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in (left, right)]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


def _numerically_equal(a: Any, b: Any, tolerance: float) -> bool | None:
    """Equality at random values of all symbols, to `tolerance` relative; None if the expressions have no values there."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return None
    compared = 0
    for point in _points(a, b):
        x, y = _value(a, point), _value(b, point)
        if x is None or y is None:
            continue
        compared += 1
        if abs(x - y) > tolerance * max(abs(x), abs(y)):
            return False
    return True if compared else None


def _proportional(a: Any, b: Any) -> bool:
    """Whether a = c * b for one constant c != 0: the two equations a = 0 and b = 0 are the same."""
    ratios = []
    for point in _points(a, b):
        x, y = _value(a, point), _value(b, point)
        if x is None or y is None:
            return False
        if x == 0 or y == 0:
            if x != y:
                return False
            continue
        ratios.append(x / y)
    return bool(ratios) and all(abs(ratio - ratios[0]) <= 1e-20 * abs(ratios[0]) for ratio in ratios)


def _points(a: Any, b: Any) -> list[dict[Any, Any]]:
    import sympy

    generator = random.Random(20240501)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    constants = {"e": sympy.E, "pi": sympy.pi, "i": sympy.I}
    free = [symbol for symbol in symbols if str(symbol) not in constants]
    fixed = {symbol: constants[str(symbol)] for symbol in symbols if str(symbol) in constants}
    return [{**fixed, **{s: sympy.Rational(generator.randint(1, 997), 331) for s in free}} for _ in range(POINTS if free else 1)]


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    import sympy

    value = sympy.N(expression.subs(point).doit(), DIGITS)
    return value if value.is_number and value.is_finite else None


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    except (ImportError, ValueError, OSError):  # not offered on this platform
        return


def _die_after(seconds: float) -> None:
    """Let the kernel end this process if its parent is gone and a computation never returns; 0 cancels."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
