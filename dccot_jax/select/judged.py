"""Signals of judges: teachers that grade rows on a rubric (`select/rubrics.py`).

Any teacher that answers requests can judge; its replies are cached and found again like those of the stages that write traces. A reply
that is not a verdict is asked for again, `score.judge.retries` times, as a further sample; a row that stays without a
verdict of any one judge has no score. A signal is the mean over the judges of the mean of its criteria.

Forward parts are judged. The other parts of a group take the value of its forward part (the first by id), as they do for
`student_error`. File: judgements.jsonl, one line per judged row, rubric and judge.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.records import Dropped, Request, Response, Teacher, Trace, derive_seed, user_request
from dccot_jax.select.agreement import agreement
from dccot_jax.select.rubrics import RUBRICS, Rubric, VerdictError, judge_request, read_verdict
from dccot_jax.teachers.build import TeacherError, make_teacher
from dccot_jax.teachers.cache import RequestCache
from dccot_jax.teachers.client import Usage, complete_all
from dccot_jax.teachers.stage import cache_dir

FORWARD = "forward"
FILE = "judgements.jsonl"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one judge said about one row in the end.

    Attributes:
      grades: {criterion: grade}, or None without a verdict. explanation: the judge's own words.
      attempts: requests made. reason: of the last failure where there is no verdict: ``judge_malformed`` (detail: what was wrong),
      ``judge_truncated`` or ``judge_error``.
    """

    grades: Mapping[str, int] | None
    explanation: str
    attempts: int
    reason: str = ""
    detail: str = ""


def make_judges(cfg: ConfigDict) -> list[Teacher]:
    """The teachers of `score.judge.judges`. Raises ConfigError if there is none, one is named twice, or one cannot be made."""
    specs = [dict(spec) for spec in cfg.score.judge.judges]
    if not specs:
        raise ConfigError("config.score.judge.judges: empty; give at least one teacher, e.g. ({'kind': 'scripted', 'style': 'verbose'},)")
    found: list[Teacher] = []
    for place, spec in enumerate(specs):
        try:
            teacher = make_teacher(spec)
        except (TeacherError, ValueError) as error:
            raise ConfigError(f"config.score.judge.judges[{place}]: {error}") from None
        if teacher.name in [other.name for other in found]:
            raise ConfigError(f"config.score.judge.judges[{place}]: a second judge named {teacher.name!r}; judges must differ in name")
        found.append(teacher)
    return found


