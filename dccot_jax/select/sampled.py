"""Signals that need the student to write: `student_error`, from one greedy answer per question.

The question is asked exactly as evaluation asks it (the task's prompt, the student's template, the same token budget; a
row with a prompt of its own is asked with that), and judged by the task's own answer rules. Samples are kept with their
trace ids in samples.jsonl.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.chunks import committed, drop_other_layouts, read_committed
from dccot_jax.context import Context
from dccot_jax.data.template import render_prompt, reply_text
from dccot_jax.data.tokenize import training_prompt
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.generate.greedy import greedy, make_sampler
from dccot_jax.generate.sampler import Generated
from dccot_jax.records import Dropped, Trace, content_hash
from dccot_jax.tasks.answers import judge
from dccot_jax.train.checkpoint import Student

FORWARD = "forward"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question the student answers once, as the user message `prompt`. `rows` are the trace ids that get its result."""

    id: str
    task: str
    question: str
    prompt: str
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
            own = () if asks.prompt is None else (asks.prompt,)
            key = content_hash("question/1", asks.task, asks.question, asks.choices, asks.gold_answer, asks.answer_type, *own)
            asked.setdefault(key, asks)
            rows.setdefault(key, []).append(trace.id)
    questions = [
        Question(key, t.task, t.question, training_prompt(t), t.choices, t.gold_answer or "", t.answer_type, tuple(rows[key]))
        for key, t in sorted(asked.items())
    ]
    return questions, dropped


def student_error(
    cfg: ConfigDict, student: Student, mesh: Mesh, traces: Sequence[Trace], out: ArtifactWriter, ctx: Context
) -> tuple[dict[str, float], list[Dropped], dict[str, Any]]:
    """Column `student_error`: 1.0 where the student's greedy answer is wrong, missing or cut off, 0.0 where it is right.

    The answer counts by the flexible reading, as accuracy in the report does; strict verdict and reason are in the samples.
    A prompt that leaves no room for the budget (``prompt_too_long``) or a gold answer that its type cannot read
    (``bad_gold``) drops the rows.

    Returns:
      {row id: value} and dropped rows, both complete on process 0 only, and facts.
    """
    tokenizer = load_tokenizer(student.tokenizer_dir)
    questions, dropped = questions_of(traces)
    asked, too_long = _with_prompts(questions, tokenizer, student.mc.max_positions, cfg.evaluate.max_new_tokens)
    size = cfg.score.chunk_rows
    chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
    layout = content_hash("samples/1", [question.id for question, _ in asked], size)[:12]
    series = f"samples-{layout}"
    drop_other_layouts(out, ctx, "samples-", layout)
    done = committed(out, ctx, [series], len(chunks))
    sampler = functools.cache(lambda: make_sampler(cfg, student, mesh))  # not needed where every chunk is there
    started, answered = time.monotonic(), 0
    with ctx.progress("student answers", len(asked), "questions") as meter:
        for index, chunk in enumerate(chunks):
            if done[index]:
                meter.skip(len(chunk))
                continue
            numbers = range(index * size, index * size + len(chunk))
            prompts = [prompt for _, prompt in chunk]
            replies = greedy(
                sampler(), prompts, cfg.evaluate.max_new_tokens, row_ids=numbers, on_batch=lambda _: ctx.stop_point("student answers")
            )
            if ctx.is_main:
                limit = cfg.verify.time_limit_seconds
                samples = [make_sample(q, tokenizer, reply, student.stop_ids, time_limit=limit) for (q, _), reply in zip(chunk, replies)]
                out.commit_chunk(series, index, pa.table({"sample": pa.array([_line(sample) for sample in samples], pa.string())}))
            answered += len(chunk)
            meter.advance(len(chunk))
    seconds = time.monotonic() - started
    if not ctx.is_main:
        return {}, [], {}
    samples = [sample for index in range(len(chunks)) for sample in _read(out, series, index)]
    samples.sort(key=lambda sample: sample["question_id"])
    out.write_text("samples.jsonl", "".join(_line(sample) + "\n" for sample in samples))
    judged = [sample for sample in samples if sample["reason"] != "bad_gold"]
    bad = [
        Dropped(row, "bad_gold", f"student_error: {s['gold']!r}") for s in samples if s["reason"] == "bad_gold" for row in s["trace_ids"]
    ]
    column = {row: float(not sample["correct"]) for sample in judged for row in sample["trace_ids"]}
    facts = {
        "questions": len(judged),
        "questions_per_second": round(answered / max(seconds, 1e-9), 3),
        "sample_seconds": round(seconds, 3),
        "sample_tokens": sum(sample["tokens"] for sample in samples),
        "student_error_rate": round(sum(not sample["correct"] for sample in judged) / max(len(judged), 1), 4),
        "sample_reasons": dict(sorted(Counter(sample["reason"] for sample in samples).items())),
    }
    return column, [*dropped, *too_long, *bad], facts


def make_sample(question: Question, tokenizer: Any, reply: Generated, stop_ids: Sequence[int], *, time_limit: float) -> dict[str, Any]:
    """One row of samples.jsonl: the question, the student's text and its verdicts. An unreadable answer is not correct."""
    text = reply_text(tokenizer, reply.tokens, stop_ids)
    verdict = judge(text, question.gold, question.answer_type, question.choices, time_limit=time_limit)
    return {
        "question_id": question.id,
        "trace_ids": list(question.rows),
        "task": question.task,
        "question": question.question,
        "gold": question.gold,
        "text": text,
        "tokens": len(reply.tokens),
        "finish_reason": reply.finish_reason,
        "answer": verdict.answer_flexible,
        "correct": bool(verdict.flexible),
        "correct_strict": bool(verdict.strict),
        "reason": verdict.reason,
    }


def _with_prompts(
    questions: Sequence[Question], tokenizer: Any, max_positions: int, max_new_tokens: int
) -> tuple[list[tuple[Question, list[int]]], list[Dropped]]:
    """Questions with their prompt ids, short prompts first so that those of a batch are of similar length."""
    found, dropped = [], []
    for question in questions:
        prompt = render_prompt(tokenizer, question.prompt)
        if len(prompt) + max_new_tokens > max_positions:
            detail = f"student_error: {len(prompt)} prompt tokens + {max_new_tokens} new > {max_positions} positions"
            dropped += [Dropped(row, "prompt_too_long", detail) for row in question.rows]
        else:
            found.append((question, prompt))
    return sorted(found, key=lambda pair: (len(pair[1]), pair[0].id)), dropped


def _line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, sort_keys=True, ensure_ascii=False)


def _read(out: ArtifactWriter, series: str, index: int) -> list[dict[str, Any]]:
    return [json.loads(text) for text in read_committed(out, series, index)["sample"].to_pylist()]
