"""Stage `evaluate`: ask a student every item of every evaluation task, judge the replies, measure gold rationales.

Files: ``samples.jsonl`` (one row per item: prompt, reply, verdicts; lm-eval's names beside ours; `completion_tokens`
counts the stop token), ``metrics.json`` (see `metrics.task_metrics`), ``dropped.parquet`` (items that could not be asked)
and ``gold_dropped.parquet`` (items that were asked and whose gold rationale could not be measured). Replies are committed
in chunks of `CHUNK_ROWS`, so a kill loses at most one chunk.
"""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, json_hash
from dccot_jax.chunks import committed, read_committed
from dccot_jax.context import Context, Meter
from dccot_jax.data.template import reply_text
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.evaluate import gold_nll
from dccot_jax.evaluate.metrics import task_metrics
from dccot_jax.evaluate.protocol import GROUPS, Panel, Question, describe, load_panels, make_questions
from dccot_jax.generate.greedy import greedy, make_sampler
from dccot_jax.generate.sampler import Generated
from dccot_jax.model.backends.choice import choose
from dccot_jax.model.sharding import make_mesh
from dccot_jax.records import Dropped, content_hash, count_reasons, dropped_to_table
from dccot_jax.tasks.answers import judge
from dccot_jax.train.checkpoint import Student, load_student

