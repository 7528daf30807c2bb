"""Which texts ask the same: signs of mathematics count, punctuation of prose does not."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator

import pytest
from select_cases import singles

from dccot_jax.questions import question_key, question_words
from dccot_jax.records import make_trace, normalise_question
from dccot_jax.select.candidates import question_key as candidate_key
from dccot_jax.select.decontaminate import ExactIndex, Question, drop_leaked, evaluation_questions
from dccot_jax.select.methods.minhash import jaccard, word_ngrams
from dccot_jax.select.relative import grape
from dccot_jax.tasks.registry import load_items


@pytest.mark.parametrize(
    "same",
    [
        ("What is 3 + 4?", "what is  3+4", "WHAT IS $3$ + $4$", "What is ３＋４?", r"What is \(3+4\)?", "What, is 3 + 4 ?!"),
        ("3 - 4", "3-4", "3 − 4", "3 – 4", "$3-4$"),
        ("3 * 4", "3×4", "3 · 4", r"3*4"),
        ("3 / 4", "3÷4", "¾"),
        ("twenty-one pens", "twenty one pens", "Twenty‑one pens."),
        ("a 12-year-old's T-shirt", "a 12 year old’s T shirt"),
        ("Ann - a girl - sings", "Ann -- a girl -- sings", "Ann, a girl, sings", "Ann — a girl — sings"),
        ("He has 3.", "he has 3", "He has **3**", "He has “3”…"),
        ("is 1.5 m", "Is １．５ m."),
        ("is .5", "is 0.5"),
        ("x^{10}", "x^10", "$x^{10}$"),
        ("x^{a+b}", "x^(a+b)"),
        ("10²", "10^2"),
        ("2½ cups", "2 1/2 cups"),
        ("* Ann has 3 pens", "Ann has 3 pens"),
        ("and/or", "and or"),
        ("हिन्दी में", "हिन्दी  में।"),
        ("café", "cafe\u0301"),
    ],
)
def test_texts_that_ask_the_same(same):
    assert {question_words(text) for text in same} == {question_words(same[0])}


@pytest.mark.parametrize(
    "different",
    [
        [f"What is 3 {sign} 4?" for sign in ("+", "-", "*", "/", "^", "=", "<", ">", "≤", "≥", "", "**", "%", "- -")],
        [f"Find {sign}x" for sign in ("", "-")],
        ["not (a or b)", "not a or b", "(not a) or b"],
        ["2 * (3 + 4)", "(2 * 3) + 4", "2 * 3 + 4", "2 * [3 + 4] + 1"],
        ["1.5 m", "15 m", "1 5 m", "-1.5 m"],
        ["x^{a+b}", "x^a+b", "x^{a-b}"],
        [r"\frac{a+b}{c}", r"\frac{a}{b+c}", r"\frac{a}{b}+c"],
        [r"$\pi+\alpha$", r"$\pi-\alpha$", r"$\pi\alpha$"],
        ["|7-24i|", "|7+24i|", "7-24i"],
        ["25% of them", "25 of them"],
        ["10²", "102"],
        ["1½", "11/2"],
        ["का", "कि", "क"],
    ],
)
def test_texts_that_ask_something_else(different):
    assert len({question_words(text) for text in different}) == len(different)


def test_equal_keys_have_equal_values_over_all_small_expressions():
    """Brute force: of all expressions of three operands no two that are written alike differ in value, whatever the spacing."""
    value: dict[tuple[str, ...], float] = {}
    signs = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": lambda x, y: x / y if y else math.inf}
    written = 0
    for a, b, c in itertools.product(("2", "-3", "1.5"), repeat=3):
        for (one, f), (two, g) in itertools.product(signs.items(), repeat=2):
            x, y, z = float(a), float(b), float(c)
            for form, result in (("({} {} {}) {} {}", g(f(x, y), z)), ("{} {} ({} {} {})", f(x, g(y, z)))):
                text = form.format(a, one, b, two, c)
                keys = {question_words(text), question_words(text.replace(" ", "")), question_words(f"${text}$")}
                assert len(keys) == 1
                assert value.setdefault(keys.pop(), result) == result, text
                written += 1
    assert len(value) == written


def test_a_question_is_its_options_too():
    assert question_key("Which?", ("x - 1", "x")) != question_key("Which?", ("x + 1", "x"))
    assert question_key("Which?", ("a b", "c")) != question_key("Which?", ("a", "b c"))
    assert question_words("3, 4") == question_words("3 4") == question_words("3. 4")
    assert question_key("Which ?", ("X-1", "x.")) == question_key("which", ("x - 1", "X"))


def test_marks_stay_in_their_words():
    assert normalise_question("हिन्दी में") == "हिन्दी में" and normalise_question("का") != normalise_question("कि")
    assert normalise_question("co\u00adoperate") == "cooperate"


ASKED = ("What is 3 + 4?", "What is 3 - 4?", "What is 3 * 4?", "what is 3+4")


def traces():
    return [make_trace(task="t", split="train", question=text, target=str(number)) for number, text in enumerate(ASKED)]


def test_operators_keep_questions_apart_in_selection():
    keys = [candidate_key(dataclasses.replace(c, record=trace)) for c, trace in zip(singles(4), traces())]
    assert len(set(keys)) == 3 and keys[0] == keys[3]
    rows = traces()
    nll = {trace.id: float(number + 1) for number, trace in enumerate(rows)}
    assert list(grape(rows, nll).values()) == [0.0, 0.0, 0.0, -3.0]


def test_operators_count_for_near_duplicates():
    first, second = (word_ngrams(text, 5) for text in ("3 + 4 = 7", "3 - 4 = -7"))
    assert jaccard(first, second) == 0.0
    assert jaccard(first, word_ngrams("3+4=7.", 5)) == 1.0


def leak(test: str, text: str) -> bool:
    row = make_trace(task="t", split="train", question=text, target="x")
    return bool(drop_leaked([row], ExactIndex([Question.of("t", "1", test)]))[1])


LONG = "What is the value of (3.5 + 4) * x - 2 when x = 12?"


@pytest.mark.parametrize(
    "test, text, found",
    [
        ("Evaluate $|7+24i|$.", "Evaluate $|7-24i|$.", False),
        ("Evaluate $|7-24i|$.", r"evaluate \(\left|7 - 24i\right|\)", True),
        (LONG, f"Solve - carefully - this: 3. {LONG} Think first; 5 - 3 = 2.", True),
        (LONG, "So: " + LONG.replace("+", "-"), False),
        (LONG, "So: " + LONG.replace("3.5", "35"), False),
        (LONG, "So: " + LONG.replace("- 2", "+ 2"), False),
        (LONG, "So: " + LONG.replace(" * x - ", "*x−"), True),
        ("(3 + 4) * 2 = ?", "I ask: (3 + 4) * 2 = ?", False),  # eight signs, but too few words to count inside a text
    ],
)
def test_exact_overlap_reads_signs(test, text, found):
    assert leak(test, text) is found


@pytest.mark.realdata
def test_distinct_items_stay_distinct(data_dir):
    items = load_items("bbh_boolean_expressions", "test", data_dir)
    assert len({item.question for item in items}) == len({question_words(item.question) for item in items}) == 250
    for name in ("svamp", "gsm8k"):
        tests = evaluation_questions([name], data_dir)
        held_out = {test.words for test in tests}
        assert len({test.signed for test in tests}) == len(held_out)
        train = [make_trace(task=name, split="train", question=i.question, target="x") for i in load_items(name, "train", data_dir)]
        assert not drop_leaked(train, ExactIndex(tests))[1]
        asked = [
            make_trace(task=name, split="test", question=f"Q: {i.question} A:", target="x") for i in load_items(name, "test", data_dir)
        ]
        short = sum(len(test.words) < 8 for test in tests)
        assert len(asked) - len(drop_leaked(asked, ExactIndex(tests))[1]) <= short
