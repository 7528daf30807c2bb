"""Stage traces: generated and replayed traces, their fields, joins, refusals and counts."""

from __future__ import annotations

import dataclasses
import json

import pytest
from toy_task import PAIRS, TOY, FakeTeacher, config, install, items, question, run_stage

from dccot_jax.formats import export_traces, import_records
from dccot_jax.records import Response, make_trace, table_to_traces
from dccot_jax.tasks.answers import judge
from dccot_jax.tasks.base import make_item
from dccot_jax.tasks.registry import SplitMismatchError, get_task, load_items, split_hash
from dccot_jax.teachers import stage
from dccot_jax.teachers.build import TeacherError
from dccot_jax.teachers.prompts import gold_text, read_question, read_verdict
from dccot_jax.teachers.replay import ReplaySpec, replay, replay_spec
from dccot_jax.teachers.rows import as_stated, rationale, split_tag


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec(*files, **fields):
    return {"kind": "replay", "name": "old", "files": files, **fields}


def traces_of(artifact):
    return table_to_traces(artifact.table("traces"))


def test_generated_traces(tmp_path, monkeypatch):
    teacher = FakeTeacher()
    install(monkeypatch, teacher)
    artifact, result = run_stage(stage, config(traces__samples=2), tmp_path, "traces")
    traces = traces_of(artifact)
    assert len(traces) == 2 * len(PAIRS) == result.rows_out and len({trace.id for trace in traces}) == len(traces)
    first = traces[0]
    assert (first.question, first.gold_answer, first.n_steps, first.answer) == (question(3, 4), "7", 1, "7")
    assert (first.reasoning, first.target, first.prompt) == ("3+4=7.", "3+4=7.\nThe answer is 7.", None)
    assert (first.teacher, first.style, first.prompt_tokens, first.completion_tokens) == ("fake", "fake", 5, 7)
    assert first.split == split_tag("train", split_hash(items("train"))) == result.facts["split"]
    assert teacher.asked[0].messages[0].content == question(3, 4) + TOY.prompt_suffix
    assert {trace.sample_index for trace in traces} == {0, 1}
    assert len({request.seed for request in teacher.asked}) == len(teacher.asked)
    assert len(json.loads(first.meta)["request"]) == 64


def test_second_run_is_served_from_the_cache_and_equal(tmp_path, monkeypatch):
    install(monkeypatch, FakeTeacher())
    _, first = run_stage(stage, config(), tmp_path, "traces")
    again = FakeTeacher()
    install(monkeypatch, again)
    _, second = run_stage(stage, config(), tmp_path, "again")
    assert again.asked == [] and first.logical_hash == second.logical_hash
    assert second.facts["teachers"]["fake"]["cache_hits"] == len(PAIRS)


def test_failures_and_cut_replies_are_counted_never_kept(tmp_path, monkeypatch):
    def reply(kind, text, index):
        if "has 3" in text:
            return Response("", finish_reason="error", error="unknown family")
        if "has 10" in text:
            return Response("10+5=15.\nThe answer is 15.", finish_reason="length")
        return "  \n" if "has 7" in text else None

    install(monkeypatch, FakeTeacher(reply=reply))
    artifact, result = run_stage(stage, config(), tmp_path, "traces")
    assert result.dropped == {"empty_reply": 1, "teacher_error": 1, "truncated": 1}
    assert result.rows_in == len(PAIRS) and result.rows_out == len(PAIRS) - 3
    assert "unknown family" in artifact.table("dropped").column("detail").to_pylist()


