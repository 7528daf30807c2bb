"""What the steps of a selection may say, checked before any work: names, options, signals, budgets."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dccot_jax.config import ConfigError
from dccot_jax.select.budget import BUDGETS
from dccot_jax.select.candidates import FIELDS, LABELS, META, TEXTS, Selector, Step
from dccot_jax.tasks.registry import UnknownTaskError, get_task


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a step.

    Attributes:
      check: raises ConfigError on a value it does not take; gets (value, where it stands, columns at hand).
      required: must be given. reads: the score columns that a value makes the step read.
    """

    check: Callable[[Any, str, Columns | None], None]
    required: bool = False
    reads: Callable[[Any], Sequence[str]] = lambda value: ()


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the score columns at hand: numbers, and vectors."""

    numbers: Sequence[str]
    vectors: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """A selector, its options, whether it takes a budget ("none", "optional", "required"), and signals it always reads."""

    run: Selector
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    budget: str = "none"
    reads: tuple[str, ...] = ()


def check_step(step: Any, where: str, rules: Mapping[str, Rule], columns: Columns | None) -> None:
    """Raises ConfigError naming the step, the option and what would be accepted."""
    if not isinstance(step, Mapping) or "name" not in step:
        raise ConfigError(f"{where}: {step!r} is not a step; write e.g. {{'name': 'top', 'signal': 'ifd_loss', 'rows': 500}}")
    name = step["name"]
    if name not in rules:
        raise ConfigError(f"{where}.name: {name!r} is not one of {', '.join(rules)}{nearest(str(name), tuple(rules))}")
    rule = rules[name]
    accepted = (*rule.options, *(BUDGETS if rule.budget != "none" else ()))
    for key in step:
        if key != "name" and key not in accepted:
            raise ConfigError(f"{where}.{key}: {name} takes {', '.join(accepted) or 'no options'}{nearest(str(key), accepted)}")
    for key, option in rule.options.items():
        if option.required or key in step:
            option.check(step.get(key), f"{where}.{key}", columns)
    for signal in rule.reads:
        check_number(signal, where, columns)
    if name == "threshold" and not {"min", "max"} & set(step):
        raise ConfigError(f"{where}: threshold needs a finite number as 'min', 'max' or both")
    if name == "quantile" and not step.get("low", 0.0) < step.get("high", 1.0):
        raise ConfigError(f"{where}: quantile needs low < high, got {step.get('low', 0.0)} and {step.get('high', 1.0)}")
    if name == "stratified":
        _check_strata(step, where, columns)
    if rule.budget != "none":
        _check_budget(step, where, rules, columns)


def step_reads(step: Step, rules: Mapping[str, Rule]) -> set[str]:
    """Score columns that a step reads."""
    rule = rules.get(step.get("name", ""))
    if rule is None:
        return set()
    found = set(rule.reads)
    for key, option in rule.options.items():
        if key in step:
            found.update(option.reads(step[key]))
    if "match" in step:
        found |= step_reads(step["match"], rules)
    if step["name"] == "stratified" and "bins" in step:
        found.add(step["by"])
    return found - set(FIELDS)


# --- kinds of options ----------------------------------------------------------------------------------------------------


def signal(*, required: bool = False) -> Option:
    """The name of a number: a score column, or one of `FIELDS`."""
    return Option(check_number, required, lambda value: (value,))


def signals(*, count: int | None = None) -> Option:
    """Several numbers (exactly `count`, or one and more); required."""

    def check(value: Any, where: str, columns: Columns | None) -> None:
        names = [value] if isinstance(value, str) and count is None else value
        if not isinstance(names, (list, tuple)) or not names or (count is not None and len(names) != count):
            raise ConfigError(f"{where}: {value!r} must be {'one or more' if count is None else count} signals, e.g. ('nll', 'entropy')")
        for name in names:
            check_number(name, where, columns)

    return Option(check, True, lambda value: [value] if isinstance(value, str) else list(value))


def vector() -> Option:
    """The name of a vector column, e.g. an embedding; required."""

    def check(value: Any, where: str, columns: Columns | None) -> None:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where}: missing; name a vector, e.g. 'embedding_rationale'")
        if columns is not None and value not in columns.vectors:
            kind = "is a number, not a vector" if value in (*FIELDS, *columns.numbers) else "is not at hand"
            raise ConfigError(f"{where}: {value!r} {kind}; vectors: {_list(columns.vectors)}; add one to config.score.signals")

    return Option(check, True, lambda value: (value,))


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> Option:
    """A finite number in [low, high]; `above`, `below`: without that end."""
    span = f"{'(' if above or low == -math.inf else '['}{low:g}, {high:g}{')' if below or high == math.inf else ']'}"

    def check(value: Any, where: str, columns: Columns | None) -> None:
        inside = _is_number(value) and math.isfinite(value) and low <= value <= high
        if not inside or (above and value == low) or (below and value == high):
            raise ConfigError(f"{where}: {value!r} must be a finite number" + (f" in {span}" if math.isfinite(max(low, -high)) else ""))

    return Option(check)


def whole(low: int) -> Option:
    """A whole number of at least `low`."""

    def check(value: Any, where: str, columns: Columns | None) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{where}: {value!r} must be a whole number of at least {low}")

    return Option(check)


def one_of(*accepted: Any) -> Option:
    def check(value: Any, where: str, columns: Columns | None) -> None:
        if value not in accepted:
            raise ConfigError(f"{where}: {value!r} is not one of {_list(accepted)}{nearest(str(value), list(map(str, accepted)))}")

    return Option(check)


def pair_of(*accepted: Any) -> Option:
    def check(value: Any, where: str, columns: Columns | None) -> None:
        if not isinstance(value, (list, tuple)) or len(value) != 2 or any(item not in accepted for item in value):
            raise ConfigError(f"{where}: {value!r} must be two of {_list(accepted)}, e.g. ({accepted[0]!r}, {accepted[-1]!r})")

    return Option(check)


def string(example: str) -> Option:
    def check(value: Any, where: str, columns: Columns | None) -> None:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {value!r} must be a string, e.g. {example!r}")

    return Option(check)


def label() -> Option:
    """A label of traces; required."""
    return Option(_check_label, True)


def anything(*, required: bool = False) -> Option:
    """Checked elsewhere, together with other options."""
    return Option(lambda value, where, columns: None, required)


def text() -> Option:
    return one_of(*TEXTS)


def prefer() -> Option:
    return one_of("high", "low")


def weights() -> Option:
    """{value: weight >= 0}, some weight above 0."""

    def check(value: Any, where: str, columns: Columns | None) -> None:
        found = list(value.values()) if isinstance(value, Mapping) else []
        if not found or not all(_is_number(item) and math.isfinite(item) and item >= 0 for item in found) or not sum(found):
            raise ConfigError(f"{where}: {value!r} must give weights of at least 0, some of them above, e.g. {{'algebra': 2.0}}")

    return Option(check)


def train_task() -> Option:
    """The name of a task with a training split: resembling a test set would fit the selection to it. Required."""

    def check(value: Any, where: str, columns: Columns | None) -> None:
        try:
            task = get_task(str(value))
        except UnknownTaskError as error:
            raise ConfigError(f"{where}: {error}") from None
        if "train" not in task.splits:
            raise ConfigError(f"{where}: task {value!r} has only a test split; data must not be selected to resemble a test set")

    return Option(check, True)


def subtasks() -> Option:
    """Names of sub-tasks whose influence (`less_<name>`) was scored, one or more."""

    def check(value: Any, where: str, columns: Columns | None) -> None:
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(f"{where}: {value!r} must be one or more sub-tasks of score.gradients.validation")
        known = [] if columns is None else [name.removeprefix("less_") for name in columns.numbers if name.startswith("less_")]
        for name in value if columns is not None else ():
            if name not in known:
                raise ConfigError(f"{where}: {name!r} is not one of {_list(known)}{nearest(str(name), known)}")

    return Option(check)


def check_number(name: Any, where: str, columns: Columns | None) -> None:
    """Raises ConfigError unless `name` is a number at hand."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: missing; name a signal, e.g. 'ifd_loss'")
    if columns is None or name in FIELDS or name in columns.numbers:
        return
    if name in columns.vectors:
        raise ConfigError(f"{where}: {name!r} is a vector; a number is needed: {_list((*FIELDS, *columns.numbers))}")
    raise ConfigError(f"{where}: signal {name!r} has no scores; scored: {_list(columns.numbers)}; add it to config.score.signals")


