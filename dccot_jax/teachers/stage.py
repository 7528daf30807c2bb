"""Stage ``traces``: every teacher of the config answers the training questions, or its finished traces are read.

Reads: the task's training rows, teachers. Writes ``traces.parquet``, ``dropped.parquet``. A trace's prompt stays None: it is
the task's own prompt. Fails on unknown tasks and teachers, on missing data, on files that cannot be read, and on replayed
files that were made on another public split of the task, and where not one trace is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, table_hash
from dccot_jax.context import Context
from dccot_jax.records import Dropped, Request, Trace, count_reasons, derive_seed, traces_to_table, user_request
from dccot_jax.tasks.base import Item, Task
from dccot_jax.tasks.registry import build_prompt, get_task, load_items, split_hash
from dccot_jax.teachers.build import TeacherError, make_teacher
from dccot_jax.teachers.cache import RequestCache
from dccot_jax.teachers.client import Usage, complete_all
from dccot_jax.teachers.replay import replay, replay_spec
from dccot_jax.teachers.rows import answered_trace, item_fields, reply_fields, split_tag, target_text


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Collect traces. The manifest's facts hold the split's hash and what every teacher did."""
    if not ctx.is_main:
        ctx.barrier("traces")
        return StageResult("")
    task = get_task(cfg.traces.task)
    specs = [dict(spec) for spec in cfg.traces.teachers]
    data_dir = ctx.data_dir or (Path(cfg.data_dir).expanduser() if cfg.data_dir else None)
    items = load_items(task.name, "train", data_dir)
    asked = load_items(task.name, "train", data_dir, limit=cfg.traces.questions) if cfg.traces.questions else items
    replays = any(spec.get("kind") == "replay" for spec in specs)
    test = load_items(task.name, "test", data_dir) if replays and "test" in task.splits else []
    whole_hash = split_hash(items)
    split = split_tag("train", whole_hash)
    traces: list[Trace] = []
    dropped: list[Dropped] = []
    teachers: dict[str, dict[str, int]] = {}
    rows_in = 0
    with RequestCache(cache_dir(ctx)) as cache:
        for spec in specs:
            if spec.get("kind") == "replay":
                checked = replay_spec(spec)
                wanted = {item.id for item in asked}
                found = replay(checked, task, items, split=split, data_dir=data_dir, wanted=wanted, test=test)
                new, lost, label, facts = found.traces, found.dropped, f"replay:{checked.name}:{checked.level or checked.style}", {}
                rows_in += found.rows
            else:
                teacher = make_teacher(spec)
                usage = Usage()
                new, lost = _generate(teacher, task, asked, cfg, split, cache, usage, ctx)
                label, facts = teacher.name, usage.as_dict()
                rows_in += usage.requests
            traces += new
            dropped += lost
            while label in teachers:
                label += "+"
            teachers[label] = {"traces": len(new), "dropped": len(lost), **facts}
    if not traces:
        raise TeacherError(_nothing(task, rows_in, specs, dropped))
    traces = _distinct(traces, dropped)
    table = traces_to_table(traces)
    out.write_table("traces", table)
    counts = out.write_dropped(dropped)
    ctx.log(f"  {len(traces):,} traces of {len({trace.question for trace in traces}):,} questions; dropped: {counts or 'none'}")
    ctx.barrier("traces")
    return StageResult(
        logical_hash=table_hash(table),
        rows_in=rows_in,
        rows_out=len(traces),
        dropped=counts,
        facts={
            "task": task.name,
            "split": split,
            "train_split_hash": whole_hash,
            "train_items": len(items),
            "questions": len(asked),
            "teachers": teachers,
        },
    )


def cache_dir(ctx: Context) -> epath.Path:
    """Where responses of every teacher are kept, shared by all arms and runs of a workdir."""
    return epath.Path(ctx.workdir) / "cache" / "teachers"


def _nothing(task: Task, rows: int, specs: Sequence[Mapping[str, Any]], dropped: Sequence[Dropped]) -> str:
    """Why no trace came of `rows` requests and rows of files."""
    sources = ", ".join(str(name) for spec in specs for name in spec.get("files", (f"teacher {spec.get('kind')}",)))
    counts = ", ".join(f"{reason} {count:,}" for reason, count in count_reasons(dropped).items())
    why = f"dropped: {counts}; e.g. {dropped[0].id}: {dropped[0].detail or dropped[0].reason}" if dropped else "nothing was there to read"
    return f"config.traces.teachers: not one trace of task {task.name!r} came of {rows:,} requests and rows ({sources}); {why}"


def _generate(
    teacher: Any, task: Task, items: Sequence[Item], cfg: ConfigDict, split: str, cache: RequestCache, usage: Usage, ctx: Context
) -> tuple[list[Trace], list[Dropped]]:
    """Traces of one teacher, `cfg.traces.samples` per question; failures and cut replies are dropped with a reason."""
    jobs = [(item, _request(task, item, cfg, sample)) for item in items for sample in range(cfg.traces.samples)]
    with ctx.progress(f"traces {teacher.name}", len(jobs), "requests") as bar:

        def done(count: int) -> None:
            bar.advance(count)
            ctx.stop_alone("traces: answers are cached")

        responses = complete_all(teacher, [request for _, request in jobs], cache=cache, meter=usage, on_done=done)
    traces, dropped = [], []
    for (item, request), response in zip(jobs, responses, strict=True):
        place = f"{item.id}/{teacher.name}/{request.sample_index}"
        target = target_text(response)
        if response.finish_reason == "error":
            dropped.append(Dropped(place, "teacher_error", response.error))
        elif response.finish_reason == "length":
            dropped.append(Dropped(place, "truncated", f"cut at {request.max_tokens} tokens"))
        elif not target:
            dropped.append(Dropped(place, "empty_reply"))
        else:
            traces.append(answered_trace(target, **item_fields(item, task, split), **reply_fields(teacher, request, response)))
    return traces, dropped


def _request(task: Task, item: Item, cfg: ConfigDict, sample: int) -> Request:
    seed = derive_seed(cfg.traces.seed, "traces", item.id, sample) % (1 << 31)  # services take 32-bit seeds
    return user_request(
        build_prompt(task, item.question, item.choices),
        temperature=float(cfg.traces.temperature),
        max_tokens=int(cfg.traces.max_tokens),
        seed=seed,
        sample_index=sample,
    )


def _distinct(traces: Sequence[Trace], dropped: list[Dropped]) -> list[Trace]:
    """Each id once; the same trace from two specs is counted as a duplicate."""
    found: dict[str, Trace] = {}
    for trace in traces:
        if trace.id in found:
            dropped.append(Dropped(f"{trace.source}/{trace.id}", "duplicate", trace.id))
        else:
            found[trace.id] = trace
    return list(found.values())
