"""Question rephrasing (MetaMath): the question in other words, answered anew.

Qhat_j = T(Q; P_rephrase), j = 1..L; (Rhat, Ahat) = T(Qhat); kept iff Ahat equals the gold answer of Q. Used in union with the
originals. Cost: 2 calls per sample. Options of a multiple-choice question stay as they are.
Rejections: ``rephrase:unreadable`` (no question in the reply), ``rephrase:repeated`` (the question itself or an earlier
rephrasing), ``rephrase:wrong`` and other reasons of the judge, teacher failures.
"""

from __future__ import annotations

from collections.abc import Sequence

from dccot_jax.augment.seeds import Asker, Outcome, Seed, Settings, question_fields
from dccot_jax.questions import question_key
from dccot_jax.records import Request
from dccot_jax.tasks.registry import build_prompt
from dccot_jax.teachers.prompts import REPHRASED, read_question, rephrase_request
from dccot_jax.teachers.rows import answered_trace, reply_fields

METHOD = "rephrase"


def rephrase_questions(seeds: Sequence[Seed], settings: Settings, asker: Asker) -> Outcome:
    """Up to ``settings.rephrasings`` new traces per seed, each with its own question."""
    outcome = Outcome()
    drafts = [
        (seed, settings.request(rephrase_request(seed.parent.question, seed.parent.choices), METHOD, seed, index))
        for seed in seeds
        for index in range(settings.rephrasings)
    ]
    replies = asker.ask([request for _, request in drafts], "rephrasings")
    known = {seed.key: {question_key(seed.parent.question)} for seed in seeds}
    jobs: list[tuple[Seed, Request, str, Request]] = []
    for (seed, request), reply in zip(drafts, replies, strict=True):
        index = request.sample_index
        text = outcome.usable(seed, METHOD, index, reply)
        if text is None:
            continue
        question = read_question(text, REPHRASED)
        if question is None:
            outcome.reject(seed, METHOD, index, "unreadable", text)
        elif question_key(question) in known[seed.key]:
            outcome.reject(seed, METHOD, index, "repeated", question)
        else:
            known[seed.key].add(question_key(question))
            prompt = build_prompt(seed.task, question, seed.parent.choices)
            jobs.append((seed, request, question, settings.request(prompt, f"{METHOD} answer {index}", seed)))
    responses = asker.ask([request for *_, request in jobs], "answers to rephrasings")
    for (seed, draft, question, request), response in zip(jobs, responses, strict=True):
        index = draft.sample_index
        text = outcome.right(seed, METHOD, index, response, f": {question}")
        if text is None:
            continue
        fields = question_fields(seed, METHOD) | reply_fields(asker.teacher, request, response, via=(draft,))
        outcome.traces.append(answered_trace(text, **fields | {"question": question, "sample_index": index}))
    return outcome
