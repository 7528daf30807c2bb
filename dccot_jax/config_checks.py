"""What single values of a config may be: finite numbers, within bounds, and tuples whose elements are of one kind.

Tables, so that a new key is one line. What several keys must be together stands in `config.validate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """Values from `low` to `high`; without the end that is named in `without` ("low", "high" or ""). note: what an end means."""

    low: float
    high: float = math.inf
    without: str = ""
    note: str = ""

    def holds(self, value: float) -> bool:
        """Whether `value` lies within."""
        above = value > self.low if self.without == "low" else value >= self.low
        return above and (value < self.high if self.without == "high" else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"be {'above' if self.without == 'low' else 'at least'} {self.low:g}{self.note}"
        opens, closes = "(" if self.without == "low" else "[", ")" if self.without == "high" else "]"
        return f"lie in {opens}{self.low:g}, {self.high:g}{closes}{self.note}"


_FROM_0, _FROM_1, _ABOVE_0 = Bound(0), Bound(1), Bound(0, without="low")
_SHARE, _SHARE_ABOVE_0, _SHARE_BELOW_1 = Bound(0, 1), Bound(0, 1, "low"), Bound(0, 1, "high")
_ALL, _NONE = Bound(0, note=" (0: all)"), Bound(0, note=" (0: none)")

BOUNDS: Mapping[str, Bound] = {
    "student.model.rope_theta": _ABOVE_0,
    "traces.questions": _ALL,
    "traces.samples": _FROM_1,
    "traces.temperature": _FROM_0,
    "traces.max_tokens": _FROM_1,
    "augment.temperature": _FROM_0,
    "augment.max_tokens": _FROM_1,
    "augment.answers": _FROM_1,
    "augment.rephrasings": _FROM_1,
    "augment.votes": _FROM_1,
    "augment.agreement": _SHARE,
    "verify.time_limit_seconds": _ABOVE_0,
    "verify.ngram_drop_size": _FROM_1,
    "verify.ngram_drop_share": Bound(0, 1, note=" (0: drop none)"),
    "tokens.max_length": _FROM_1,
    "score.chunk_rows": _FROM_1,
    "score.batch_tiles": _FROM_1,
    "score.warmup.share": _SHARE_ABOVE_0,
    "score.warmup.steps": _FROM_1,
    "score.sampling.samples": _FROM_1,
    "score.sampling.temperature": Bound(0, without="low", note="; all answers would be one"),
    "score.gradients.checkpoints": _FROM_1,
    "score.over_time.snapshots": Bound(2),
    "score.over_time.learned": _SHARE_ABOVE_0,
    "score.judge.temperature": _FROM_0,
    "score.judge.max_tokens": _FROM_1,
    "score.judge.retries": _FROM_0,
    "mix.alpha": _SHARE,
    "mix.total_examples": _ALL,
    "mix.total_tokens": _ALL,
    "mix.temperature": _ABOVE_0,
    "curriculum.stages": Bound(2),
    "curriculum.c0": _SHARE_ABOVE_0,
    "curriculum.full_at": _SHARE_ABOVE_0,
    "train.steps": Bound(0, note=" (0: train.epochs says how many)"),
    "train.epochs": _FROM_0,
    "train.rows_per_step": _FROM_1,
    "train.row_tokens": _FROM_1,
    "train.microbatches": _FROM_1,
    "train.learning_rate": _FROM_0,
    "train.warmup_steps": _NONE,
    "train.final_lr_share": _SHARE,
    "train.decay_share": _SHARE,
    "train.momentum": _SHARE_BELOW_1,
    "train.b1": _SHARE_BELOW_1,
    "train.b2": _SHARE_BELOW_1,
    "train.eps": _ABOVE_0,
    "train.weight_decay": _FROM_0,
    "train.clip_norm": Bound(0, note=" (0: no clipping)"),
    "train.checkpoint_every": _FROM_1,
    "train.keep_best": _FROM_0,
    "train.max_skipped": _FROM_0,
    "train.step_deadline_seconds": Bound(0, note=" (0: never)"),
    "train.snapshots": _NONE,
    "train.log_every": _FROM_1,
    "evaluate.limit": _ALL,
    "evaluate.max_new_tokens": _FROM_1,
    "evaluate.batch_rows": _FROM_1,
    "report.samples": _FROM_0,
    "report.bootstrap": _FROM_1,
}


class Elements(NamedTuple):
    """What the elements of a tuple must be, in words and as a test of one (of its plain form: lists for tuples)."""

    words: str
    holds: Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_NAMES = Elements("a non-empty string", _text)
_TEACHERS = Elements(
    "a dict that describes a teacher, e.g. {'kind': 'scripted', 'style': 'verbose'}", lambda value: isinstance(value, dict)
)

ELEMENTS: Mapping[str, Elements] = {
    "seeds": Elements("a whole number", _whole),
    "traces.teachers": _TEACHERS,
    "augment.methods": _NAMES,
    "verify.ngram_sizes": Elements("a whole number of at least 1", lambda value: _whole(value) and value >= 1),
    "score.signals": _NAMES,
    "score.gradients.norm_subset": _NAMES,
    "score.gradients.subset": _NAMES,
    "score.gradients.validation": Elements(
        "a dict and is not a sub-task; write {'task': 'svamp', 'rows': 32} or {'traces': 32}", lambda value: isinstance(value, dict)
    ),
    "score.judge.judges": _TEACHERS,
    "select.tables": _NAMES,
    "mix.strong": _NAMES,
    "mix.long": _NAMES,
    "curriculum.stage_shares": Elements(
        "a number above 0", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    ),
    "train.lora.targets": _NAMES,
    "evaluate.iid": _NAMES,
    "evaluate.ood": _NAMES,
    "evaluate.cross": _NAMES,
    "report.compare": Elements(
        "a pair of arm names, e.g. ('vanilla', 'correct')",
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_text, value)),
    ),
    "arms": Elements("a dict of a name and the dotted keys it changes", lambda value: isinstance(value, dict)),
}


def problem(values: Mapping[str, Any]) -> str:
    """What is wrong with the first value that cannot work, naming key, value and what is accepted; "" if there is none.

    Args:
      values: dotted key -> plain value (no ConfigDict, no tuple) of every leaf of a config.
    """
    return next(_problems(values), "")


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        for number in _floats(value):
            if not math.isfinite(number):
                yield f"config.{key}: {number} must be a finite number"
        bound = BOUNDS.get(key)
        if bound is not None and not bound.holds(value):
            yield f"config.{key}: {value} must {bound}"
        elements = ELEMENTS.get(key)
        for place, element in enumerate(value if elements else ()):
            if elements and not elements.holds(element):
                yield f"config.{key}[{place}]: {element!r} must be {elements.words}"


def _floats(value: Any) -> Iterator[float]:
    """Every float in a plain value."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)
