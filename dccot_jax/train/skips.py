"""Steps that moved nothing, because their loss or gradient was not finite or because no position of theirs has a weight ("empty").

They are counted; when too many come in a row, those that were not finite are traced to the sequences that cause them.

The compiled step leaves parameters and moments alone in such a step, so all steps of one row of skips saw the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dccot_jax.records import InputError

NAMED = 8  # trace ids in a message
Unit = tuple[int, int]  # packed row of the step, segment in it (from 1)


class NonFiniteError(InputError):
    """Training stopped: too many steps in a row were not finite, or empty."""


class Skips:
    """The skipped steps in a row that end with the newest step.

    Args:
      limit: how many in a row are borne (`train.max_skipped`). steps: those of the run that is resumed, oldest first.
      empty: which of these had nothing to train on.
    """

    def __init__(self, limit: int, steps: Sequence[int] = (), empty: Sequence[int] = ()):
        self._limit = limit
        self.steps, self.empty = list(steps), list(empty)

    def add(self, step: int, skipped: bool, empty: bool = False) -> bool:
        """Count a finished step; True once there are more in a row than are borne."""
        self.steps = [*self.steps, step] if skipped else []
        self.empty = [step for step in (*self.empty, *([step] if empty else ())) if step in self.steps]
        return len(self.steps) > self._limit

    def error(self, plan: pa.Table, fails: Callable[[int, frozenset[Unit]], bool]) -> NonFiniteError:
        """What to raise, with the ids of up to `NAMED` traces, those of the newest steps first.

        Args:
          plan: columns step (from 0), row, id. fails: whether a step with only these sequences is not finite.
        """
        row = f"{len(self.steps)} steps in a row, {self.steps[0]} to {self.steps[-1]} (config.train.max_skipped = {self._limit})"
        broken = [step for step in self.steps if step not in self.empty]
        if not broken:
            ids = list(dict.fromkeys(sequences_of(plan, self.steps[-1]).values()))
            names = ", ".join(ids[:NAMED]) + (", …" if len(ids) > NAMED else "")
            return NonFiniteError(
                f"training stopped: no position had a weight to train on in {row}. Traces of step {self.steps[-1]}: {names}"
            )
        found: dict[int, list[str]] = {}
        room = NAMED
        for step in reversed(broken):
            ids = sequences_of(plan, step)
            units = culprits(lambda part, step=step: fails(step, frozenset(part)), list(ids), most=room)
            found[step] = [ids[unit] for unit in units]
            room -= len(units)
            if room <= 0:
                break
        more = ", perhaps more" if room <= 0 else ""
        if self.empty:
            row = f"{len(broken)} of {row}; in the others no position had a weight to train on"
        names = "; ".join(_names(step, ids) for step, ids in found.items())
        return NonFiniteError(f"training stopped: the loss or gradient was not finite in {row}. Traces that cause it: {names}{more}")


def skipped_line(skipped: int, empty: int, steps: int) -> str:
    """A line for the end of a training of so many steps."""
    reasons = {"a gradient that was not finite": skipped - empty, "nothing to train on": empty}
    return f"{skipped} of {steps} steps were skipped: " + ", ".join(f"{count} with {reason}" for reason, count in reasons.items() if count)


def _names(step: int, ids: Sequence[str]) -> str:
    names = list(dict.fromkeys(ids))
    rest = f" and {len(names) - NAMED} more, together" if len(names) > NAMED else ""
    return f"step {step}: {', '.join(names[:NAMED]) or 'none, it is finite when run again'}{rest}"


def sequences_of(plan: pa.Table, step: int) -> dict[Unit, str]:
    """(row, segment) -> trace id of every sequence of a step, counted from 1 as in the log."""
    rows = plan.filter(pa.array(plan["step"].to_numpy() == step - 1))
    found: dict[Unit, str] = {}
    segments: dict[int, int] = {}
    for row, name in zip(rows["row"].to_pylist(), rows["id"].to_pylist()):
        segments[row] = segments.get(row, 0) + 1
        found[row, segments[row]] = name
    return found


def culprits(fails: Callable[[Sequence[Any]], bool], units: Sequence[Any], *, most: int) -> list[Any]:
    """Units that fail, by halving: about 2·log2(n) calls for each. Units that only fail together are returned together.

    At most `most` failing parts are looked for.
    """
    if most <= 0 or not units or not fails(units):
        return []
    if len(units) == 1:
        return list(units)
    half = len(units) // 2
    found = culprits(fails, units[:half], most=most)
    found += culprits(fails, units[half:], most=most - len(found))
    return found or list(units)


def only(batch: Mapping[str, np.ndarray], rows: Sequence[int], units: frozenset[Unit]) -> dict[str, np.ndarray]:
    """A batch [len(rows), T, ...] in which every sequence outside `units` is padding. rows: the packed row of each."""
    keep = np.zeros(batch["segment_ids"].shape, bool)
    for place, row in enumerate(rows):
        keep[place] = np.isin(batch["segment_ids"][place], [segment for r, segment in units if r == row])
    return {name: np.where(keep.reshape(keep.shape + (1,) * (x.ndim - 2)), x, np.zeros((), x.dtype)) for name, x in batch.items()}
