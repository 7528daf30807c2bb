"""Augmentation: what each method keeps, what it rejects and why, lineage, and that nothing is asked twice."""

from __future__ import annotations

import collections
import json

import pytest
from toy_task import PAIRS, TOY, FakeTeacher, config, install, question, run_stage, traces_artifact

from dccot_jax.augment import stage
from dccot_jax.augment.question import majority
from dccot_jax.augment.reverse import backward_prompt, backward_type
from dccot_jax.context import Context
from dccot_jax.records import Response, make_trace, table_to_traces
from dccot_jax.select import verify
from dccot_jax.tasks.base import Task
from dccot_jax.teachers import stage as traces_stage
from dccot_jax.teachers.cache import RequestCache

N = len(PAIRS)


def run(tmp_path, monkeypatch, methods, reply=None, originals=None, **changes):
    """(new traces, originals kept, reasons, facts per method) of one augment stage over the toy task's vanilla traces."""
    install(monkeypatch, FakeTeacher())
    base, _ = run_stage(traces_stage, config(), tmp_path, "traces")
    if originals is not None:
        base = traces_artifact(tmp_path, "originals", originals(table_to_traces(base.table("traces"))))
    teacher = FakeTeacher("helper", reply)
    install(monkeypatch, FakeTeacher(), teacher)
    artifact, result = run_stage(
        stage, config(augment__methods=methods, augment__teacher={"kind": "helper"}, **changes), tmp_path, "augment", traces=base
    )
    rows = table_to_traces(artifact.table("traces"))
    assert len({row.id for row in rows}) == len(rows)
    vanilla = [row for row in rows if row.method == "vanilla"]
    return [row for row in rows if row.method != "vanilla"], vanilla, dict(result.dropped), result.facts["methods"]


# --- answer -----------------------------------------------------------------------------------------------------------


def test_answer_paths_right_and_new(tmp_path, monkeypatch):
    new, vanilla, dropped, facts = run(tmp_path, monkeypatch, ("answer",))
    assert len(vanilla) == N and len(new) == 3 * N and not dropped and facts["answer"]["calls"] == 3 * N
    assert {row.sample_index for row in new} == {1, 2, 3} and all(row.teacher == "helper" for row in new)
    by_id = {row.id: row for row in vanilla}
    for row in new:
        (parent,) = row.parent_ids
        assert by_id[parent].question == row.question and row.gold_answer == row.answer and row.target != by_id[parent].target


def test_answer_rejects_wrong_repeated_cut_and_failed(tmp_path, monkeypatch):
    def reply(kind, text, index):
        if "has 3" in text:  # equals the original, apart from case and dots
            return "3+4=7\nTHE ANSWER IS 7"
        if "has 10" in text:
            return f"path {index}. The answer is 16."
        if "has 7" in text:
            return "I do not know."
        if "has 20" in text:
            return Response("", finish_reason="error", error="no")
        if "has 6" in text:
            return Response("6+9=15.\nThe answer is 15.", finish_reason="length")
        return "The same new path: 32. The answer is 32."

    new, _, dropped, _ = run(tmp_path, monkeypatch, ("answer",), reply)
    assert [row.target for row in new] == ["The same new path: 32. The answer is 32."]
    assert dropped == {
        "answer:repeated": 3 + 2,
        "answer:wrong": 3,
        "answer:no_answer": 3,
        "answer:teacher_error": 3,
        "answer:truncated": 3,
    }


# --- rephrase ---------------------------------------------------------------------------------------------------------


