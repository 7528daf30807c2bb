"""Signals that need the student to write: `student_error`, from one greedy answer per question.

The question is asked exactly as evaluation asks it (the task's prompt, the student's template, the same token budget),
and judged by the task's own answer rules. Samples are kept with their trace ids in samples.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.data.template import render_prompt, stop_ids
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.generate.sampler import Sampler
from dccot_jax.records import Dropped, Trace, content_hash
from dccot_jax.select.chunks import committed, drop_other_layouts
from dccot_jax.tasks.answers import judge
from dccot_jax.tasks.registry import build_prompt, get_task
from dccot_jax.train.checkpoint import Student

FORWARD = "forward"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question the student answers once. `rows` are the trace ids that get its result."""

    id: str
    task: str
    question: str
    choices: tuple[str, ...]
    gold: str
    answer_type: str
    rows: tuple[str, ...]


def questions_of(traces: Sequence[Trace]) -> tuple[list[Question], list[Dropped]]:
    """The distinct questions behind `traces`, sorted by id, and the rows that have none.

    A forward row is asked its own question; the other rows of a group take the question of the group's forward row (the
    first by id). Rows without a gold answer (``missing_gold``) or without a forward row (``no_forward_part``) are dropped.
    """
    forward: dict[str, Trace] = {}
    for trace in sorted(traces, key=lambda t: t.id):
        if trace.part == FORWARD:
            forward.setdefault(trace.group_id, trace)
    rows: dict[str, list[str]] = {}
    asked: dict[str, Trace] = {}
    dropped = []
    for trace in sorted(traces, key=lambda t: t.id):
        asks = trace if trace.part == FORWARD else forward.get(trace.group_id)
        if asks is None:
            dropped.append(Dropped(trace.id, "no_forward_part", "student_error: its group has no question to ask the student"))
        elif not asks.gold_answer:
            dropped.append(Dropped(trace.id, "missing_gold", "student_error: no gold answer to compare with"))
        else:
            key = content_hash("question/1", asks.task, asks.question, asks.choices, asks.gold_answer, asks.answer_type)
            asked.setdefault(key, asks)
            rows.setdefault(key, []).append(trace.id)
    questions = [
        Question(key, t.task, t.question, t.choices, t.gold_answer or "", t.answer_type, tuple(rows[key]))
        for key, t in sorted(asked.items())
    ]
    return questions, dropped


def student_error(
    cfg: ConfigDict, student: Student, mesh: Mesh, traces: Sequence[Trace], out: ArtifactWriter, ctx: Context
) -> tuple[dict[str, float], list[Dropped], dict[str, Any]]:
    """Column `student_error`: 1.0 where the student's greedy answer is wrong, missing or cut off, 0.0 where it is right.

    The answer counts by the flexible reading, as accuracy in the report does; strict verdict and reason are in the samples.

    Returns:
      {row id: value} and dropped rows (both complete on process 0 only), and facts.
    """
    questions, dropped = questions_of(traces)
    size = cfg.score.chunk_rows
    chunks = [questions[start : start + size] for start in range(0, len(questions), size)]
    layout = content_hash("samples/1", [q.id for q in questions], size)[:12]
    series = f"samples-{layout}"
    drop_other_layouts(out, ctx, "samples-", layout)
    done = committed(out, ctx, [series], len(chunks))
    tokenizer = load_tokenizer(student.tokenizer_dir)
    sampler = None
    started, asked = time.monotonic(), 0
    with ctx.progress("student answers", len(questions)) as meter:
        for index, chunk in enumerate(chunks):
            if done[index]:
                meter.skip(len(chunk))
                continue
            sampler = sampler or make_sampler(cfg, student, mesh, tokenizer)
            table = pa.table(
                {"sample": pa.array([json.dumps(s, sort_keys=True, ensure_ascii=False) for s in _answers(cfg, sampler, tokenizer, chunk)])}
            )
            if ctx.is_main:
                out.commit_chunk(series, index, table)
            asked += len(chunk)
            meter.advance(len(chunk))
    seconds = time.monotonic() - started
    if not ctx.is_main:
        return {}, [], {}
    samples: list[dict[str, Any]] = []
    for index in range(len(chunks)):
        table = out.read_chunk(series, index)
        if table is None:
            raise RuntimeError(f"chunk {series} {index} was committed and cannot be read back")
        samples += [json.loads(text) for text in table["sample"].to_pylist()]
    out.write_text("samples.jsonl", "".join(json.dumps(s, sort_keys=True, ensure_ascii=False) + "\n" for s in samples))
    column = {row: float(not sample["correct"]) for sample in samples for row in sample["trace_ids"]}
    facts = {
        "questions": len(questions),
        "questions_per_second": round(asked / max(seconds, 1e-9), 3),
        "sample_seconds": round(seconds, 3),
        "sample_tokens": sum(s["tokens"] for s in samples),
        "student_error_rate": round(sum(not s["correct"] for s in samples) / max(len(samples), 1), 4),
        "sample_reasons": dict(sorted(Counter(s["reason"] for s in samples).items())),
    }
    return column, dropped, facts


def make_sampler(cfg: ConfigDict, student: Student, mesh: Mesh, tokenizer: Any) -> Sampler:
    """The sampler with evaluation's settings."""
    return Sampler(
        student.mc,
        student.params,
        mesh,
        compute_dtype=cfg.compute_dtype,
        batch_rows=cfg.evaluate.batch_rows,
        eos_id=stop_ids(tokenizer)[0],
        pad_id=0,
    )


def _answers(cfg: ConfigDict, sampler: Sampler, tokenizer: Any, questions: Sequence[Question]) -> list[Mapping[str, Any]]:
    prompts = [render_prompt(tokenizer, build_prompt(get_task(q.task), q.question, q.choices)) for q in questions]
    found = []
    for question, generated in zip(questions, sampler.generate(prompts, cfg.evaluate.max_new_tokens)):
        text = tokenizer.decode(generated.tokens, skip_special_tokens=True)
        verdict = judge(text, question.gold, question.answer_type, question.choices, time_limit=cfg.verify.time_limit_seconds)
        found.append(
            {
                "question_id": question.id,
                "trace_ids": list(question.rows),
                "task": question.task,
                "question": question.question,
                "gold": question.gold,
                "text": text,
                "tokens": len(generated.tokens),
                "finish_reason": generated.finish_reason,
                "answer": verdict.answer_flexible,
                "correct": bool(verdict.flexible),
                "correct_strict": bool(verdict.strict),
                "reason": verdict.reason,
            }
        )
    return found