def test_a_stage_without_one_trace_stops_and_says_why(tmp_path, monkeypatch):
    install(monkeypatch, FakeTeacher(reply=lambda kind, text, index: Response("", finish_reason="error", error="unknown family")))
    with pytest.raises(TeacherError) as caught:
        run_stage(stage, config(), tmp_path, "none")
    words = f"not one trace of task 'toy' came of {len(PAIRS)} requests and rows (teacher fake); dropped: teacher_error {len(PAIRS)}; e.g. "
    assert words in str(caught.value) and str(caught.value).endswith(": unknown family")
    path = write(tmp_path / "r.jsonl", {"prompt": "What is the capital of France?", "completion": "The answer is 1."})
    with pytest.raises(TeacherError, match=r"1 requests and rows \(.*r\.jsonl\); dropped: not_in_train_split 1; e\.g\. r\.jsonl:1"):
        run_stage(stage, config(traces__teachers=(spec(path),)), tmp_path, "other")
    with pytest.raises(TeacherError, match=r"came of 0 requests and rows \(.*empty\.jsonl\); nothing was there to read"):
        run_stage(stage, config(traces__teachers=(spec(write(tmp_path / "empty.jsonl")),)), tmp_path, "empty")


def test_thinking_channel_becomes_part_of_the_target(tmp_path, monkeypatch):
    install(monkeypatch, FakeTeacher(reply=lambda kind, text, index: Response("The answer is 7.", reasoning="hm, 3 and 4")))
    artifact, _ = run_stage(stage, config(traces__questions=1), tmp_path, "traces")
    (trace,) = traces_of(artifact)
    assert trace.target == "<think>\nhm, 3 and 4\n</think>\n\nThe answer is 7." and trace.reasoning == "hm, 3 and 4" and trace.answer == "7"


def test_question_limit_and_seed(tmp_path, monkeypatch):
    teacher = FakeTeacher()
    install(monkeypatch, teacher)
    path = write(tmp_path / "r.jsonl", *({"prompt": question(a, b), "completion": "The answer is 1."} for a, b in PAIRS))
    artifact, result = run_stage(stage, config(traces__questions=2, traces__teachers=({"kind": "fake"}, spec(path))), tmp_path, "traces")
    traces = traces_of(artifact)
    assert len({trace.question for trace in traces}) == 2 and len(traces) == 4
    assert result.dropped == {"over_question_limit": len(PAIRS) - 2}
    run_stage(stage, config(traces__questions=2, traces__seed=1), tmp_path, "other")
    assert len(teacher.asked) == 4, "another traces.seed asks anew"


# --- replay -----------------------------------------------------------------------------------------------------------


def test_replay_joins_on_the_question(tmp_path, monkeypatch):
    install(monkeypatch)
    rows = [
        {"instruction": "ann HAS 10 pens, and gets 5 more; how many pens has Ann", "output": " 10+5=15. The answer is 15"},
        {"instruction": question(50, 1), "output": "50+1=51. The answer is 51"},  # in neither split
        {"instruction": question(3, 4), "output": "3+4=8. The answer is 8"},
        {"instruction": question(3, 4), "output": "3+4=7. The answer is 7"},
        {"instruction": question(3, 4), "output": "3+4=7. The answer is 7 "},
        {"instruction": question(3, 4)},
    ]
    path = write(tmp_path / "r.jsonl", *rows)
    artifact, result = run_stage(stage, config(traces__teachers=(spec(path, level="2", style="terse"),)), tmp_path, "traces")
    traces = traces_of(artifact)
    assert [(trace.question, trace.gold_answer, trace.answer, trace.sample_index) for trace in traces] == [
        (question(10, 5), "15", "15", 0),
        (question(3, 4), "7", "8", 0),
        (question(3, 4), "7", "7", 1),
    ]
    assert {(trace.teacher, trace.level, trace.style, trace.source) for trace in traces[:1]} == {("old", "2", "terse", "r.jsonl:1")}
    assert traces[0].target == "10+5=15. The answer is 15" and traces[0].reasoning == "10+5=15."
    assert result.dropped == {"missing_field": 1, "not_in_train_split": 1, "duplicate": 1} and result.rows_in == 6


def test_repeated_row_is_a_duplicate_of_the_first_sample(tmp_path, monkeypatch):
    install(monkeypatch)
    row = {"instruction": question(3, 4), "output": "3+4=7. The answer is 7"}
    found = replay(ReplaySpec("old", (write(tmp_path / "r.jsonl", row, row, row),)), TOY, items("train"), split="train-x", data_dir=None)
    assert len(found.traces) == 1 and [row.reason for row in found.dropped] == ["duplicate"] * 2


