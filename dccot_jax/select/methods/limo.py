"""LIMO's score of a reasoning chain (arXiv 2502.03387): length, and words of checking, of caution and of conclusion."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from dccot_jax.records import fold_text
from dccot_jax.select.budget import budget_of, take
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, partition, text

# (weight, words): elaborated reasoning, self-verification, exploration, adaptive granularity
PARTS = (
    (0.30, ()),
    (0.20, ("check", "verify")),
    (0.25, ("perhaps", "might")),
    (0.25, ("therefore", "since")),
)
_WORD = re.compile("[^\\W\\d_]+(?:['\u2019][^\\W\\d_]+)?|\\d+")


def limo(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Highest sum of 0.30 z(words) + 0.20 z(check, verify) + 0.25 z(perhaps, might) + 0.25 z(therefore, since), within the budget.

    The last three are shares of the rationale's words; z is over the candidates of the step, and 0 where all are equal. A
    group without a rationale is dropped (``no_reasoning``), and so is one whose rationale has no word or number (``no_words``).
    The paper's words are English: in other languages length alone tells rationales apart. The paper's difficulty filter is a
    step of its own.
    """
    ordered_in = sorted(candidates, key=lambda c: c.group_id)
    counted = {c.group_id: features(text(c, "reasoning")) for c in ordered_in}
    found, reasons = partition(ordered_in, lambda c: None if counted[c.group_id][0] > 0 else _without_words(text(c, "reasoning")))
    columns = [_standard([counted[c.group_id][part] for c in found]) for part in range(len(PARTS))]
    score = {c.group_id: sum(weight * column[i] for (weight, _), column in zip(PARTS, columns)) for i, c in enumerate(found)}
    ordered = sorted(found, key=lambda c: (-score[c.group_id], c.group_id))
    kept, lost = take(ordered, step, budget_of(step, candidates), "not_in_limo", lambda c: f", score = {score[c.group_id]:.6g}")
    return kept, reasons | lost


def features(reasoning: str) -> list[float]:
    """Number of words (letters of any script that stand together, or digits), then the share of each part's words among them."""
    folded = fold_text(reasoning)
    if not folded.isascii():  # vowel signs and accents do not end a word
        folded = "".join(c for c in folded if unicodedata.category(c)[0] != "M")
    words = _WORD.findall(folded)
    return [float(len(words)), *(sum(word in part for word in words) / max(len(words), 1) for _, part in PARTS[1:])]


def _without_words(reasoning: str) -> tuple[str, str]:
    if not reasoning.strip():
        return "no_reasoning", "limo: the trace has no rationale"
    return "no_words", f"limo: no word or number in the rationale {reasoning.strip()[:40]!r}"


def _standard(values: Sequence[float]) -> list[float]:
    """z-scores with the population's deviation."""
    n = max(len(values), 1)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / n)
    # equal values may differ from their mean by a rounding
    return [(v - mean) / deviation if deviation > 1e-12 * max(1.0, abs(mean)) else 0.0 for v in values]
