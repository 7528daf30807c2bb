"""The texts of augmentation: what a teacher is asked, how its reply is read, and what the student is asked in return.

Every request starts with a line ``Task: ...`` and ends with its blocks (``Question: ...``), so that a scripted teacher and
a language model can both read it. After DC-CoT (arXiv 2504.14772) and RevThink (arXiv 2411.19865); the wording is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

REPHRASED, NEW, BACKWARD = "Rephrased question:", "New question:", "Backward question:"

_REPHRASE = (
    "Say the question below in other words. Keep every number, name and condition, and ask for exactly the same thing, so that the "
    "answer stays the same. Do not solve it. Reply with one line that starts with '{reply}'.\n"
    "An example: from 'A shop sold 4 boxes of 6 pens. How many pens did it sell?' comes 'How many pens left the shop if it sold 4 "
    "boxes with 6 pens in each?'"
)
_NEW = {
    "number": (
        "Write a new problem of the same kind as the one below, with other numbers and other people or things. It asks for one thing, "
        "has one number as its answer, uses plausible values, stands on its own and does not contain its solution. Solve it for "
        "yourself first and repair it if something is wrong. Reply with one line that starts with '{reply}'."
    ),
    "": (
        "Write a new question of the same kind as the one below, about another subject but answered by the same kind of reasoning. It "
        "has exactly one right answer, stands on its own and does not give it away. Answer it for yourself first and repair it if "
        "something is wrong. Keep the form of the question, with the same number of options if it has any. Reply with one line that "
        "starts with '{reply}'."
    ),
}
_BACKWARD = {
    "number": (
        "Below are a problem and its right answer. Write the inverse problem: state the right answer as a known fact, leave out one of "
        "the numbers the problem gave, and ask for that number. Everything else stays. The answer of the inverse problem must be a "
        "number that the problem below states. Reply with one line that starts with '{reply}'."
    ),
    "choice": (
        "Below are a question with options and its right answer. Write an inverse question with the same number of options, marked "
        "(A), (B), and so on. It takes the right answer as given and asks for something that the question below states; exactly one "
        "option is right, the others are wrong for the same reason that the old options were. It must not repeat the question below. "
        "Reply with one line that starts with '{reply}'."
    ),
    "yes_no": (
        "Below are a question and its right answer, yes or no. Write an inverse question with two options, (A) and (B): it takes the "
        "right answer as a given fact and asks for something that the question below states. Exactly one option is right. Reply with "
        "one line that starts with '{reply}'."
    ),
    "": (
        "Below are a question and its right answer. Write the inverse question: state the right answer as a known fact, leave out one "
        "of the facts the question gave, and ask for it. The answer must stand in the question below. Reply with one line that starts "
        "with '{reply}'."
    ),
}
_CONSISTENCY = {
    "number": (
        "Question 2 was made from question 1 by turning it round. Check that answer 2 is right for question 2, and that it is one of "
        "the numbers that question 1 states. Reason briefly, then write True (both hold) or False as the last line."
    ),
    "": (
        "Question 2 was made from question 1 by turning it round. Check that what answer 2 says is contained in question 1. Reason "
        "briefly, then write True (it is) or False as the last line."
    ),
}
_LETTERS = "ABCDEFGHIJ"
_VERDICT = re.compile(r"\b(true|false)\b", re.IGNORECASE)


def with_options(question: str, choices: Sequence[str]) -> str:
    """``question (A) x (B) y``."""
    return " ".join([question, *(f"({letter}) {text}" for letter, text in zip(_LETTERS, choices))])


def rephrase_request(question: str, choices: Sequence[str]) -> str:
    """Asks for the question in other words; options are not part of it and stay as they are."""
    return f"Task: rephrase\n{_REPHRASE.format(reply=REPHRASED)}\n\nQuestion: {question}"


def new_question_request(question: str, choices: Sequence[str], answer_type: str) -> str:
    return f"Task: new question\n{_for_type(_NEW, answer_type).format(reply=NEW)}\n\nQuestion: {with_options(question, choices)}"


def backward_question_request(question: str, choices: Sequence[str], gold: str, answer_type: str) -> str:
    """Asks for the inverse question of a question and its right answer (RevThink's P_bq)."""
    instruction = _for_type(_BACKWARD, answer_type).format(reply=BACKWARD)
    return f"Task: backward question\n{instruction}\n\nQuestion: {with_options(question, choices)}\nAnswer: {gold_text(gold, choices)}"


def consistency_request(question: str, choices: Sequence[str], gold: str, backward: str, predicted: str, answer_type: str) -> str:
    """Asks whether the inverse question's answer is contained in the question (RevThink's P_con)."""
    instruction = _for_type(_CONSISTENCY, answer_type)
    first = f"Question 1: {with_options(question, choices)}\nAnswer 1: {gold_text(gold, choices)}"
    return f"Task: consistency\n{instruction}\n\n{first}\nQuestion 2: {backward}\nAnswer 2: {predicted}"


def inverse_question_prompt(question: str, choices: Sequence[str], gold: str) -> str:
    """What the *student* is asked in the second part of the reverse loss: write the inverse question."""
    return f"Write the inverse question.\n{with_options(question, choices)}\nThe answer is {gold_text(gold, choices)}."


def gold_text(gold: str, choices: Sequence[str]) -> str:
    """A gold answer as shown in a text: for a letter also the option, ``(B) blue``."""
    index = _LETTERS.find(gold) if len(gold) == 1 else -1
    return f"({gold}) {choices[index]}" if 0 <= index < len(choices) else gold


def read_question(text: str, reply: str) -> str | None:
    """The question in a reply: what follows the last `reply` header, or a reply of one paragraph; None if there is none.

    A repeated header, quotes around it and a stated answer ("The correct answer is (A).") are cut.
    """
    _, found, after = text.rpartition(reply)
    body = after if found else text
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", body.strip()) if part.strip()]
    if not paragraphs or (not found and len(paragraphs) > 1):
        return None
    question = re.sub(r"\s*The (?:correct )?answer is[^\n]*$", "", paragraphs[0]).strip()
    while len(question) > 1 and question[0] in "\"'“‘*" and question[-1] in "\"'”’*":
        question = question[1:-1].strip()
    return question or None


def read_verdict(text: str) -> bool | None:
    """The last ``True`` or ``False`` in a consistency reply; None if there is neither."""
    found = _VERDICT.findall(text)
    return found[-1].lower() == "true" if found else None


def _for_type(texts: dict[str, str], answer_type: str) -> str:
    return texts.get("number" if answer_type == "latex" else answer_type, texts[""])