def test_replay_completes_the_answer_line(tmp_path, monkeypatch):
    install(monkeypatch)
    rows = [
        {"instruction": question(3, 4), "output": "7"},
        {"instruction": question(10, 5), "output": "10+5 is fifteen pens", "answer": "15"},
    ]
    found = replay(ReplaySpec("old", (write(tmp_path / "r.jsonl", *rows),)), TOY, items("train"), split="train-x", data_dir=None)
    assert found.traces[0].target == "The answer is 7."
    assert judge(found.traces[0].target, "7", "number").strict


def test_replay_tells_items_with_other_options_apart(tmp_path, monkeypatch):
    install(monkeypatch)
    pool = [
        make_item("toy", "train", "Which one?", choices=("red", "blue"), gold="A"),
        make_item("toy", "train", "Which one?", choices=("cat", "dog"), gold="B"),
        make_item("toy", "train", "Only one like this?", choices=("yes it is", "no"), gold="B"),
    ]
    rows = [
        {"instruction": "Q: Which one? Answer choices: A: cat, B: dog", "output": "The answer is B"},
        {"instruction": "Q: Which one? Answer choices: A: red, B: blue", "output": "The answer is A"},
        {"instruction": "Which one?", "output": "The answer is A"},  # ambiguous
        {"instruction": "Only one like this?", "output": "The answer is B"},
        {"instruction": "Q: Which one? Answer choices: A: cat, B: cow", "output": "The answer is B"},
    ]
    found = replay(ReplaySpec("old", (write(tmp_path / "r.jsonl", *rows),)), TOY, pool, split="train-x", data_dir=None)
    assert [trace.choices for trace in found.traces] == [("cat", "dog"), ("red", "blue"), ("yes it is", "no")]
    assert [row.reason for row in found.dropped] == ["not_in_train_split"] * 2


def test_replay_tells_items_with_other_signs_apart_and_still_joins_looser_rows(tmp_path):
    pool = [make_item("toy", "train", f"What is (12 {sign} 4) + 1?", gold=gold) for sign, gold in (("+", "17"), ("-", "9"), ("*", "49"))]
    asked = ("What is (12 - 4) + 1?", "what is (12*4)+1", "What is (12 + 4) + 1?", "What is 12 4 1", "What is 12 / 4 + 1")
    rows = [{"instruction": text, "output": f"The answer is {number}."} for number, text in enumerate(asked)]
    found = replay(ReplaySpec("old", (write(tmp_path / "r.jsonl", *rows),)), TOY, pool, split="train-x", data_dir=None)
    assert [trace.gold_answer for trace in found.traces] == ["9", "49", "17", "17", "17"] and not found.dropped


def test_replay_of_dccot_groups(tmp_path, monkeypatch):
    install(monkeypatch)
    row = {
        "question": question(3, 4),
        "gold_answer": 7.0,
        "forward_reasoning": "3+4=7. The answer is 7.",
        "forward_pred": 7.0,
        "backward_question": "Ann has 3 pens, gets x, now 7. What is x?",
        "backward_reasoning": "7-3=4. The answer is 4.",
        "backward_pred": 4.0,
        "is_consistent": "true",
    }
    bad = {**row, "question": question(10, 5), "is_consistent": "false"}
    test = {**row, "question": question(100, 1)}
    found = replay(ReplaySpec("old", (write(tmp_path / "r.jsonl", row, bad, test),)), TOY, items("train"), split="train-x", data_dir=None)
    forward, asked, backward = found.traces
    assert len({trace.group_id for trace in found.traces}) == 1 and {trace.method for trace in found.traces} == {"reverse"}
    assert asked.target == row["backward_question"] and asked.prompt is not None and question(3, 4) in asked.prompt and "7" in asked.prompt
    assert (backward.question, backward.gold_answer, backward.gold_source) == (row["backward_question"], "4", "pseudo")
    assert forward.gold_answer == "7" and forward.prompt is None
    reasons = [dropped.reason for dropped in found.dropped]
    assert reasons == ["inconsistent"] * 3 + ["not_in_train_split"] * 3, "groups are refused whole"


