"""DEITA's diverse selection (arXiv 2312.15685): best score first, unless something like it is kept already."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from dccot_jax.select.budget import budget_of, prefix
from dccot_jax.select.candidates import Candidate, Selected, SelectionError, Setting, Step, Verdicts, describe, with_values, with_vectors
from dccot_jax.select.methods.grid import SQUARE, blocks, dots, unit_grid

TAU = 0.9
_LOOK_AHEAD = 256  # candidates compared with the kept ones in one product


def deita(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Sort by the product of `signals` (complexity x quality in the paper), highest first; keep one iff its largest cosine on
    `vector` to those kept before is at most `tau` (default 0.9); stop at the budget, if there is one.

    The published filter compares a whole batch with what was kept before the batch, so that its result depends on the
    batch size; here every candidate is compared with every kept one. Cost O(N |kept| D).

    Raises SelectionError for a negative value of one of several signals: two negative ones would beat two positive ones.
    """
    names = [step["signals"]] if isinstance(step["signals"], str) else list(step["signals"])
    scored, reasons = with_values(candidates, *names)
    found, matrix, missing = with_vectors(scored, step["vector"])
    reasons |= missing
    for c, name in itertools.product(found, names if len(names) > 1 else ()):
        if c.values[name] < 0:
            raise SelectionError(f"{describe(step)}: {name} of {c.group_id} is {c.values[name]:.6g}; values to multiply must be at least 0")
    score = {c.group_id: math.prod(c.values[name] for name in names) for c in found}
    order = sorted(range(len(found)), key=lambda i: (-score[found[i].group_id], found[i].group_id))
    tau = step.get("tau", TAU)
    similar: dict[int, tuple[int, float]] = {}
    kept = prefix((found[i] for i in novel(unit_grid(matrix), order, tau, similar)), budget_of(step, candidates))
    chosen = {c.group_id for c in kept}
    lost: Verdicts = {}
    for rank, i in enumerate(order, start=1):
        c = found[i]
        if c.group_id in chosen:
            continue
        if i in similar:
            other, cosine = similar[i]
            lost[c.group_id] = ("too_similar", f"deita: cosine {cosine:.6g} > {tau:g} to {found[other].group_id}")
        else:
            lost[c.group_id] = ("not_in_deita", f"{describe(step)}: rank {rank} of {len(order)}, score = {score[c.group_id]:.6g}")
    return kept, reasons | lost


def novel(
    points: np.ndarray, order: Sequence[int], tau: float, similar: dict[int, tuple[int, float]], ahead: int = _LOOK_AHEAD
) -> Iterator[int]:
    """Yield the indices of `order` whose largest cosine to those yielded before is at most `tau`.

    Args:
      points: unit grid vectors [N, D]. similar: filled for each index passed over with (the most similar one, cosine).
      ahead: how many are compared at once; it changes the speed alone.
    """
    kept: list[int] = []
    for start in range(0, len(order), ahead):
        batch = list(order[start : start + ahead])
        best, which = np.full(len(batch), -np.inf), np.zeros(len(batch), np.int64)
        for part in blocks(len(kept), max(len(batch), points.shape[1])):
            products = dots(points[batch], points[kept[part]])
            top = np.argmax(products, axis=1)
            value = products[np.arange(len(batch)), top]
            which = np.where(value > best, np.array(kept[part])[top], which)
            best = np.maximum(best, value)
        inside = dots(points[batch], points[batch])
        for place, i in enumerate(batch):
            if best[place] > tau * SQUARE:
                similar[i] = (int(which[place]), float(best[place] / SQUARE))
                continue
            kept.append(i)
            which = np.where(inside[place] > best, i, which)
            best = np.maximum(best, inside[place])
            yield i
