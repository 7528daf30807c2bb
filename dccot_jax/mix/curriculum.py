"""Curricula: an order of the groups by difficulty, and how many of them may be used at a step.

A curriculum is a pair: ``order`` (easy to hard) and ``pool_size(step)``; step s draws from the first pool_size(s)
groups of the order. That makes the controls exact: ``anti`` reverses the order and ``random_growing`` shuffles it, both
with the very size curve of the pacing they control (arXiv 2012.03107). Pacing:

    staged       K equal buckets by difficulty, cumulative: stage k of K uses the first ceil(N k / K) groups
    competence   c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)), the first ceil(N c(t)) groups   (arXiv 1903.09848)
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from dccot_jax.mix.groups import Group, PlanError, drop_groups, seeded_order
from dccot_jax.records import Dropped

PACINGS = ("staged", "competence")
CONTROLS = ("anti", "random_growing")


@dataclasses.dataclass(frozen=True)
class Pacing:
    """Share of the groups in use over a run of `total_steps`.

    Attributes:
      kind: ``none`` (all from the start), ``staged`` or ``competence``.
      shares: staged: share of the steps of each stage. c0, full_at: competence: share of the data at step 0, and share
        of the steps T / total_steps after which all are used.
    """

    kind: str = "none"
    shares: tuple[float, ...] = ()
    c0: float = 0.1
    full_at: float = 1.0

    def size(self, step: int, total_steps: int, n: int) -> int:
        """Number of groups in use at `step` of `total_steps`, between 1 and n; never falls as steps go on."""
        if self.kind == "none":
            return n
        if self.kind == "staged":
            stages = len(self.shares)
            ends = stage_ends(self.shares, total_steps)
            stage = min(bisect.bisect_right(ends, step), stages - 1)
            return max(1, -(-n * (stage + 1) // stages))
        horizon = self.full_at * total_steps
        c = 1.0 if step >= horizon else min(1.0, math.sqrt(step * (1.0 - self.c0**2) / horizon + self.c0**2))
        return min(n, max(1, math.ceil(n * c - 1e-9)))


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Groups in the order in which they come into use, and the pacing."""

    order: tuple[Group, ...]
    pacing: Pacing

    def pool_size(self, step: int, total_steps: int) -> int:
        return self.pacing.size(step, total_steps, len(self.order))


def stage_ends(shares: Sequence[float], total_steps: int) -> list[int]:
    """First step after each stage; the last is `total_steps`."""
    whole, done, ends = sum(shares), 0.0, []
    for share in shares:
        done += share
        ends.append(round(total_steps * done / whole))
    return ends


def difficulties(groups: Sequence[Group], name: str, scores: Mapping[str, float | None]) -> dict[str, float]:
    """Difficulty per group id, of the group's leading row; groups without one are missing.

    Args:
      name: ``n_steps``, ``completion_tokens``, ``question_tokens`` or a signal.
      scores: trace id -> value of that signal, where `name` is one.
    """
    known = {
        "n_steps": lambda group: group.n_steps,
        "completion_tokens": lambda group: group.lead.completion_tokens,
        "question_tokens": lambda group: group.lead.prompt_tokens,
    }
    read = known.get(name, lambda group: scores.get(group.lead.id))
    values = {group.id: read(group) for group in groups}
    return {identity: float(value) for identity, value in values.items() if value is not None and not math.isnan(value)}


def build_curriculum(
    cfg: ConfigDict, groups: Sequence[Group], scores: Mapping[str, float | None], *, seed: int
) -> tuple[Curriculum, list[Dropped]]:
    """The curriculum of ``cfg`` (the ``curriculum`` section) over `groups`.

    Groups whose difficulty is missing are dropped and counted, under the controls too, so that arms compare like with
    like. Ties break by id. Raises PlanError if no group has a difficulty, or the pacing cannot work.
    """
    if cfg.kind == "none":
        return Curriculum(tuple(groups), Pacing()), []
    pacing = make_pacing(cfg)
    value = difficulties(groups, cfg.difficulty, scores)
    missing = [group for group in groups if group.id not in value]
    if groups and not value:
        raise PlanError(
            f"config.curriculum.difficulty: no row has a value for {cfg.difficulty!r}; use n_steps, completion_tokens, question_tokens "
            "or a signal named in config.score.signals"
        )
    order = sorted((group for group in groups if group.id in value), key=lambda group: (value[group.id], group.id))
    if cfg.kind == "anti":
        order.reverse()
    elif cfg.kind == "random_growing":
        order = seeded_order(order, seed, "random_growing")
    return Curriculum(tuple(order), pacing), drop_groups(missing, "missing_difficulty", f"no value for {cfg.difficulty!r}")


def make_pacing(cfg: ConfigDict) -> Pacing:
    """Pacing of the ``curriculum`` section; a control follows ``cfg.pacing``. Raises PlanError naming the field at fault."""
    kind = cfg.pacing if cfg.kind in CONTROLS else cfg.kind
    if kind == "staged":
        if cfg.stages < 2:
            raise PlanError(f"config.curriculum.stages: {cfg.stages} must be at least 2 (3 is usual)")
        shares = tuple(float(share) for share in cfg.stage_shares) or (1.0,) * cfg.stages
        if len(shares) != cfg.stages or min(shares) <= 0:
            raise PlanError(f"config.curriculum.stage_shares: {shares} must be {cfg.stages} positive shares")
        return Pacing("staged", shares=shares)
    if kind == "competence":
        if not 0.0 < cfg.c0 <= 1.0:
            raise PlanError(f"config.curriculum.c0: {cfg.c0} must lie in (0, 1]")
        if not 0.0 < cfg.full_at <= 1.0:
            raise PlanError(f"config.curriculum.full_at: {cfg.full_at} must lie in (0, 1]")
        return Pacing("competence", c0=float(cfg.c0), full_at=float(cfg.full_at))
    raise PlanError(f"config.curriculum.pacing: {kind!r} is not one of {', '.join(PACINGS)}")
