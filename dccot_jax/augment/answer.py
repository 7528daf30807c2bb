"""Answer augmentation (MetaMath AnsAug, rejection sampling): further correct reasoning paths to the same question.

For k = 1..L: (R_k, A_k) = T(Q) at temperature > 0; kept iff A_k equals the gold answer and R_k is new (compared on letters and
digits with the originals and with earlier paths). Cost: L calls per question. The teacher never sees the gold answer.
Rejections: ``answer:wrong``, ``answer:no_answer`` (and other reasons of the judge), ``answer:repeated``, teacher failures.
"""

from __future__ import annotations

from collections.abc import Sequence

from dccot_jax.augment.seeds import Asker, Outcome, Seed, Settings, question_fields
from dccot_jax.records import normalise_question
from dccot_jax.teachers.rows import answered_trace, reply_fields

METHOD = "answer"


def augment_answers(seeds: Sequence[Seed], settings: Settings, asker: Asker) -> Outcome:
    """Up to ``settings.answers`` new traces per seed, with sample_index 1, 2, ... (the original request is sample 0)."""
    outcome = Outcome()
    jobs = [(seed, settings.request(seed.prompt(), METHOD, seed, index + 1)) for seed in seeds for index in range(settings.answers)]
    responses = asker.ask([request for _, request in jobs], "answer paths")
    known: dict[str, set[str]] = {seed.key: {normalise_question(trace.target) for trace in seed.traces} for seed in seeds}
    for (seed, request), response in zip(jobs, responses, strict=True):
        index = request.sample_index
        text = outcome.right(seed, METHOD, index, response)
        if text is None:
            continue
        if normalise_question(text) in known[seed.key]:
            outcome.reject(seed, METHOD, index, "repeated")
            continue
        known[seed.key].add(normalise_question(text))
        outcome.traces.append(answered_trace(text, **question_fields(seed, METHOD), **reply_fields(asker.teacher, request, response)))
    return outcome
