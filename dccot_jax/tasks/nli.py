"""Natural language inference as three options: ANLI round 3 and e-SNLI."""

from __future__ import annotations

from typing import Any

from dccot_jax.tasks.base import Task
from dccot_jax.tasks.loading import Row, choice_suffix, loader

OPTIONS = ("entailment", "neutral", "contradiction")


def _read(row: Row) -> dict[str, Any] | None:
    """Label 0, 1, 2 = A, B, C; rows without an agreed label (-1) are left out."""
    label = OPTIONS.index(row["label"]) if row["label"] in OPTIONS else int(row["label"])
    if label < 0:
        return None
    rationale = row.get("reason") or row.get("explanation_1")
    texts = f"Premise: {row['premise'].strip()}\nHypothesis: {row['hypothesis'].strip()}"
    question = f"{texts}\nWhat is the relation of the hypothesis to the premise?"
    return {"question": question, "choices": OPTIONS, "gold": "ABC"[label], "rationale": (rationale or "").strip() or None}


TASKS: tuple[Task, ...] = (
    Task(
        name="anli_r3",
        answer_type="choice",
        domain="nli",
        description="Adversarial NLI, round 3",
        hub="facebook/anli",
        load=loader("anli_r3", hub="facebook/anli", hub_splits={"train": "train_r3", "test": "test_r3"}, read_hub=_read),
        prompt_suffix=choice_suffix(3),
        iid=("anli_r3",),
        ood=("esnli",),
        cross=("strategyqa", "svamp"),
        local_files=("anli_r3/train.jsonl", "anli_r3/test.jsonl"),
    ),
    Task(
        name="esnli",
        answer_type="choice",
        domain="nli",
        description="SNLI with human explanations",
        hub="esnli/esnli",
        load=loader("esnli", hub="esnli/esnli", hub_splits={"train": "train", "test": "test"}, read_hub=_read),
        prompt_suffix=choice_suffix(3),
        iid=("esnli",),
        ood=("anli_r3",),
        cross=("strategyqa", "svamp"),
        local_files=("esnli/train.jsonl", "esnli/test.jsonl"),
    ),
)
