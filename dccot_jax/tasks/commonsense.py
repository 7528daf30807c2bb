"""Commonsense and science questions: StrategyQA, BoolQ, CommonsenseQA, OpenBookQA, ARC-Challenge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dccot_jax.records import normalise_question
from dccot_jax.tasks.base import Item, Task
from dccot_jax.tasks.loading import YES_NO_SUFFIX, Row, build_items, choice_suffix, file_loader, hub_task
from dccot_jax.tasks.sources import letter_of, read_rows, split_options

_CROSS = ("svamp", "gsm8k", "date_understanding", "bbh_tracking_shuffled_objects_three_objects")


# --- StrategyQA, BoolQ --------------------------------------------------------------------------------------------------


def _read_strategyqa(row: Row) -> dict[str, Any]:
    """The facts in order as the rationale."""
    facts = row.get("facts") or []
    text = facts if isinstance(facts, str) else " ".join(_sentence(fact) for fact in facts)
    steps = len(row["decomposition"]) if isinstance(row.get("decomposition"), (list, tuple)) else None
    gold = "yes" if row["answer"] in (True, "True", "true", "yes") else "no"
    return {"question": row["question"].strip(), "gold": gold, "rationale": text.strip() or None, "n_steps": steps}


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _local_strategyqa(split: str, data_dir: Path) -> list[Item]:
    """Test: the 290 questions of the teachers' own test file; train: every other question of the original train and dev files."""
    original = [row for name in ("train", "dev") for row in read_rows(data_dir, f"strategyqa/{name}.json.gz", task="strategyqa")]
    test_rows = read_rows(data_dir, "strategyqa/eit/strategyQA_test.json.gz", task="strategyqa")
    held_out = {normalise_question(str(row["instruction"])) for row in test_rows}
    items = build_items("strategyqa", split, original, _read_strategyqa, "strategyqa/train.json.gz, dev.json.gz")
    return [item for item in items if (normalise_question(item.question) in held_out) == (split == "test")]


def _read_boolq(row: Row) -> dict[str, Any]:
    question = row["question"].strip().rstrip("?").strip()
    passage = row["passage"].strip()
    return {"question": f"{passage}\nQuestion: {question[:1].upper()}{question[1:]}?", "gold": "yes" if row["answer"] else "no"}


# --- multiple choice ----------------------------------------------------------------------------------------------------


def _read_hub_choice(row: Row) -> dict[str, Any] | None:
    """CommonsenseQA, OpenBookQA and ARC on the hub: {question or question_stem, choices: {text, label}, answerKey}."""
    labels, texts = [str(label) for label in row["choices"]["label"]], [str(text).strip() for text in row["choices"]["text"]]
    gold = chr(ord("A") + labels.index(str(row["answerKey"])))  # some ARC rows number their options 1 to 4
    question = row["question_stem"] if "question_stem" in row else row["question"]
    fact = row.get("fact1")
    return {"question": question.strip(), "choices": texts, "gold": gold, "rationale": _sentence(fact) if fact else None}


def _read_text_choice(task: str, where: str) -> Callable[[Row], dict[str, Any]]:
    """Rows {question, choices, answer = option text}."""

    def read(row: Row) -> dict[str, Any]:
        choices = [str(choice).strip() for choice in row["choices"]]
        gold = letter_of(row["answer"], choices, task=task, where=where)
        return {"question": row["question"].strip(), "choices": choices, "gold": gold}

    return read


def _read_inline_choice(row: Row) -> dict[str, Any]:
    """Rows whose text holds question and options; the letter is in ``label`` or ``output``."""
    question, choices = split_options(row["instruction"])
    gold = str(row["label"] if row.get("label") else row["output"]).strip().upper()
    if not choices or gold not in "ABCDEFGHIJ"[: len(choices)]:
        raise ValueError(f"answer {gold!r} with {len(choices)} options")
    return {"question": question, "choices": choices, "gold": gold}


def _local_arc(split: str, data_dir: Path) -> list[Item]:
    name = f"arc/tinyllm/arc_{split}.json.gz"
    return build_items(
        "arc_challenge", split, read_rows(data_dir, name, task="arc_challenge"), _read_text_choice("arc_challenge", name), name
    )


_OBQA = {"train": "openbookqa/eit/openbookQA_onlyans.json.gz", "test": "openbookqa/eit/openbookQA_test.json.gz"}
_CSQA = {"train": "commonsenseqa/eit/commonsenseQA_onlyans.json.gz", "test": "commonsenseqa/eit/csqa_test.json.gz"}

TASKS: tuple[Task, ...] = (
    hub_task(
        "strategyqa",
        answer_type="yes_no",
        domain="commonsense",
        description="Yes/no questions that need implicit facts",
        hub="ChilleD/StrategyQA",
        read_hub=_read_strategyqa,
        local=_local_strategyqa,
        local_files=("strategyqa/train.json.gz", "strategyqa/dev.json.gz", "strategyqa/eit/strategyQA_test.json.gz"),
        prompt_suffix=YES_NO_SUFFIX,
        ood=("boolq", "commonsenseqa", "openbookqa"),
        cross=("gsm8k", "svamp", "date_understanding", "bbh_tracking_shuffled_objects_three_objects"),
    ),
    hub_task(
        "boolq",
        answer_type="yes_no",
        domain="commonsense",
        description="Yes/no questions about a passage",
        hub="google/boolq",
        hub_splits={"train": "train", "test": "validation"},
        read_hub=_read_boolq,
        prompt_suffix=YES_NO_SUFFIX,
        ood=("strategyqa",),
        cross=("svamp", "gsm8k"),
    ),
    hub_task(
        "commonsenseqa",
        answer_type="choice",
        domain="commonsense",
        description="Commonsense questions with five options (test = the official validation set)",
        hub="tau/commonsense_qa",
        hub_splits={"train": "train", "test": "validation"},
        read_hub=_read_hub_choice,
        local=file_loader("commonsenseqa", _CSQA, _read_inline_choice),
        local_files=tuple(_CSQA.values()),
        prompt_suffix=choice_suffix(5),
        ood=("openbookqa", "arc_challenge"),
        cross=_CROSS,
    ),
    hub_task(
        "openbookqa",
        answer_type="choice",
        domain="science",
        description="Elementary science questions with four options",
        hub="allenai/openbookqa:main",
        read_hub=_read_hub_choice,
        local=file_loader("openbookqa", _OBQA, _read_inline_choice),
        local_files=tuple(_OBQA.values()),
        prompt_suffix=choice_suffix(4),
        ood=("arc_challenge",),
        cross=_CROSS,
    ),
    hub_task(
        "arc_challenge",
        answer_type="choice",
        domain="science",
        description="Grade-school science exam questions, the hard part (local files: four options only)",
        hub="allenai/ai2_arc:ARC-Challenge",
        read_hub=_read_hub_choice,
        local=_local_arc,
        local_files=("arc/tinyllm/arc_train.json.gz", "arc/tinyllm/arc_test.json.gz"),
        prompt_suffix=choice_suffix(4),
        ood=("openbookqa",),
        cross=("svamp", "strategyqa"),
    ),
)