def test_rephrase_is_answered_and_filtered(tmp_path, monkeypatch):
    def reply(kind, text, index):
        if kind == "rephrase" and "has 3" in text:
            return f"Rephrased question: {question(3, 4).upper()}"
        if kind == "rephrase" and "has 10" in text:
            return "One line.\n\nAnother."
        if kind == "solve" and "owned 7" in text:
            return "7+7=15. The answer is 15."
        return None

    new, vanilla, dropped, facts = run(tmp_path, monkeypatch, ("rephrase",), reply)
    assert len(vanilla) == N and len(new) == N - 3
    assert dropped == {"rephrase:repeated": 1, "rephrase:unreadable": 1, "rephrase:wrong": 1}
    assert facts["rephrase"]["calls"] == N + N - 2
    first = new[0]
    assert first.question == "Ann owned 20 pens, 1 came along. What is her total? (way 0)"
    assert (first.gold_answer, first.answer, first.gold_source, first.prompt, first.n_steps) == ("21", "21", "given", None, 1)
    assert len(json.loads(first.meta)["via"]) == 1


def test_several_rephrasings(tmp_path, monkeypatch):
    new, _, dropped, _ = run(tmp_path, monkeypatch, ("rephrase",), augment__rephrasings=2)
    assert len(new) == 2 * N and not dropped and len({row.question for row in new}) == 2 * N


# --- question ---------------------------------------------------------------------------------------------------------


def test_new_question_needs_agreement(tmp_path, monkeypatch):
    def reply(kind, text, index):
        if kind != "solve":
            return None
        if "has 4" in text:  # from 3 and 4: three of five agree, the first sample does not
            return "The answer is 1." if index in (0, 2) else f"way {index}. The answer is 10.0"
        if "has 11" in text:  # two of five
            return f"The answer is {index // 2}."
        if "has 8" in text:
            return "who knows"
        return None

    new, vanilla, dropped, facts = run(tmp_path, monkeypatch, ("question",), reply)
    assert len(vanilla) == N and len(new) == N - 2
    assert dropped == {"question:disagreement": 1, "question:no_answer": 1}
    first = new[0]
    assert first.question == "Bob has 4 hats and finds 6 hats. How many hats?"
    assert (first.gold_answer, first.gold_source, first.sample_index, first.n_steps) == ("10", "pseudo", 1, None)
    assert facts["question"]["calls"] == 6 * N


def test_new_question_that_is_known_is_rejected(tmp_path, monkeypatch):
    new, _, dropped, _ = run(
        tmp_path,
        monkeypatch,
        ("question",),
        lambda kind, text, index: f"New question: {question(2, 30)}" if kind == "new question" else None,
    )
    assert not new and dropped == {"question:repeated": N}


def test_new_questions_that_differ_by_an_operator_are_two(tmp_path, monkeypatch):
    def reply(kind, text, index):
        if kind == "new question":
            return f"New question: Evaluate 8 {'-' if 'has 3' in text else '+'} 2."
        return "The answer is 1." if "Evaluate" in text else None

    new, _, dropped, _ = run(tmp_path, monkeypatch, ("question",), reply)
    assert {row.question for row in new} == {"Evaluate 8 - 2.", "Evaluate 8 + 2."} and dropped == {"question:repeated": N - 2}


def test_majority():
    def say(*answers):
        return [Response(f"The answer is {answer}.") if answer else Response("hm") for answer in answers]

    assert majority(say("3", "4", "3.0"), "number", ()) == ("3", 2 / 3, 0)
    assert majority(say("4", "3", "3", "4"), "number", ()) == ("4", 0.5, 0), "ties: the earliest"
    assert majority(say("", "3", ""), "number", ()) == ("3", 1 / 3, 1), "silence counts against"
    assert majority(say("", ""), "number", ()) is None
    cut = Response("The answer is 9.", finish_reason="length")
    assert majority([cut, cut, *say("3")], "number", ()) == ("3", 1 / 3, 2)


# --- reverse ----------------------------------------------------------------------------------------------------------


