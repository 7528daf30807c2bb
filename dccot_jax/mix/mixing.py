"""Mixes: how much of each kind of trace the student sees. Pure functions from groups to kept groups and drop reasons.

Length and teacher mix (arXiv 2502.12143), two parts A (long; strong teachers) and B (the rest):

    D_mix(alpha) = sample(A, round(alpha M))  U  sample(B, M - round(alpha M))

without replacement, in a seeded order, M fixed (or as large as both parts allow). ``pooled`` samples from all groups;
``per_question`` uses every question that has both kinds once: of M questions, in a seeded order, round(alpha M) give
their A group and the others their B group. Domain mix: a quota per task, by given weights or n^(1/temperature).
Totals count groups (a Reverse triple is one example) or completion tokens; in tokens each quota is filled up to the
last group that fits.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dccot_jax.mix.groups import Group, PlanError, drop_groups, seeded_order
from dccot_jax.records import Dropped


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Kept groups (sorted by id), dropped rows, and figures for the manifest."""

    groups: list[Group]
    dropped: list[Dropped]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Total:
    """Fixed size of a mix: `examples` groups or `tokens` completion tokens; both 0: as many as there are."""

    examples: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.examples and self.tokens:
            raise PlanError("config.mix: total_examples and total_tokens are both set; give one")
        if self.examples < 0 or self.tokens < 0:
            raise PlanError("config.mix: total_examples and total_tokens cannot be negative")


def subset(groups: Sequence[Group], total: Total, *, seed: int) -> Mixed:
    """No mix: all groups, or a random share of fixed size."""
    return _fill({"all": list(groups)}, {"all": 1.0}, total, seed=seed)


def is_long(groups: Sequence[Group], long: Sequence[str] = ()) -> dict[str, bool]:
    """Per group id: is it long? By style or level if `long` names some, else by the leading row's completion tokens
    above the median of its task."""
    if long:
        names = {str(name) for name in long}
        return {group.id: group.style in names or group.level in names for group in groups}
    by_task: dict[str, list[int]] = {}
    for group in groups:
        by_task.setdefault(group.task, []).append(group.lead.completion_tokens)
    medians = {task: statistics.median(values) for task, values in by_task.items()}
    return {group.id: group.lead.completion_tokens > medians[group.task] for group in groups}


def is_strong(groups: Sequence[Group], strong: Sequence[str]) -> dict[str, bool]:
    """Per group id: was it written by one of the strong teachers? Raises PlanError if none are named."""
    if not strong:
        raise PlanError(f"config.mix.strong: empty; name the strong teachers, of {_names(group.teacher for group in groups)}")
    names = {str(name) for name in strong}
    return {group.id: group.teacher in names for group in groups}


def two_part_mix(
    groups: Sequence[Group], in_a: Mapping[str, bool], alpha: float, total: Total, *, mode: str, seed: int, labels: tuple[str, str]
) -> Mixed:
    """Length or teacher mix.

    Args:
      in_a: group id -> does it belong to part A. alpha: share of part A. mode: ``pooled`` or ``per_question``.
      labels: names of part A and B for figures and messages, e.g. ("long", "short").
    Raises PlanError if a part holds less than the mix needs.
    """
    parts = {label: [group for group in groups if in_a[group.id] == flag] for label, flag in zip(labels, (True, False))}
    if mode == "pooled":
        return _fill(parts, {labels[0]: alpha, labels[1]: 1.0 - alpha}, total, seed=seed)
    if mode != "per_question":
        raise PlanError(f"config.mix.mode: {mode!r} is not one of pooled, per_question")
    return _per_question(parts, alpha, total, seed=seed)


def domain_mix(groups: Sequence[Group], weights: Mapping[str, float], temperature: float, total: Total, *, mode: str, seed: int) -> Mixed:
    """A quota per task: by `weights` (tasks without one get nothing), else by n^(1/temperature), n groups per task.

    ``per_question`` first keeps one group per question. Raises PlanError on unusable weights or too few groups.
    """
    dropped: list[Dropped] = []
    if mode == "per_question":
        groups, dropped = _one_per_question(groups, seed=seed)
    parts: dict[str, list[Group]] = {}
    for group in groups:
        parts.setdefault(group.task, []).append(group)
    if weights:
        unknown = sorted(set(weights) - set(parts))
        if unknown or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise PlanError(f"config.mix.weights: {dict(weights)} must be non-negative weights of tasks that have rows: {_names(parts)}")
        shares = {task: float(weights.get(task, 0.0)) for task in parts}
    elif temperature <= 0:
        raise PlanError(f"config.mix.temperature: {temperature} must be positive")
    else:
        shares = {task: len(members) ** (1.0 / temperature) for task, members in parts.items()}
    mixed = _fill(parts, shares, total, seed=seed)
    return dataclasses.replace(mixed, dropped=mixed.dropped + dropped)


