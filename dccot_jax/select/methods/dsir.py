"""DSIR (arXiv 2302.03169): importance resampling towards the n-grams of a target task."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from dccot_jax.select.budget import budget_of, take
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, text
from dccot_jax.select.draws import gumbel

BUCKETS = 10_000
_SMOOTH = 1e-8
_WORDS = re.compile(r"\w+|[^\w\s]+")


def dsir(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Rank by log importance weight plus Gumbel noise (`sample` False: without), within the budget.

    log w(x) = sum_b n_b(x) (log p_target(b) - log p_raw(b)), n_b the counts of hashed words and pairs of words: lower case,
    words and runs of punctuation, SHA-256 modulo `buckets` (default 10,000); p the pooled frequencies of the training
    questions of task `target` and of the candidates, each + 1e-8. `text` "question" (default), or "full": question and
    trace against question, gold rationale and answer. The published code also drops texts under 100 tokens; this does not.
    """
    size, ordered_in = step.get("buckets", BUCKETS), sorted(candidates, key=lambda c: c.group_id)
    texts = [_text(c, step.get("text", "question")) for c in ordered_in]
    weights = log_weights(texts, setting.corpora[corpus_name(step)], size)
    noise = [gumbel(setting.seed, "select/dsir", c.group_id) if step.get("sample", True) else 0.0 for c in ordered_in]
    keys = {c.group_id: (-(w + g), w) for c, w, g in zip(ordered_in, weights, noise)}
    ordered = sorted(ordered_in, key=lambda c: (keys[c.group_id][0], c.group_id))
    return take(ordered, step, budget_of(step, candidates), "not_in_dsir", lambda c: f", log weight = {keys[c.group_id][1]:.6g}")


def corpus_name(step: Step) -> str:
    """Key of the target texts that a `dsir` step needs: ``<task>:<text>``."""
    return f"{step['target']}:{step.get('text', 'question')}"


def log_weights(raw: Sequence[str], target: Iterable[str], buckets: int = BUCKETS) -> list[float]:
    """Log importance weight of every raw text. Raises ValueError on an empty target."""
    counts = [ngram_counts(string, buckets) for string in raw]
    wanted = _total((ngram_counts(string, buckets) for string in target), buckets)
    if not wanted.sum():
        raise ValueError("dsir: the target has no words")
    pool = _total(counts, buckets)
    difference = np.log(wanted / wanted.sum() + _SMOOTH) - np.log(pool / max(pool.sum(), 1) + _SMOOTH)
    return [sum(n * float(difference[b]) for b, n in sorted(count.items())) for count in counts]


def ngram_counts(string: str, buckets: int = BUCKETS) -> Counter[int]:
    """Counts of hashed words and pairs of neighbouring words."""
    words = _WORDS.findall(string.lower())
    grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
    return Counter(_bucket(gram, buckets) for gram in grams)


@functools.lru_cache(maxsize=1 << 20)
def _bucket(gram: str, buckets: int) -> int:
    return int(hashlib.sha256(gram.encode()).hexdigest(), 16) % buckets


def _total(counts: Iterable[Counter[int]], buckets: int) -> np.ndarray:
    total = np.zeros(buckets, np.int64)
    for count in counts:
        for b, n in count.items():
            total[b] += n
    return total


def _text(candidate: Candidate, name: str) -> str:
    return text(candidate, "question") if name == "question" else f"{text(candidate, 'question')}\n{text(candidate, 'target')}"
