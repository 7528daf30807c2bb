"""Packing: which group goes into which step, and where in the step's rows.

One step is R rows of L tokens. Groups come from a queue without replacement; each goes, whole, into the first rows that
have room. A group that does not fit is set aside, and after `LOOKAHEAD` of them the step is closed and they return to
the head of the queue, in order, so that nothing is overtaken for long.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dccot_jax.mix.curriculum import Curriculum
from dccot_jax.mix.groups import Group, Row, seeded_order

PACKER = "first_fit/1"
LOOKAHEAD = 32


@dataclasses.dataclass(frozen=True)
class Placed:
    """One token row in a step: packed row 0..R-1, and its place in that row, counted from 0."""

    row: int
    slot: int
    token: Row
    group: Group


class Queue:
    """Groups without replacement from a pool that may grow; a new pass begins when the old one is used up.

    Args:
      order: groups in the order in which they join the pool. seed: of the passes.
      limit: how many draws there are in all; None: no end.
    """

    def __init__(self, order: Sequence[Group], *, seed: int, limit: int | None = None):
        self._order, self._seed, self._left = order, seed, limit
        self._size = 0
        self._queue: deque[Group] = deque()
        self._passes = 0

    def grow(self, size: int) -> None:
        """Let the first `size` groups of the order take part; the new ones join this pass, shuffled in."""
        if size > self._size:
            joined = [*self._queue, *self._order[self._size : size]]
            self._queue = deque(seeded_order(joined, self._seed, "pool", size))
            self._size = size

    def pop(self) -> Group | None:
        """The next group, or None when all draws are made."""
        if self._left == 0:
            return None
        if not self._queue:
            self._passes += 1
            self._queue.extend(seeded_order(self._order[: self._size], self._seed, "pass", self._passes))
        if self._left is not None:
            self._left -= 1
        return self._queue.popleft()

    def push_back(self, groups: Sequence[Group]) -> None:
        """Return groups to the head, the first of them first."""
        self._queue.extendleft(reversed(groups))
        if self._left is not None:
            self._left += len(groups)


def fits(group: Group, rows: int, row_tokens: int) -> bool:
    """Does a group fit an empty step?"""
    return Bins(rows, row_tokens).place(group) is not None


class Bins:
    """The free room of one step's rows."""

    def __init__(self, rows: int, row_tokens: int):
        self.free = np.full(rows, row_tokens, np.int64)
        self._slots = [0] * rows

    def place(self, group: Group) -> list[Placed] | None:
        """First-fit all rows of a group, or change nothing and return None."""
        before = self.free.copy() if len(group.rows) > 1 else None
        chosen: list[int] = []
        for token in group.rows:
            room = self.free >= token.length
            row = int(np.argmax(room))
            if not room[row]:
                if before is not None:
                    self.free = before
                return None
            self.free[row] -= token.length
            chosen.append(row)
        placed = []
        for row, token in zip(chosen, group.rows):
            placed.append(Placed(row, self._slots[row], token, group))
            self._slots[row] += 1
        return placed


def pack_step(queue: Queue, rows: int, row_tokens: int, *, shortest: int = 1) -> list[Placed]:
    """Fill one step from the queue; empty when the queue has ended.

    A step that spans the end of a pass may hold a group twice. `shortest` is the length of the shortest row there is,
    below which no room is worth searching.
    """
    bins = Bins(rows, row_tokens)
    found: list[Placed] = []
    aside: list[Group] = []
    while len(aside) < LOOKAHEAD and int(bins.free.max()) >= shortest:
        group = queue.pop()
        if group is None:
            break
        placed = bins.place(group)
        if placed is None:
            aside.append(group)
        else:
            found += placed
    queue.push_back(aside)
    return found


def pack_epochs(groups: Sequence[Group], epochs: float, *, rows: int, row_tokens: int, seed: int) -> Iterator[list[Placed]]:
    """Steps in which every group occurs `epochs` times: whole passes, then a seeded share of one more."""
    queue = Queue(groups, seed=seed, limit=round(epochs * len(groups)))
    queue.grow(len(groups))
    shortest = min(row.length for group in groups for row in group.rows)
    while step := pack_step(queue, rows, row_tokens, shortest=shortest):
        yield step


def pack_steps(curriculum: Curriculum, steps: int, *, rows: int, row_tokens: int, seed: int) -> Iterator[list[Placed]]:
    """Exactly `steps` steps, each drawn from the curriculum's pool at that step, pass after pass."""
    queue = Queue(curriculum.order, seed=seed)
    shortest = min(row.length for group in curriculum.order for row in group.rows)
    for step in range(steps):
        queue.grow(curriculum.pool_size(step, steps))
        yield pack_step(queue, rows, row_tokens, shortest=shortest)


def weight_rule(kind: str, *, full: bool) -> Callable[[Placed], float]:
    """Loss weight of each trained token of a placed row, under the step loss sum(w nll) / sum(w).

    ``token``: 1. ``sequence``: 1/n, a mean of per-sequence means. ``reverse``: 1/(P n), P parts of the group, so that a
    group of three counts CE/3 each (RevThink, Eq. 1) and a single row as a whole. n: trained tokens of the row, which
    are its completion, or with `full` all but its first token.
    """

    def trained(placed: Placed) -> int:
        return placed.token.length - 1 if full else placed.token.completion_tokens

    rules: dict[str, Callable[[Placed], float]] = {
        "token": lambda placed: 1.0,
        "sequence": lambda placed: 1.0 / trained(placed),
        "reverse": lambda placed: 1.0 / (len(placed.group.rows) * trained(placed)),
    }
    return rules[kind]