def test_replay_drops_text_that_is_no_unicode(tmp_path):
    rows = [{"question": question(3, 4), "answer": text} for text in ("3+4=7. The answer is 7.", "seven \ud800. The answer is 7.")]
    found = replay(ReplaySpec("old", (write(tmp_path / "r.jsonl", *rows),)), TOY, items("train"), split="train-x", data_dir=None)
    assert [(d.id, d.reason) for d in found.dropped] == [("r.jsonl:2", "not_unicode")] and found.rows == 2
    assert [trace.source for trace in found.traces] == ["r.jsonl:1"]


def test_replay_of_exported_traces(tmp_path, monkeypatch):
    install(monkeypatch, FakeTeacher())
    artifact, _ = run_stage(stage, config(), tmp_path, "traces")
    traces = traces_of(artifact)
    derived = make_trace(
        **{name: getattr(traces[0], name) for name in ("task", "split", "gold_answer", "answer_type", "teacher", "style")},
        question="Pens: 3 and 4 more?",
        target="3+4=7. The answer is 7.",
        method="rephrase",
        parent_ids=(traces[0].id,),
    )
    export_traces([*traces, derived], tmp_path / "t.parquet", "trace")
    replayed = spec(str(tmp_path / "t.parquet"), name="fake", style="fake")
    again, second = run_stage(stage, config(traces__teachers=(replayed,)), tmp_path, "again")
    assert [trace.id for trace in traces_of(again)] == [*(trace.id for trace in traces), derived.id] and not second.dropped
    foreign = [
        make_trace(**{**record, "id": "", "group_id": "", "split": "train-000000000000"})
        for record in import_records(tmp_path / "t.parquet").records
    ]
    export_traces(foreign, tmp_path / "f.parquet", "trace")
    both = (spec(str(tmp_path / "f.parquet")), replayed)
    _, third = run_stage(stage, config(traces__teachers=both), tmp_path, "third")
    assert third.dropped == {"other_split": len(foreign)} and third.rows_out == len(foreign)


def test_groups_of_files_with_one_name_stay_apart(tmp_path, monkeypatch):
    install(monkeypatch)
    row = {
        "question": question(3, 4),
        "forward_reasoning": "3+4=7. The answer is 7.",
        "backward_question": "Ann has 3 pens, gets x, now 7. What is x?",
        "backward_reasoning": "7-3=4. The answer is 4.",
    }
    specs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.json", row)
        specs += [spec(f"{name}/train.json", name=name), spec(str(tmp_path / name / "train.json"), name=name, level="2")]
    artifact, _ = run_stage(stage, config(data_dir=str(tmp_path), traces__teachers=tuple(specs)), tmp_path, "traces")
    groups: dict[str, set[str]] = {}
    for trace in traces_of(artifact):
        groups.setdefault(trace.group_id, set()).add(trace.teacher)
    assert sorted(map(sorted, groups.values())) == [["one"], ["two"]], "level is no part of a trace's id, so those rows are duplicates"
    # The same traces read back and given to another teacher are other groups, still whole.
    export_traces(traces_of(artifact), tmp_path / "t.jsonl", "trace")
    again = replay(ReplaySpec("three", ("t.jsonl",)), TOY, items("train"), split=traces_of(artifact)[0].split, data_dir=tmp_path)
    assert not {trace.group_id for trace in again.traces} & set(groups) and {trace.method for trace in again.traces} == {"reverse"}


