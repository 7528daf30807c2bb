"""From a teacher's reply to a trace: what is rationale, what is the stated answer, what the student learns to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dccot_jax.formats_rows import join_reasoning, split_reasoning
from dccot_jax.records import Request, Response, Teacher, Trace, canonical_json, make_trace
from dccot_jax.tasks.answers import equal, extract
from dccot_jax.tasks.base import Item, Task
from dccot_jax.teachers.cache import request_key

_STATEMENT = re.compile(r"(?:(?:so|thus|therefore|hence),?\s+)?the\s+(?:final\s+)?answer\s+is\b", re.IGNORECASE)
SPLIT_DIGITS = 12


def split_tag(name: str, split_hash: str) -> str:
    """How a trace names the split its question belongs to: the split's name and the hash of its items."""
    return f"{name}-{split_hash[:SPLIT_DIGITS]}"


def target_text(response: Response) -> str:
    """The text to learn: a separate thinking channel goes in front, in tags; spaces around are cut."""
    inside, rest = split_reasoning(response.text.strip())
    return join_reasoning(response.reasoning.strip() or inside, rest)


def rationale(target: str) -> str:
    """The part of a target before its last statement of an answer; the thinking, where there is one."""
    thinking, rest = split_reasoning(target)
    if thinking:
        return thinking
    statements = list(_STATEMENT.finditer(rest))
    return rest[: statements[-1].start()].rstrip() if statements else rest.strip()


def as_stated(target: str, canonical: str, answer_type: str, choices: Sequence[str] = ()) -> str:
    """An answer in the words of the text it was read from ("05/20/2024"), where a date, a formula or a string states it so.

    Numbers, letters and yes/no stay canonical.
    """
    if answer_type not in ("date", "latex", "string"):
        return canonical
    _, rest = split_reasoning(target)
    statements = list(_STATEMENT.finditer(rest))
    stated = rest[statements[-1].end() :].strip().strip(":").strip().removesuffix(".") if statements else ""
    return stated if stated and equal(stated, canonical, answer_type, choices) else canonical


def item_fields(item: Item, task: Task, split: str) -> dict[str, Any]:
    """The fields of a trace that come from its question."""
    return {
        "task": task.name,
        "split": split,
        "question": item.question,
        "choices": item.choices,
        "gold_answer": item.gold,
        "answer_type": task.answer_type,
        "n_steps": item.n_steps,
    }


def reply_fields(teacher: Teacher, request: Request, response: Response, via: Sequence[Request] = ()) -> dict[str, Any]:
    """The fields of a trace that come from one reply; ``meta`` leads back to the cached request and to those that led to it."""
    meta: dict[str, Any] = {"request": request_key(teacher, request), "model": response.model}
    if via:
        meta["via"] = [request_key(teacher, earlier) for earlier in via]
    return {
        "teacher": teacher.name,
        "style": str(getattr(teacher, "style", "")),
        "sample_index": request.sample_index,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": response.completion_tokens,
        "source": f"teacher:{teacher.name}",
        "meta": canonical_json(meta),
    }


def answered_trace(target: str, **fields: Any) -> Trace:
    """A trace whose ``reasoning`` and ``answer`` are read from its target."""
    found = extract(target, fields["answer_type"], fields.get("choices", ()))
    return make_trace(target=target, reasoning=rationale(target), answer=found.flexible, **fields)
