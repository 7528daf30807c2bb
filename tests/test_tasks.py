"""Registry, prompts, relations, split checks, row sources; and the real files' counts where they are at hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from dccot_jax.records import ANSWER_TYPES, make_trace, normalise_question
from dccot_jax.tasks import registry
from dccot_jax.tasks.answers import canonical, judge
from dccot_jax.tasks.base import TaskDataError, make_item
from dccot_jax.tasks.math import equation_rationale, read_gsm8k
from dccot_jax.tasks.registry import SplitMismatchError, build_prompt, build_target, check_traces_split, get_task, load_items, split_hash
from dccot_jax.tasks.sources import read_rows, split_options

REQUIRED = """
gsm8k svamp asdiv mawps mawps_addsub mawps_multiarith mawps_singleeq mawps_singleop gsm_hard strategyqa commonsenseqa openbookqa
arc_challenge date_understanding math500 aqua anli_r3 boolq esnli coin_flip last_letters bbh_boolean_expressions
bbh_date_understanding bbh_logical_deduction_three_objects bbh_multistep_arithmetic_two bbh_object_counting
bbh_tracking_shuffled_objects_three_objects
"""


def test_registry_is_complete_and_closed():
    tasks = {task.name: task for task in registry.all_tasks()}
    assert set(REQUIRED.split()) <= set(tasks)
    for task in tasks.values():
        assert task.answer_type in ANSWER_TYPES and task.description
        for name in (*task.iid, *task.ood, *task.cross):
            assert name in tasks and "test" in tasks[name].splits, (task.name, name)
        assert not set(task.ood) & set(task.cross), task.name
        assert task.hub or task.local_files or task.name in ("coin_flip", "last_letters") or task.name.startswith("synth_")
        if "train" in task.splits:
            assert task.name in task.iid


@pytest.mark.parametrize(
    ("source", "target"),
    [("strategyqa", "boolq"), ("arc_challenge", "openbookqa"), ("anli_r3", "esnli"), ("gsm8k", "math500"), ("svamp", "mawps")],
)
def test_ood_pairs(source, target):
    assert target in get_task(source).ood


def test_canary_tasks_have_no_train_split():
    assert all(
        task.splits == ("test",) for task in registry.all_tasks() if task.name.startswith("bbh_") or task.name == "date_understanding"
    )


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'svamp'"):
        get_task("svmap")
    with pytest.raises(TaskDataError, match="no split 'validation'"):
        load_items("coin_flip", "validation")
    with pytest.raises(ValueError, match="twice"):
        registry.register(get_task("coin_flip"))


def test_missing_data_names_the_file(tmp_path):
    with pytest.raises(TaskDataError, match=r"svamp.*SVAMP_only_ans\.json\.gz is missing"):
        load_items("svamp", "test", tmp_path)
    with pytest.raises(TaskDataError, match=r"boolq/test\.jsonl is missing.*google/boolq"):
        load_items("boolq", "test", tmp_path)
    with pytest.raises(TaskDataError, match="mawps_addsub has no hub data set"):
        load_items("mawps_addsub", "test", None)
    assert not registry.data_at_hand(get_task("svamp"), tmp_path) and registry.data_at_hand(get_task("coin_flip"), None)


def test_hub_failure_names_the_id(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TaskDataError, match=r"task gsm8k: hub data set openai/gsm8k:main \(split train\) cannot be loaded: no network$"):
        load_items("gsm8k", "train", None)


def test_hub_rows_become_items(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {
        "tau/commonsense_qa": [{"question": "Where?", "choices": {"label": ["A", "B"], "text": ["here", "there"]}, "answerKey": "B"}],
        "allenai/ai2_arc": [{"question": "Which?", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": "1"}],
        "facebook/anli": [{"premise": "P", "hypothesis": "H", "label": 2, "reason": "r"}],
        "google/boolq": [{"question": "is it so", "passage": "It is.", "answer": True}],
        "deepmind/aqua_rat": [
            {"question": "n?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "1+1=2\nAnswer: B", "correct": "B"}
        ],
        "HuggingFaceH4/MATH-500": [{"problem": "p", "solution": "s", "answer": "\\frac{1}{2}"}],
        "EleutherAI/asdiv": [
            {"body": "Two and one.", "question": "Sum?", "answer": "3 (apples)", "formula": "2+1=3"},
            {"body": "Ratio.", "question": "Which?", "answer": "3:2", "formula": "3:2"},
        ],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **__: rows[path])
    assert load_items("commonsenseqa", "test")[0].gold == "B"
    assert load_items("arc_challenge", "test")[0].gold == "A"
    assert load_items("anli_r3", "test")[0].gold == "C"
    assert load_items("boolq", "test")[0].question == "It is.\nQuestion: Is it so?"
    aqua = load_items("aqua", "test")[0]
    assert (aqua.choices[1], aqua.gold, aqua.rationale) == ("2", "B", "1+1=2")
    assert load_items("math500", "test")[0].gold == "\\frac{1}{2}"
    assert [(item.gold, item.rationale) for item in load_items("asdiv", "test")] == [("3", "2+1 = 3.")]


def test_prompt_and_target_are_read_back_strictly():
    gold = {"number": "5", "yes_no": "yes", "choice": "B", "latex": "\\frac{1}{2}", "string": "nk", "date": "2021-05-01"}
    for task in registry.all_tasks():
        choices = ("one", "two", "three") if task.answer_type == "choice" else ()
        prompt = build_prompt(task, "Q?", choices)
        assert prompt.startswith("Q?") and prompt.endswith(task.prompt_suffix)
        assert ("(A) one (B) two (C) three" in prompt) == bool(choices)
        for rationale in ("", "Because 3 or 4."):
            target = build_target(task, rationale, gold[task.answer_type])
            assert judge(target, gold[task.answer_type], task.answer_type, choices).strict, (task.name, target)


@pytest.mark.parametrize(
    ("text", "question", "choices"),
    [
        (
            "Q: Where is it? Answer choices: A: in a bag, box, B: 5 degrees C, C: D, D: none",
            "Where is it?",
            ("in a bag, box", "5 degrees C", "D", "none"),
        ),
        ("Where is it? Answer Choices:\nA. bank\nB. a, b\n", "Where is it?", ("bank", "a, b")),
        ("Where?\nOptions:\n(A) x y\n(B) (z)\n(C) 1", "Where?", ("x y", "(z)", "1")),
        ("Where? (A) x (B) y", "Where?", ("x", "y")),
        ("Which options: none are listed?", "Which options: none are listed?", ()),
    ],
)
def test_options_inside_a_question(text, question, choices):
    assert split_options(text) == (question, choices)


def test_rationales():
    assert equation_rationale("( 76.0 - 25.0 )", "51") == ("76 - 25 = 51.", 1)
    assert equation_rationale("( ( 3.0 + 2.0 ) - 4.0 )", "1") == ("(3 + 2) - 4 = 1.", 2)
    assert equation_rationale("( 3.0 + 2.0 ) * ( 4.0 + 1.0 )", "25") == ("(3 + 2) * (4 + 1) = 25.", 3)
    assert equation_rationale("( 76.0 - 25.0 )", "50") == (None, None)
    row = read_gsm8k({"question": "Q", "answer": "He sold 48/2 = <<48/2=24>>24 clips.\nTotal 1,072.\n#### 1,072"})
    assert row["rationale"] == "He sold 48/2 = 24 clips.\nTotal 1,072." and row["gold"] == "1072" and row["n_steps"] == 2


@pytest.mark.parametrize("name", ["coin_flip", "last_letters"])
def test_generated_tasks(name):
    train, test = load_items(name, "train"), load_items(name, "test")
    assert (len(train), len(test)) == (2000, 500)
    assert not {normalise_question(item.question) for item in train} & {normalise_question(item.question) for item in test}
    assert load_items(name, "test") == test
    for item in test:
        if name == "coin_flip":
            assert item.gold == ("no" if item.question.count(" flips ") % 2 else "yes")
        else:
            assert item.gold == "".join(word[-1] for word in item.question.split('"')[1].split())
    assert max(Counter(item.gold for item in test).values()) < 300


def test_limit_does_not_depend_on_order():
    whole = load_items("coin_flip", "test")
    some = load_items("coin_flip", "test", limit=50)
    assert len(some) == 50 and {item.id for item in some} == set(sorted(item.id for item in whole)[:50])
    assert [item for item in whole if item in some] == some
    assert split_hash(whole) == split_hash(reversed(whole)) != split_hash(some)


def test_item_ids_keep_operators_apart():
    ids = {make_item("t", "test", text).id for text in ("not ( True ) and ( True )", "not ( True and True )", "1 - 2", "1 + 2")}
    assert len(ids) == 4
    assert make_item("t", "test", "How many, Ann?").id == make_item("t", "train", "how  many Ann ?").id


def _split(names: range, split: str):
    return [make_item("svamp", split, f"question number {index}", gold=str(index)) for index in names]


def _traces(names: range, split: str = "train"):
    return [make_trace(task="svamp", split=split, question=f"Question number {index}?", target="x") for index in names]


def test_traces_of_another_split_are_refused():
    train, test = _split(range(700), "train"), _split(range(700, 1000), "test")
    check_traces_split(_traces(range(700)), train, test)
    check_traces_split(_traces(range(703)), train, test)  # three leaks: verification drops and counts them
    check_traces_split(_traces(range(1000)), train, test)  # the whole pool: the same
    check_traces_split(_traces(range(300, 1000)), train, [make_item("asdiv", "test", item.question) for item in test])
    with pytest.raises(SplitMismatchError, match="210 of 700"):
        check_traces_split(_traces(range(420, 910)) + _traces(range(210)), train, test)
    tag = f"train-{split_hash(train)[:12]}"
    check_traces_split(_traces(range(10), tag), train, test)
    with pytest.raises(SplitMismatchError, match="train-0123"):
        check_traces_split(_traces(range(10), "train-0123456789ab"), train, test)


def test_corrupt_files(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(TaskDataError, match=r"a\.jsonl:2: not JSON"):
        read_rows(tmp_path, "a.jsonl", task="t")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"examples": [{"a": 1}]}')[:-9])
    with pytest.raises(TaskDataError, match="cannot be read"):
        read_rows(tmp_path, "b.json.gz", task="t")
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.jsonl").write_text(json.dumps({"question": "q"}) + "\n")
    with pytest.raises(TaskDataError, match=r"row 0 cannot be used \(KeyError: 'passage'\)"):
        load_items("boolq", "test", tmp_path)


# --- real files ---------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_counts(data_dir):
    sizes = {
        ("gsm8k", "train"): 7473,
        ("gsm8k", "test"): 1319,
        ("svamp", "train"): 700,
        ("svamp", "test"): 300,
        ("gsm_hard", "test"): 1319,
        ("strategyqa", "test"): 290,
        ("strategyqa", "train"): 1999,
        ("openbookqa", "train"): 4952,
        ("openbookqa", "test"): 500,
        ("commonsenseqa", "train"): 9740,
        ("commonsenseqa", "test"): 1221,
        ("arc_challenge", "test"): 1165,
        ("date_understanding", "test"): 369,
        **{
            (f"bbh_{name}", "test"): 250
            for name in ("boolean_expressions", "date_understanding", "object_counting", "multistep_arithmetic_two")
        },
    }
    for (name, split), size in sizes.items():
        items = load_items(name, split, data_dir)
        assert len(items) == size, (name, split)
        task = get_task(name)
        assert all(canonical(item.gold, task.answer_type, item.choices) is not None for item in items), name
    mawps = load_items("mawps", "test", data_dir)
    assert len({normalise_question(item.question) for item in mawps}) == len(mawps) < 395 + 600 + 508 + 562 - 150


@pytest.mark.realdata
def test_real_svamp_split(data_dir):
    train, test = load_items("svamp", "train", data_dir), load_items("svamp", "test", data_dir)
    kinds = Counter(item.meta["type"] for item in test)
    assert kinds == {"Subtraction": 160, "Addition": 59, "Common-Division": 48, "Multiplication": 33}
    held_out = {normalise_question(item.question) for item in test}
    known = {normalise_question(item.question) for item in train}
    for path in sorted((data_dir / "svamp" / "eit").glob("*.json.gz")):
        asked = {normalise_question(row["instruction"]) for row in read_rows(data_dir, f"svamp/eit/{path.name}", task="svamp")}
        assert asked <= known and not asked & held_out, path.name
    assert all(item.rationale and judge(f"{item.rationale}\nThe answer is {item.gold}.", item.gold, "number").strict for item in test)


@pytest.mark.realdata
def test_real_strategyqa_test_questions_never_in_train(data_dir):
    held_out = {normalise_question(item.question) for item in load_items("strategyqa", "test", data_dir)}
    assert not held_out & {normalise_question(item.question) for item in load_items("strategyqa", "train", data_dir)}
    human = read_rows(data_dir, "strategyqa/eit/stqa_human_annotation.json.gz", task="strategyqa")
    assert held_out <= {normalise_question(row["instruction"]) for row in human}


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("task", "file", "right", "slack"),
    [
        ("svamp", "svamp/eit/SVAMP_ChatGPT_level1_ranked.json.gz", 691, 3),
        ("svamp", "svamp/eit/SVAMP_gemini_level6_ranked.json.gz", 682, 0),
        ("svamp", "svamp/eit/SVAMP_llama_level3_ranked.json.gz", 698, 3),
        ("gsm8k", "gsm8k/eit/gsm8k_gemini_level2_ranked.json.gz", 7072, 0),
        ("strategyqa", "strategyqa/eit/strategyQA_chatgpt_level_6_ranked.json.gz", 1906, 4),
        ("openbookqa", "openbookqa/eit/obqa_gemini_level3_ranked.json.gz", 4921, 35),
        ("commonsenseqa", "commonsenseqa/eit/csqa_llama_level3_ranked.json.gz", 9717, 10),
    ],
)
def test_real_teachers_are_as_right_as_counted(data_dir, task, file, right, slack):
    kind = get_task(task).answer_type
    gold = {(normalise_question(item.question), item.choices): item for item in load_items(task, "train", data_dir)}
    count = 0
    for row in read_rows(data_dir, file, task=task):
        question, choices = split_options(row["instruction"]) if kind == "choice" else (row["instruction"], ())
        item = gold.get((normalise_question(question), choices))
        count += item is not None and judge(row["output"], item.gold, kind, item.choices).strict
    assert abs(count - right) <= slack
