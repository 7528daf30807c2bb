"""Candidates for tests of selectors: groups with ties, gaps, labels, texts and vectors."""

from __future__ import annotations

import random

import numpy as np

from dccot_jax.records import make_trace
from dccot_jax.select.candidates import Candidate
from dccot_jax.select.selectors import apply_steps

WORDS = (
    "the",
    "a",
    "box",
    "holds",
    "pens",
    "and",
    "apples",
    "red",
    "blue",
    "seven",
    "four",
    "check",
    "therefore",
    "perhaps",
    "so",
    "3",
    "4",
)
NUMBERS = ("nll", "entropy", "student_error")
VECTORS = ("embedding", "trajectory")


def pool(n: int = 40, seed: int = 0) -> list[Candidate]:
    """Groups of one to three rows with coarse values (so that there are ties) and a few without a value or vector."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        group = f"g{rng.randrange(10**9):09d}"
        size = rng.choice([1, 1, 1, 3])
        values = {"completion_tokens": float(rng.randrange(5, 60))}
        if rng.random() > 0.1:
            values |= {
                "nll": rng.choice([0.5, 1.0, 1.5, 2.0]),
                "entropy": rng.choice([0.1, 0.2, 0.3]),
                "student_error": float(rng.random() < 0.5),
            }
        vectors = {
            "embedding": np.array([rng.randrange(-2, 3) for _ in range(3)], np.float32),
            "trajectory": np.array([rng.randrange(4), rng.randrange(4)], np.float32),
        }
        if rng.random() < 0.1:
            vectors = {name: np.full_like(vector, np.nan) for name, vector in vectors.items()}
        record = make_trace(
            task="toy",
            split="train",
            question=" ".join(rng.choices(WORDS, k=3)),
            target=" ".join(rng.choices(WORDS, k=rng.choice([4, 12]))),
            reasoning=" ".join(rng.choices(WORDS, k=rng.choice([0, 8, 30]))),
            teacher=rng.choice(["x", "y", "z"]),
            level=str(rng.randrange(3)),
            meta='{"subject": "algebra"}' if rng.random() < 0.3 else "{}",
        )
        ids = tuple(sorted(f"{group}-{j}" for j in range(size)))
        verdict = rng.choice([True, True, False, None])
        found.append(Candidate(group, ids, int(values["completion_tokens"]), verdict, "why", values, vectors, record))
    return found


def select(candidates, *steps, seed=0, available=NUMBERS, vectors=VECTORS, corpora=None):
    return apply_steps(candidates, steps, seed=seed, available=available, vectors=vectors, corpora=corpora)


def ids(candidates) -> set[str]:
    return {i for c in candidates for i in c.ids}


def size(candidates) -> int:
    return sum(len(c.ids) for c in candidates)


def singles(n: int, **columns) -> list[Candidate]:
    """`n` groups g000, g001, ... of one row of one token; `columns` are callables index -> value, a vector if it is a sequence."""
    found = []
    for i in range(n):
        made = {name: column(i) for name, column in columns.items()}
        values = {name: float(value) for name, value in made.items() if np.ndim(value) == 0}
        vectors = {name: np.asarray(value, np.float32) for name, value in made.items() if np.ndim(value) == 1}
        found.append(Candidate(f"g{i:03d}", (f"g{i:03d}",), 1, True, "", values, vectors))
    return found


def with_text(question: str = "q", target: str = "t", reasoning: str = "", **fields):
    return make_trace(task="toy", split="train", question=question, target=target, reasoning=reasoning, **fields)