def judge_rows(
    cfg: ConfigDict, names: Sequence[str], traces: Sequence[Trace], out: ArtifactWriter, ctx: Context
) -> tuple[dict[str, dict[str, float]], list[Dropped], dict[str, Any]]:
    """Columns of the judges' signals `names` over `traces`, rows without a score, and facts; process 0 asks, the others get nothing.

    Facts, per rubric: `judges` (per judge: what it was asked, verdicts, replies that were none, rows lost by reason, mean
    grades) and `agreement` of every pair of judges.
    """
    if not ctx.is_main:
        ctx.barrier("judgements")
        return {}, [], {}
    judges = make_judges(cfg)
    by_id = {trace.id: trace for trace in traces}
    source = _forward_rows(traces)
    asked = sorted({i for i in source.values() if i})
    dropped = [Dropped(row, "no_forward_part", "judge: its group has no forward part in the pool") for row, i in source.items() if not i]
    columns: dict[str, dict[str, float]] = {}
    facts: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    with RequestCache(cache_dir(ctx)) as cache:
        for rubric in RUBRICS:
            wanted = [name for name in rubric.signals if name in names]
            if not wanted:
                continue
            found: dict[str, dict[str, Judgement]] = {}
            about = {}
            for judge in judges:
                found[judge.name], about[judge.name] = _ask(judge, rubric, [by_id[i] for i in asked], cfg, cache, ctx)
                labels = {"rubric": rubric.name, "judge": judge.name}
                lines += [{"id": i, **labels, **dataclasses.asdict(judgement)} for i, judgement in found[judge.name].items()]
            values, lost = _values(rubric, wanted, asked, found)
            for name in wanted:
                columns[name] = {row: values[name][i] for row, i in source.items() if i in values[name]}
            dropped += [dataclasses.replace(lost[i], id=row) for row, i in source.items() if i in lost]
            facts[rubric.name] = {"judges": about, "agreement": _agreements(rubric, found)}
    out.write_text(FILE, "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines))
    ctx.barrier("judgements")
    return columns, dropped, {"judged": facts}


def _forward_rows(traces: Sequence[Trace]) -> dict[str, str]:
    """{row id: id of the row that is judged for it}, "" where the group has no forward part; sorted by id."""
    ordered = sorted(traces, key=lambda t: t.id)
    forward: dict[str, str] = {}
    for trace in ordered:
        if trace.part == FORWARD:
            forward.setdefault(trace.group_id, trace.id)
    return {t.id: t.id if t.part == FORWARD else forward.get(t.group_id, "") for t in ordered}


def _ask(
    judge: Teacher, rubric: Rubric, traces: Sequence[Trace], cfg: ConfigDict, cache: RequestCache, ctx: Context
) -> tuple[dict[str, Judgement], dict[str, Any]]:
    """({trace id: judgement}, facts) of one judge, asked again where its reply is no verdict."""
    settings, usage = cfg.score.judge, Usage()
    found: dict[str, Judgement] = {}
    failures: Counter[str] = Counter()
    left = list(traces)
    for attempt in range(settings.retries + 1):
        if not left:
            break
        requests = [_request(rubric, trace, settings, attempt) for trace in left]
        with ctx.progress(f"{rubric.name}: {judge.name}" + (f", again ({attempt})" if attempt else ""), len(left), "verdicts") as bar:
            responses = complete_all(judge, requests, cache=cache, meter=usage, on_done=bar.advance)
        for trace, response in zip(left, responses, strict=True):
            found[trace.id] = _judgement(rubric, response, attempt + 1)
            failures[found[trace.id].reason] += 1
        left = [trace for trace in left if found[trace.id].grades is None]
    graded = [j.grades for j in found.values() if j.grades is not None]
    return found, {
        **usage.as_dict(),
        "rows": len(traces),
        "verdicts": len(graded),
        "no_verdict_replies": {reason: count for reason, count in sorted(failures.items()) if reason},
        "rows_without_verdict": dict(sorted(Counter(j.reason for j in found.values() if j.grades is None).items())),
        "mean": {name: round(sum(g[name] for g in graded) / len(graded), 4) for name in rubric.criteria} if graded else {},
    }


def _request(rubric: Rubric, trace: Trace, settings: Any, attempt: int) -> Request:
    text = judge_request(rubric, trace.question, trace.choices, trace.target)
    return user_request(
        text,
        temperature=float(settings.temperature),
        max_tokens=int(settings.max_tokens),
        seed=derive_seed(0, "judge", attempt) % (1 << 31),  # services take 32-bit seeds
        sample_index=attempt,
    )


def _judgement(rubric: Rubric, response: Response, attempts: int) -> Judgement:
    if response.finish_reason == "error":
        return Judgement(None, "", attempts, "judge_error", response.error)
    if response.finish_reason == "length":
        return Judgement(None, "", attempts, "judge_truncated", "the reply was cut at score.judge.max_tokens")
    try:
        grades, explanation = read_verdict(rubric, response.text)
    except VerdictError as error:
        return Judgement(None, "", attempts, "judge_malformed", str(error))
    return Judgement(grades, explanation, attempts)


def _values(
    rubric: Rubric, wanted: Sequence[str], asked: Sequence[str], found: Mapping[str, Mapping[str, Judgement]]
) -> tuple[dict[str, dict[str, float]], dict[str, Dropped]]:
    """({signal: {row id: value}}, {row id: why it has none}); every judge counts alike."""
    values: dict[str, dict[str, float]] = {name: {} for name in wanted}
    lost: dict[str, Dropped] = {}
    for row in asked:
        silent = [(name, judgements[row]) for name, judgements in found.items() if judgements[row].grades is None]
        if silent:
            name, last = silent[0]
            lost[row] = Dropped(row, last.reason, f"{rubric.name}: {name}, {last.attempts} times; the last: {last.detail}")
            continue
        for signal in wanted:
            criteria = rubric.signals[signal]
            grades = [(j[row].grades or {})[criterion] for j in found.values() for criterion in criteria]
            values[signal][row] = float(Fraction(sum(grades), len(grades)))
    return values, lost


def _agreements(rubric: Rubric, found: Mapping[str, Mapping[str, Judgement]]) -> list[dict[str, Any]]:
    """Agreement of every pair of judges over the rows that both have graded."""
    graded = {name: {row: dict(j.grades) for row, j in judgements.items() if j.grades is not None} for name, judgements in found.items()}
    return [
        {"judges": [a, b], **agreement(graded[a], graded[b], criteria=tuple(rubric.criteria), thresholds=rubric.thresholds)}
        for a, b in itertools.combinations(graded, 2)
    ]
