"""Math word problems and competition math: GSM8K, SVAMP, ASDiv, MAWPS, GSM-hard, MATH-500, AQuA."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from dccot_jax.records import normalise_question
from dccot_jax.tasks.base import Item, Task, TaskDataError, make_item
from dccot_jax.tasks.loading import LATEX_SUFFIX, NUMBER_SUFFIX, LocalLoader, Row, build_items, choice_suffix, file_loader, hub_task
from dccot_jax.tasks.rational import exact
from dccot_jax.tasks.sources import number_text, read_rows

_NOTE = re.compile(r"<<[^<>]*>>")
_PAL = "pal_math_ood"
MAWPS_PARTS = ("addsub", "multiarith", "singleeq", "singleop")
_CROSS = ("strategyqa", "date_understanding", "bbh_boolean_expressions", "bbh_tracking_shuffled_objects_three_objects")


# --- GSM8K and GSM-hard -------------------------------------------------------------------------------------------------


def read_gsm8k(row: Row) -> dict[str, Any]:
    """Human solution without its <<...>> notes as the rationale; the number after #### as gold."""
    solution, gold = row["answer"].rsplit("####", 1)
    rationale = _NOTE.sub("", solution).strip()
    steps = len([line for line in rationale.splitlines() if line.strip()])
    return {"question": row["question"].strip(), "gold": gold.strip().replace(",", ""), "rationale": rationale, "n_steps": steps}


def _read_pal(row: Row) -> dict[str, Any]:
    return {"question": row["input"].strip(), "gold": number_text(row["target"])}


def _pal_loader(task: str, stem: str) -> LocalLoader:
    return file_loader(task, {"test": f"{_PAL}/{stem}.jsonl.gz"}, _read_pal)


# --- SVAMP --------------------------------------------------------------------------------------------------------------


def read_svamp(row: Row) -> dict[str, Any]:
    """Body and question joined; the equation, worked out, as the rationale ("76 - 25 = 51.")."""
    question = f"{row['Body'].strip()} {row['Question'].strip()}"
    gold = number_text(float(row["Answer"]))
    rationale, steps = equation_rationale(row["Equation"], gold)
    kind = row["Type"].replace("Divison", "Division")
    return {"question": question, "gold": gold, "rationale": rationale, "n_steps": steps, "meta": {"source_id": row["ID"], "type": kind}}


def equation_rationale(equation: str, gold: str) -> tuple[str | None, int | None]:
    """``("76 - 25 = 51.", 1)`` for ``"( 76.0 - 25.0 )"``; (None, None) if the equation does not come to the gold answer."""
    value = exact(equation)
    if value is None or abs(value - Fraction(gold)) > Fraction(1, 100):
        return None, None
    text = re.sub(r"([0-9])\.0(?![0-9])", r"\1", equation).strip()
    if text.startswith("(") and text.endswith(")") and _closes_last(text):
        text = text[1:-1].strip()
    text = re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", text))
    return f"{text} = {gold}.", len(re.findall(r"(?<=\s)[-+*/](?=\s)", equation))


def _closes_last(text: str) -> bool:
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return index == len(text) - 1
    return False


def _local_svamp(split: str, data_dir: Path) -> list[Item]:
    """Test: the 300 rows that are in no teacher file; train: the others. (SVAMP itself has no official split.)"""
    answers = read_rows(data_dir, "svamp/eit/SVAMP_only_ans.json.gz", task="svamp")  # holds every question of every teacher file
    taught = {normalise_question(str(row["instruction"])) for row in answers}
    items = build_items("svamp", split, read_rows(data_dir, "svamp/SVAMP.json.gz", task="svamp"), read_svamp, "svamp/SVAMP.json.gz")
    return [item for item in items if (normalise_question(item.question) in taught) == (split == "train")]


# --- MAWPS, ASDiv -------------------------------------------------------------------------------------------------------


def _local_mawps(split: str, data_dir: Path) -> list[Item]:
    """The four parts pooled; a question that stands in two parts is there once, from the first."""
    items: dict[str, Item] = {}
    for part in MAWPS_PARTS:
        for item in _pal_loader(f"mawps_{part}", f"mawps{part}")(split, data_dir):
            pooled = make_item("mawps", split, item.question, gold=item.gold, meta={"part": part})
            items.setdefault(normalise_question(item.question), pooled)
    return list(items.values())


def _read_calc_mawps(row: Row) -> dict[str, Any]:
    return {
        "question": row["question"].strip(),
        "gold": number_text(row["result_float"] if row.get("result_float") is not None else row["result"]),
    }


def _read_asdiv(row: Row) -> dict[str, Any] | None:
    match = re.fullmatch(r"\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*(?:\([^()]*\))?\s*", str(row["answer"]))
    if match is None:
        return None  # ratios, times and several-part answers are not numbers
    gold = match.group(1).replace(",", "")
    rationale, steps = equation_rationale(str(row["formula"]).split("=")[0], gold)
    return {"question": f"{row['body'].strip()} {row['question'].strip()}", "gold": gold, "rationale": rationale, "n_steps": steps}


