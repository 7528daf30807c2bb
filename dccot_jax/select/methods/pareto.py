"""Pareto selection of two signals: what nothing else beats in both, front by front."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np

from dccot_jax.select.budget import budget_of, take
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, with_values


def pareto(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Keep the first Pareto front of two `signals`, or with a budget front after front until it is spent.

    `prefer`: "high" or "low" for each signal. A front that does not fit is thinned by crowding distance, the most
    isolated first (NSGA-II, Deb et al. 2002), then by id.
    """
    names, prefer = tuple(step["signals"]), tuple(step.get("prefer", ("high", "high")))
    scored, reasons = with_values(candidates, *names)
    scored = sorted(scored, key=lambda c: c.group_id)
    points = np.array([[c.values[n] * (1.0 if p == "high" else -1.0) for n, p in zip(names, prefer)] for c in scored], np.float64)
    fronts = pareto_fronts(points.reshape(-1, 2))
    crowding = np.zeros(len(scored))
    for front in range(int(fronts.max(initial=-1)) + 1):
        members = np.flatnonzero(fronts == front)
        crowding[members] = crowding_distance(points[members])
    order = sorted(range(len(scored)), key=lambda i: (fronts[i], -crowding[i], i))
    place = {scored[i].group_id: int(fronts[i]) + 1 for i in order}
    budget = budget_of(step, candidates)
    if math.isinf(budget.limit):
        kept = [scored[i] for i in order if fronts[i] == 0]
        lost = {c.group_id: ("not_on_front", f"pareto: front {place[c.group_id]}") for c in scored if place[c.group_id] > 1}
    else:
        kept, lost = take([scored[i] for i in order], step, budget, "not_in_pareto", lambda c: f", front {place[c.group_id]}")
    return kept, reasons | lost


def pareto_fronts(points: np.ndarray) -> np.ndarray:
    """Front number (0 best) of each of [N, 2] points, larger being better; equal points share a front. O(N log N).

    A point dominates another if it is at least as good in both and better in one. Swept by falling first coordinate, a
    point belongs to the first front whose best second coordinate so far does not dominate it.
    """
    order = np.lexsort((-points[:, 1], -points[:, 0]))
    fronts = np.zeros(len(points), np.int64)
    lowest: list[float] = []  # per front, minus its best second coordinate so far: ascending, since later fronts are worse
    previous = -1
    for i in order:
        if previous >= 0 and np.array_equal(points[i], points[previous]):
            fronts[i] = fronts[previous]
        else:
            # A front whose best is no smaller dominates it: the first coordinate is no smaller there, and the points differ.
            height = -float(points[i, 1])
            fronts[i] = front = bisect.bisect_right(lowest, height)
            lowest[front : front + 1] = [height]
        previous = i
    return fronts


def crowding_distance(points: np.ndarray) -> np.ndarray:
    """Crowding distance of the [N, 2] points of one front: infinite at its ends, else the sum of its neighbours' relative gaps."""
    distance = np.zeros(len(points))
    for axis in range(points.shape[1]):
        order = np.lexsort((np.arange(len(points)), points[:, axis]))
        values = points[order, axis]
        spread = values[-1] - values[0]
        distance[order[[0, -1]]] = np.inf
        if spread > 0 and len(points) > 2:
            distance[order[1:-1]] += (values[2:] - values[:-2]) / spread
    return distance
