"""Formats: what each reader makes of a row, what it refuses, and that every export reads back."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dccot_jax import formats
from dccot_jax.formats import FormatError, dataset_info, export_traces, import_records
from dccot_jax.formats_rows import join_reasoning, split_options, split_reasoning
from dccot_jax.records import make_trace


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("prompt_completion", {"prompt": "What is 2+3?", "completion": " 2+3=5. The answer is 5."}),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "user", "content": "What is 2+3?"}],
                "completion": [{"role": "assistant", "content": "2+3=5. The answer is 5."}],
            },
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "2+3=5. The answer is 5."}]},
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "What is 2+3?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "2+3=5. The answer is 5."}]},
                ]
            },
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "What is 2+3?"}, {"from": "gpt", "value": "2+3=5. The answer is 5."}]}),
        ("alpaca", {"instruction": "What is 2+3?", "input": "", "output": "2+3=5. The answer is 5."}),
        ("eit", {"instruction": "What is 2+3?", "output": " 2+3=5. The answer is 5."}),
        ("question_answer", {"question": "What is 2+3?", "answer": " 2+3=5. The answer is 5."}),
        ("dccot", {"question": "What is 2+3?", "gold_answer": 5.0, "forward_reasoning": "2+3=5. The answer is 5.", "forward_pred": "5"}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_auto_detection(tmp_path, kind, row, suffix):
    path = tmp_path / f"rows{suffix}"
    text = json.dumps([row], indent=1) if suffix == ".json" else json.dumps(row) + "\n"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    found = import_records(path)
    assert found.format == kind and not found.dropped
    (record,) = found.records
    assert (record["question"], record["target"]) == ("What is 2+3?", "2+3=5. The answer is 5.")
    assert record["source"] == f"rows{suffix}:1"
    assert import_records(path, kind).records == found.records


def test_corrupt_line_is_named_or_counted(tmp_path):
    good = {"prompt": "q", "completion": "a"}
    path = lines(tmp_path / "t.jsonl", good, '{"prompt": "q2", "compl', good)
    with pytest.raises(FormatError, match=r"t\.jsonl:2: not a valid JSON line \(Unterminated string.*column"):
        import_records(path)
    found = import_records(path, skip_corrupt=True)
    assert len(found.records) == 2 and [(row.id, row.reason) for row in found.dropped] == [("t.jsonl:2", "corrupt_line")]
    assert [record["source"] for record in found.records] == ["t.jsonl:1", "t.jsonl:3"]


@pytest.mark.parametrize("bad", ['{"prompt": "q2", "compl', "[1]", '{"prompt": NaN, "completion": "x"}', "\x00"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_any_corrupt_line_anywhere(tmp_path, bad, at):
    rows = [{"prompt": "q", "completion": "a"}] * 2
    rows.insert(at, bad)
    path = lines(tmp_path / "t.jsonl", *rows)
    with pytest.raises(FormatError, match=rf"t\.jsonl:{at + 1}: "):
        import_records(path)
    found = import_records(path, skip_corrupt=True)
    assert len(found.records) == 2 and found.dropped[0].id == f"t.jsonl:{at + 1}"


def test_bad_utf8_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"prompt": "q", "completion": "a"}\n{"prompt": "\xff", "completion": "a"}\n')
    with pytest.raises(FormatError, match=r"t\.jsonl:2: .*utf-8"):
        import_records(path)
    assert len(import_records(path, skip_corrupt=True).records) == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"prompt": "q"},\n {"prompt": ]', r"a\.json:2: not valid JSON"),
        ("a.json", b"[1, 2]", "row 1 is a int"),
        ("a.json.gz", gzip.compress(b"[]" * 500, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"PAR1 nothing", "parquet"),
        ("fake.parquet", b"hello\n", r"fake\.parquet: not a parquet file"),
        ("a.jsonl", b'{"text": "x"}\n', "unknown format .fields of the first row: text."),
    ],
)
def test_unreadable_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=message):
        import_records(tmp_path / name)


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        import_records(tmp_path / "none.jsonl")
    with pytest.raises(FormatError, match="not one of auto, trace"):
        import_records(tmp_path / "none.jsonl", "csv")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, "missing_field"),
        ({"prompt": "", "completion": "a"}, "missing_field"),
        ({"prompt": "q", "completion": "  "}, "missing_field"),
        ({"messages": [{"role": "user", "content": "q"}]}, "missing_field"),
        ({"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]}, "several_turns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
        ({"messages": "q"}, "not_messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not_text"),
        ({"instruction": 5, "output": "x"}, "not_text"),
        ({"instruction": "q", "output": "x", "history": [["a", "b"]]}, "several_turns"),
        ({"question": "q", "answer_aug": [], "gold_answer": "1"}, "missing_field"),
    ],
)
def test_unusable_rows_are_counted(tmp_path, row, reason):
    kind = formats.detect(row) or "prompt_completion"
    found = import_records(lines(tmp_path / "t.jsonl", row), kind)
    assert not found.records
    assert [(dropped.id, dropped.reason) for dropped in found.dropped] == [("t.jsonl:1", reason)]


def test_single_object_files(tmp_path):
    row = {"instruction": "q", "output": "a"}
    for text in (json.dumps({"examples": [row, row]}), json.dumps({"examples": [row, row]}, indent=2)):
        (tmp_path / "o.json").write_text(text)
        assert len(import_records(tmp_path / "o.json").records) == 2
    (tmp_path / "o.json").write_text("")
    assert import_records(tmp_path / "o.json").records == []


def test_reasoning_channel_and_tags(tmp_path):
    user = {"role": "user", "content": "q"}
    rows = [
        {"messages": [user, {"role": "assistant", "content": "The answer is 5.", "reasoning_content": "2+3=5"}]},
        {"messages": [user, {"role": "assistant", "content": "<think>\n2+3=5\n</think>\n\nThe answer is 5."}]},
        {"messages": [user, {"role": "assistant", "content": "2+3=5</think>The answer is 5."}]},
        {"messages": [user, {"role": "assistant", "content": "<|begin_of_thought|>2+3=5<|end_of_thought|>The answer is 5."}]},
    ]
    for record in import_records(lines(tmp_path / "t.jsonl", *rows)).records:
        assert record["reasoning"] == "2+3=5"
        assert record["target"] == "<think>\n2+3=5\n</think>\n\nThe answer is 5."


def test_split_reasoning_inverts_join():
    assert split_reasoning(join_reasoning("a\nb", "c")) == ("a\nb", "c")
    assert split_reasoning("no tags at all") == ("", "no tags at all")
    assert split_reasoning("<think>never closed") == ("never closed", "")


def test_system_and_gold_are_kept(tmp_path):
    row = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "label": 7.0,
        "origin": "x",
    }
    (record,) = import_records(lines(tmp_path / "t.jsonl", row)).records
    assert record["question"] == "q" and record["prompt"] == "Be brief.\n\nq" and record["gold_answer"] == "7"
    assert json.loads(record["meta"]) == {"row": {"origin": "x"}}


def test_options_are_taken_apart():
    assert split_options("Q: The sun Answer choices: A: a dog, B: it, is B, C: c") == ("The sun", ("a dog", "it, is B", "c"))
    assert split_options("Pick one (A) red (B) blue (C) green") == ("Pick one", ("red", "blue", "green"))
    assert split_options("What is (A) alone?") == ("What is (A) alone?", ())
    assert split_options("plain") == ("plain", ())


def test_dccot_record_becomes_its_parts(tmp_path):
    row = {
        "question": "Ann has 3 apples and buys 2. How many?",
        "gold_answer": 5.0,
        "forward_reasoning": "3+2=5. The answer is 5.",
        "forward_pred": "5",
        "backward_question": "Ann has 3 apples and then 5. How many did she buy?",
        "backward_reasoning": "5-3=2. The answer is 2.",
        "backward_pred": "2",
        "is_consistent": "true",
        "answer_augmentations": [{"reasoning": "2+3=5. The answer is 5.", "extracted_prediction": "5"}],
        "_original_index": 4,
    }
    found = import_records(lines(tmp_path / "t.jsonl", row))
    assert found.format == "dccot"
    forward, question, backward, path = found.records
    assert [record.get("part", "forward") for record in found.records] == ["forward", "backward_question", "backward_reasoning", "forward"]
    assert forward["group"] == question["group"] == backward["group"] and "group" not in path
    assert question["target"] == row["backward_question"] and backward["question"] == row["backward_question"]
    assert backward["gold_answer"] == "2" and forward["gold_answer"] == "5" and path["method"] == "answer"
    assert all(record["join_question"] == row["question"] for record in found.records)
    assert all(record["consistent"] is True for record in found.records[:3])
    gemini = dict(row, answer_aug=[{"reasoning": "r", "answer_raw": "5", "pred": "5"}])
    del gemini["answer_augmentations"]
    assert len(import_records(lines(tmp_path / "g.jsonl", gemini)).records) == 4


# --- export -----------------------------------------------------------------------------------------------------------

TRACES = [
    make_trace(
        task="t",
        split="train",
        question="What is 2+3?",
        gold_answer="5",
        answer_type="number",
        teacher="x",
        target="2+3=5.\nThe answer is 5.",
        answer="5",
    ),
    make_trace(
        task="t",
        split="train",
        question="Which is red — the “sky”?",
        choices=("blood", "sky"),
        gold_answer="A",
        answer_type="choice",
        teacher="x",
        reasoning="Blood is.",
        target="<think>\nBlood is.\n</think>\n\nThe answer is (A).",
        answer="A",
    ),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("kind", formats.FORMATS)
def test_export_reads_back(tmp_path, kind, suffix):
    path = tmp_path / f"out{suffix}"
    assert export_traces(TRACES, path, kind) == 2
    found = import_records(path)
    assert found.format == kind and not found.dropped
    for record, trace in zip(found.records, TRACES, strict=True):
        for name in ("question", "target", "choices", "gold_answer"):
            assert record[name] == getattr(trace, name), name
    again = tmp_path / f"again{suffix}"
    export_traces(TRACES, again, kind)
    assert again.read_bytes() == path.read_bytes()


def test_trace_export_is_lossless(tmp_path):
    export_traces(TRACES, tmp_path / "t.jsonl", "trace")
    records = import_records(tmp_path / "t.jsonl").records
    assert [make_trace(**{**record, "source": ""}) for record in records] == TRACES


def test_prompt_of_decides_the_user_message(tmp_path):
    export_traces(TRACES, tmp_path / "t.jsonl", "messages", prompt_of=lambda trace: trace.question + " Think.")
    first = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert first["messages"][0] == {"role": "user", "content": "What is 2+3? Think."}
    (record, _) = import_records(tmp_path / "t.jsonl").records
    assert record["question"] == "What is 2+3?" and record["prompt"] == "What is 2+3? Think."


def test_reverse_group_survives_dccot(tmp_path):
    base = {"task": "t", "split": "train", "method": "reverse", "group_id": "g", "answer_type": "number", "gold_answer": "5"}
    group = [
        make_trace(**base, question="q", target="r_f 5", answer="5"),
        make_trace(**base, question="q", target="q_b", part="backward_question"),
        make_trace(**{**base, "gold_answer": "2"}, question="q_b", target="r_b 2", answer="2", part="backward_reasoning"),
    ]
    path = make_trace(
        task="t", split="train", question="q", target="other 5", answer="5", method="answer", gold_answer="5", parent_ids=(group[0].id,)
    )
    export_traces([*group[::-1], path], tmp_path / "t.json", "dccot")
    (row,) = json.loads((tmp_path / "t.json").read_text())
    assert (row["forward_reasoning"], row["backward_question"], row["backward_reasoning"], row["is_consistent"]) == (
        "r_f 5",
        "q_b",
        "r_b 2",
        "true",
    )
    found = import_records(tmp_path / "t.json").records
    assert [record["target"] for record in found] == ["r_f 5", "q_b", "r_b 2", "other 5"]


def test_export_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(FormatError, match="not one of"):
        export_traces(TRACES, tmp_path / "t.jsonl", "csv")
    with pytest.raises(FormatError, match="cannot tell what to write"):
        export_traces(TRACES, tmp_path / "t.csv", "messages")
    assert not list(tmp_path.iterdir())


def test_llamafactory_stanza_names_columns_that_are_written(tmp_path):
    for kind in ("alpaca", "eit", "prompt_completion", "sharegpt", "messages"):
        export_traces(TRACES, tmp_path / "t.jsonl", kind)
        row = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
        (stanza,) = dataset_info("mine", "t.jsonl", kind).values()
        assert set(stanza["columns"].values()) <= set(row)
    with pytest.raises(FormatError, match="does not read"):
        dataset_info("mine", "t.jsonl", "dccot")


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "conversational"), [("messages", True), ("prompt_completion", False)])
def test_trl_reads_what_we_write(tmp_path, kind, conversational):
    """`datasets` reads an exported file and TRL takes its rows for the type they are."""
    data_utils = pytest.importorskip("trl.data_utils")
    datasets = pytest.importorskip("datasets")
    export_traces(TRACES, tmp_path / "t.jsonl", kind)
    rows = datasets.Dataset.from_json(str(tmp_path / "t.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == len(TRACES)
    assert data_utils.is_conversational(rows[0]) is conversational
    text = rows[1]["messages"][-1]["content"] if conversational else rows[1]["completion"]
    assert text == TRACES[1].target


def test_an_answer_beside_another_reply_is_not_taken_for_one(tmp_path):
    row = {"question": "What is 2+3?", "rationale": "2+3=5", "answer": "5"}
    with pytest.raises(FormatError, match=r"unknown format \(fields of the first row: answer, question, rationale\)"):
        import_records(lines(tmp_path / "t.jsonl", row))


def test_a_named_field_holds_the_gold_answers(tmp_path):
    row = {"prompt": "What is 2+3?", "completion": "5", "answer": "wrong", "Key": 5.0}
    path = lines(tmp_path / "t.jsonl", row, {**row, "Key": None})
    found = import_records(path, gold_field="Key")
    assert found.records[0]["gold_answer"] == "5" and import_records(path).records[0]["gold_answer"] == "wrong"
    assert found.records[1]["gold_answer"] is None
    with pytest.raises(FormatError, match="no row has the field 'key'; fields of the first row: prompt, completion, answer, Key"):
        import_records(path, gold_field="key")
