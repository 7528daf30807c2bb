"""Stage ``augment``: the configured methods, one after the other, each on the original traces.

Reads: traces. Writes ``traces.parquet`` (originals and new rows; lineage in ``parent_ids``) and ``dropped.parquet`` (every
rejected sample with its reason; originals that became part of a reverse group as ``in_group:reverse``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, table_hash
from dccot_jax.augment.answer import augment_answers
from dccot_jax.augment.question import new_questions
from dccot_jax.augment.rephrase import rephrase_questions
from dccot_jax.augment.reverse import reverse_thinking
from dccot_jax.augment.seeds import Asker, Outcome, Seed, Settings, seeds_of
from dccot_jax.context import Context
from dccot_jax.records import Dropped, Request, Response, Trace, table_to_traces, traces_to_table
from dccot_jax.tasks.registry import get_task
from dccot_jax.teachers.build import make_teacher
from dccot_jax.teachers.cache import RequestCache
from dccot_jax.teachers.client import Usage, complete_all
from dccot_jax.teachers.stage import cache_dir

METHODS: dict[str, Callable[[Sequence[Seed], Settings, Asker], Outcome]] = {
    "rephrase": rephrase_questions,
    "question": new_questions,
    "answer": augment_answers,
    "reverse": reverse_thinking,
}


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Augment. The manifest's facts hold, per method, what was asked, made and rejected."""
    if not ctx.is_main:
        ctx.barrier("augment")
        return StageResult("")
    originals = table_to_traces(inputs["traces"].table("traces"))
    with RequestCache(cache_dir(ctx)) as cache:
        traces, dropped, facts = augment(originals, cfg, cache, ctx)
    table = traces_to_table(traces)
    out.write_table("traces", table)
    counts = out.write_dropped(dropped)
    ctx.log(f"  {len(originals):,} original traces, {len(traces):,} after augmentation; dropped: {counts or 'none'}")
    ctx.barrier("augment")
    source = inputs["traces"].facts
    kept = {name: source[name] for name in ("task", "split", "train_split_hash") if name in source}
    return StageResult(
        logical_hash=table_hash(table), rows_in=len(originals), rows_out=len(traces), dropped=counts, facts=kept | {"methods": facts}
    )


def augment(
    originals: Sequence[Trace], cfg: ConfigDict, cache: RequestCache, ctx: Context
) -> tuple[list[Trace], list[Dropped], dict[str, dict[str, Any]]]:
    """(all traces, dropped, facts per method). New traces follow the originals, in the order of the methods."""
    teacher = make_teacher(dict(cfg.augment.teacher))
    settings = Settings(
        temperature=float(cfg.augment.temperature),
        max_tokens=int(cfg.augment.max_tokens),
        answers=cfg.augment.answers,
        rephrasings=cfg.augment.rephrasings,
        votes=cfg.augment.votes,
        agreement=cfg.augment.agreement,
        root=cfg.traces.seed,
    )
    seeds, without_gold = seeds_of(originals, get_task)
    dropped: list[Dropped] = []
    consumed: dict[str, str] = {}
    made: list[Trace] = []
    facts: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(cfg.augment.methods):
        usage = Usage()

        def ask(requests: Sequence[Request], label: str, usage: Usage = usage) -> list[Response]:
            with ctx.progress(f"augment {label}", len(requests), "requests") as bar:

                def done(count: int) -> None:
                    bar.advance(count)
                    ctx.stop_alone("augment: answers are cached")

                responses = complete_all(teacher, requests, cache=cache, meter=usage, on_done=done)
            return responses

        outcome = METHODS[method](seeds, settings, Asker(teacher, ask))
        dropped += outcome.dropped
        dropped += [Dropped(f"{trace.id}/{method}/0", f"{method}:missing_gold") for trace in without_gold]
        consumed |= outcome.consumed
        made += outcome.traces
        facts[method] = {"questions": len(seeds), "traces": len(outcome.traces), "rejected": len(outcome.dropped), **usage.as_dict()}
    dropped += [Dropped(trace.id, "in_group:reverse", consumed[trace.id]) for trace in originals if trace.id in consumed]
    rows: dict[str, Trace] = {}
    for trace in [*(trace for trace in originals if trace.id not in consumed), *made]:
        if trace.id in rows:
            dropped.append(Dropped(trace.id, "duplicate", trace.method))
        rows.setdefault(trace.id, trace)
    return list(rows.values()), dropped, facts
