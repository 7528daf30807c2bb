"""Signals that need the student to write: `student_error` and `student_entropy`, from one greedy answer per question, and
`pass_rate`, from several drawn ones.

The question is asked exactly as evaluation asks it (the task's prompt, the student's template, the same token budget; a
row with a prompt of its own is asked with that), and judged by the task's own answer rules: an answer counts by the flexible
reading, as accuracy in the report does. Greedy answers are kept with their trace ids in samples.jsonl, drawn ones in draws.jsonl.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from dccot_jax.generate.sampler import Generated, Sampler
from dccot_jax.records import Dropped, Trace, content_hash, derive_seed
from dccot_jax.select.signals import NEEDS_GOLD, SAMPLED
from dccot_jax.tasks.answers import NO_VERDICT, judge
from dccot_jax.train.checkpoint import Student

FORWARD = "forward"
Ask = Callable[[Sampler, list[list[int]], range], list[Generated]]  # replies to prompts, given their numbers in the stage


@dataclasses.dataclass(frozen=True)
class Question:
    """One question to the student, as the user message `prompt`. `rows` are the trace ids that get its result; `gold` "": unknown."""

    id: str
    task: str
    question: str
    prompt: str
    choices: tuple[str, ...]
    gold: str
    answer_type: str
    rows: tuple[str, ...]


def questions_of(traces: Sequence[Trace], needs_gold: str = "student_error") -> tuple[list[Question], list[Dropped]]:
    """The distinct questions behind `traces`, sorted by id, and the rows that have none.

    A forward row is asked its own question; the other rows of a group take the question of the group's forward row (the
    first by id). Rows without a forward row (``no_forward_part``) are dropped, and where a signal `needs_gold` those without a
    gold answer (``missing_gold``).
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
            dropped.append(Dropped(trace.id, "no_forward_part", "its group has no question to ask the student"))
        elif needs_gold and not asks.gold_answer:
            dropped.append(Dropped(trace.id, "missing_gold", f"{needs_gold}: no gold answer to compare with"))
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


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k answers is right: 1 - C(n-c, k) / C(n, k), unbiased (Chen et al., arXiv 2107.03374, eq. 1).

    Raises ValueError if fewer than k answers were drawn, or more were right than there are.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples}: needs 0 <= right <= samples and 1 <= k <= samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def score(
    cfg: ConfigDict, names: Iterable[str], student: Student, mesh: Mesh, traces: Sequence[Trace], out: ArtifactWriter, ctx: Context
) -> tuple[dict[str, dict[str, float]], list[Dropped], dict[str, Any]]:
    """The columns of the sampled signals among `names`.

    `student_error`: 1.0 where the student's greedy answer is wrong, missing or cut off, 0.0 where it is right.
    `student_entropy`: mean entropy of its next-token distribution over the tokens of that answer, nats; it needs no gold answer.
    `pass_rate`: share of right ones among `score.sampling.samples` answers drawn at `score.sampling.temperature`.

    A prompt that leaves no room for the budget drops the rows (``prompt_too_long``). So does, for the signals that compare, an answer
    without a verdict: the gold answer cannot be read (``bad_gold``), or the comparison took more than `verify.time_limit_seconds`
    (``timeout``). One such draw is enough for `pass_rate`: the share of the others is no share of `samples` draws.

    Returns:
      {signal: {row id: value}} and dropped rows, both complete on process 0 only, and facts.
    """
    names = [name for name in names if name in SAMPLED]
    tokenizer = load_tokenizer(student.tokenizer_dir)
    questions, dropped = questions_of(traces, next((name for name in names if name in NEEDS_GOLD), ""))
    asked, too_long = _with_prompts(questions, tokenizer, student.mc.max_positions, cfg.evaluate.max_new_tokens)
    dropped += too_long
    sampler = functools.cache(lambda: make_sampler(cfg, student, mesh))  # not needed where every chunk is there
    limit, drawing = cfg.evaluate.max_new_tokens, cfg.score.sampling
    seed = derive_seed(drawing.seed, "pass_rate")

    def on_batch(_: Any) -> None:
        ctx.stop_point("student answers")

    def ask_greedy(sampler: Sampler, prompts: list[list[int]], numbers: range) -> list[Generated]:
        return greedy(sampler, prompts, limit, row_ids=numbers, entropy="student_entropy" in names, on_batch=on_batch)

    def ask_drawing(sampler: Sampler, prompts: list[list[int]], numbers: range) -> list[Generated]:
        return sampler.generate(prompts, limit, drawing.temperature, seed, row_ids=numbers, on_batch=on_batch)

    columns: dict[str, dict[str, float]] = {}
    facts: dict[str, Any] = {}
    if {"student_error", "student_entropy"} & set(names):
        samples, facts = _answers(cfg, "samples", asked, 1, ask_greedy, sampler, tokenizer, student.stop_ids, out, ctx)
        judged = [sample for sample in samples if sample["correct"] is not None]
        columns["student_error"] = {row: float(not sample["correct"]) for sample in judged for row in sample["trace_ids"]}
        columns["student_entropy"] = {row: sample.get("entropy", math.nan) for sample in samples for row in sample["trace_ids"]}
        facts["student_error_rate"] = round(sum(not sample["correct"] for sample in judged) / max(len(judged), 1), 4)
        dropped += _without_verdict(samples, "student_error") if "student_error" in names else []
    if "pass_rate" in names:
        count = drawing.samples
        draws, more = _answers(cfg, "draws", asked, count, ask_drawing, sampler, tokenizer, student.stop_ids, out, ctx)
        unknown = {sample["question_id"] for sample in draws if sample["correct"] is None}
        judged = [sample for sample in draws if sample["question_id"] not in unknown]
        right = Counter({sample["question_id"]: 0 for sample in judged})
        right.update(sample["question_id"] for sample in judged if sample["correct"])
        columns["pass_rate"] = {row: right[sample["question_id"]] / count for sample in judged for row in sample["trace_ids"]}
        powers = [1 << n for n in range(count.bit_length()) if 1 << n <= count]
        means = {str(k): round(sum(pass_at_k(count, c, k) for c in right.values()) / max(len(right), 1), 4) for k in powers}
        facts |= {f"draw_{name}": value for name, value in more.items()} | {"draws_per_question": count, "pass_at_k": means}
        dropped += _without_verdict(draws, "pass_rate")
    if not ctx.is_main:
        return {}, [], {}
    return {name: columns[name] for name in names}, list(dict.fromkeys(dropped)), facts


