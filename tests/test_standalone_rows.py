"""Files of traces without a task: what every format becomes, ids, what is dropped, and the way back to the file's rows."""

from __future__ import annotations

import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from standalone_cases import PAIRS, ROW, rows_of, write_lines

from dccot_jax.config import ConfigError, default_config
from dccot_jax.context import Context
from dccot_jax.data.tokenize import training_prompt
from dccot_jax.formats import FormatError, export_traces
from dccot_jax.records import make_trace
from dccot_jax.standalone.recipe import Recipe, read_recipe
from dccot_jax.standalone.request import make_request
from dccot_jax.standalone.rows import judged, read_traces, write_dropped, write_kept


@pytest.fixture
def ctx(tmp_path):
    return Context(tmp_path, console=Console(quiet=True))


def test_every_format_becomes_the_same_traces(tmp_path):
    found = {kind: read_traces(write_lines(tmp_path / f"{kind}.jsonl", rows_of(kind))) for kind in ROW}
    for kind, file in found.items():
        assert file.format == kind and not file.dropped
        assert [(training_prompt(t), t.target) for t in file.traces] == PAIRS, kind
        assert [t.id for t in file.traces] == [t.id for t in found["messages"].traces], kind
        assert [file.places[t.id] for t in file.traces] == [f"{kind}.jsonl:{n}" for n in range(1, len(PAIRS) + 1)]


def test_ids_hang_on_the_content_alone(tmp_path):
    rows = rows_of("messages", gold=lambda n: str(n))
    first = read_traces(write_lines(tmp_path / "a.jsonl", rows))
    path = tmp_path / "b.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows[::-1]).encode()))
    second = read_traces(path, gold_field="gold", answer_type="number")
    assert {t.id: t.group_id for t in first.traces} == {t.id: t.group_id for t in second.traces}
    assert {t.answer_type for t in second.traces} == {"number"} and not first.typed and second.typed


def test_a_registered_task_says_how_answers_look_and_not_how_the_row_asks(tmp_path):
    file = read_traces(write_lines(tmp_path / "a.jsonl", rows_of("eit", 2, task="svamp", gold_answer="7")))
    assert [t.task for t in file.traces] == ["svamp"] * 2 and file.typed and file.traces[0].answer_type == "number"
    assert training_prompt(file.traces[0]) == PAIRS[0][0]  # no suffix that the file does not have
    other = read_traces(write_lines(tmp_path / "b.jsonl", rows_of("eit", 2, task="mine", grade="easy")))
    assert other.traces[0].task == "rows:string" and json.loads(other.traces[0].meta) == {"grade": "easy", "task": "mine"}


def test_own_traces_keep_ids_groups_and_the_prompt_of_their_task(tmp_path):
    traces = [
        make_trace(task="svamp", split="train-abc", question="Q?", target="The answer is 3.", gold_answer="3", answer_type="number"),
        make_trace(task="elsewhere", split="train", question="R?", target="x", choices=("one", "two"), group_id="G"),
    ]
    export_traces(traces, tmp_path / "t.parquet", "trace")
    file = read_traces(tmp_path / "t.parquet")
    assert [(t.id, t.group_id) for t in file.traces] == [(t.id, t.group_id) for t in traces]
    assert training_prompt(file.traces[0]).startswith("Q?\nReason step by step") and file.typed
    assert training_prompt(file.traces[1]) == "R? (A) one (B) two"


def test_rows_that_are_no_trace_have_a_reason_and_a_place(tmp_path):
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}
    rows = rows_of("messages", 3)
    file = read_traces(write_lines(tmp_path / "t.jsonl", [rows[0], "", turns, rows[1], rows[0], {"messages": []}]))
    assert [(d.id, d.reason) for d in file.dropped] == [
        ("t.jsonl:3", "several_turns"),
        ("t.jsonl:6", "missing_field"),
        ("t.jsonl:5", "duplicate"),
    ]
    assert "stands at t.jsonl:1" in file.dropped[2].detail
    write_dropped(file, file.dropped, tmp_path / "d.parquet")
    assert pq.read_table(tmp_path / "d.parquet")["source"].to_pylist() == ["t.jsonl:3", "t.jsonl:5", "t.jsonl:6"]