# --- parts ---------------------------------------------------------------------------------------------------------------


def _check_label(value: Any, where: str, columns: Columns | None) -> None:
    if not isinstance(value, str) or (value not in LABELS and not value.startswith(META)):
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(LABELS)}, {META}<key>{nearest(str(value), LABELS)}")


def _check_strata(step: Step, where: str, columns: Columns | None) -> None:
    if "bins" in step:
        check_number(step.get("by"), f"{where}.by", columns)
    elif columns is not None and step.get("by") in (*FIELDS, *columns.numbers):
        raise ConfigError(f"{where}.bins: missing; {step['by']!r} is a number, say into how many quantile bins it is cut")
    else:
        _check_label(step.get("by"), f"{where}.by", columns)


def _check_budget(step: Step, where: str, rules: Mapping[str, Rule], columns: Columns | None) -> None:
    accepted = (*BUDGETS, "match") if step["name"] == "random" else BUDGETS
    given = [key for key in accepted if key in step]
    if not given and rules[step["name"]].budget == "optional":
        return
    if len(given) != 1:
        raise ConfigError(f"{where}: {step['name']} needs exactly one of {', '.join(accepted)}, got {', '.join(given) or 'none'}")
    if given[0] == "match":
        if step.get("by", "rows") not in ("rows", "tokens"):
            raise ConfigError(f"{where}.by: {step['by']!r} is not one of rows, tokens")
        check_step(step["match"], f"{where}.match", rules, columns)
    elif step["name"] == "random" and "by" in step:
        raise ConfigError(f"{where}.by: only together with 'match'")
    elif given[0] == "share":
        if not _is_number(step["share"]) or not 0 < step["share"] <= 1:
            raise ConfigError(f"{where}.share: {step['share']!r} must lie in (0, 1]")
    elif not isinstance(step[given[0]], int) or isinstance(step[given[0]], bool) or step[given[0]] < 1:
        raise ConfigError(f"{where}.{given[0]}: {step[given[0]]!r} must be a whole number of at least 1")


def nearest(name: str, accepted: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` or nothing."""
    close = difflib.get_close_matches(name, accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _list(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
