"""MinHash near-duplicates of texts (Broder 1997; banding as in Leskovec et al., Mining of Massive Datasets, chapter 3)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dccot_jax.questions import question_words
from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, Verdicts, by_value, text, with_values

THRESHOLD = 0.7
NGRAM = 5
BANDS, ROWS = 32, 4  # a pair of Jaccard similarity 0.7 is missed once in 6,600 times, one of 0.8 once in 10^7 times


def minhash(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Drop a group whose `text` (question, reasoning or target; default target) nearly repeats that of a kept one.

    Nearly: Jaccard similarity of their sets of `ngram`s (default 5) of words and operators of at least `threshold` (default
    0.7). MinHash finds the pairs, their similarity is then computed exactly. Of duplicates the best by `signal` stays (see `prefer`), or
    without one the first by id. Cost O(N) for few duplicates; memory 1 KiB and one set of n-grams per kept group.
    """
    name, size, threshold = step.get("text", "target"), step.get("ngram", NGRAM), step.get("threshold", THRESHOLD)
    reasons: Verdicts = {}
    if "signal" in step:
        found, reasons = with_values(candidates, step["signal"])
        ordered = by_value(found, step["signal"], step.get("prefer", "high"))
    else:
        ordered = sorted(candidates, key=lambda c: c.group_id)
    kept: list[Candidate] = []
    shingles: list[np.ndarray] = []
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for c in ordered:
        own = word_ngrams(text(c, name), size)
        keys = list(enumerate(bands(own)))
        near = sorted({other for key in keys if key in buckets for other in buckets[key]})
        alike, best = max(((jaccard(own, shingles[other]), -other) for other in near), default=(-1.0, 0))
        if alike >= threshold:
            detail = f"minhash: {alike:.3f} of the {size}-grams shared with {kept[-best].group_id}"
            reasons[c.group_id] = ("near_duplicate", detail)
            continue
        for key in keys:
            buckets[key].append(len(kept))
        kept.append(c)
        shingles.append(own)
    return kept, reasons


def word_ngrams(string: str, size: int) -> np.ndarray:
    """Sorted distinct 64-bit hashes of the n-grams of a text's words and operators (`questions`); a shorter text is one n-gram."""
    words = question_words(string)
    grams = {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}
    hashes = [int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little") for gram in grams]
    return np.unique(np.array(hashes, np.uint64))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union, of two sets of hashes (each sorted, without repeats)."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def bands(hashes: np.ndarray) -> list[bytes]:
    """The signature in bands: equal bands make two texts a pair to look at. Two bands agree with probability similarity^`ROWS`."""
    salts = _mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64))
    lowest = np.min(_mix(hashes[:, None] ^ salts[None, :]), axis=0)
    return [lowest[start : start + ROWS].tobytes() for start in range(0, BANDS * ROWS, ROWS)]


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that looks random (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