def test_reverse_makes_groups_of_three(tmp_path, monkeypatch):
    new, vanilla, dropped, facts = run(tmp_path, monkeypatch, ("reverse",))
    assert not vanilla and dropped == {"in_group:reverse": N} and facts["reverse"]["calls"] == 3 * N
    groups = collections.defaultdict(list)
    for row in new:
        groups[row.group_id].append(row)
    assert len(groups) == N
    forward, asked, backward = groups[new[0].group_id]
    assert [forward.part, asked.part, backward.part] == ["forward", "backward_question", "backward_reasoning"]
    assert (forward.question, forward.target, forward.teacher, forward.prompt) == (question(3, 4), "3+4=7.\nThe answer is 7.", "fake", None)
    assert asked.target == backward.question == "Ann has 3 pens and gets x more. Now she has 7. What is x?"
    assert asked.prompt == f"Write the inverse question.\n{question(3, 4)}\nThe answer is 7." and asked.gold_answer == "7"
    assert (backward.target, backward.gold_answer, backward.gold_source) == ("7-3=4.\nThe answer is 4.", "4", "pseudo")
    assert asked.teacher == backward.teacher == "helper"
    assert forward.parent_ids == asked.parent_ids == backward.parent_ids


def test_reverse_filters(tmp_path, monkeypatch):
    def reply(kind, text, index):
        if kind == "backward question" and "has 10" in text:
            return f"Backward question: {question(10, 5)}"
        if kind == "solve" and "has 7" in text:
            return "cannot say"
        if kind == "consistency" and "has 20" in text:
            return "First I thought True, then False."
        if kind == "consistency" and "has 6" in text:
            return "maybe"
        return None

    def originals(traces):  # the first one is wrong
        fields = {name: getattr(traces[0], name) for name in ("task", "split", "question", "gold_answer", "answer_type", "teacher")}
        return [make_trace(**fields, target="The answer is 8."), *traces[1:]]

    new, vanilla, dropped, _ = run(tmp_path, monkeypatch, ("reverse",), reply, originals)
    assert len(new) == 3 and len(vanilla) == N - 1
    assert dropped == {
        "reverse:forward_wrong": 1,
        "reverse:repeated": 1,
        "reverse:no_answer": 1,
        "reverse:inconsistent": 1,
        "reverse:no_verdict": 1,
        "in_group:reverse": 1,
    }


def test_reverse_builds_on_a_right_trace_and_leaves_the_others(tmp_path, monkeypatch):
    def originals(traces):
        fields = {name: getattr(traces[0], name) for name in ("task", "split", "question", "gold_answer", "answer_type")}
        return [
            make_trace(**fields, teacher="a", target="The answer is 8."),
            make_trace(**fields, teacher="b", target="b: The answer is 7."),
            make_trace(**fields, teacher="helper", target="helper: The answer is 7."),
        ]

    new, vanilla, dropped, _ = run(tmp_path, monkeypatch, ("reverse",), None, originals)
    assert (
        [row.teacher for row in vanilla] == ["a", "b"]
        and new[0].target == "helper: The answer is 7."
        and dropped == {"in_group:reverse": 1}
    )


def test_inverse_questions_of_other_answer_types():
    def task(answer_type, suffix):
        return Task(name="t", answer_type=answer_type, domain="logic", description="", load=lambda *_: [], prompt_suffix=suffix)

    assert backward_prompt(task("choice", " S"), "q", ("x", "y")) == "q\n(A) x (B) y S"
    two = backward_prompt(task("yes_no", " say yes or no"), "q", ("x", "y"))
    assert two.startswith("q\n(A) x (B) y\n") and "yes" not in two
    assert backward_type(task("yes_no", ""), ("x", "y")) == "choice" and backward_type(task("number", ""), ()) == "number"


# --- stage ------------------------------------------------------------------------------------------------------------


def test_missing_gold_is_counted_per_method(tmp_path, monkeypatch):
    def originals(traces):
        fields = {name: getattr(traces[0], name) for name in ("task", "split", "question", "answer_type", "teacher", "target")}
        return [make_trace(**fields), *traces[1:]]

    _, vanilla, dropped, _ = run(tmp_path, monkeypatch, ("rephrase", "answer"), None, originals)
    assert len(vanilla) == N and dropped == {"rephrase:missing_gold": 1, "answer:missing_gold": 1}


