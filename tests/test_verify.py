"""Stage verify: verdicts, leaks, missing gold, groups, other splits, resume."""

from __future__ import annotations

import pytest
from toy_task import FakeTeacher, config, install, question, run_stage, traces_artifact

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.records import make_trace, table_to_traces
from dccot_jax.select import verify
from dccot_jax.tasks.registry import SplitMismatchError, load_items, split_hash
from dccot_jax.teachers.rows import split_tag


@pytest.fixture
def toy(monkeypatch):
    install(monkeypatch, FakeTeacher())
    return split_tag("train", split_hash(load_items("toy", "train")))


def trace(split, target="The answer is 7.", **fields):
    base = {"task": "toy", "split": split, "question": question(3, 4), "gold_answer": "7", "answer_type": "number"}
    return make_trace(**{**base, "target": target, **fields})


def run(tmp_path, traces, name="verify", **changes):
    artifact, result = run_stage(verify, config(**changes), tmp_path, name, traces=traces_artifact(tmp_path, f"{name}-in", traces))
    dropped = {row["id"]: row["reason"] for row in artifact.table("dropped").to_pylist()}
    return {row.id: row for row in table_to_traces(artifact.table("traces"))}, dropped, result


def test_verdicts_and_reasons(tmp_path, toy):
    traces = [
        trace(toy),
        trace(toy, "7.0 pens"),
        trace(toy, "The answer is 8."),
        trace(toy, "no idea"),
        trace(toy, "<think>The answer is 7."),
        trace(toy, "The answer is 7.", gold_answer="unknown", question="other"),
    ]
    found, dropped, result = run(tmp_path, traces)
    got = [(found[row.id].verdict, found[row.id].verdict_reason) for row in traces]
    assert got == [
        (True, "correct"),
        (True, "correct"),
        (False, "wrong"),
        (False, "no_answer"),
        (False, "thinking_unclosed"),
        (None, "bad_gold"),
    ]
    assert not dropped and (result.facts["right"], result.facts["wrong"], result.facts["no_verdict"]) == (2, 3, 1)
    assert result.facts["reasons"]["no_answer"] == 1


def test_leaks_and_missing_gold_are_dropped_and_counted(tmp_path, toy):
    leaked = trace(toy, question="ANN has 100 pens and gets 1 more. How many pens has Ann", gold_answer="101")
    no_gold = trace(toy, question="q", gold_answer=None)
    good = [trace(toy, question=f"unseen {index}") for index in range(60)]
    found, dropped, result = run(tmp_path, [*good, leaked, no_gold])
    assert set(found) == {row.id for row in good}
    assert dropped == {leaked.id: "leak:toy", no_gold.id: "missing_gold"}
    assert result.dropped == {"leak:toy": 1, "missing_gold": 1} and (result.rows_in, result.rows_out) == (62, 60)


def test_backward_parts_follow_the_forward_part(tmp_path, toy):
    def group(name, target):
        return [
            trace(toy, f"What is x? {name}", method="reverse", group_id=name, part="backward_question"),
            trace(
                toy,
                f"The answer is 4. {name}",
                question=f"x {name}",
                gold_answer="5",
                method="reverse",
                group_id=name,
                part="backward_reasoning",
            ),
            trace(toy, target, method="reverse", group_id=name),
        ]

    right, wrong = group("a", "The answer is 7."), group("b", "The answer is 9.")
    found, _, _ = run(tmp_path, [*right, *wrong])
    assert [found[row.id].verdict for row in right] == [True] * 3 and [found[row.id].verdict for row in wrong] == [False] * 3
    assert [found[row.id].verdict_reason for row in right] == ["forward_correct", "forward_correct", "correct"]


def test_another_split_is_refused(tmp_path, toy):
    with pytest.raises(SplitMismatchError, match="train-000000000000"):
        run(tmp_path, [trace("train-000000000000")])


def test_configured_evaluation_sets_replace_the_relations(toy):
    assert verify.evaluation_names(config()) == ("toy",)
    chosen = config(evaluate__ood=("synth_objects",), evaluate__cross=("synth_calendar", "synth_objects"))
    assert verify.evaluation_names(chosen) == ("synth_objects", "synth_calendar")


def test_order_of_rows_does_not_matter(tmp_path, toy):
    traces = [trace(toy, f"way {index}. The answer is {index % 9}.") for index in range(40)]
    _, _, first = run(tmp_path, traces)
    _, _, second = run(tmp_path, traces[::-1], "reversed")
    assert first.logical_hash == second.logical_hash


def test_resume_judges_only_what_is_left(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(verify, "CHUNK_ROWS", 10)
    traces = [trace(toy, f"way {index}. The answer is {index % 9}.") for index in range(45)]
    judged = []
    whole = verify.verdict_of

    def breaking(row, limit):
        if len(judged) == 25:
            raise KeyboardInterrupt
        judged.append(row.id)
        return whole(row, limit)

    monkeypatch.setattr(verify, "THREADS", 1)
    monkeypatch.setattr(verify, "verdict_of", breaking)
    with pytest.raises(KeyboardInterrupt):
        verify.run(
            config(), {"traces": traces_artifact(tmp_path, "in", traces)}, ArtifactWriter(tmp_path / "verify"), Context(workdir=tmp_path)
        )
    again = []
    monkeypatch.setattr(verify, "verdict_of", lambda row, limit: (again.append(row.id), whole(row, limit))[1])
    _, _, resumed = run(tmp_path, traces)
    assert again == [row.id for row in traces[20:]], "two whole chunks were committed"
    assert not (tmp_path / "verify" / "chunks").exists()
    _, _, fresh = run(tmp_path, traces, "fresh")
    assert resumed.logical_hash == fresh.logical_hash


def test_a_foreign_chunk_is_not_trusted(tmp_path, toy, monkeypatch):
    traces = [trace(toy, f"way {index}. The answer is 7.") for index in range(3)]
    writer = ArtifactWriter(tmp_path / "verify")
    verify._verdicts(traces[:2], 5.0, writer, Context(workdir=tmp_path))
    found, _, _ = run(tmp_path, traces)
    assert set(found) == {row.id for row in traces}