# --- MATH-500, AQuA -----------------------------------------------------------------------------------------------------


def _read_math500(row: Row) -> dict[str, Any]:
    meta = {"subject": row.get("subject"), "level": row.get("level")}
    return {"question": row["problem"].strip(), "gold": row["answer"].strip(), "rationale": row["solution"].strip(), "meta": meta}


def _read_aqua(row: Row) -> dict[str, Any]:
    options = [re.sub(r"^\s*[A-E]\s*[).]\s*", "", option).strip() for option in row["options"]]
    if not re.fullmatch(r"[A-E]", row["correct"].strip()) or len(options) != 5:
        raise TaskDataError(f"answer {row['correct']!r} with {len(options)} options")
    lines = [line for line in row["rationale"].splitlines() if not re.match(r"\s*(?:the\s+)?(?:correct\s+)?(?:answer|ans)\b", line, re.I)]
    return {
        "question": row["question"].strip(),
        "choices": options,
        "gold": row["correct"].strip(),
        "rationale": "\n".join(lines).strip() or None,
    }


def _number_task(name: str, description: str, **fields: Any) -> Task:
    return hub_task(name, answer_type="number", domain="math", description=description, prompt_suffix=NUMBER_SUFFIX, **fields)


_GSM8K = {"train": "gsm8k/train.jsonl.gz", "test": "gsm8k/test.jsonl.gz"}
_TEST_ONLY = {"test": "test"}

TASKS: tuple[Task, ...] = (
    _number_task(
        "gsm8k",
        "Grade-school word problems of 2 to 8 steps, human solutions",
        hub="openai/gsm8k:main",
        read_hub=read_gsm8k,
        local=file_loader("gsm8k", _GSM8K, read_gsm8k),
        local_files=tuple(_GSM8K.values()),
        ood=("gsm_hard", "svamp", "asdiv", "mawps", "math500"),
        cross=(*_CROSS, "aqua"),
    ),
    _number_task(
        "svamp",
        "One-step word problems with distractors; local test = the 300 rows in no teacher file",
        hub="ChilleD/SVAMP",
        read_hub=read_svamp,
        local=_local_svamp,
        local_files=("svamp/SVAMP.json.gz", "svamp/eit/SVAMP_only_ans.json.gz"),
        ood=("asdiv", "mawps", "gsm8k"),
        cross=_CROSS,
    ),
    _number_task(
        "asdiv",
        "Diverse one- and two-step word problems with numeric answers",
        hub="EleutherAI/asdiv",
        hub_splits={"test": "validation"},
        read_hub=_read_asdiv,
        local=_pal_loader("asdiv", "asdiv"),
        local_files=(f"{_PAL}/asdiv.jsonl.gz",),
    ),
    _number_task(
        "mawps",
        "MAWPS: AddSub, MultiArith, SingleEq and SingleOp without repeats",
        hub="MU-NLPC/Calc-mawps",
        hub_splits=_TEST_ONLY,
        read_hub=_read_calc_mawps,
        local=_local_mawps,
        local_files=tuple(f"{_PAL}/mawps{part}.jsonl.gz" for part in MAWPS_PARTS),
    ),
    *(
        _number_task(
            f"mawps_{part}",
            f"The {part} part of MAWPS",
            hub=None,
            hub_splits=_TEST_ONLY,
            read_hub=_read_pal,
            local=_pal_loader(f"mawps_{part}", f"mawps{part}"),
            local_files=(f"{_PAL}/mawps{part}.jsonl.gz",),
        )
        for part in MAWPS_PARTS
    ),
    _number_task(
        "gsm_hard",
        "GSM8K test questions with larger numbers (a quarter are unchanged)",
        hub="reasoning-machines/gsm-hard",
        hub_splits={"test": "train"},
        read_hub=_read_pal,
        local=_pal_loader("gsm_hard", "gsmhardv2"),
        local_files=(f"{_PAL}/gsmhardv2.jsonl.gz",),
    ),
    hub_task(
        "math500",
        answer_type="latex",
        domain="math",
        description="500 competition problems of the MATH test set",
        hub="HuggingFaceH4/MATH-500",
        hub_splits=_TEST_ONLY,
        read_hub=_read_math500,
        prompt_suffix=LATEX_SUFFIX,
    ),
    hub_task(
        "aqua",
        answer_type="choice",
        domain="math",
        description="Algebra word problems with five options and rationales",
        hub="deepmind/aqua_rat:raw",
        read_hub=_read_aqua,
        prompt_suffix=choice_suffix(5),
        ood=("gsm8k", "math500"),
        cross=("strategyqa", "commonsenseqa"),
    ),
)
