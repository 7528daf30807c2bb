"""Question augmentation (after Xwin-Math): a parallel problem with a voted answer.

Q_new = T(Q; P_new); k answers are sampled and the majority is the pseudo-gold answer; kept iff its share of *all* k samples is
at least ``agreement``. The trace is the first sample that gave the majority's answer. Cost: 1 + k calls per sample.
Rejections: ``question:unreadable``, ``question:repeated`` (a question we have already), ``question:no_answer``,
``question:disagreement``, teacher failures of the draft. Nothing says that a pseudo-gold answer is right: such traces carry
``gold_source = "pseudo"``.
"""

from __future__ import annotations

from collections.abc import Sequence

from dccot_jax.augment.seeds import Asker, Outcome, Seed, Settings, question_fields
from dccot_jax.formats_rows import split_options
from dccot_jax.questions import question_key
from dccot_jax.records import Request, Response
from dccot_jax.tasks.answers import equal, extract
from dccot_jax.tasks.registry import build_prompt
from dccot_jax.teachers.prompts import NEW, new_question_request, read_question
from dccot_jax.teachers.rows import answered_trace, as_stated, reply_fields, target_text

METHOD = "question"


def new_questions(seeds: Sequence[Seed], settings: Settings, asker: Asker) -> Outcome:
    """At most one new question, with its trace, per seed."""
    outcome = Outcome()
    drafts = [
        (seed, settings.request(new_question_request(seed.parent.question, seed.parent.choices, seed.task.answer_type), METHOD, seed))
        for seed in seeds
    ]
    replies = asker.ask([request for _, request in drafts], "new questions")
    known = {question_key(seed.parent.question) for seed in seeds}
    jobs: list[tuple[Seed, Request, str, tuple[str, ...], list[Request]]] = []
    for (seed, draft), reply in zip(drafts, replies, strict=True):
        text = outcome.usable(seed, METHOD, 0, reply)
        if text is None:
            continue
        written = read_question(text, NEW)
        question, choices = split_options(written) if written and seed.parent.choices else (written, ())
        if not question or len(choices) != len(seed.parent.choices):
            outcome.reject(seed, METHOD, 0, "unreadable", text)
        elif question_key(question) in known:
            outcome.reject(seed, METHOD, 0, "repeated", question)
        else:
            known.add(question_key(question))
            prompt = build_prompt(seed.task, question, choices)
            votes = [settings.request(prompt, f"{METHOD} vote", seed, index) for index in range(settings.votes)]
            jobs.append((seed, draft, question, choices, votes))
    responses = iter(asker.ask([request for *_, votes in jobs for request in votes], "votes on new questions"))
    for seed, draft, question, choices, votes in jobs:
        replies = [next(responses) for _ in votes]
        winner = majority(replies, seed.task.answer_type, choices)
        if winner is None:
            outcome.reject(seed, METHOD, 0, "no_answer", question)
            continue
        voted, share, first = winner
        pseudo_gold = as_stated(target_text(replies[first]), voted, seed.task.answer_type, choices)
        if share < settings.agreement:
            outcome.reject(seed, METHOD, 0, "disagreement", f"{share:.2f} for {pseudo_gold}: {question}")
            continue
        fields = question_fields(seed, METHOD) | reply_fields(asker.teacher, votes[first], replies[first], via=(draft,))
        fields |= {"question": question, "choices": choices, "gold_answer": pseudo_gold, "gold_source": "pseudo", "n_steps": None}
        outcome.traces.append(answered_trace(target_text(replies[first]), **fields))
    return outcome


def majority(responses: Sequence[Response], answer_type: str, choices: Sequence[str]) -> tuple[str, float, int] | None:
    """(most frequent answer, its share of all responses, index of the first that gave it); None if nobody answered.

    Answers are compared by type ("3" and "3.0" are one vote). Of equally frequent answers the earliest wins. Cut or failed
    responses count against the share and never for an answer.
    """
    ballots: list[tuple[str, list[int]]] = []
    for index, response in enumerate(responses):
        given = extract(target_text(response), answer_type, choices).flexible if response.finish_reason == "stop" else None
        if given is None:
            continue
        for answer, voters in ballots:
            if equal(given, answer, answer_type, choices):
                voters.append(index)
                break
        else:
            ballots.append((given, [index]))
    if not ballots:
        return None
    answer, voters = max(ballots, key=lambda ballot: len(ballot[1]))
    return answer, len(voters) / len(responses), voters[0]
