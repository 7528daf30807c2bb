"""Signals that place a row among the other rows of its question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dccot_jax.questions import question_key
from dccot_jax.records import Trace


def grape(traces: Sequence[Trace], nll: Mapping[str, float]) -> dict[str, float]:
    """GRAPE (arXiv 2502.04194): mean log p(response token | question) minus that of the best response to the same question.

    0 for the response the student finds most natural, below 0 for the others; nats per token. The candidates of a question
    are the rows of one task and part that ask it, up to case, spacing and
    punctuation of prose (`questions`).

    Args:
      traces: the rows. nll: mean -log p per row id (`signals.nll`); rows without one take no part.
    """
    best: dict[tuple[str, ...], float] = defaultdict(lambda: float("inf"))
    for trace in traces:
        if trace.id in nll:
            best[_key(trace)] = min(best[_key(trace)], nll[trace.id])
    return {trace.id: best[_key(trace)] - nll[trace.id] for trace in traces if trace.id in nll}


def _key(trace: Trace) -> tuple[str, ...]:
    return trace.task, trace.part, question_key(trace.question, trace.choices)
