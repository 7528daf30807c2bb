"""Judges: strict verdicts, further requests, rows that stay without one, agreement, and replies found again."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from tiny import tiny_config
from toy_task import FakeTeacher, install, question

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.preflight import check
from dccot_jax.records import Response, make_trace
from dccot_jax.select.judged import judge_rows
from dccot_jax.select.rubrics import JUDGE, PROXY, VerdictError, judge_request, read_verdict

GOOD = {"explanation": "fine", "coherence": 8, "correctness": 10, "clarity": 7}
SIGNALS = ("judge", "judge_clarity", "judge_correctness")


def verdict(**changes):
    return json.dumps(GOOD | changes)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        verdict(),
        f"  {verdict()}\n",
        f"```json\n{verdict()}\n```",
        f"```\n{verdict()}\n```",
        f"<think>\nlet me see {{}}\n</think>\n{verdict()}",
        json.dumps(GOOD, indent=2),
    ],
)
def test_a_verdict_reads(text):
    assert read_verdict(JUDGE, text) == ({"coherence": 8, "correctness": 10, "clarity": 7}, "fine")


def test_an_explanation_may_speak_of_thinking():
    assert read_verdict(JUDGE, verdict(explanation="it ends in </think> and {"))[1] == "it ends in </think> and {"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not a JSON object"),
        ("8", "not a JSON object"),
        ("I give it 8 of 10.", "not a JSON object: 'I give it 8 of 10.'"),
        (f"Here you are: {verdict()}", "not a JSON object"),
        (f"{verdict()} I hope this helps.", "not a JSON object"),
        (f"{verdict()}\n{verdict()}", "not a JSON object"),
        (verdict()[:-1], "not a JSON object"),
        (f"[{verdict()}]", "not a JSON object"),
        (verdict(clarity=11), "clarity = 11 is not a whole number from 1 to 10"),
        (verdict(clarity=0), "clarity = 0 is not"),
        (verdict(clarity=7.0), "clarity = 7.0 is not"),
        (verdict(clarity=7.5), "clarity = 7.5 is not"),
        (verdict(clarity="7"), 'clarity = "7" is not'),
        (verdict(clarity=True), "clarity = true is not"),
        (verdict(clarity=None), "clarity = null is not"),
        (verdict(clarity=float("nan")), "NaN is not a number"),
        (verdict(explanation=3), "explanation is not a text"),
        (verdict(overall=8), "unknown overall"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "clarity"}), "without clarity"),
        (verdict()[:-1] + ', "clarity": 9}', "a key twice"),
        ("<think>\nnever closed", "not a JSON object"),
    ],
)
def test_anything_else_is_refused_and_says_why(text, words):
    with pytest.raises(VerdictError) as caught:
        read_verdict(JUDGE, text)
    assert words in str(caught.value)


def test_the_request_shows_question_options_and_response_but_no_gold():
    text = judge_request(PROXY, "Which?", ("red", "blue"), "Blue is it.\nThe answer is (B).")
    assert text.startswith("Task: complexity and quality\n")
    assert text.endswith("Question: Which? (A) red (B) blue\nResponse: Blue is it.\nThe answer is (B).")
    assert "from 1 (worst) to 6 (best)" in text and '{"explanation": "...", "complexity": n, "quality": n}' in text


# --- judging rows -----------------------------------------------------------------------------------------------------


def make_traces():
    made = []
    for a, b in ((3, 4), (10, 5), (7, 7), (6, 9)):
        fields = {"task": "toy", "split": "train", "question": question(a, b), "gold_answer": str(a + b), "answer_type": "number"}
        made.append(make_trace(target=f"{a}+{b}={a + b}.\nThe answer is {a + b}.", **fields))
    return made


def run(monkeypatch, tmp_path, traces, *judges, name="score", signals=SIGNALS, **settings):
    install(monkeypatch, *judges)
    specs = tuple({"kind": judge.name} for judge in judges)
    cfg = tiny_config(score__signals=signals, score__judge__judges=specs, **{f"score__judge__{key}": v for key, v in settings.items()})
    out = ArtifactWriter(tmp_path / name)
    columns, dropped, facts = judge_rows(cfg, signals, traces, out, Context(tmp_path, console=Console(file=io.StringIO())))
    lines = [json.loads(line) for line in (tmp_path / name / "judgements.jsonl").read_text().splitlines()]
    return columns, dropped, facts["judged"], lines


def judge_of(replies, name="fake"):
    """A judge that gives, for the sum in a question, its list of replies one after the other (sample by sample)."""

    def reply(kind, text, index):
        assert kind in ("judge", "complexity and quality")
        numbers = tuple(int(word) for word in text.rpartition("Question: ")[2].split() if word.isdigit())[:2]
        given = replies.get(numbers, replies.get("else"))
        return given[index] if isinstance(given, list) else given

    return FakeTeacher(name, reply)


def test_malformed_replies_are_asked_for_again_then_counted_and_dropped(monkeypatch, tmp_path):
    traces = make_traces()
    cut = Response("{", finish_reason="length")
    down = Response("", finish_reason="error", error="no route")
    judge = judge_of(
        {
            (3, 4): ["Nine!", verdict(clarity=12), verdict(clarity=9)],
            (10, 5): [cut, "no", "8/10"],
            (7, 7): [down, "no", down],
            "else": verdict(),
        }
    )
    columns, dropped, facts, lines = run(monkeypatch, tmp_path, traces, judge, retries=2)
    by_question = {t.question: t.id for t in traces}
    third, last = by_question[question(3, 4)], by_question[question(6, 9)]
    assert columns == {
        "judge": {third: 9.0, last: pytest.approx(25 / 3)},
        "judge_clarity": {third: 9.0, last: 7.0},
        "judge_correctness": {third: 10.0, last: 10.0},
    }
    assert {d.id: d.reason for d in dropped} == {
        by_question[question(10, 5)]: "judge_malformed",
        by_question[question(7, 7)]: "judge_error",
    }
    detail = next(d.detail for d in dropped if d.reason == "judge_malformed")
    assert "fake, 3 times" in detail and "'8/10'" in detail
    about = facts["judge"]["judges"]["fake"]
    assert about["no_verdict_replies"] == {"judge_error": 2, "judge_malformed": 5, "judge_truncated": 1}
    assert about["rows_without_verdict"] == {"judge_error": 1, "judge_malformed": 1}
    assert (about["rows"], about["verdicts"], about["calls"]) == (4, 2, 4 + 3 + 3)
    assert facts["judge"]["agreement"] == []
    assert {line["id"]: line["attempts"] for line in lines} == {third: 3, last: 1, **{d.id: 3 for d in dropped}}

    # all that came back is found again; errors are asked for again
    again = judge_of({})
    columns_2, _, facts_2, _ = run(monkeypatch, tmp_path, [t for t in traces if t.question != question(7, 7)], again, name="again")
    assert not again.asked and columns_2 == columns and facts_2["judge"]["judges"]["fake"]["cache_hits"] == 3 + 2 + 2


def test_without_retries_one_bad_reply_is_final(monkeypatch, tmp_path):
    columns, dropped, _, _ = run(monkeypatch, tmp_path, make_traces(), judge_of({(3, 4): ["no"], "else": verdict()}), retries=0)
    assert len(columns["judge"]) == 3 and [d.reason for d in dropped] == ["judge_malformed"]


def test_two_judges_count_alike_and_their_agreement_is_reported(monkeypatch, tmp_path):
    traces = make_traces()
    strict = judge_of({(3, 4): verdict(clarity=2), (10, 5): "no", "else": verdict(clarity=6)}, "strict")
    mild = judge_of({"else": verdict(clarity=9)}, "mild")
    columns, dropped, facts, lines = run(monkeypatch, tmp_path, traces, strict, mild, retries=1)
    by_question = {t.question: t.id for t in traces}
    assert columns["judge_clarity"][by_question[question(3, 4)]] == (2 + 9) / 2
    assert columns["judge"][by_question[question(3, 4)]] == pytest.approx((8 + 10 + 2 + 8 + 10 + 9) / 6)
    assert [d.id for d in dropped] == [by_question[question(10, 5)]] and by_question[question(10, 5)] not in columns["judge"]
    [pair] = facts["judge"]["agreement"]
    assert pair["judges"] == ["strict", "mild"] and pair["rows"] == 3
    assert pair["criteria"]["clarity"]["kappa"] == 0.0 and pair["criteria"]["coherence"]["kappa"] is None
    assert pair["criteria"]["coherence"]["equal"] == 1.0
    assert set(pair["kept_at"]) == {"6", "7", "8", "9"} and pair["kept_at"]["7"] == 0.0
    assert len(lines) == 8


def test_parts_take_the_value_of_their_forward_part(monkeypatch, tmp_path):
    head, other = make_traces()[:2]
    part = make_trace(task="toy", split="train", question="back", target="b", part="backward_question", group_id=head.group_id)
    alone = make_trace(task="toy", split="train", question="back again", target="b", part="backward_question", group_id="gone")
    judge = judge_of({"else": verdict()})
    columns, dropped, _, _ = run(monkeypatch, tmp_path, [part, head, other, alone], judge, signals=("judge_coherence",))
    assert columns == {"judge_coherence": {head.id: 8.0, part.id: 8.0, other.id: 8.0}}
    assert [(d.id, d.reason) for d in dropped] == [(alone.id, "no_forward_part")] and len(judge.asked) == 2


def test_the_proxy_is_a_rubric_of_its_own(monkeypatch, tmp_path):
    both = json.dumps({"explanation": "", "complexity": 3, "quality": 5})
    names = ("judge", "proxy_complexity", "proxy_quality")
    judge = FakeTeacher("fake", lambda kind, text, index: both if kind == "complexity and quality" else verdict())
    columns, _, facts, lines = run(monkeypatch, tmp_path, make_traces()[:1], judge, signals=names)
    assert {name: list(column.values()) for name, column in columns.items()} == {
        "judge": [pytest.approx(25 / 3)],
        "proxy_complexity": [3.0],
        "proxy_quality": [5.0],
    }
    assert set(facts) == {"judge", "complexity and quality"} and len(lines) == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"judges": ()}, ["score.judge.judges: empty", "at least one teacher"]),
        ({"judges": ({"kind": "replay"},)}, ["score.judge.judges[0]", "replay", "cannot answer requests"]),
        ({"judges": ({"kind": "scripted", "style": "kind"},)}, ["score.judge.judges[0]", "'kind'", "verbose"]),
        ({"judges": ({"kind": "scripted", "style": "noisy"},) * 2}, ["score.judge.judges[1]", "'scripted-noisy'", "differ"]),
        ({"retries": -1}, ["score.judge.retries: -1", "at least 0"]),
        ({"max_tokens": 0}, ["score.judge.max_tokens: 0", "at least 1"]),
        ({"temperature": -0.5}, ["score.judge.temperature: -0.5", "at least 0"]),
    ],
)
def test_settings_are_checked_before_any_work(changes, words):
    settings = {"judges": ({"kind": "scripted", "style": "noisy"},)} | changes
    cfg = {f"score__judge__{key}": value for key, value in settings.items()}
    with pytest.raises(ConfigError) as caught:
        check(tiny_config(score__signals=("judge",), select__steps=(), **cfg))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if "judges" in changes:
        check(tiny_config(score__signals=("nll",), select__steps=(), **cfg))  # nobody reads them