def _answers(
    cfg: ConfigDict,
    series: str,
    asked: Sequence[tuple[Question, list[int]]],
    count: int,
    ask: Ask,
    sampler: Callable[[], Sampler],
    tokenizer: Any,
    stop_ids: Sequence[int],
    out: ArtifactWriter,
    ctx: Context,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`count` answers to each question, in chunks that are committed one by one, then written to `<series>.jsonl`.

    Returns the samples, sorted by question (none but on process 0), and facts: questions, rate, seconds, tokens, reasons.
    """
    size = max(1, cfg.score.chunk_rows // count)
    chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
    layout = content_hash(f"{series}/1", [question.id for question, _ in asked], size, count)[:12]
    drop_other_layouts(out, ctx, f"{series}-", layout)
    done = committed(out, ctx, [f"{series}-{layout}"], len(chunks))
    started, answered = time.monotonic(), 0
    with ctx.progress("student answers", len(asked) * count, "answers") as meter:
        for index, chunk in enumerate(chunks):
            wanted = [(question, prompt) for question, prompt in chunk for _ in range(count)]
            if done[index]:
                meter.skip(len(wanted))
                continue
            first = index * size * count
            replies = ask(sampler(), [prompt for _, prompt in wanted], range(first, first + len(wanted)))
            if ctx.is_main:
                limit = cfg.verify.time_limit_seconds
                samples = [make_sample(q, tokenizer, reply, stop_ids, time_limit=limit) for (q, _), reply in zip(wanted, replies)]
                out.commit_chunk(f"{series}-{layout}", index, pa.table({"sample": pa.array([_line(s) for s in samples], pa.string())}))
            answered += len(wanted)
            meter.advance(len(wanted))
    seconds = time.monotonic() - started
    if not ctx.is_main:
        return [], {}
    samples = [sample for index in range(len(chunks)) for sample in _read(out, f"{series}-{layout}", index)]
    samples.sort(key=lambda sample: sample["question_id"])
    out.write_text(f"{series}.jsonl", "".join(_line(sample) + "\n" for sample in samples))
    reasons = Counter(sample["reason"] for sample in samples)
    unknown = {sample["question_id"] for sample in samples if sample["reason"] in NO_VERDICT}
    return samples, {
        "questions": len(samples) // count - len(unknown),
        "questions_per_second": round(answered / count / max(seconds, 1e-9), 3),
        "sample_seconds": round(seconds, 3),
        "sample_tokens": sum(sample["tokens"] for sample in samples),
        "sample_reasons": dict(sorted(reasons.items())),
    }


def _without_verdict(samples: Sequence[Mapping[str, Any]], signal: str) -> list[Dropped]:
    """The rows of questions an answer to which could not be judged, each once."""
    found: dict[str, Dropped] = {}
    for sample in samples:
        if sample["reason"] in NO_VERDICT:
            why = {
                "bad_gold": f"{sample['gold']!r} does not read as its answer type",
                "timeout": f"{signal}: comparing {sample['answer']!r} with {sample['gold']!r} ran out of time",
            }
            for row in sample["trace_ids"]:
                found.setdefault(row, Dropped(row, sample["reason"], why[sample["reason"]]))
    return list(found.values())


def make_sample(question: Question, tokenizer: Any, reply: Generated, stop_ids: Sequence[int], *, time_limit: float) -> dict[str, Any]:
    """One row of samples.jsonl: the question, the student's text and its verdicts. An unreadable answer is not correct.

    Verdicts are None where there is none: no gold answer (reason ``no_gold``), an unreadable one (``bad_gold``), or a comparison that
    ran out of time (``timeout``).
    """
    text = reply_text(tokenizer, reply.tokens, stop_ids)
    sample = {
        "question_id": question.id,
        "trace_ids": list(question.rows),
        "task": question.task,
        "question": question.question,
        "gold": question.gold,
        "text": text,
        "tokens": len(reply.tokens),
        "finish_reason": reply.finish_reason,
        **({} if reply.entropy is None else {"entropy": reply.entropy}),
    }
    if not question.gold:
        return {**sample, "answer": None, "correct": None, "correct_strict": None, "reason": "no_gold"}
    verdict = judge(text, question.gold, question.answer_type, question.choices, time_limit=time_limit)
    known = verdict.reason not in NO_VERDICT
    return {
        **sample,
        "answer": verdict.answer_flexible,
        "correct": bool(verdict.flexible) if known else None,
        "correct_strict": bool(verdict.strict) if known else None,
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
            detail = f"{len(prompt)} prompt tokens + {max_new_tokens} new > {max_positions} positions"
            dropped += [Dropped(row, "prompt_too_long", detail) for row in question.rows]
        else:
            found.append((question, prompt))
    return sorted(found, key=lambda pair: (len(pair[1]), pair[0].id)), dropped


def _line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, sort_keys=True, ensure_ascii=False)


def _read(out: ArtifactWriter, series: str, index: int) -> list[dict[str, Any]]:
    return [json.loads(text) for text in read_committed(out, series, index)["sample"].to_pylist()]
