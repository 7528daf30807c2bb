"""The embedded source: determinism, disjointness, rationales checked step by step, noise rates, augmenters' requests."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
from typing import Any

import pytest

from dccot_jax.records import Message, Request, canonical_json, normalise_question, user_request
from dccot_jax.tasks.base import Item, TaskDataError
from dccot_jax.tasks.synthetic import SIZES, TASKS, disjointness_report, load
from dccot_jax.tasks.synthetic import arithmetic as arithmetic_module
from dccot_jax.tasks.synthetic.arithmetic import ARITHMETIC, make_arithmetic
from dccot_jax.tasks.synthetic.calendar import make_calendar
from dccot_jax.tasks.synthetic.corpus import corpus
from dccot_jax.tasks.synthetic.family import PATHS, skeleton_split
from dccot_jax.tasks.synthetic.noise import P_WRONG_GIVEN_FEATURE
from dccot_jax.tasks.synthetic.objects import make_objects
from dccot_jax.tasks.synthetic.teachers import FAMILIES, STYLES, ScriptedTeacher

TRAINABLE = ("synth_arithmetic", "synth_objects", "synth_calendar")
GAINING = {"finds", "buys", "wins", "picks", "makes", "gets", "earns", "takes", "adds", "is", "borrows", "collects"}
LOSING = {"gives", "sells", "lends", "throws", "uses", "trades", "sends", "puts", "hides", "returns", "loses", "drops", "breaks"}


def ask(style: str, text: str, **sampling: Any) -> str:
    response = asyncio.run(ScriptedTeacher(style).complete(user_request(text, **sampling)))
    assert response.finish_reason == "stop", response.error
    return response.text


def shown(item: Item) -> str:
    """Question with its options, as a prompt shows them."""
    return item.question + "".join(f"\n({letter}) {text}" for letter, text in zip("ABCD", item.choices))


def stated(reply: str) -> str:
    """The answer of a reply; an option's letter without its brackets."""
    match = re.fullmatch(r"(?:.*\n)?The answer is (.+)\.", reply, re.DOTALL)
    assert match, reply
    return match[1].strip("()")


def simulate(item: Item) -> str:
    """The answer, by word rules that share no code with the generators."""
    if item.task.startswith("synth_arithmetic"):
        first, *clauses = re.findall(r"[^.?]+[.?]", item.question)[:-1]
        count = int(re.findall(r"\d+", first)[0])
        for clause in clauses:
            verb, number = clause.split()[1], int(re.findall(r"\d+", clause)[0])
            assert (verb in GAINING) != (verb in LOSING)
            count += number if verb in GAINING else -number
        return str(count)
    if item.task == "synth_objects":
        holds: dict[str, str] = {}
        for clause in re.findall(r"[^.?]+[.?]", item.question):
            words = clause.strip(" .?").split()
            people = [word for word in words if word in holds]
            if "the" in words and len(words) >= 4 and words[0] != "What":
                holds[words[0]] = words[-1]
            elif words[0] != "What":
                holds[people[0]], holds[people[1]] = holds[people[1]], holds[people[0]]
        asked = next(word for word in re.findall(r"\w+", item.question.rsplit(".", 1)[-1]) if word in holds)
        return "ABCD"[item.choices.index(holds[asked])]
    date = datetime.datetime.strptime(re.findall(r"\d\d/\d\d/\d{4}", item.question)[0], "%m/%d/%Y")
    for number, unit, way in re.findall(r"(\d+) (day|week)s? (ahead|forward|back|earlier)", item.question):
        days = int(number) * (7 if unit == "week" else 1)
        date += datetime.timedelta(days=days if way in ("ahead", "forward") else -days)
    return date.strftime("%m/%d/%Y")


def check_equations(rationale: str) -> int:
    """Every 'a+b-c=d' and 'date ±n days = date' holds and starts where one is given; returns how many were checked."""
    checked = 0
    for left, right in re.findall(r"(-?\d+(?:[+-]+\d+)+)=(-?\d+)", rationale):
        assert sum(int(part) for part in re.findall(r"(?:^|(?<=\d))[+-]?\d+", left.replace("--", "+"))) == int(right), (
            left,
            right,
            rationale,
        )
        checked += 1
    dates = re.split(r"(\d\d/\d\d/\d{4})", rationale)
    for before, between, after in zip(dates[1::2], dates[2::2], dates[3::2]):
        days = re.findall(r"([+-]\d+) days = $", between)
        if days:
            moved = datetime.datetime.strptime(before, "%m/%d/%Y") + datetime.timedelta(days=int(days[0]))
            assert moved.strftime("%m/%d/%Y") == after, rationale
            checked += 1
    return checked


