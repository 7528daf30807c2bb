"""k-center greedy (Sener and Savarese, arXiv 1708.00489): every candidate has a kept one near it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dccot_jax.select.budget import budget_of, prefix
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, Verdicts, describe, with_vectors
from dccot_jax.select.draws import shuffled
from dccot_jax.select.methods.grid import ONE, blocks, dots, scaled_grid, squared_norms


def kcenter(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Repeatedly keep the candidate farthest (Euclidean, on `vector`) from all kept ones, within the budget.

    The first one is drawn by a seeded hash. Cost O(N k D), memory O(N). The detail of a dropped group is how far it is
    from the nearest kept one.
    """
    found, matrix, reasons = with_vectors(candidates, step["vector"])
    if not found:
        return [], reasons
    points, scale = scaled_grid(matrix)
    place = {c.group_id: i for i, c in enumerate(found)}
    search = Farthest(points, place[shuffled(found, setting.seed, "select/kcenter")[0].group_id])
    kept = prefix((found[i] for i in search), budget_of(step, candidates))
    if kept:
        search.see(place[kept[-1].group_id])
    nearest = scale / ONE * np.sqrt(search.nearest)
    lost: Verdicts = {}
    chosen = {c.group_id for c in kept}
    for i, c in enumerate(found):
        if c.group_id not in chosen:
            lost[c.group_id] = ("not_in_kcenter", f"{describe(step)}: {nearest[i]:.6g} from the nearest kept group")
    return kept, reasons | lost


class Farthest:
    """Iterates over the indices of grid points [N, D]: next is always the one farthest from all before (ties: the lower index).

    `nearest` [N] holds the squared distances to the ones seen: all that were yielded before the current one.
    """

    def __init__(self, points: np.ndarray, first: int, block: int | None = None):
        self.points, self.first, self.block = points, first, block
        self.norms = squared_norms(points)
        self.nearest = np.full(len(points), np.inf)

    def __iter__(self) -> Iterator[int]:
        left = np.ones(len(self.points), bool)
        current = self.first
        for _ in range(len(self.points)):
            yield current
            left[current] = False
            self.see(current)
            current = int(np.argmax(np.where(left, self.nearest, -1.0)))

    def see(self, i: int) -> None:
        """Count point i as kept."""
        for part in blocks(len(self.points), self.points.shape[1], self.block):
            distance = self.norms[part] + self.norms[i] - 2.0 * dots(self.points[part], self.points[i : i + 1])[:, 0]
            self.nearest[part] = np.minimum(self.nearest[part], distance)
