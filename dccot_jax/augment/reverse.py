"""Reverse thinking (RevThink, arXiv 2411.19865): the forward trace with an inverse question and its reasoning.

For every question with a right forward trace (Q, R_f):
  Q_b = T(Q, A*; P_bq)        R_b = T(Q_b)        c = T(Q, A*, Q_b, A_b; P_con) in {True, False}
Kept iff c is True. Cost: 3 calls per question besides the forward trace. The result is one group of three rows, trained with
equal weight (loss_weight ``reverse``: 1/3 each, a token mean inside each):
  forward             Q -> R_f
  backward_question   "write the inverse question", Q, A* -> Q_b
  backward_reasoning  Q_b -> R_b
The original becomes the group's forward row and leaves the set as a row of its own, so that it is not trained twice; other
traces of the same question stay. With several right traces the augmenting teacher's own is taken, else the first by id.
Rejections: ``reverse:forward_wrong``, ``reverse:unreadable``, ``reverse:repeated`` (Q_b is Q), ``reverse:no_answer``,
``reverse:no_verdict``, ``reverse:inconsistent``, teacher failures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dccot_jax.augment.seeds import Asker, Outcome, Seed, Settings, question_fields
from dccot_jax.formats_rows import split_options
from dccot_jax.questions import question_key
from dccot_jax.records import Request, Response, Trace, content_hash, make_trace
from dccot_jax.tasks.answers import extract
from dccot_jax.tasks.base import Task
from dccot_jax.tasks.registry import build_prompt
from dccot_jax.teachers.prompts import (
    BACKWARD,
    backward_question_request,
    consistency_request,
    gold_text,
    inverse_question_prompt,
    read_question,
    read_verdict,
)
from dccot_jax.teachers.rows import answered_trace, as_stated, reply_fields, target_text

METHOD = "reverse"
CHOICE_SUFFIX = "\nReason step by step, then write the last line as 'The answer is (X).'"
_FORWARD_FIELDS = (
    *("teacher", "style", "level", "sample_index", "reasoning", "answer", "target", "prompt"),
    *("finish_reason", "prompt_tokens", "completion_tokens", "source", "meta"),
)


@dataclasses.dataclass
class _Draft:
    """One quadruple in the making."""

    seed: Seed
    forward: Trace
    asked: Request
    reply: Response | None = None
    question: str = ""
    stem: str = ""
    choices: tuple[str, ...] = ()
    answered: Request | None = None
    answer_reply: Response | None = None
    answer: str = ""


def reverse_thinking(seeds: Sequence[Seed], settings: Settings, asker: Asker) -> Outcome:
    """At most one group of three traces per seed; ``consumed`` names the originals that became forward rows."""
    outcome = Outcome()
    drafts = []
    for seed in seeds:
        forward = forward_trace(seed, asker.teacher.name)
        if forward is None:
            outcome.reject(seed, METHOD, 0, "forward_wrong")
            continue
        text = backward_question_request(forward.question, forward.choices, seed.gold, seed.task.answer_type)
        drafts.append(_Draft(seed, forward, settings.request(text, "backward question", seed)))
    drafts = _write_questions(drafts, settings, asker, outcome)
    drafts = _answer_questions(drafts, settings, asker, outcome)
    for draft in _check_consistency(drafts, settings, asker, outcome):
        group = _group(draft, asker)
        outcome.traces += group
        outcome.consumed[draft.forward.id] = group[0].group_id
    return outcome


def forward_trace(seed: Seed, teacher: str) -> Trace | None:
    """The right trace to build on: the augmenting teacher's own if there is one, else the first by id; None if all are wrong."""
    right = [trace for trace, verdict in zip(seed.traces, seed.verdicts) if verdict]
    return next((trace for trace in right if trace.teacher == teacher), right[0] if right else None)


def backward_prompt(task: Task, question: str, choices: Sequence[str]) -> str:
    """How an inverse question is asked: like the task's own, except that a yes/no task's inverse question has two options."""
    if task.answer_type == "yes_no" and choices:
        return build_prompt(dataclasses.replace(task, answer_type="choice", prompt_suffix=CHOICE_SUFFIX), question, choices)
    return build_prompt(task, question, choices)