def test_files_of_another_public_split_are_refused_before_the_join(tmp_path, monkeypatch):
    pool = [question(index, 1000 + index) for index in range(100)]

    def load(split, data_dir):
        mine = pool[:70] if split == "train" else pool[70:]
        return [make_item("toy", split, text, gold=str(1000 + 2 * pool.index(text))) for text in mine]

    install(monkeypatch, tasks=(dataclasses.replace(TOY, load=load),))

    def traced(name, numbers):
        rows = [{"instruction": pool[index], "output": f"The answer is {1000 + 2 * index}"} for index in numbers]
        cfg = config(traces__teachers=(spec(write(tmp_path / f"{name}.jsonl", *rows)),))
        return run_stage(stage, cfg, tmp_path, name)[1]

    with pytest.raises(SplitMismatchError, match=r"other\.jsonl: 20 of 70 trace questions stand in the test set of 30"):
        traced("other", range(20, 90))
    assert traced("own", range(70)).dropped == {}
    assert traced("leak", range(71)).dropped == {"not_in_train_split": 1}  # a handful is dropped and counted
    assert traced("whole", range(100)).dropped == {"not_in_train_split": 30}  # the whole pool covers the test set


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"files": "a.json"}, "must be a list"),
        ({"files": ()}, "must be a list"),
        ({"files": ("a",), "nam": "x"}, "unknown field 'nam'"),
        ({"files": ("a",)}, "name is missing"),
        ({"files": ("a",), "name": "x", "format": "csv"}, "format 'csv'"),
    ],
)
def test_bad_replay_specs(bad, message):
    with pytest.raises(TeacherError, match=message):
        replay_spec({"kind": "replay", **bad})


def test_same_trace_from_two_specs_is_kept_once(tmp_path, monkeypatch):
    install(monkeypatch)
    path = write(tmp_path / "r.jsonl", {"instruction": question(3, 4), "output": "The answer is 7"})
    artifact, result = run_stage(stage, config(traces__teachers=(spec(path), spec(path))), tmp_path, "traces")
    assert artifact.table("traces").num_rows == 1 and result.dropped == {"duplicate": 1}


# --- text -------------------------------------------------------------------------------------------------------------


def test_rationale_and_stated_answer():
    assert rationale("a. So the answer is 3. b\nThe answer is 4.") == "a. So the answer is 3. b"
    assert rationale("no statement 4") == "no statement 4"
    assert as_stated("x\nThe answer is 05/20/2024.", "2024-05-20", "date") == "05/20/2024"
    assert as_stated("x\nThe answer is 7 pens.", "7", "number") == "7"


def test_reading_replies():
    assert read_question('Sure!\n\nNew question: "How many?" The correct answer is (B).', "New question:") == "How many?"
    assert read_question("Just a question?", "New question:") == "Just a question?"
    assert read_question("Some talk.\n\nA question?", "New question:") is None
    assert read_question("New question:   ", "New question:") is None
    assert read_verdict("It is not True that ... so False.") is False and read_verdict("untrue") is None
    assert gold_text("B", ("x", "y")) == "(B) y" and gold_text("12", ()) == "12" and gold_text("C", ("x",)) == "C"


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "rows", "right"),
    [
        ("ChatGPT_level1", 700, 691),
        ("ChatGPT_level2", 700, 689),
        ("gemini_level1", 700, 698),
        ("gemini_level2", 700, 694),
        ("llama_level1", 700, 697),
        ("llama_level2", 700, 696),
    ],
)
def test_real_svamp_traces(data_dir, file, rows, right):
    """Every row of the released files joins, and as many are right as their README counts (its reader is simpler than ours: +-3)."""
    task, pool = get_task("svamp"), load_items("svamp", "train", data_dir)
    files, test = (f"svamp/eit/SVAMP_{file}_ranked.json.gz",), load_items("svamp", "test", data_dir)
    found = replay(ReplaySpec("t", files), task, pool, split="train-x", data_dir=data_dir, test=test)
    assert (len(found.traces), found.dropped) == (rows, [])
    assert not any(trace.target != trace.target.strip() for trace in found.traces)
    correct = sum(judge(trace.target, trace.gold_answer, "number").flexible for trace in found.traces)
    assert abs(correct - right) <= 3


@pytest.mark.realdata
def test_real_test_rationales_are_refused(data_dir):
    """A file over test questions gives no trace at all."""
    task, pool = get_task("strategyqa"), load_items("strategyqa", "train", data_dir)
    files = ("strategyqa/eit/stqa_human_annotation.json.gz",)
    test = load_items("strategyqa", "test", data_dir)
    found = replay(ReplaySpec("human", files), task, pool, split="train-x", data_dir=data_dir, test=test)
    assert sum(row.reason == "not_in_train_split" for row in found.dropped) >= 290
    held_out = {item.question for item in test}
    assert not held_out & {trace.question for trace in found.traces}