@pytest.mark.parametrize("kind", ROW)
def test_text_that_is_no_unicode_costs_its_row_alone(tmp_path, kind):
    good = rows_of(kind, 3)
    bad = [rows_of(kind, 1, note="a \ud800 b")[0], json.loads(json.dumps(good[0]).replace("answer is", "answer \\udfff"))]
    bad += [rows_of(kind, 1, **{"\udc00": 1})[0], rows_of(kind, 1, deep=[{"x": ["\U0001f600", "\ude00"]}])[0]]
    file = read_traces(write_lines(tmp_path / "t.jsonl", [bad[0], good[0], *bad[1:], *good[1:]]))
    assert [file.places[t.id] for t in file.traces] == ["t.jsonl:2", "t.jsonl:6", "t.jsonl:7"]
    assert [(d.id, d.reason) for d in file.dropped] == [(f"t.jsonl:{n}", "not_unicode") for n in (1, 3, 4, 5)]
    assert file.dropped[0].detail == r"note: lone surrogate \ud800 at character 3"
    assert file.dropped[-1].detail == r"deep.x: lone surrogate \ude00 at character 1"
    write_dropped(file, file.dropped, tmp_path / "d.parquet")
    assert write_kept(file, [t.id for t in file.traces], tmp_path / "kept.jsonl") == 3