def backward_type(task: Task, choices: Sequence[str]) -> str:
    """Answer type of an inverse question: a choice where it has options, else the task's (a string for yes/no)."""
    if choices:
        return "choice"
    return "string" if task.answer_type in ("yes_no", "choice") else task.answer_type


def _write_questions(drafts: list[_Draft], settings: Settings, asker: Asker, outcome: Outcome) -> list[_Draft]:
    left = []
    for draft, reply in zip(drafts, asker.ask([draft.asked for draft in drafts], "backward questions"), strict=True):
        text = outcome.usable(draft.seed, METHOD, 0, reply)
        if text is None:
            continue
        question = read_question(text, BACKWARD)
        if question is None:
            outcome.reject(draft.seed, METHOD, 0, "unreadable", text)
            continue
        draft.reply, draft.question = reply, question
        draft.stem, draft.choices = split_options(question)
        if question_key(draft.stem) == question_key(draft.forward.question):
            outcome.reject(draft.seed, METHOD, 0, "repeated", question)
        else:
            left.append(draft)
    return left


def _answer_questions(drafts: list[_Draft], settings: Settings, asker: Asker, outcome: Outcome) -> list[_Draft]:
    for draft in drafts:
        prompt = backward_prompt(draft.seed.task, draft.stem, draft.choices)
        draft.answered = settings.request(prompt, "backward reasoning", draft.seed)
    requests = [draft.answered for draft in drafts if draft.answered is not None]
    left = []
    for draft, response in zip(drafts, asker.ask(requests, "backward reasoning"), strict=True):
        text = outcome.usable(draft.seed, METHOD, 0, response)
        if text is None:
            continue
        kind = backward_type(draft.seed.task, draft.choices)
        found = extract(text, kind, draft.choices)
        if found.flexible is None:
            outcome.reject(draft.seed, METHOD, 0, "no_answer", text)
            continue
        draft.answer_reply, draft.answer = response, as_stated(text, found.flexible, kind, draft.choices)
        left.append(draft)
    return left


def _check_consistency(drafts: list[_Draft], settings: Settings, asker: Asker, outcome: Outcome) -> list[_Draft]:
    requests = []
    for draft in drafts:
        shown = gold_text(draft.answer, draft.choices)
        first = (draft.forward.question, draft.forward.choices, draft.seed.gold)
        text = consistency_request(*first, draft.question, shown, draft.seed.task.answer_type)
        requests.append(settings.request(text, "consistency", draft.seed, temperature=0.0))
    left = []
    for draft, response in zip(drafts, asker.ask(requests, "consistency"), strict=True):
        text = outcome.usable(draft.seed, METHOD, 0, response)
        if text is None:
            continue
        verdict = read_verdict(text)
        if verdict:
            left.append(draft)
        else:
            outcome.reject(draft.seed, METHOD, 0, "no_verdict" if verdict is None else "inconsistent", f"{draft.question} {draft.answer}")
    return left


def _group(draft: _Draft, asker: Asker) -> list[Trace]:
    """The three rows of a kept quadruple, forward first."""
    assert draft.reply is not None and draft.answered is not None and draft.answer_reply is not None
    forward, task = draft.forward, draft.seed.task
    reasoning = target_text(draft.answer_reply)
    shared = question_fields(draft.seed, METHOD) | {
        "group_id": content_hash(METHOD, forward.id, draft.question, reasoning),
        "parent_ids": (forward.id,),
    }
    kept: dict[str, Any] = {name: getattr(forward, name) for name in _FORWARD_FIELDS}
    asked = reply_fields(asker.teacher, draft.asked, draft.reply)
    answered = reply_fields(asker.teacher, draft.answered, draft.answer_reply, via=(draft.asked,))
    prompt = backward_prompt(task, draft.stem, draft.choices)
    backward = {
        "question": draft.stem,
        "choices": draft.choices,
        "answer_type": backward_type(task, draft.choices),
        "gold_answer": draft.answer,
        "gold_source": "pseudo",
        "n_steps": None,
        "prompt": None if prompt == build_prompt(task, draft.stem, draft.choices) else prompt,
    }
    return [
        make_trace(**shared | kept),
        make_trace(
            **shared | asked,
            part="backward_question",
            target=draft.question,
            prompt=inverse_question_prompt(forward.question, forward.choices, draft.seed.gold),
        ),
        answered_trace(reasoning, **shared | answered | backward, part="backward_reasoning"),
    ]