def quotas(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` split by `shares`, whole numbers, each within one of its exact share (largest remainder, ties by name)."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    found = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    rest = total - sum(found.values())
    for name in sorted(exact, key=lambda name: (-(exact[name] - found[name]), name))[:rest]:
        found[name] += 1
    return found


def _fill(parts: Mapping[str, list[Group]], shares: Mapping[str, float], total: Total, *, seed: int) -> Mixed:
    """Sample each part's quota without replacement."""
    kept: list[Group] = []
    dropped: list[Dropped] = []
    wanted = _token_quotas(parts, shares, total) if total.tokens else _example_quotas(parts, shares, total)
    for name, members in sorted(parts.items()):
        order = seeded_order(members, seed, "mix")
        count = _fit(order, wanted[name]) if total.tokens else wanted[name]
        kept += order[:count]
        dropped += drop_groups(order[count:], "mix_quota", f"part {name}: its share was full")
    return _mixed(kept, dropped, parts)


def _example_quotas(parts: Mapping[str, list[Group]], shares: Mapping[str, float], total: Total) -> dict[str, int]:
    sizes = {name: len(members) for name, members in parts.items()}
    if total.examples:
        wanted = quotas(total.examples, shares)
        short = [name for name in sorted(parts) if wanted[name] > sizes[name]]
        if short:
            raise PlanError(
                f"config.mix.total_examples: {total.examples} needs {wanted[short[0]]} groups of part {short[0]!r}, "
                f"and there are {sizes[short[0]]}"
            )
        return wanted
    empty = [name for name in sorted(parts) if not sizes[name] and shares[name] > 0]
    if empty:
        raise PlanError(
            f"config.mix: no group of part {empty[0]!r}, which should make up {shares[empty[0]] / sum(shares.values()):.0%} of the mix"
        )
    low, high = 0, sum(sizes.values())  # the largest total whose quotas all parts can fill; `low` always can be filled
    while low < high:
        middle = (low + high + 1) // 2
        if all(count <= sizes[name] for name, count in quotas(middle, shares).items()):
            low = middle
        else:
            high = middle - 1
    return quotas(low, shares)


def _token_quotas(parts: Mapping[str, list[Group]], shares: Mapping[str, float], total: Total) -> dict[str, int]:
    wanted = quotas(total.tokens, shares)
    for name, members in sorted(parts.items()):
        held = sum(group.completion_tokens for group in members)
        if wanted[name] > held:
            raise PlanError(
                f"config.mix.total_tokens: {total.tokens:,} needs {wanted[name]:,} completion tokens of part {name!r}, "
                f"and there are {held:,}"
            )
    return wanted


def _fit(order: Sequence[Group], budget_tokens: int) -> int:
    """How many groups of the order fit the budget, stopping at the first that does not."""
    used = 0
    for place, group in enumerate(order):
        used += group.completion_tokens
        if used > budget_tokens:
            return place
    return len(order)


def _per_question(parts: Mapping[str, list[Group]], alpha: float, total: Total, *, seed: int) -> Mixed:
    (name_a, name_b) = parts
    dropped: list[Dropped] = []
    single: dict[str, dict[str, Group]] = {}
    for name, members in parts.items():
        single[name], repeats = _by_question(members, seed=seed)
        dropped += repeats
    both = sorted(set(single[name_a]) & set(single[name_b]))
    for name, other in ((name_a, name_b), (name_b, name_a)):
        alone = [group for question, group in single[name].items() if question not in single[other]]
        dropped += drop_groups(alone, "mix_one_source", f"its question has no {other} group")
    order = [group.question for group in seeded_order([single[name_a][question] for question in both], seed, "mix")]
    if not order:
        raise PlanError(f"config.mix: no question has both a {name_a} and a {name_b} group; use mode 'pooled'")
    if total.examples > len(order):
        raise PlanError(
            f"config.mix.total_examples: {total.examples} questions wanted, and {len(order)} have both a {name_a} and a {name_b} group"
        )
    # Question k gives its A group when round(alpha k) steps up: every prefix of the order has the ratio within one item.
    chosen = [single[name_a if _rounded(alpha * (k + 1)) > _rounded(alpha * k) else name_b][question] for k, question in enumerate(order)]
    if total.tokens:
        held = sum(group.completion_tokens for group in chosen)
        if total.tokens > held:
            raise PlanError(f"config.mix.total_tokens: {total.tokens:,} wanted, and the mix of all {len(order)} questions has {held:,}")
        chosen = chosen[: _fit(chosen, total.tokens)]
    elif total.examples:
        chosen = chosen[: total.examples]
    ids = {group.id for group in chosen}
    rest = [part[question] for part in single.values() for question in both if part[question].id not in ids]
    return _mixed(chosen, dropped + drop_groups(rest, "mix_quota", "its question uses the other group, or the mix was full"), parts)


def _rounded(value: float) -> int:
    return math.floor(value + 0.5 + 1e-9)


def _by_question(groups: Sequence[Group], *, seed: int) -> tuple[dict[str, Group], list[Dropped]]:
    found: dict[str, Group] = {}
    repeats: list[Group] = []
    for group in seeded_order(groups, seed, "mix"):
        if group.question in found:
            repeats.append(group)
        else:
            found[group.question] = group
    return found, drop_groups(repeats, "mix_repeated_question", "another group of its question was drawn")


def _one_per_question(groups: Sequence[Group], *, seed: int) -> tuple[list[Group], list[Dropped]]:
    found, dropped = _by_question(groups, seed=seed)
    return sorted(found.values(), key=lambda group: group.id), dropped


def _mixed(kept: Sequence[Group], dropped: list[Dropped], parts: Mapping[str, list[Group]]) -> Mixed:
    ids = {group.id for group in kept}
    facts = {}
    for name, members in sorted(parts.items()):
        inside = [group for group in members if group.id in ids]
        facts[name] = {"groups": len(inside), "of": len(members), "completion_tokens": sum(group.completion_tokens for group in inside)}
    return Mixed(sorted(kept, key=lambda group: group.id), dropped, facts)


def _names(values: Any) -> str:
    return ", ".join(sorted({str(value) or "(none)" for value in values})) or "(none)"