def test_a_whole_pair_is_text(tmp_path):
    file = read_traces(write_lines(tmp_path / "t.jsonl", [r'{"prompt": "\ud83d\ude00?", "completion": "a"}']))
    assert file.traces[0].question == "\U0001f600?" and not file.dropped


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": '], r"t.jsonl:2: not a valid JSON line"),
        ([{"text": "a"}], r"unknown format \(fields of the first row: text\); give one of"),
        ([{"prompt": "a", "completion": ""}], r"no usable row \(t.jsonl:1: missing_field completion\)"),
        ([], "no usable row .the file is empty"),
        ([{"question": "a", "target": "b", "teacher": "t", "method": "m", "n_steps": "many"}], r"t.jsonl:1: not a trace row \("),
        ([{"question": "a", "target": "b", "teacher": "t", "method": "m", "answer_type": "sum"}], r"t.jsonl:1: answer_type 'sum' is not"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(FormatError, match=message):
        read_traces(write_lines(tmp_path / "t.jsonl", rows))


def test_kept_rows_are_written_as_they_stood(tmp_path):
    rows = rows_of("messages", 4, note=lambda n: {"é": [n, None]})
    file = read_traces(write_lines(tmp_path / "t.jsonl", rows))
    kept = {file.traces[3].id, file.traces[1].id}
    assert write_kept(file, kept, tmp_path / "k.jsonl") == 2
    assert [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()] == [rows[1], rows[3]]
    assert write_kept(file, kept, tmp_path / "k.parquet") == 2
    assert pq.read_table(tmp_path / "k.parquet")["messages"].to_pylist() == [rows[1]["messages"], rows[3]["messages"]]
    with pytest.raises(FormatError, match="cannot tell what to write"):
        write_kept(file, kept, tmp_path / "k.csv")


def test_parquet_keeps_its_types(tmp_path):
    table = pa.Table.from_pylist(rows_of("prompt_completion", 3))
    table = table.append_column("n", pa.array([1, 2, 3], pa.int8())).append_column("at", pa.array([datetime.date(2020, 1, 1)] * 3))
    pq.write_table(table.append_column("x", pa.array([float("nan")] * 3)), tmp_path / "t.parquet")
    file = read_traces(tmp_path / "t.parquet")
    write_kept(file, {file.traces[2].id}, tmp_path / "k.parquet")
    kept = pq.read_table(tmp_path / "k.parquet")
    assert (
        kept.schema.field("n").type == pa.int8() and kept["n"].to_pylist() == [3] and kept["at"].to_pylist() == [datetime.date(2020, 1, 1)]
    )
    with pytest.raises(FormatError, match=r"a column of t.parquet cannot be written as JSON .*; write .parquet"):
        write_kept(file, {file.traces[2].id}, tmp_path / "k.jsonl")


def test_a_dccot_row_keeps_only_its_kept_traces(tmp_path):
    row = {"question": "Q?", "forward_reasoning": "F", "answer_aug": [{"reasoning": "A"}, {"reasoning": "B"}]}
    group = {"question": "R?", "forward_reasoning": "F", "backward_question": "S?", "backward_reasoning": "G"}
    file = read_traces(write_lines(tmp_path / "t.jsonl", [row, group]))
    by_target = {t.target: t for t in file.traces}
    assert len({t.group_id for t in file.traces}) == 4 and by_target["S?"].group_id == by_target["G"].group_id
    assert by_target["S?"].prompt.startswith("Write the inverse question.")
    write_kept(file, {by_target["B"].id}, tmp_path / "k.jsonl")
    again = read_traces(tmp_path / "k.jsonl")
    assert [t.target for t in again.traces] == ["B"]


def test_verdicts_by_gold_answers(tmp_path, ctx):
    rows = rows_of("question_answer", 3, gold_answer=lambda n: [str(n + n * 7 % 10), "99", None][n])
    path = write_lines(tmp_path / "t.jsonl", rows)
    file = judged(read_traces(path, answer_type="number"), 5.0, ctx)
    assert [(t.verdict, t.verdict_reason) for t in file.traces] == [(True, "correct"), (False, "wrong"), (None, "no gold answer")]
    assert {t.verdict for t in judged(read_traces(path), 5.0, ctx).traces} == {None}  # nobody said what the answers are


def test_a_config_file_says_how_its_rows_are_scored(tmp_path):
    path = tmp_path / "r.py"
    text = "from dccot_jax.config import default_config\ndef get_config():\n  c = default_config()\n  %s\n  return c\n"

    def asked(lines, verb="score", **given):
        path.write_text(text % "\n  ".join(["c.select.steps = ({'name': 'top', 'signal': 'nll', 'rows': 3},)", *lines]))
        out = {"score": "s.parquet", "stability": "s.json", "select": "k.jsonl"}[verb]
        overrides = given.pop("overrides", {})
        return make_request(verb, {"student": "S", "recipe": str(path), "out": out, **given}, [str(path)], overrides).config

    lines = ["c.score.student = 'warmup'", "c.score.warmup.steps = 7", "c.train.learning_rate = 1e-4", "c.score.batch_tiles = 9"]
    for verb in ("score", "stability"):
        config = asked([*lines, "c.score.signals = ('entropy',)", "c.tokens.max_length = 9"], verb)
        assert (config.score.student, config.score.warmup.steps, config.train.learning_rate) == ("warmup", 7, 1e-4)
        assert config.score.signals == ("entropy", "nll") and config.tokens.max_length == 256
    assert asked(lines).score.batch_tiles == 9 and asked(lines, batch_size="2").score.batch_tiles == 2
    assert asked(lines, signals="nll,ppl").score.signals == ("nll", "ppl")
    assert asked(lines, overrides={"score.student": "base"}).score.student == "base"
    assert asked(lines, "select").score == default_config().score
    assert asked(lines[2:3]).train.learning_rate == 1e-3  # nothing is trained
    validation = "c.score.gradients.validation = ({'task': %s, 'rows': 4},)"
    assert asked([validation % "c.traces.task"]).score.gradients.validation == ()  # there is no training task here
    assert asked([validation % "'svamp'"]).score.gradients.validation == ({"task": "svamp", "rows": 4},)
    with pytest.raises(ConfigError, match=r"score\.kind"):
        path.write_text("def get_config():\n  return {'select': {'steps': [{'name': 'none'}]}, 'score': {'kind': 1}}\n")
        make_request("score", {"student": "S", "recipe": str(path), "out": "s.parquet"}, [str(path)], {})


def test_recipes(tmp_path):
    top = {"name": "top", "signal": "nll", "rows": 3}
    assert read_recipe('["none", {"name": "top", "signal": "nll", "rows": 3}]') == Recipe([{"name": "none"}, top])
    assert read_recipe(json.dumps(top)) == Recipe([top])
    (tmp_path / "r.json").write_text(json.dumps([top]))
    assert read_recipe(str(tmp_path / "r.json")) == Recipe([top])
    text = "from dccot_jax.config import default_config\ndef get_config():\n  c = default_config()\n  c.select.steps = (%r,)\n  return c\n"
    (tmp_path / "r.py").write_text(text % top)
    assert read_recipe(str(tmp_path / "r.py")) == Recipe([top])
    (tmp_path / "bad.py").write_text("def get_config(:\n")
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "bad.json").write_text('[\n{"name": }]')
    for given, message in (
        ("tpo", "not JSON"),
        ('["tpo"]', r"'tpo' is not one of .*did you mean 'top'"),
        ('[{"name": "top", "signal": "nll"}]', "needs exactly one of rows, tokens, share"),
        ("3", "3 is not a step"),
        (str(tmp_path / "absent.py"), "absent.py: no such file"),
        (str(tmp_path / "bad.py"), r"bad.py:1: "),
        (str(tmp_path / "none.py"), r"get_config\(\) cannot be called \(AttributeError"),
        (str(tmp_path / "bad.json"), r"bad.json:2: not JSON"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_recipe(given)