# --- items ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, task", [(make_arithmetic, "synth_arithmetic"), (make_objects, "synth_objects"), (make_calendar, "synth_calendar")]
)
def test_items_are_pure_functions_of_task_split_index(make: Any, task: str) -> None:
    assert [make(task, "train", index) for index in (3, 1, 2)] == [make(task, "train", index) for index in (3, 1, 2)]
    assert make(task, "train", 1) == load(task, "train")[1]
    assert make(task, "train", 5).question != make(task, "test", 5).question


def test_first_items_never_change() -> None:
    """The embedded data are part of every stored result: a change here must be deliberate."""
    first = [load(task, "train")[0].question for task in TRAINABLE]
    assert first == FIRST_QUESTIONS


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_answers_agree_with_an_independent_simulation(task: str) -> None:
    for item in load(task, "test")[:300]:
        assert simulate(item) == item.gold, item.question


@pytest.mark.parametrize(
    "task, low, high", [("synth_arithmetic", 0, 19), ("synth_arithmetic_long", 0, 19), ("synth_arithmetic_large", 10, 99)]
)
def test_arithmetic_stays_in_its_domain(task: str, low: int, high: int) -> None:
    steps = set()
    for item in load(task, "test"):
        count = item.meta["skeleton"][0]
        for change in item.meta["skeleton"][1:]:
            count += change
            assert low <= count <= high
            assert (1 <= abs(change) <= 9) if high == 19 else (11 <= abs(change) <= 40)
        steps.add(item.n_steps)
    assert steps == (set(range(7, 10)) if task.endswith("long") else set(range(2, 7)))


def test_templates_and_pool_sizes() -> None:
    templates = arithmetic_module.TEMPLATES
    assert len(set(templates)) == len(templates) >= 20
    assert {template for item in load("synth_arithmetic", "train")[:2000] for template in item.meta["templates"]} == set(templates)
    assert len({item.id for item in load("synth_arithmetic", "train")}) >= 20000
    for task in SIZES:
        assert len({item.id for item in load(task, "test")}) >= 900
    with pytest.raises(TaskDataError, match="no split 'train'"):
        load("synth_arithmetic_long", "train")


def test_train_and_test_share_neither_items_nor_skeletons() -> None:
    report = disjointness_report()
    assert set(report) == set(SIZES)
    for task, counts in report.items():
        assert counts["shared_items"] == counts["shared_skeletons"] == 0, task
        assert counts["test_skeletons"] > 100

    # and not only by the generators' own account: numbers in order, read off the text
    def skeleton(item: Item) -> tuple[str, ...]:
        signs = ["+" if word in GAINING else "-" for word in re.findall(r"(?:She|He) (\w+)", item.question)]
        return (*re.findall(r"\d+", item.question), *signs)

    train = {skeleton(item) for item in load("synth_arithmetic", "train")}
    for task in ("synth_arithmetic", "synth_arithmetic_long", "synth_arithmetic_large"):
        assert not train & {skeleton(item) for item in load(task, "test")}


# --- teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [task.name for task in TASKS])
@pytest.mark.parametrize("style", ["verbose", "concise"])
def test_clean_teachers_are_right_on_every_path(task: str, style: str) -> None:
    for item in load(task, "test")[:50]:
        replies = [ask(style, shown(item) + "\nThink first.", temperature=0.7, seed=5, sample_index=index) for index in range(len(PATHS))]
        assert all(stated(reply) == item.gold for reply in replies)
        checked = [check_equations(reply) for reply in replies]
        assert task == "synth_objects" or min(checked) >= 1
        assert task == "synth_objects" or checked[0] == item.n_steps  # one equation per step
        assert len(set(replies)) >= 3
        assert ask(style, shown(item)) == replies[0] == ask(style, shown(item), seed=9)


def test_styles_differ_in_length() -> None:
    for task in TRAINABLE:
        words = {style: sum(len(ask(style, shown(item)).split()) for item in load(task, "test")[:100]) for style in STYLES}
        assert words["verbose"] > 1.3 * words["concise"] > 1.3 * words["answer_only"]
        item = load(task, "test")[0]
        gold = f"({item.gold})" if item.choices else item.gold
        assert ask("answer_only", shown(item)) == f"The answer is {gold}."
        assert ask("verbose", shown(item)) == f"{item.rationale}\nThe answer is {gold}."


