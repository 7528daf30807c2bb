"""Natural language inference as three options: ANLI round 3 and e-SNLI."""

from __future__ import annotations

from typing import Any

from dccot_jax.tasks.base import Task
from dccot_jax.tasks.loading import Row, choice_suffix, hub_task

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


_SHARED: dict[str, Any] = {"answer_type": "choice", "domain": "nli", "prompt_suffix": choice_suffix(3), "cross": ("strategyqa", "svamp")}

TASKS: tuple[Task, ...] = (
    hub_task(
        "anli_r3",
        description="Adversarial NLI, round 3",
        hub="facebook/anli",
        hub_splits={"train": "train_r3", "test": "test_r3"},
        read_hub=_read,
        ood=("esnli",),
        **_SHARED,
    ),
    hub_task("esnli", description="SNLI with human explanations", hub="esnli/esnli", read_hub=_read, ood=("anli_r3",), **_SHARED),
)
