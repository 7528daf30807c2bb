"""Answers: what is read from a text, what counts as equal, and that no comparison outlives its limit."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dccot_jax.tasks import latex_worker
from dccot_jax.tasks.answers import canonical, equal, extract, judge
from dccot_jax.tasks.rational import exact

OPTIONS = ("a dog", "the bank", "river", "river bank", "none of the above")


def strict(text: str, answer_type: str, choices=()) -> str | None:
    return extract(text, answer_type, choices).strict


# --- where the answer is read -------------------------------------------------------------------------------------------


def test_reads_only_after_the_reasoning():
    assert extract("<think>The answer is 5.</think> The answer is 7.", "number").strict == "7"
    assert extract("The answer is 5.</think> So 7.", "number").flexible == "7"
    assert extract("<think>The answer is 5.", "number").reason == "thinking_unclosed"
    assert extract("<think>a</think> The answer is 5. <think>no, 6", "number").reason == "thinking_unclosed"
    assert extract("<think>The answer is 5.</think>", "number").reason == "no_answer"


def test_box_before_statement_before_fallback():
    assert strict(r"The answer is 7. \boxed{5}", "number") == "5"
    assert strict(r"\boxed{3} and \boxed{5}.", "number") is None  # two answers side by side
    assert strict("first \\boxed{3}, which we corrected to \\boxed{5}.", "number") == "5"
    assert strict(r"\boxed{\frac{1}{2}}", "number") == "0.5"
    found = extract("3 + 4 = 7 apples", "number")
    assert (found.strict, found.flexible) == (None, "7")
    assert strict("The answer is:\n\n12", "number") == "12"
    assert strict("The answer to the question is 12", "number") == "12"
    assert strict("The answer is 5. Wait, the answer is 6.", "number") == "6"


@pytest.mark.parametrize(
    "text", [r"The answer is 5. \boxed{5", r"\boxed{5} so \boxed{5", r"\boxed{\frac{5}{1}", r"\boxed5", "\\boxed{5\\}"]
)
def test_unterminated_final_box_is_no_answer(text):
    result = judge(text, "5", "number")
    assert not result.strict and not result.flexible and result.reason == "unterminated_box"


def test_empty_box_is_no_answer():
    assert judge(r"The answer is 5. \boxed{}", "5", "number").reason == "no_answer"


def test_bad_gold_is_its_own_reason():
    assert judge("The answer is 5", "many", "number").reason == "bad_gold"
    assert judge("The answer is 5", None, "number").reason == "bad_gold"
    with pytest.raises(ValueError, match="answer_type"):
        judge("x", "y", "float")


# --- numbers ------------------------------------------------------------------------------------------------------------

SAME = [
    "{}",
    "${}",
    "{} apples",
    "**{}**",
    "${}$",
    "{}.",
    "about {}",
    "x = {}",
    "{} (which is final)",
    "= {}",
    r"\text{{{} apples}}",
    "{} km/hour",
    "{} apples!",
    "{} more apples",
    "{} times",
    "{} miles in 2 hours",
    "{} of the 7 boxes",
    "7 less than 10 = {}",
]


@given(value=st.integers(-(10**9), 10**9), wrap=st.sampled_from(SAME), commas=st.booleans())
def test_paraphrases_of_an_integer(value, wrap, commas):
    shown = wrap.format(f"{value:,}" if commas else value)
    result = judge(f"We add.\nThe answer is {shown}", str(value), "number")
    assert result.strict and result.flexible and result.reason == "correct", result
    assert not judge(f"The answer is {shown}", str(value + 1), "number").flexible


JOINTS = [" or ", " and ", ", ", "; ", " to ", " or maybe ", " & ", ", or it could be "]


@given(a=st.integers(-999, 999), b=st.integers(-999, 999), joint=st.sampled_from(JOINTS))
def test_several_answers_are_never_accepted(a, b, joint):
    texts = [f"The answer is {a}{joint}{b}", f"The answer is {a} apples{joint}{b} apples.", f"\\boxed{{{a}{joint}{b}}}"]
    if joint in JOINTS[:3]:
        texts.append(f"\\boxed{{{a}}}{joint}\\boxed{{{b}}}")
    for text in texts:
        if a == b:
            continue
        for gold in (a, b):
            result = judge(text, str(gold), "number")
            assert not result.flexible and result.reason == "several_answers", (text, result)


UNFINISHED = [
    "{a} less than {b}",
    "{a} apples fewer than {b} apples",
    "{a} times {b}",
    "{a} plus {b}",
    "{a} divided by {b}",
    "twice {a}",
    "half of {a}",
    "double the {a}",
    "a third of {a}",
    "Janet has twice {a} apples",
    "the square root of {a}",
    "sqrt({a})",
    "{a}%% of {b}",
    "1/2 of {a}",
    "{a} squared",
    "{a} dozen",
    "{a} dozen eggs",
    "{a}!",
    "more than {a}",
    "at least {a}",
    "{a}^{b}",
    "not {a}",
    "likely, but not surely, {a} times {b}",
]


@given(a=st.integers(2, 999), b=st.integers(2, 999), shape=st.sampled_from(UNFINISHED))
def test_arithmetic_in_words_is_no_answer_in_either_reading(a, b, shape):
    said = shape.replace("%%", "%").format(a=a, b=b)
    for text in (f"We add {a} and {b}.\nThe answer is {said}", f"\\boxed{{{said}}}", f"Answer: {said}"):
        found = extract(text, "number")
        assert (found.strict, found.flexible) == (None, None), (text, found)


@given(
    a=st.integers(1, 99),
    b=st.integers(1, 99),
    shape=st.sampled_from(["{} hours {} minutes", "{} feet, {} inches", "{}h{}m", "{} h {} min"]),
)
def test_a_quantity_in_two_units_is_several_answers(a, b, shape):
    if a != b:
        assert extract(f"The answer is {shape.format(a, b)}.", "number").reason == "several_answers"


@pytest.mark.parametrize(
    ("text", "answer_type"),
    [
        ("We had 10. The answer is more than 5.", "number"),
        ("The answer is 10^999.", "number"),
        ("So it is 10^999", "number"),
        ("There are 12. The answer is five less than ten.", "number"),
        ("There are 12. The answer is two dozen.", "number"),
        ("There are 12. The answer is five hours thirty minutes.", "number"),
        ("We had 10. The answer is unknown.", "number"),
        ("Yes it is. The answer is unclear.", "yes_no"),
        ("It was (B). The answer is unknown.", "choice"),
        ("It was 05/01/2021. The answer is some day in May.", "date"),
    ],
)
def test_a_fallback_never_overrules_a_stated_answer(text, answer_type):
    assert extract(text, answer_type, OPTIONS).flexible is None


def test_nothing_behind_the_answer_is_leaves_the_fallback():
    assert extract("There are 40. The answer is <answer>", "number").flexible == "40"


@given(value=st.fractions(min_value=-1000, max_value=1000, max_denominator=60))
def test_fractions_and_their_spellings(value):
    spelled = [
        f"{value.numerator}/{value.denominator}",
        f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}",
    ]
    for text in spelled:
        assert equal(text, str(value), "number"), text
    assert not equal(str(value + Fraction(1, 1000)), str(value), "number")


@given(value=st.integers(0, 1000))
def test_percent_is_not_the_bare_number(value):
    for sign in ("%", r"\%", " percent"):
        assert not equal(f"{value}{sign}", str(value), "number")
        assert equal(f"{value}{sign}", f"{value}%", "number")


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        ("1,234,567", "1234567"),
        ("$5.00", "5"),
        ("2 1/2", "2.5"),
        ("2½", "2.5"),
        ("-$5", "-5"),
        ("−5", "-5"),
        ("negative 5", "-5"),
        ("33.3333333", "100/3"),
        ("5 million", "5000000"),
        ("3 \\times 10^4", "30000"),
        ("1e3", "1000"),
        ("12 = 5 + 7", "12"),
        ("79 - (24 + 51) = 79 - 75 = 4", "4"),
        ("five", "5"),
        ("twenty-five apples", "25"),
        ("5, not 3", "5"),
        ("5 (since 3 + 2 = 5)", "5"),
        ("1{,}234", "1234"),
        (".5", "0.5"),
        ("Janet has 5 apples", "5"),
    ],
)
def test_equal_numbers(pred, gold):
    assert equal(pred, gold, "number")


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        ("more than 5", "5"),
        ("at most 5", "5"),
        ("not 5", "5"),
        ("5\\pi", "5"),
        ("\\sqrt{5}", "5"),
        ("5²", "5"),
        ("5x", "5"),
        ("5-7", "5"),
        ("3:5", "3"),
        ("5 + 7", "5"),
        ("5 + 7", "7"),
        ("1000000", "1000001"),
        ("1/2^99", "1/2^98"),
        ("between 5 and 7", "5"),
        ("290.2.3", "290.2"),
        ("1331 and 1728", "1728"),
        ("5 (or 7)", "5"),
        ("5 hours and 30 minutes", "5"),
        ("33.33", "100/3"),
        ("1/0", "1"),
        ("5,6", "56"),
        ("0.0000001", "0"),
    ],
)
def test_wrong_numbers(pred, gold):
    assert not equal(pred, gold, "number")


def test_exact_arithmetic():
    assert exact("1/2^99") != exact("1/2^98") and exact("1/2^99") == Fraction(1, 2**99)
    assert exact(r"-2^2 + \frac12 \cdot 2\frac{1}{3}") == -4 + Fraction(1, 2) * Fraction(7, 3)
    assert exact("9^{9^{9^9}}") is None and exact("x + 1") is None and exact("1/0") is None and exact("(" * 500) is None


# --- yes/no, choice, date, string ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The answer is True", "yes"),
        ("The answer is no, no dog can fly.", "no"),
        ("The answer is **Yes**.", "yes"),
        ("The answer is yes or no", None),
        ("The answer is not true", None),
        ("I know nothing now", None),
        ("'The answer is False'", "no"),
        (r"\boxed{\text{No}}", "no"),
        ("The answer is maybe yes, maybe no", None),
    ],
)
def test_yes_no(text, want):
    assert extract(text, "yes_no").flexible == want


def test_yes_no_fallback_needs_whole_words():
    assert extract("We know that it is so; yes it is. Nothing else.", "yes_no").flexible == "yes"
    assert extract("It is not true", "yes_no").flexible is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The answer is B", "B"),
        ("The answer is (d) river bank.", "D"),
        ("the answer is b.", "B"),
        ("The answer is C: river", "C"),
        ("The answer is option A", "A"),
        ("The answer is A dog", "A"),
        ("The answer is the bank", "B"),
        ("The answer is river", "C"),
        ("The answer is the river bank.", "D"),
        (r"\boxed{\text{(E)}}", "E"),
        ("The answer is A or B", None),
        ("The answer is (A) and (B)", None),
        ("The answer is B: river", None),
        ("The answer is H", None),
        ("The answer is not A", None),
        ("The answer is A because B is wrong", "A"),
        ("The answer is none of the above", "E"),
        ("It must be (C)", "C"),
        ("A good idea, so B", "B"),
        ("both A and B", "B"),
    ],
)
def test_choice(text, want):
    assert extract(text, "choice", OPTIONS).flexible == want


def test_choice_by_letter_or_text_and_ambiguous_text():
    assert equal("river", "C", "choice", OPTIONS) and equal("c", "river", "choice", OPTIONS) and not equal("B", "C", "choice", OPTIONS)
    assert canonical("same", "choice", ("same", "same", "other")) is None
    assert judge("The answer is B", "B", "choice", ("same", "same")).strict


@pytest.mark.parametrize(
    ("pred", "gold", "same"),
    [
        ("05/01/2021", "May 1, 2021", True),
        ("1 May 2021", "2021-05-01", True),
        ("the 1st of May 2021", "05/01/2021", True),
        ("05/02/2021", "05/01/2021", False),
        ("13/45/2021", "05/01/2021", False),
        ("05/01/2021 or 05/02/2021", "05/01/2021", False),
    ],
)
def test_dates(pred, gold, same):
    assert equal(pred, gold, "date") is same


def test_strings():
    assert judge('The answer is "nk".', "nk", "string").strict
    assert not judge("The answer is nk or nm", "nk", "string").flexible
    assert judge('Joined they are "nk".', "nk", "string").flexible


# --- latex --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1331 and 1728", "1728"),
        ("3x + 4y + 14=0", "3*x-1*y+13=0"),
        ("1/2^99", "1/2^98"),
        (r"1 - 1/\mathrm{e}", r"1 + 1/\mathrm{e}"),
        ("555_{10}", "555_7"),
        ("555_7", "555"),
        (r"50\%", "50"),
        ("(7,5)", "(5,7)"),
        ("[1,2)", "(1,2)"),
        (r"5 \text{ cm}", r"5\text{ m}"),
        ("2x+2y=5", "x+y=2"),
        (r"1\pm 2", "1+2"),
        ("x<3", "x>3"),
        ("2 pi", "2"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\sqrt{3}", "1.73"),
        ("2^{100}", "2^{101}"),
        ("x", "y"),
        ("p - q", "q-p"),
        (r"\{1,2\}", r"\{1,2,2\}"),
        ("3, 3", "3"),
        ("x^2+1", "(x+1)^2"),
        (r"\sqrt{2}+", r"\sqrt{2}"),
    ],
)
def test_latex_different(a, b):
    assert not equal(a, b, "latex") and not equal(b, a, "latex")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\frac{1}{2}", "0.5"),
        ("x=5", "5"),
        (r"x = 5 \text{ or } x=7", "7, 5"),
        ("(1, 2)", "(1,2)"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("10,000", "10000"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"90^\circ", "90"),
        (r"5\text{ cm}", "5"),
        (r"\text{east}", "East"),
        (r"\text{(C)}", "C"),
        ("2x+2y=4", "x+y=2"),
        ("y=2x+1", "2x+1"),
        (r"1 \pm \sqrt{2}", r"1\pm\sqrt 2"),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
        ("x<3", "3>x"),
        (r"x\in(1,2)", "(1,2)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
        (r"\frac{\pi}{2}", r"0.5\pi"),
        (r"\frac{270}7", "270/7"),
        ("25_8", "21_{10}"),
    ],
)
def test_latex_same(a, b):
    assert equal(a, b, "latex") and equal(b, a, "latex")


def test_latex_texts():
    assert judge(r"so $x=2$ and hence \boxed{\frac{x+1}{2}}.", r"\frac12(x+1)", "latex").strict
    assert judge("so $x = 2$, then $y = 3+4 = 7$.", "7", "latex").flexible
    assert not judge(r"\boxed{5} or \boxed{7}", "5", "latex").flexible
    assert judge("The answer is 5 apples in all.", "5", "latex").strict


def test_hang_is_killed_in_threads_and_others_still_answer():
    assert judge(r"\boxed{\frac{x}{2}}", "x/2", "latex").flexible  # a child is warm
    results: dict[int, tuple[str, float]] = {}

    def work(index: int) -> None:
        start = time.monotonic()
        text, gold = (
            (r"\boxed{9^{9^{9^9}}}", "3+x") if index < 2 else (rf"\boxed{{\sqrt{{{index * index}x^2}}+1}}", rf"1+{index}\sqrt{{x^2}}")
        )
        results[index] = (judge(text, gold, "latex", time_limit=1.0 if index < 2 else 60.0).reason, time.monotonic() - start)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [results[index][0] for index in range(5)] == ["timeout", "timeout", "correct", "correct", "correct"]
    assert judge(r"\boxed{\frac{x}{3}}", "x/3", "latex").flexible  # killed children have been replaced
    latex_worker.close()


NASTY = {
    "open boxes": "\\boxed{" * 20_000,
    "nested boxes": "\\boxed{" * 20_000 + "5" + "}" * 20_000,
    "boxes side by side": "\\boxed{5} or " * 20_000 + "\\boxed{6}",
    "digits": "The answer is " + "7" * 1_000_000,
    "bare digits": "7" * 5_000,
    "boxed digits": "\\boxed{" + "7" * 5_000 + "}",
    "long fraction": "\\boxed{1/" + "3" * 1_900 + "}",
    "long decimal": "The answer is 0." + "3" * 1_900,
    "thousands": "The answer is 1" + ",000" * 490,
    "braces": "The answer is " + "{" * 500_000 + "}" * 500_000,
    "parentheses": "\\boxed{" + "(" * 900 + "x" + ")" * 900 + "}",
    "text commands": "\\text{" * 50_000 + "5" + "}" * 50_000,
    "spaces": "answer" + " " * 1_000_000 + "is 5",
    "open tag and spaces": "<" + " " * 1_000_000,
    "thinking": "<think>" * 100_000 + "</think> The answer is 5",
    "statements": "The answer is 5. " * 60_000,
    "answer to": "the answer to " * 70_000,
    "words": "The answer is " + "not " * 250_000,
    "numbers": "The answer is " + "5 " * 500_000,
    "list": "\\boxed{" + "5, " * 600 + "}",
    "dollars": "$" * 1_000_000,
    "formulas": "$5$ " * 250_000,
    "dates": "05/01/2021 " * 90_000,
    "letters": "(A) " * 250_000,
    "fractions": "\\frac" * 160_000,
    "signs": "The answer is " + "-" * 1_000_000,
    "equals": "5 = " * 250_000,
    "quotes": '"a' * 500_000,
}


@pytest.mark.parametrize("answer_type", ["number", "yes_no", "choice", "date", "string", "latex"])
def test_nasty_texts_are_read_in_bounded_time_and_never_fail(answer_type):
    """Quadratic reading of any of these would take minutes."""
    for text in NASTY.values():
        gold = {"choice": "B", "yes_no": "yes", "date": "05/02/2021"}.get(answer_type, "8")
        assert not judge(text, gold, answer_type, OPTIONS, time_limit=1.0).strict


def test_more_digits_than_can_be_converted_are_no_answer():
    for digits in (1_100, 4_400):
        for text in ("{}", "There are 3, then {}", "The answer is {}", "\\boxed{{{}}}", "The answer is 1/{}", "The answer is 2 (= {})"):
            found = extract(text.format("9" * digits), "number")
            assert found.flexible in (None, "2"), text
    assert exact("9" * 5_000) is None and not equal("9" * 5_000, "9", "latex") and canonical("9" * 5_000, "number") is None
    assert canonical("9" * 900, "number") == "9" * 900


def test_only_the_tail_of_a_long_text_is_read_but_thinking_counts_whole():
    assert extract("\\boxed{5}" + " and so on" * 3_000, "number").strict is None
    assert extract("word " * 50_000 + "The answer is 5.", "number").strict == "5"
    assert extract("<think>" + "word " * 50_000 + "The answer is 5.", "number").reason == "thinking_unclosed"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from(list("0123456789.,-+/*^%$\\{}()=<> abAnsweri\nyesor_ठ½²−")), max_size=60),
    prefix=st.sampled_from(["", "The answer is ", "\\boxed{"]),
)
def test_reading_never_fails(text, prefix):
    for answer_type in ("number", "yes_no", "choice", "date", "string", "latex"):
        found = extract(prefix + text, answer_type, OPTIONS)
        assert found.strict is None or found.strict == found.flexible
        if answer_type == "number" and found.flexible is not None:
            assert canonical(found.flexible, "number") == found.flexible  # canonical form is a fixed point