@pytest.mark.parametrize("task", TRAINABLE)
def test_noise_depends_on_the_feature(task: str) -> None:
    items = load(task, "train")[:1500]
    wrong = {item.id: stated(ask("noisy", shown(item))) != item.gold for item in items}
    feature = [item for item in items if item.meta["feature"]]
    assert not any(wrong[item.id] for item in items if not item.meta["feature"])
    given_feature = sum(wrong[item.id] for item in feature) / len(feature)
    assert 0.70 <= given_feature <= 0.80 and P_WRONG_GIVEN_FEATURE == 0.75
    assert 0.30 <= sum(wrong.values()) / len(items) <= 0.40
    correct = [item for item in items if not wrong[item.id]]
    assert sum(item.meta["feature"] for item in correct) / len(correct) > 0.12  # what a filtered student can learn from
    for item in feature[:50]:  # wrong rationales still look consistent, and repeat
        assert ask("noisy", shown(item)) == ask("noisy", shown(item), seed=1)
        check_equations(ask("noisy", shown(item)))


def test_noisy_is_wrong_by_the_misread_clause_alone() -> None:
    noisy = [item for item in load("synth_arithmetic", "train")[:300] if item.meta["feature"]]
    for item in noisy:
        reply = ask("noisy", item.question)
        accident = next(t for t in item.meta["templates"] if t in arithmetic_module.ACCIDENTS)
        n = abs(item.meta["skeleton"][1 + item.meta["templates"].index(accident)])
        assert int(stated(reply)) - int(item.gold or "") in (0, 2 * n)


def test_repeated_noisy_samples_decide_anew() -> None:
    item = next(item for item in load("synth_arithmetic", "train") if item.meta["feature"])
    right = [stated(ask("noisy", item.question, temperature=0.7, sample_index=index)) == item.gold for index in range(1, 200)]
    assert 0.15 < sum(right) / len(right) < 0.35


def test_unreadable_requests_are_errors() -> None:
    teacher = ScriptedTeacher("verbose")
    for text in (
        "A train leaves at noon. How far does it go?",
        "Mia has 7 shells. She eats 3. How many shells does Mia have now?",
        "Mia has 7 shells. She finds 3 more. How many shells does Ben have now?",
        "Task: rephrase\nQuestion: What is love?",
        "Task: rephrase\nMia has 7 shells.",
        "Task: summarise\nQuestion: Mia has 7 shells. She finds 3 more. How many shells does Mia have now?",
        "Task: backward question\nQuestion: Mia has 7 shells. She finds 3 more. How many shells does Mia have now?\nAnswer: 11",
    ):
        response = asyncio.run(teacher.complete(user_request(text)))
        assert (response.finish_reason, response.text) == ("error", "") and response.error, text
    assert asyncio.run(teacher.complete(Request((Message("system", "hello"),)))).finish_reason == "error"
    with pytest.raises(ValueError, match="style 'loud'"):
        ScriptedTeacher("loud")


def test_token_limit_cuts_and_says_so() -> None:
    item = load("synth_arithmetic", "test")[0]
    response = asyncio.run(ScriptedTeacher("verbose").complete(user_request(item.question, max_tokens=5)))
    assert response.finish_reason == "length" and len(response.text.split()) == response.completion_tokens == 5


def test_cache_keys_differ_by_style() -> None:
    assert len({ScriptedTeacher(style).cache_key for style in STYLES}) == len(STYLES)


# --- augmenters' requests ---------------------------------------------------------------------------------------------


def after(reply: str, tag: str) -> str:
    assert reply.startswith(tag + " "), reply
    return reply.removeprefix(tag + " ")


def another(answer: str) -> str:
    """A different answer of the same kind."""
    if answer in "ABCD":
        return "A" if answer != "A" else "B"
    return str(int(answer) + 1) if answer.isdigit() else answer[:-1] + "9"


