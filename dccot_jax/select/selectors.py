"""Selectors: pure functions from candidate groups to the kept ones, with a reason for every dropped row.

A step of `config.select.steps` is a dict {"name": ..., options}; steps apply in order, each to what the one before kept.

  none                keep all
  teacher_correct     keep groups whose forward part was verified correct and no part of which was found wrong
  student_error       keep groups whose question the student answers wrongly (`student_error` column = 1)
  threshold           `signal`, `min` and/or `max`, inclusive
  quantile            `signal`, `low` and/or `high` in [0, 1]: a window of ranks, lowest value first
  top | bottom        `signal`, budget: highest / lowest first
  middle              `signal`, budget: nearest to the middle rank first
  random              budget, or `match`: {another step}: as many as that step would keep of the same candidates
                      (`by`: "rows" (default) or "tokens"); `stream`: a name, another one draws independently
  gumbel_topk         `signal`, budget, `temperature`, `prefer`: without replacement, ~ exp(signal / temperature)
  stratified          `by` a label (or `bins` of a signal), budget, `allocation`, `signal`, `prefer`
  per_question_best   `signal`, `prefer`, `count`
  pareto              `signals` (two), `prefer` (two), budget or the first front
  deita               `signals` (their product; of several none may be negative), `vector`, `tau`, budget or none
  kcenter             `vector`, budget
  facility_location   `vector`, budget
  semdedup            `vector`, `epsilon`, `clusters`
  minhash             `text`, `threshold`, `ngram`, `signal`, `prefer`
  dsir                `target` (a task), budget, `text`, `sample`, `buckets`
  s1k                 `by` (a label), budget, `signal`, `weights`
  limo                budget
  less_topk           budget, `tasks`: the sub-tasks of `score.gradients.validation` that count (all)
  s2l                 `vector`, budget, `clusters`

Budget: exactly one of `rows` (traces), `tokens` (completion tokens of the student's tokenizer) or `share` (of the rows
that enter the step, rounded down). Candidates are taken in rank order until the next one would exceed the budget, so a
larger budget of a ranking keeps a superset. `signal` is any score column of numbers, or `completion_tokens`,
`prompt_tokens`, `n_steps`; `vector` a column of vectors. What a method computes stands in its file in `select/methods/`.

Rows of one method instance share a group; a group is kept or dropped whole. Its value of a signal is the mean over its
forward parts: they are what the student has to do at test time (a group without a forward part: the mean over all
parts). A group that lacks the value is dropped with reason ``no_score_<signal>``. Ties break by group id, ascending.
Random choices hang on the seed and the group's id. No result depends on the order of the candidates.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from dccot_jax.records import Dropped, count_reasons
from dccot_jax.select import options as option
from dccot_jax.select.budget import BUDGETS, budget_of
from dccot_jax.select.candidates import Candidate, Selected, SelectionError, Setting, Step, describe, rows, tokens
from dccot_jax.select.methods import drawn, filters, ranked
from dccot_jax.select.methods.deita import deita
from dccot_jax.select.methods.dsir import corpus_name, dsir
from dccot_jax.select.methods.facility_location import facility_location
from dccot_jax.select.methods.kcenter import kcenter
from dccot_jax.select.methods.less_topk import less_topk
from dccot_jax.select.methods.limo import limo
from dccot_jax.select.methods.minhash import minhash
from dccot_jax.select.methods.pareto import pareto
from dccot_jax.select.methods.per_question import per_question_best
from dccot_jax.select.methods.s1k import s1k
from dccot_jax.select.methods.s2l import s2l
from dccot_jax.select.methods.semdedup import semdedup
from dccot_jax.select.methods.stratified import stratified
from dccot_jax.select.options import Columns, Rule, check_step, step_reads

_COUNTED = {"rows": "rows", "tokens": "completion tokens"}


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


_RANKED = {"signal": option.signal(required=True)}
RULES: dict[str, Rule] = {
    "none": Rule(filters.none),
    "teacher_correct": Rule(filters.teacher_correct),
    "student_error": Rule(filters.student_error, reads=("student_error",)),
    "threshold": Rule(filters.threshold, _RANKED | {"min": option.number(), "max": option.number()}),
    "quantile": Rule(ranked.quantile, _RANKED | {"low": option.number(0, 1), "high": option.number(0, 1)}),
    "top": Rule(ranked.top, _RANKED, "required"),
    "bottom": Rule(ranked.bottom, _RANKED, "required"),
    "middle": Rule(ranked.middle, _RANKED, "required"),
    "random": Rule(
        drawn.random,
        {"match": option.anything(), "by": option.anything(), "stream": option.string("control")},
        "required",
    ),
    "gumbel_topk": Rule(drawn.gumbel_topk, _RANKED | {"temperature": option.number(0, above=True), "prefer": option.prefer()}, "required"),
    "stratified": Rule(
        stratified,
        {"by": option.anything(), "bins": option.whole(2), "allocation": option.one_of("proportional", "equal")}
        | {"signal": option.signal(), "prefer": option.prefer()},
        "required",
    ),
    "per_question_best": Rule(per_question_best, _RANKED | {"prefer": option.prefer(), "count": option.whole(1)}),
    "pareto": Rule(pareto, {"signals": option.signals(count=2), "prefer": option.pair_of("high", "low")}, "optional"),
    "deita": Rule(deita, {"signals": option.signals(), "vector": option.vector(), "tau": option.number(-1, 1)}, "optional"),
    "kcenter": Rule(kcenter, {"vector": option.vector()}, "required"),
    "facility_location": Rule(facility_location, {"vector": option.vector()}, "required"),
    "semdedup": Rule(semdedup, {"vector": option.vector(), "epsilon": option.number(1e-6, 1), "clusters": option.whole(1)}),
    "minhash": Rule(
        minhash,
        {"text": option.text(), "threshold": option.number(0, 1, above=True), "ngram": option.whole(1)}
        | {"signal": option.signal(), "prefer": option.prefer()},
    ),
    "dsir": Rule(
        dsir,
        {"target": option.train_task(), "text": option.one_of("question", "full"), "sample": option.one_of(True, False)}
        | {"buckets": option.whole(2)},
        "required",
    ),
    "s1k": Rule(s1k, {"by": option.label(), "signal": option.signal(), "weights": option.weights()}, "required"),
    "limo": Rule(limo, {}, "required"),
    "less_topk": Rule(less_topk, {"tasks": option.subtasks()}, "required", reads=("less",)),
    "s2l": Rule(s2l, {"vector": option.vector(), "clusters": option.whole(1)}, "required"),
}


def apply_steps(
    candidates: Sequence[Candidate],
    steps: Sequence[Step],
    *,
    seed: int,
    available: Sequence[str],
    vectors: Sequence[str] = (),
    corpora: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Candidate], list[Dropped], list[StepReport]]:
    """Apply `steps` in order.

    Args:
      candidates: all groups. seed: root seed of the run. available, vectors: columns of numbers and of vectors at hand.
      corpora: the texts that `required_corpora` names.

    Returns:
      kept candidates sorted by group id, dropped rows sorted by id, one report per step.

    Raises ConfigError on a malformed step or a signal that was not scored, SelectionError as soon as nothing is left, or for
    values that a step cannot use.
    """
    check_steps(steps, available, vectors)
    kept = sorted(candidates, key=lambda c: c.group_id)
    if not kept:
        raise SelectionError("selection: no rows to select from")

    def run(pool: Sequence[Candidate], step: Step) -> Selected:
        return RULES[step["name"]].run(pool, step, setting)

    setting = Setting(seed, corpora or {}, run)
    dropped: list[Dropped] = []
    reports = []
    for index, step in enumerate(steps):
        before = kept
        chosen, reasons = run(before, step)
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
            why = _too_small(before, step, run)
            raise SelectionError(f"config.select.steps[{index}] ({describe(step)}): kept 0 of {rows(before)} rows ({counts}){why}")
    return kept, sorted(dropped, key=lambda d: d.id), reports


def check_steps(steps: Sequence[Step], available: Sequence[str] | None = None, vectors: Sequence[str] = ()) -> None:
    """Check names, options and budgets before any work; with `available`, also that every signal and vector was scored.

    Raises ConfigError naming the step, the option and what would be accepted.
    """
    columns = None if available is None else Columns(available, vectors)
    for index, step in enumerate(steps):
        check_step(step, f"config.select.steps[{index}]", RULES, columns)


def required_signals(steps: Sequence[Step]) -> tuple[str, ...]:
    """Score columns that `steps` read, sorted: what `config.score.signals` must contain."""
    return tuple(sorted({name for step in steps for name in step_reads(step, RULES)}))


def required_corpora(steps: Sequence[Step]) -> dict[str, str]:
    """{key of the target texts: task} that `steps` need, `match`ed ones included; a key is ``<task>:<text>``."""
    found: dict[str, str] = {}
    for step in steps:
        if step["name"] == "dsir":
            found[corpus_name(step)] = step["target"]
        if "match" in step:
            found |= required_corpora([step["match"]])
    return found


def _too_small(before: Sequence[Candidate], step: Step, run: Callable[[Sequence[Candidate], Step], Selected]) -> str:
    """Why the budget of a step that kept nothing holds not one group; "" if it is not the budget's doing."""
    if not set(BUDGETS) & set(step):
        return ""
    budget = budget_of(step, before)
    if not budget.limit:
        return f": a share of {step['share']} of {rows(before)} rows is 0 rows, rounded down"
    free = {key: value for key, value in step.items() if key not in BUDGETS}
    costs = sorted({budget.cost(candidate) for candidate in before})
    # The first group costs the smallest budget that keeps any.
    place = bisect.bisect_left(costs, True, key=lambda cost: bool(run(before, free | {budget.by: cost})[0]))
    if place == len(costs) or costs[place] <= budget.limit:
        return ""
    return f": the first group alone has {costs[place]:,} {_COUNTED[budget.by]}, the budget is {budget.limit:,}"


def _report(step: Step, before: Sequence[Candidate], after: Sequence[Candidate], gone: Sequence[Dropped]) -> StepReport:
    return StepReport(
        step=describe(step),
        rows_in=rows(before),
        rows_out=rows(after),
        groups_in=len(before),
        groups_out=len(after),
        tokens_in=tokens(before),
        tokens_out=tokens(after),
        dropped=count_reasons(gone),
    )
