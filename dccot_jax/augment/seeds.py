"""What every augmentation method is given and gives back: questions with their traces, a way to ask, traces and rejections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dccot_jax.records import Dropped, Request, Response, Teacher, Trace, content_hash, derive_seed, user_request
from dccot_jax.tasks.answers import Judgement, judge
from dccot_jax.tasks.base import Task
from dccot_jax.tasks.registry import build_prompt
from dccot_jax.teachers.rows import target_text


@dataclasses.dataclass(frozen=True)
class Seed:
    """One question to augment and all original traces of it, sorted by id.

    ``parent`` is the trace that new ones name as their parent: the first that is right, or the first.
    """

    task: Task
    traces: tuple[Trace, ...]
    verdicts: tuple[bool, ...]

    @property
    def parent(self) -> Trace:
        return next((trace for trace, right in zip(self.traces, self.verdicts) if right), self.traces[0])

    @property
    def key(self) -> str:
        """Hash of the question: the same whoever answered it, so that equal requests stay equal over arms."""
        return content_hash("question", self.task.name, self.parent.question, list(self.parent.choices))

    @property
    def gold(self) -> str:
        assert self.parent.gold_answer is not None  # `seeds_of` leaves questions without gold out
        return self.parent.gold_answer

    def prompt(self) -> str:
        return build_prompt(self.task, self.parent.question, self.parent.choices)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of ``cfg.augment`` that methods read, and the root of their random seeds (``cfg.traces.seed``)."""

    temperature: float = 0.7
    max_tokens: int = 1024
    answers: int = 3
    rephrasings: int = 1
    votes: int = 5
    agreement: float = 0.6
    root: int = 0

    def request(self, text: str, kind: str, seed: Seed, index: int = 0, *, temperature: float | None = None) -> Request:
        """A request whose seed hangs on (kind, question, index) alone."""
        return user_request(
            text,
            temperature=self.temperature if temperature is None else temperature,
            max_tokens=self.max_tokens,
            seed=derive_seed(self.root, "augment", kind, seed.key, index) % (1 << 31),
            sample_index=index,
        )


@dataclasses.dataclass(frozen=True)
class Asker:
    """The teacher and the way to it (cached, metered): ``ask(requests, label) -> responses`` in order."""

    teacher: Teacher
    ask: Callable[[Sequence[Request], str], list[Response]]


@dataclasses.dataclass
class Outcome:
    """New traces, samples that did not pass with their reason, and ids of originals that live on inside a group."""

    traces: list[Trace] = dataclasses.field(default_factory=list)
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    consumed: dict[str, str] = dataclasses.field(default_factory=dict)  # original id -> group id

    def reject(self, seed: Seed, method: str, index: int, reason: str, detail: str = "") -> None:
        """Count one rejected sample; its id is the parent's, with method and sample number."""
        self.dropped.append(Dropped(f"{seed.parent.id}/{method}/{index}", f"{method}:{reason}", detail[:200]))

    def usable(self, seed: Seed, method: str, index: int, response: Response) -> str | None:
        """The reply's text, or None after counting why there is none (error, cut at the limit, empty)."""
        if response.finish_reason == "error":
            self.reject(seed, method, index, "teacher_error", response.error)
        elif response.finish_reason == "length":
            self.reject(seed, method, index, "truncated")
        elif text := target_text(response):
            return text
        else:
            self.reject(seed, method, index, "empty_reply")
        return None

    def right(self, seed: Seed, method: str, index: int, response: Response, note: str = "") -> str | None:
        """The reply's text if it gives the question's gold answer, else None after counting why not; `note` ends the detail."""
        text = self.usable(seed, method, index, response)
        if text is None:
            return None
        verdict = judged(text, seed.parent)
        if verdict.flexible:
            return text
        self.reject(seed, method, index, verdict.reason, f"{verdict.answer_flexible} for {seed.gold}{note}")
        return None


def seeds_of(traces: Iterable[Trace], task_of: Callable[[str], Task]) -> tuple[list[Seed], list[Trace]]:
    """Questions of the original forward traces in order of first appearance; and the traces of questions without a gold answer."""
    by_question: dict[tuple[Any, ...], list[Trace]] = {}
    for trace in traces:
        if trace.method == "vanilla" and trace.part == "forward":
            by_question.setdefault((trace.task, trace.question, trace.choices), []).append(trace)
    seeds, without_gold = [], []
    for (task, _, _), group in by_question.items():
        if any(trace.gold_answer is None for trace in group):
            without_gold += group
            continue
        ordered = tuple(sorted(group, key=lambda trace: trace.id))
        seeds.append(Seed(task_of(task), ordered, tuple(judged(trace.target, trace).flexible for trace in ordered)))
    return seeds, without_gold


def judged(text: str, like: Trace) -> Judgement:
    """Judge a text against the gold answer of a trace with the same question."""
    return judge(text, like.gold_answer or "", like.answer_type, like.choices)


def question_fields(seed: Seed, method: str) -> dict[str, Any]:
    """Fields that a new trace of the same question (or of one with the same answer) has from its parent."""
    parent = seed.parent
    return {
        "task": parent.task,
        "split": parent.split,
        "question": parent.question,
        "choices": parent.choices,
        "gold_answer": parent.gold_answer,
        "answer_type": parent.answer_type,
        "n_steps": parent.n_steps,
        "method": method,
        "parent_ids": (parent.id,),
    }