@pytest.mark.parametrize("style", ["verbose", "noisy"])
@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_augmenters_requests(task: str, style: str) -> None:
    family = next(f for f in FAMILIES if f.parse(load(task, "test")[0].question) is not None)
    for item in load(task, "test")[:40]:
        choices = shown(item).removeprefix(item.question)
        request = {"temperature": 0.7, "seed": 3}

        text = f"Task: rephrase\nSay it in other words.\nQuestion: {shown(item)}"
        rephrased = after(ask(style, text, **request), "Rephrased question:")
        assert normalise_question(rephrased) != normalise_question(item.question)
        assert stated(ask("verbose", rephrased + choices)) == item.gold
        assert stated(ask("noisy", rephrased + choices)) == stated(ask("noisy", shown(item)))

        text = f"Task: new question\nQuestion: {shown(item)}"
        new = after(ask(style, text, **request), "New question:")
        problem = family.parse(new)
        assert problem is not None and skeleton_split(family.name, family.skeleton(problem)) == "train"
        assert [f"({letter}) {text}" in new for letter, text in zip("ABCD", item.choices)] == [True] * len(item.choices)
        assert stated(ask("verbose", new)) == stated(ask("concise", new))
        assert after(ask(style, text, **request, sample_index=1), "New question:") != new

        text = f"Task: backward question\nQuestion: {shown(item)}\nAnswer: {item.gold}"
        back = after(ask(style, text, **request), "Backward question:")
        reasoning = ask(style, back)
        check_equations(reasoning)
        answer = stated(reasoning)

        def verdict(question: str, gold: str | None, backward: str, recovered: str, options: str = choices) -> str:
            text = f"Task: consistency\nTrue or False?\nQuestion 1: {question}{options}\nAnswer 1: {gold}\n"
            return ask(style, f"{text}Question 2: {backward}\nAnswer 2: {recovered}").splitlines()[-1]

        assert verdict(item.question, item.gold, back, answer) == "True"
        assert verdict(item.question, item.gold, back, reasoning) == "True"
        assert verdict(item.question, item.gold, back, another(answer)) == "False"
        if item.choices:  # letters, words and both mean the same
            word, recovered = (item.choices["ABCD".index(letter)] for letter in (item.gold or "", answer))
            assert verdict(item.question, f"({item.gold}) {word}", back, f"({answer}) {recovered}") == "True"
            assert verdict(item.question, word, back, f"the {recovered}", options="") == "True"
            assert verdict(item.question, f"({another(item.gold or '')}) {word}", back, answer) == "False"
        assert verdict(item.question, another(item.gold or ""), back, answer) == "False"
        assert verdict(item.question, item.gold, new, answer) == "False"
        other = load(task, "test")[300]
        assert verdict(other.question, other.gold, back, answer, shown(other).removeprefix(other.question)) == "False"


def test_backward_arithmetic_recovers_the_masked_number() -> None:
    masked_start = 0
    for item in load("synth_arithmetic", "test")[:200]:
        back = after(ask("verbose", f"Task: backward question\nQuestion: {item.question}\nAnswer: {item.gold}"), "Backward question:")
        for style in ("verbose", "concise"):
            x = stated(ask(style, back))
            ours, theirs = re.findall(r"\b\d+\b", item.question), re.findall(r"\b(?:\d+|x)\b", back)
            assert theirs[: len(ours)] == [n if m != "x" else "x" for n, m in zip(ours, theirs)]
            assert ours[theirs.index("x")] == x
        masked_start += theirs[0] == "x"
    assert 20 < masked_start < 100


# --- corpus -----------------------------------------------------------------------------------------------------------


def test_corpus_is_fixed_and_free_of_test_questions() -> None:
    texts = list(corpus())
    assert texts == list(corpus())
    assert 500_000 < sum(map(len, texts)) < 2_000_000
    joined = "\n".join(texts)
    for needle in ("Task: consistency", "Rephrased question:", "New question:", "Backward question:", "(A)", "The answer is"):
        assert needle in joined
    tests = {item.question for task in SIZES for item in load(task, "test")}
    assert not tests & set(texts)
    read = [problem for text in texts if (problem := ARITHMETIC.parse(text)) is not None]
    assert read and all(skeleton_split("arithmetic", ARITHMETIC.skeleton(problem)) == "train" for problem in read)


def test_meta_is_json() -> None:
    for task in SIZES:
        meta = dict(load(task, "test")[0].meta)
        assert meta and json.loads(canonical_json(meta)) == meta


FIRST_QUESTIONS = [
    "At first Ben has 12 shells. He collects 3 more. He sends away 6. How many shells are left for Ben?",
    "Mia has the cup. Ann has the key. Zoe has the hat. Ben has the pen. Ben swaps with Mia. Ben and Ann swap. Zoe and Mia switch. Zoe and Ann trade. What does Ann have in the end?",  # noqa: E501
    "The calendar of Max shows 02/29/2024. He counts 1 week back. He counts 6 days ahead. What date does Max reach?",
]
