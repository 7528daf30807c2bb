"""Selectors: pure functions from candidate groups to the kept ones, with a reason for every dropped row.

A step of `config.select.steps` is a dict {"name": ..., options}; steps apply in order, each to what the one before kept.

  none              keep all
  teacher_correct   keep groups whose forward part was verified correct and no part of which was found wrong
  student_error     keep groups whose question the student answers wrongly (`student_error` column = 1)
  top | bottom      `signal`, budget: highest / lowest first
  middle            `signal`, budget: nearest to the middle rank first
  threshold         `signal`, `min` and/or `max`, inclusive
  random            budget, or `match`: {another step}: as many as that step would keep of the same candidates
                    (`by`: "rows" (default) or "tokens"); `stream`: a name, another one draws independently

Budget: exactly one of `rows` (traces), `tokens` (completion tokens of the student's tokenizer) or `share` (of the rows
that enter the step, rounded down). Candidates are taken in rank order until the next one would exceed the budget, so a
larger budget always keeps a superset. `signal` is any score column, or `completion_tokens`, `prompt_tokens`, `n_steps`.

Rows of one method instance share a group; a group is kept or dropped whole. Its value of a signal is the mean over its
forward parts: they are what the student has to do at test time (a group without a forward part: the mean over all
parts). A group that lacks the value is dropped with reason ``no_score_<signal>``. Ties break by group id, ascending.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dccot_jax.config import ConfigError, nearest
from dccot_jax.records import Dropped, InputError, count_reasons, derive_seed

FIELDS = ("completion_tokens", "prompt_tokens", "n_steps")


class SelectionError(InputError):
    """A selection that keeps nothing; the message names the step and the counts."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One group of rows.

    Attributes:
      group_id: shared id. ids: its rows, sorted. completion_tokens: over all its rows (student's tokenizer).
      verdict: True, False or None (not verified), over the group as `teacher_correct` reads it; verdict_reason: why.
      values: {signal: value}; a signal without a value is absent, never a default.
    """

    group_id: str
    ids: tuple[str, ...]
    completion_tokens: int
    verdict: bool | None
    verdict_reason: str
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one step did: rows, groups and completion tokens before and after, rows dropped per reason."""

    step: str
    rows_in: int
    rows_out: int
    groups_in: int
    groups_out: int
    tokens_in: int
    tokens_out: int
    dropped: Mapping[str, int]


# A selector returns the kept candidates and, for every other one, (reason, detail) by group id.
Verdicts = dict[str, tuple[str, str]]
Selected = tuple[list[Candidate], Verdicts]
Step = Mapping[str, Any]


def apply_steps(
    candidates: Sequence[Candidate], steps: Sequence[Step], *, seed: int, available: Sequence[str]
) -> tuple[list[Candidate], list[Dropped], list[StepReport]]:
    """Apply `steps` in order.

    Args:
      candidates: all groups. seed: root seed of the run. available: score columns at hand.

    Returns:
      kept candidates sorted by group id, dropped rows sorted by id, one report per step.

    Raises ConfigError on a malformed step or a signal that was not scored, SelectionError as soon as nothing is left.
    """
    check_steps(steps, available)
    kept = sorted(candidates, key=lambda c: c.group_id)
    if not kept:
        raise SelectionError("selection: no rows to select from")
    dropped: list[Dropped] = []
    reports = []
    for index, step in enumerate(steps):
        before = kept
        chosen, reasons = _SELECTORS[step["name"]].run(before, step, seed)
        kept = sorted(chosen, key=lambda c: c.group_id)
        gone = []
        for candidate in before:
            if candidate.group_id in reasons:
                reason, detail = reasons[candidate.group_id]
                gone += [Dropped(i, reason, f"step {index} {detail}") for i in candidate.ids]
        dropped += gone
        reports.append(_report(step, before, kept, gone))
        if not kept:
            counts = ", ".join(f"{reason} {n}" for reason, n in reports[-1].dropped.items())
            raise SelectionError(f"config.select.steps[{index}] ({describe(step)}): kept 0 of {_rows(before)} rows ({counts})")
    return kept, sorted(dropped, key=lambda d: d.id), reports


def check_steps(steps: Sequence[Step], available: Sequence[str] | None = None) -> None:
    """Check names, options and budgets before any work; with `available`, also that every signal was scored.

    Raises ConfigError naming the step, the option and what would be accepted.
    """
    for index, step in enumerate(steps):
        _check_step(step, f"config.select.steps[{index}]", available)


def required_signals(steps: Sequence[Step]) -> tuple[str, ...]:
    """Score columns that `steps` read, sorted: what `config.score.signals` must contain."""
    found: set[str] = set()
    for step in steps:
        if step.get("name") == "student_error":
            found.add("student_error")
        if "signal" in step and step["signal"] not in FIELDS:
            found.add(step["signal"])
        if "match" in step:
            found.update(required_signals([step["match"]]))
    return tuple(sorted(found))


def describe(step: Step) -> str:
    """`top(signal=ifd_loss, rows=500)`: the step as people read it."""
    options = ", ".join(f"{k}={describe(v) if isinstance(v, Mapping) else v}" for k, v in step.items() if k != "name")
    return f"{step['name']}({options})" if options else str(step["name"])


# --- selectors --------------------------------------------------------------------------------------------------------


def _none(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    return list(candidates), {}


def _teacher_correct(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    def reason(c: Candidate) -> tuple[str, str] | None:
        if c.verdict is None:
            return "not_verified", f"teacher_correct: {c.verdict_reason or 'no verdict'}"
        return None if c.verdict else ("teacher_wrong", f"teacher_correct: {c.verdict_reason or 'wrong'}")

    return _partition(candidates, reason)


def _student_error(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    def reason(c: Candidate, value: float) -> tuple[str, str] | None:
        return None if value >= 0.5 else ("student_correct", "student_error: the student answers this question correctly")

    return _with_values(candidates, "student_error", reason)


def _threshold(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    name, low, high = step["signal"], step.get("min"), step.get("max")

    def reason(c: Candidate, value: float) -> tuple[str, str] | None:
        if low is not None and value < low:
            return f"{name}_below_min", f"threshold: {name} = {value:.6g} < {low:g}"
        if high is not None and value > high:
            return f"{name}_above_max", f"threshold: {name} = {value:.6g} > {high:g}"
        return None

    return _with_values(candidates, name, reason)


def _top(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    return _ranked(candidates, step, lambda scored: sorted(scored, key=lambda c: (-c.values[step["signal"]], c.group_id)))


def _bottom(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    return _ranked(candidates, step, lambda scored: sorted(scored, key=lambda c: (c.values[step["signal"]], c.group_id)))


def _middle(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    def order(scored: Sequence[Candidate]) -> list[Candidate]:
        ranked = sorted(scored, key=lambda c: (c.values[step["signal"]], c.group_id))
        # Twice the distance to the middle rank, so that it is an integer; of two equally far, the lower rank first.
        return [c for _, _, c in sorted((abs(2 * rank - (len(ranked) - 1)), rank, c) for rank, c in enumerate(ranked))]

    return _ranked(candidates, step, order)


def _random(candidates: Sequence[Candidate], step: Step, seed: int) -> Selected:
    """Order by a seeded hash of the group id: smaller samples are subsets of larger ones, whatever else is in the pool.

    Two samples of one seed and `stream` overlap as much as they can; samples of different streams overlap by chance.
    """
    names = ("select/random", *filter(None, [step.get("stream", "")]))
    ordered = sorted(candidates, key=lambda c: (derive_seed(seed, *names, c.group_id), c.group_id))
    if "match" in step:
        kept, _ = _SELECTORS[step["match"]["name"]].run(candidates, step["match"], seed)
        by = step.get("by", "rows")
        limit = _rows(kept) if by == "rows" else _tokens(kept)
    else:
        by, limit = _budget(step, _rows(candidates))
    return _take(ordered, by, limit, "not_sampled", describe(step))


# --- parts ------------------------------------------------------------------------------------------------------------


def _partition(candidates: Sequence[Candidate], reason: Callable[[Candidate], tuple[str, str] | None]) -> Selected:
    reasons = {c.group_id: found for c in candidates if (found := reason(c)) is not None}
    return [c for c in candidates if c.group_id not in reasons], reasons


def _with_values(candidates: Sequence[Candidate], name: str, reason: Callable[[Candidate, float], tuple[str, str] | None]) -> Selected:
    """Partition by the value of one signal; a group without a value is dropped as such."""

    def judge(c: Candidate) -> tuple[str, str] | None:
        value = c.values.get(name)
        if value is None or not math.isfinite(value):
            return f"no_score_{name}", f"{name}: the group has no usable value"
        return reason(c, value)

    return _partition(candidates, judge)


def _ranked(candidates: Sequence[Candidate], step: Step, order: Callable[[Sequence[Candidate]], list[Candidate]]) -> Selected:
    scored, missing = _with_values(candidates, step["signal"], lambda c, value: None)
    by, limit = _budget(step, _rows(candidates))
    kept, reasons = _take(order(scored), by, limit, f"not_in_{step['name']}_{step['signal']}", describe(step), step["signal"])
    return kept, {**missing, **reasons}


def _budget(step: Step, rows_in: int) -> tuple[str, int]:
    """(`rows` or `tokens`, limit). A share is rounded down; the small tolerance keeps 0.29 x 100 at 29."""
    if "share" in step:
        return "rows", math.floor(step["share"] * rows_in + 1e-9)
    return ("rows", step["rows"]) if "rows" in step else ("tokens", step["tokens"])


def _take(ordered: Sequence[Candidate], by: str, limit: int, reason: str, detail: str, signal: str | None = None) -> Selected:
    """Longest prefix of `ordered` within the limit."""
    used, cut = 0, 0
    for cut, c in enumerate(ordered):  # noqa: B007
        used += len(c.ids) if by == "rows" else c.completion_tokens
        if used > limit:
            break
    else:
        cut = len(ordered)
    kept = list(ordered[:cut])
    reasons = {}
    for rank, c in enumerate(ordered[cut:], start=cut):
        value = f", {signal} = {c.values[signal]:.6g}" if signal else ""
        reasons[c.group_id] = (reason, f"{detail}: rank {rank + 1} of {len(ordered)}{value}")
    return kept, reasons


def _rows(candidates: Sequence[Candidate]) -> int:
    return sum(len(c.ids) for c in candidates)


def _tokens(candidates: Sequence[Candidate]) -> int:
    return sum(c.completion_tokens for c in candidates)


def _report(step: Step, before: Sequence[Candidate], after: Sequence[Candidate], gone: Sequence[Dropped]) -> StepReport:
    return StepReport(
        step=describe(step),
        rows_in=_rows(before),
        rows_out=_rows(after),
        groups_in=len(before),
        groups_out=len(after),
        tokens_in=_tokens(before),
        tokens_out=_tokens(after),
        dropped=count_reasons(gone),
    )


# --- the table of selectors, and the checks it allows -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Selector:
    run: Callable[[Sequence[Candidate], Step, int], Selected]
    options: tuple[str, ...] = ()
    ranked: bool = False  # takes exactly one budget


_BUDGETS = ("rows", "tokens", "share")
_SELECTORS: dict[str, _Selector] = {
    "none": _Selector(_none),
    "teacher_correct": _Selector(_teacher_correct),
    "student_error": _Selector(_student_error),
    "threshold": _Selector(_threshold, ("signal", "min", "max")),
    "top": _Selector(_top, ("signal", *_BUDGETS), ranked=True),
    "bottom": _Selector(_bottom, ("signal", *_BUDGETS), ranked=True),
    "middle": _Selector(_middle, ("signal", *_BUDGETS), ranked=True),
    "random": _Selector(_random, (*_BUDGETS, "match", "by", "stream"), ranked=True),
}


def _check_step(step: Any, where: str, available: Sequence[str] | None) -> None:
    if not isinstance(step, Mapping) or "name" not in step:
        raise ConfigError(f"{where}: {step!r} is not a step; write e.g. {{'name': 'top', 'signal': 'ifd_loss', 'rows': 500}}")
    name = step["name"]
    if name not in _SELECTORS:
        raise ConfigError(f"{where}.name: {name!r} is not one of {', '.join(_SELECTORS)}{nearest(str(name), tuple(_SELECTORS))}")
    selector = _SELECTORS[name]
    for key in step:
        if key != "name" and key not in selector.options:
            accepted = ", ".join(selector.options) or "no options"
            raise ConfigError(f"{where}.{key}: {name} takes {accepted}{nearest(str(key), selector.options)}")
    if "signal" in selector.options:
        _check_signal(step.get("signal"), f"{where}.signal", available)
    if name == "student_error":
        _check_signal("student_error", where, available)
    if name == "threshold":
        bounds = [step[key] for key in ("min", "max") if step.get(key) is not None]
        if not bounds or not all(_is_number(bound) and math.isfinite(bound) for bound in bounds):
            raise ConfigError(f"{where}: threshold needs a finite number as 'min', 'max' or both")
    if not isinstance(step.get("stream", ""), str):
        raise ConfigError(f"{where}.stream: {step['stream']!r} must be a string, e.g. 'control'")
    if selector.ranked:
        _check_budget(step, where, available)


def _check_budget(step: Step, where: str, available: Sequence[str] | None) -> None:
    accepted = (*_BUDGETS, "match") if step["name"] == "random" else _BUDGETS
    given = [key for key in accepted if key in step]
    if len(given) != 1:
        raise ConfigError(f"{where}: {step['name']} needs exactly one of {', '.join(accepted)}, got {', '.join(given) or 'none'}")
    if given[0] == "match":
        if step.get("by", "rows") not in ("rows", "tokens"):
            raise ConfigError(f"{where}.by: {step['by']!r} is not one of rows, tokens")
        _check_step(step["match"], f"{where}.match", available)
    elif "by" in step:
        raise ConfigError(f"{where}.by: only together with 'match'")
    elif given[0] == "share":
        if not _is_number(step["share"]) or not 0 < step["share"] <= 1:
            raise ConfigError(f"{where}.share: {step['share']!r} must lie in (0, 1]")
    elif not isinstance(step[given[0]], int) or isinstance(step[given[0]], bool) or step[given[0]] < 1:
        raise ConfigError(f"{where}.{given[0]}: {step[given[0]]!r} must be a whole number of at least 1")


def _check_signal(name: Any, where: str, available: Sequence[str] | None) -> None:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: missing; name a signal, e.g. 'ifd_loss'")
    if available is not None and name not in FIELDS and name not in available:
        listing = ", ".join(available) or "none"
        raise ConfigError(f"{where}: signal {name!r} has no scores; scored: {listing}; add it to config.score.signals")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