def test_methods_add_up_and_rerun_is_free(tmp_path, monkeypatch):
    methods = ("rephrase", "question", "answer", "reverse")
    install(monkeypatch, FakeTeacher())
    base, _ = run_stage(traces_stage, config(), tmp_path, "traces")
    _, first = run_stage(stage, config(augment__methods=methods), tmp_path, "augment", traces=base)
    assert first.rows_out == N + N + 3 * N + 3 * N
    again = FakeTeacher()
    install(monkeypatch, again)
    _, second = run_stage(stage, config(augment__methods=methods), tmp_path, "again", traces=base)
    assert again.asked == [] and second.logical_hash == first.logical_hash


@pytest.mark.parametrize("fail_at", [1, 5, 20, 60])
def test_broken_run_resumes_without_repeating_a_request(tmp_path, monkeypatch, fail_at):
    methods = ("rephrase", "question", "answer", "reverse")
    install(monkeypatch, FakeTeacher())
    base, _ = run_stage(traces_stage, config(), tmp_path, "traces")
    broken = FakeTeacher("helper", fail_at=fail_at)
    install(monkeypatch, broken)
    cfg = config(augment__methods=methods, augment__teacher={"kind": "helper"})
    with pytest.raises(ConnectionError):
        run_stage(stage, cfg, tmp_path, "augment", traces=base)
    healthy = FakeTeacher("helper")
    install(monkeypatch, healthy)
    _, result = run_stage(stage, cfg, tmp_path, "augment", traces=base)
    assert not set(broken.asked) & set(healthy.asked), "no request that was answered is sent again"
    fresh = FakeTeacher("helper")
    install(monkeypatch, fresh)
    _, whole = run_stage(stage, cfg, tmp_path / "elsewhere", "augment", traces=base)
    assert result.logical_hash == whole.logical_hash and len(fresh.asked) == len(broken.asked) + len(healthy.asked)


def test_every_trace_leads_back_to_its_request(tmp_path, monkeypatch):
    new, _, _, _ = run(tmp_path, monkeypatch, ("rephrase", "answer"))
    teacher = FakeTeacher("helper")
    with RequestCache(traces_stage.cache_dir(Context(workdir=tmp_path))) as cache:
        for row in new:
            request = cache.request(teacher, json.loads(row.meta)["request"])
            assert request is not None and request.messages[0].content == row.question + TOY.prompt_suffix


@pytest.mark.parametrize("task", ["synth_objects", "synth_calendar"])
def test_scripted_teachers_pass_every_filter(tmp_path, task):
    """Choice and date answers go through all four methods; nothing made is wrong or a test question."""
    methods = ("rephrase", "question", "answer", "reverse")
    teacher = {"kind": "scripted", "style": "verbose"}
    cfg = config(
        traces__task=task, traces__questions=15, traces__teachers=(teacher,), augment__teacher=teacher, augment__methods=methods,
        evaluate__iid=(task,),
    )  # fmt: skip
    base, _ = run_stage(traces_stage, cfg, tmp_path, "traces")
    made, result = run_stage(stage, cfg, tmp_path, "augment", traces=base)
    verified, outcome = run_stage(verify, cfg, tmp_path, "verify", traces=made)
    counts = collections.Counter(row.method for row in table_to_traces(verified.table("traces")))
    assert counts["reverse"] == 45 and counts["rephrase"] == 15 and counts["question"] >= 14 and counts["answer"] >= 15
    assert set(result.dropped) <= {"answer:repeated", "in_group:reverse", "question:repeated"}
    assert outcome.facts["wrong"] == outcome.facts["no_verdict"] == 0 and not outcome.dropped