CHUNK_ROWS = 256  # items per committed chunk; fixed, so that a resume with another batch size finds its chunks
GOLD_CHUNK_TILES = 8


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Evaluate the student in `inputs` (role ``train`` if there, else ``student``) under protocol `sound`.

    Rows in are the items asked for: those chosen under the limit, and those of the split that no student can be asked
    (no readable gold answer, or a repeat). Rows in less rows out are the drops. An item without a gold NLL is still evaluated;
    those are counted in the fact `gold_nll_lost`.

    Raises TaskDataError or UnknownTaskError if a task cannot be had, ConfigError if a task is listed twice.
    """
    started = time.monotonic()
    mesh = make_mesh(cfg.mesh)
    source = inputs.get("train") or inputs["student"]
    panels = load_panels(cfg, ctx.data_dir)
    student = load_student(source, mesh)
    tokenizer = load_tokenizer(student.tokenizer_dir)
    questions, dropped = make_questions(
        panels, tokenizer, max_positions=student.mc.max_positions, max_new_tokens=cfg.evaluate.max_new_tokens
    )
    samples = _answer_all(cfg, student, mesh, tokenizer, questions, out, ctx)
    if cfg.evaluate.gold_nll:
        nats, lost = _gold_all(cfg, student, mesh, tokenizer, questions, out, ctx)
    else:
        nats, lost = {}, []
    if not ctx.is_main:
        return StageResult("")

    for index, row in enumerate(samples):
        row["gold_nll_nats"], row["gold_nll_tokens"] = nats.get(index, (None, None))
    lost_items = {panel.task.name: _lost(panel, dropped) for panel in panels}
    dropped = [*(row for panel in panels for row in panel.dropped), *dropped]
    rows = _in_order(samples, panels)
    tasks = {
        name: task_metrics(rows[name], group=panel.group, available=panel.available, limit=panel.limit, dropped=lost_items[name])
        | {
            "answer_type": panel.task.answer_type,
            "prompt_suffix": panel.task.prompt_suffix,
            "split": "test",
            "task_hash": panel.task_hash,
        }
        for name, panel in ((panel.task.name, panel) for panel in panels)
    }
    flat = [row for panel in panels for row in rows[panel.task.name]]
    out.write_text("samples.jsonl", "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in flat))
    out.write_json(
        "metrics",
        {
            "tasks": tasks,
            "groups": {group: [panel.task.name for panel in panels if panel.group == group] for group in GROUPS},
            "protocol": describe(cfg, tokenizer, student.stop_ids, panels),
            "student": {"kind": source.kind, "identity": source.identity, "parameters": student.mc.num_params()},
        },
    )
    counts = out.write_dropped(dropped)
    out.write_table("gold_dropped", dropped_to_table(lost))
    for name, metrics in tasks.items():
        ctx.log(f"  {name}: {_line(metrics)}")
    return StageResult(
        json_hash([outcome(row) for row in sorted(flat, key=lambda row: (row["task"], row["item_id"]))]),
        rows_in=sum(len(panel.items) + len(panel.dropped) for panel in panels),
        rows_out=len(flat),
        dropped=counts,
        facts={
            "accuracy": {name: metrics["accuracy_flexible"] for name, metrics in tasks.items()},
            "completion_tokens": sum(row["completion_tokens"] for row in flat),
            "gold_nll_lost": count_reasons(lost),
        },
        device_seconds=round(time.monotonic() - started, 3),
    )


def outcome(row: Mapping[str, Any]) -> list[Any]:
    """What a sample means, for the logical hash: item, reply, verdicts, and gold nats to five decimals."""
    nats = row["gold_nll_nats"]
    verdicts = [row[name] for name in ("answer_strict", "answer_flexible", "correct_strict", "correct_flexible", "reason", "finish_reason")]
    return [row["task"], row["item_id"], row["tokens"], row["text"], *verdicts, None if nats is None else round(nats, 5)]


# --- replies ------------------------------------------------------------------------------------------------------------


def _answer_all(
    cfg: ConfigDict, student: Student, mesh: Mesh, tokenizer: Any, questions: Sequence[Question], out: ArtifactWriter, ctx: Context
) -> list[dict[str, Any]]:
    """Judged samples in the order of `questions`; complete on process 0, empty elsewhere."""
    chunks = [list(range(start, min(start + CHUNK_ROWS, len(questions)))) for start in range(0, len(questions), CHUNK_ROWS)]
    keys = [[question.panel.task.name, question.item.id] for question in questions]
    series = f"answers-{content_hash('answers/1', keys, CHUNK_ROWS)[:12]}"
    sampler = functools.cache(lambda: make_sampler(cfg, student, mesh))  # not needed where every chunk is there

    def work(rows: list[int], meter: Meter) -> list[dict[str, Any]]:
        asked = [questions[row] for row in rows]
        began, tokens = time.monotonic(), 0

        def advance(finished: Sequence[tuple[int, Generated]]) -> None:
            nonlocal tokens
            tokens += sum(len(reply.tokens) for _, reply in finished)
            meter.advance(len(finished), f"{tokens / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")
            ctx.stop_point("evaluate: answers")  # a chunk takes minutes: it is given up rather than finished

        prompts = [list(question.prompt_ids) for question in asked]
        replies = greedy(sampler(), prompts, cfg.evaluate.max_new_tokens, row_ids=rows, on_batch=advance)
        if not ctx.is_main:
            return []
        return [
            make_sample(question, tokenizer, reply, student.stop_ids, time_limit=cfg.verify.time_limit_seconds)
            for question, reply in zip(asked, replies, strict=True)
        ]

    return _chunked(chunks, series, "evaluate", work, out, ctx)


def make_sample(question: Question, tokenizer: Any, reply: Generated, stop_ids: Sequence[int], *, time_limit: float) -> dict[str, Any]:
    """One row of samples.jsonl, without its gold NLL and `doc_id`."""
    item, task = question.item, question.panel.task
    text = reply_text(tokenizer, reply.tokens, stop_ids)
    verdict = judge(text, item.gold, task.answer_type, item.choices, time_limit=time_limit)
    doc = {"question": item.question, "choices": list(item.choices), "gold": item.gold}
    prompt = tokenizer.decode(list(question.prompt_ids))
    return {
        "item_id": item.id,
        "task": task.name,
        "group": question.panel.group,
        "n_steps": item.n_steps,
        "doc": doc,
        "target": item.gold,
        "prompt": prompt,
        "arguments": [[prompt, {"until": [], "do_sample": False}]],
        "prompt_tokens": len(question.prompt_ids),
        "text": text,
        "tokens": [int(token) for token in reply.tokens],
        "completion_tokens": len(reply.tokens),
        "finish_reason": reply.finish_reason,
        "answer_strict": verdict.answer_strict,
        "answer_flexible": verdict.answer_flexible,
        "correct_strict": bool(verdict.strict),
        "correct_flexible": bool(verdict.flexible),
        "reason": verdict.reason,
        "resps": [[text]],
        "filtered_resps": [verdict.answer_flexible],
        "filter": "flexible-extract",
        "exact_match": float(verdict.flexible),
        "doc_hash": content_hash(doc),
        "prompt_hash": content_hash(prompt),
        "target_hash": content_hash(item.gold),
    }


# --- gold rationales ----------------------------------------------------------------------------------------------------


def _gold_all(
    cfg: ConfigDict, student: Student, mesh: Mesh, tokenizer: Any, questions: Sequence[Question], out: ArtifactWriter, ctx: Context
) -> tuple[dict[int, tuple[float, int]], list[Dropped]]:
    """({position in `questions`: (nats, tokens)}, rows that could not be measured)."""
    rows, dropped = gold_nll.gold_rows(questions, tokenizer, max_positions=student.mc.max_positions)
    batches = gold_nll.tiles(rows, mesh)
    chunks = [list(range(start, min(start + GOLD_CHUNK_TILES, len(batches)))) for start in range(0, len(batches), GOLD_CHUNK_TILES)]
    keys = [[(row.question, len(row.input_ids)) for row in batch] for batch in batches]
    series = f"gold-{content_hash('gold/1', keys, GOLD_CHUNK_TILES)[:12]}"

    attention, remark = choose(cfg.attention, student.mc, cfg.tokens.max_length, cfg.compute_dtype, packed=False)
    if remark:
        ctx.log(f"  {remark}")
    settings: Any = {"compute_dtype": cfg.compute_dtype, "pad_id": student.pad_id, "attention": attention}

    def work(numbers: list[int], meter: Meter) -> list[dict[str, Any]]:
        found = []
        picked = [batches[number] for number in numbers]
        results = gold_nll.score(student.params, student.mc, mesh, picked, **settings)
        for batch, nats in zip(picked, results, strict=True):
            found += [
                {"question": row.question, "nats": float(value), "tokens": len(row.input_ids) - row.prompt_tokens}
                for row, value in zip(batch, nats, strict=True)
            ]
        meter.advance(len(numbers))
        return found

    measured = _chunked(chunks, series, "gold NLL", work, out, ctx, unit="tiles")
    finite = [row for row in measured if np.isfinite(row["nats"])]
    if len(finite) < len(measured):
        ids = [questions[row["question"]].item.id for row in measured if not np.isfinite(row["nats"])]
        dropped += [Dropped(item, "gold_not_finite", "the student's NLL of the gold rationale is not finite") for item in ids]
    return {row["question"]: (row["nats"], row["tokens"]) for row in finite}, dropped


# --- chunks -------------------------------------------------------------------------------------------------------------


def _chunked(
    chunks: Sequence[list[int]],
    series: str,
    label: str,
    work: Callable[[list[int], Meter], list[dict[str, Any]]],
    out: ArtifactWriter,
    ctx: Context,
    unit: str = "items",
) -> list[dict[str, Any]]:
    """Results of `work` over chunks, in order: committed chunks are read back, the others made and committed by process 0."""
    done = committed(out, ctx, [series], len(chunks))
    with ctx.progress(label, sum(len(chunk) for chunk in chunks), unit) as meter:
        for index, chunk in enumerate(chunks):
            if done[index]:
                meter.skip(len(chunk))
                continue
            found = work(chunk, meter)
            if ctx.is_main:
                text = [json.dumps(row, ensure_ascii=False, allow_nan=True) for row in found]
                out.commit_chunk(series, index, pa.table({"row": pa.array(text, pa.string())}))
            ctx.stop_point(f"{label}: chunk committed")
    if not ctx.is_main:
        return []
    rows: list[dict[str, Any]] = []
    for index in range(len(chunks)):
        rows += [json.loads(text) for text in read_committed(out, series, index).column("row").to_pylist()]
    return rows


def _lost(panel: Panel, dropped: Sequence[Dropped]) -> dict[str, int]:
    """Drops of one task per reason: items of its split that cannot be asked, and chosen items that were not."""
    chosen = {item.id for item in panel.items}
    return dict(sorted(Counter(row.reason for row in (*panel.dropped, *(row for row in dropped if row.id in chosen))).items()))


def _in_order(samples: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> dict[str, list[dict[str, Any]]]:
    """Samples per task, sorted by item id and numbered (`doc_id`)."""
    rows: dict[str, list[dict[str, Any]]] = {panel.task.name: [] for panel in panels}
    for row in samples:
        rows[row["task"]].append(row)
    return {
        task: [{"doc_id": number, **row} for number, row in enumerate(sorted(found, key=lambda row: row["item_id"]))]
        for task, found in rows.items()
    }


def _line(metrics: Mapping[str, Any]) -> str:
    """One task's result for the terminal."""
    if not metrics["n"]:
        return "no items"
    low, high = metrics["accuracy_flexible_interval"]
    text = f"{metrics['accuracy_flexible']:.1%} [{low:.1%}, {high:.1%}] of {metrics['n']}, {metrics['mean_completion_tokens']:.1f} tokens"
    if metrics["gold_nll"]:
        text += f", gold NLL {metrics['gold_nll']['mean']:.3f}"
    return text + (", FORMAT FAILURE" if metrics["format_failure"] else "")
