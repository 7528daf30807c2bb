"""Decontamination: exact overlap with test questions in any text of a row, and n-grams against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest
from toy_task import FakeTeacher, config, install, question, run_stage, traces_artifact

from dccot_jax import external
from dccot_jax.config import ConfigError, validate
from dccot_jax.records import make_trace, table_to_traces
from dccot_jax.select import decontaminate, verify
from dccot_jax.select.decontaminate import ExactIndex, NgramIndex, Question, drop_leaked, drop_overlapping, signed_words, words
from dccot_jax.tasks.registry import load_items, split_hash
from dccot_jax.teachers.rows import split_tag

LONG = "Tom bought 12 red pens and gave 3 of them to his sister. How many pens has he left?"


def index(*texts: str, task: str = "other") -> ExactIndex:
    return ExactIndex(Question.of(task, str(i), text) for i, text in enumerate(texts))


def trace(text="a question", target="The answer is 7.", **fields):
    return make_trace(
        **{"task": "toy", "split": "train", "question": text, "target": target, "gold_answer": "7", "answer_type": "number", **fields}
    )


# --- exact -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        (LONG, True),
        (LONG.upper().replace("?", " ?!"), True),
        ("Solve this one: " + LONG + " Think first.", True),
        (LONG.replace("12", "13"), False),
        (LONG[: len(LONG) // 2], False),
        ("Is the sky blue?", True),
        ("I ask: is the sky blue?", False),  # too short to count inside another text
        ("", False),
    ],
)
def test_a_whole_test_question_is_found_anywhere_in_a_text(text, found):
    tests = index(LONG, "Is the sky blue")
    assert (tests.find(signed_words(text)) is not None) is found


def test_latex_layout_does_not_hide_a_question():
    tests = index(r"Find $\frac{1}{2} + \left( x^2 \right)$ for the real number $x = 3$ given above.")
    assert tests.find(signed_words(r"Find $\dfrac{1}{2}+(x^2)$ for the \text{real} number $x=3$ given above")) is not None
    assert words(r"\dfrac{a}{b}\,\leftarrow") == ("frac", "a", "b", "leftarrow")


@pytest.mark.parametrize("field", ["question", "target", "prompt"])
def test_every_text_of_a_row_is_looked_at(field):
    clean, leaked = trace("clean"), trace(**{"question": "clean too", field: f"So: {LONG}"})
    kept, dropped = drop_leaked([clean, leaked], index(LONG))
    assert kept == [clean] and [(d.id, d.reason) for d in dropped] == [(leaked.id, "leak:other")]


def test_what_was_made_from_a_leak_leaks():
    parent = trace("Secret!")
    child = trace("secret in other words", method="rephrase", parent_ids=(parent.id,))
    grandchild = trace("again", method="rephrase", parent_ids=(child.id,))
    gone = "f" * 24  # an original that became part of the reverse group
    forward = trace("Secret!", method="reverse", group_id="g", parent_ids=(gone,))
    backward = trace("back", method="reverse", group_id="g", part="backward_reasoning", parent_ids=(gone,))
    cousin = trace("cousin", method="rephrase", parent_ids=(gone,))
    clean = trace()
    kept, dropped = drop_leaked([grandchild, child, parent, forward, backward, cousin, clean], index("secret"))
    assert kept == [clean] and {row.reason for row in dropped} == {"leak:other"} and len(dropped) == 6


def test_a_leak_in_one_part_drops_the_group():
    group = [
        trace(method="reverse", group_id="g"),
        trace("q", "q_b", method="reverse", group_id="g", part="backward_question"),
        trace("The backward question?", "r_b", method="reverse", group_id="g", part="backward_reasoning"),
    ]
    kept, dropped = drop_leaked([*group, trace()], index("the backward question", task="t"))
    assert len(kept) == 1 and [row.reason for row in dropped] == ["leak:t"] * 3
    asks_back = trace("q", LONG, method="reverse", group_id="h", part="backward_question")  # the student would learn to write it
    kept, dropped = drop_leaked([trace(group_id="h"), asks_back], index(LONG))
    assert not kept and len(dropped) == 2


# --- n-grams ---------------------------------------------------------------------------------------------------------------


def brute(text: tuple[str, ...], tests: list[Question], n: int) -> dict[str, tuple[str, float, int, set[str]]]:
    def grams(sequence):
        return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]

    found = {}
    for task in {test.task for test in tests}:
        own = [test for test in tests if test.task == task and len(test.words) >= n]
        shared = {test.item: len(set(grams(test.words)) & set(grams(text))) / len(set(grams(test.words))) for test in own}
        hit = {item for item, value in shared.items() if value > 0}
        if hit:
            everything = {gram for test in own for gram in grams(test.words)}
            best = max((item for item in shared), key=lambda item: (shared[item], -[t.item for t in tests].index(item)))
            found[task] = (best, shared[best], sum(gram in everything for gram in grams(text)), hit)
    return found


@pytest.mark.parametrize("n", [1, 3, 8])
def test_ngram_matches_equal_brute_force(n):
    rng = random.Random(n)
    tests = [Question(rng.choice("ab"), f"{i}", tuple(rng.choices("uvwxyz", k=rng.randrange(1, 14)))) for i in range(40)]
    lookup = NgramIndex(tests, n)
    for _ in range(40):
        text = tuple(rng.choices("uvwxyz", k=rng.randrange(0, 20)))
        found = {m.task: (m.item, m.share, m.ngrams, set(m.items)) for m in lookup.match(text)}
        expected = brute(text, tests, n)
        assert found.keys() == expected.keys()
        for task, (item, share, ngrams, items) in expected.items():
            assert found[task] == (item, pytest.approx(share), ngrams, items)


def test_spans_merge_neighbouring_ngrams():
    text = list("abcdefghij")
    assert decontaminate.spans(text, np.array([0, 1, 5]), 3) == ("a b c d", "f g h")
    assert decontaminate.spans(text, np.array([0, 1, 2, 3]), 3) == ("a b c d e f",)
    assert len(decontaminate.spans(["x"] * 40, np.arange(0, 40, 5), 2)) == decontaminate.MAX_SPANS


def test_overlap_is_reported_per_task_and_dropped_at_a_threshold():
    near = trace(LONG.replace("sister", "brother"))
    far = trace("Something else altogether, with nothing in common at all", LONG[:40])
    tests = [Question("toy", "t1", words(LONG)), Question("toy", "t2", words("short one")), Question("free", "t3", words("q " * 20))]
    table, figures = decontaminate.overlaps([near, far], tests, (4, 8))
    assert figures["toy"] == {
        "items": 2,
        "4": {"short": 1, "rows": 2, "items": 1, "rows_half": 1},
        "8": {"short": 1, "rows": 2, "items": 1, "rows_half": 0},
    }
    nothing = {"short": 0, "rows": 0, "items": 0, "rows_half": 0}
    assert figures["free"] == {"items": 1, "4": nothing, "8": nothing}
    rows = {(row["id"], row["part"], row["n"]): row for row in table.to_pylist()}
    hit = rows[near.id, "question", 4]
    assert hit["item"] == "t1" and hit["share"] == pytest.approx(12 / 16) and hit["ngrams"] == 12
    assert hit["spans"] == ["tom bought 12 red pens and gave 3 of them to his", "how many pens has he left"]
    hit = rows[far.id, "trace", 8]
    assert hit["share"] == pytest.approx(2 / 12) and hit["spans"] == ["tom bought 12 red pens and gave 3 of"]
    own = trace("clean", prompt="Say: " + LONG[:40])
    assert [row["part"] for row in decontaminate.overlaps([own], tests, (8,))[0].to_pylist()] == ["prompt"]
    kept, dropped = drop_overlapping([near, far], table, 4, 0.5)
    assert kept == [far] and dropped[0].reason == "overlap_4:toy" and "of the 4-grams of test item t1 in its question" in dropped[0].detail
    assert drop_overlapping([near, far], table, 4, 0.99)[0] == [near, far]


# --- the stage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    install(monkeypatch, FakeTeacher())
    return split_tag("train", split_hash(load_items("toy", "train")))


def test_the_stage_reports_and_drops_only_when_told(tmp_path, toy):
    near = trace(question(100, 1).replace("Ann", "Eve"), split=toy, gold_answer="101")
    clean = [trace(f"unseen {i}", split=toy) for i in range(60)]

    def run(name, **changes):
        artifact, result = run_stage(
            verify,
            config(verify__against="evaluated", **changes),
            tmp_path,
            name,
            traces=traces_artifact(tmp_path, f"{name}-in", [near, *clean]),
        )
        return artifact, result, {t.id for t in table_to_traces(artifact.table("traces"))}

    artifact, result, kept = run("report", verify__ngram_sizes=(4,), verify__ngram_drop_size=4)
    assert near.id in kept and result.facts["overlap"]["toy"]["4"]["rows"] == 1
    assert set(artifact.table("overlap")["id"].to_pylist()) == {near.id}
    artifact, result, kept = run("drop", verify__ngram_sizes=(4,), verify__ngram_drop_size=4, verify__ngram_drop_share=0.5)
    assert near.id not in kept and result.dropped == {"overlap_4:toy": 1}


def test_registered_tasks_are_guarded_beside_the_evaluated_ones(toy):
    names = decontaminate.guarded_tasks(("toy", "gsm8k"), None, registered=True)
    assert names[:2] == ["toy", "gsm8k"] and {"synth_arithmetic", "synth_objects"} < set(names)
    assert "svamp" not in names  # its rows are not at hand without a folder
    assert decontaminate.guarded_tasks(("toy",), None, registered=False) == ["toy"]
    assert external.guarded_files(config()) == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"verify__against": "all"}, "verify.against: 'all' is not one of registered, evaluated"),
        ({"verify__ngram_sizes": (0,)}, r"ngram_sizes\[0\]: 0 must be a whole number"),
        ({"verify__ngram_drop_share": 1.5}, r"must lie in \[0, 1\]"),
        ({"verify__ngram_drop_share": 0.5, "verify__ngram_drop_size": 9}, r"9 is not in verify.ngram_sizes \(8, 13\)"),
    ],
)
def test_malformed_settings(changes, message):
    from tiny import tiny_config

    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(**changes))


@pytest.mark.realdata
def test_svamp_shares_ngrams_with_its_own_test_split(data_dir):
    """Innocently: no question is the same, yet most test questions share eight words in a row with a training question."""
    tests = decontaminate.evaluation_questions(["svamp"], data_dir)
    train = [trace(item.question, target="x") for item in load_items("svamp", "train", data_dir)]
    kept, dropped = drop_leaked(train, ExactIndex(tests))
    _, figures = decontaminate.overlaps(kept, tests, (8, 13))
    assert figures["svamp"]["items"] == 300 and figures["svamp"]["8"]["items"] == 227 and figures["svamp"]["13"]["items"] < 120
    assert not dropped
