"""The stages `student` and `tokenize`: files, hashes, masks, drops."""

from __future__ import annotations

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plan_cases import config, fake

from dccot_jax.artifact import Artifact, ArtifactWriter
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data import student, template, tokenize, tokenizer
from dccot_jax.model import hf
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import weight_shapes
from dccot_jax.records import make_trace, traces_to_table
from dccot_jax.tasks.registry import build_prompt, get_task

TASK = "gsm8k"  # has a prompt suffix


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded student: (stage result, artifact)."""
    path = tmp_path_factory.mktemp("student")
    out = ArtifactWriter(path / "student")
    result = student.run(config(), {}, out, Context(path))
    return result, Artifact(out.path, {"logical_hash": result.logical_hash, "facts": result.facts})


@pytest.fixture(scope="module")
def tok(embedded):
    return tokenizer.load_tokenizer(embedded[1].file("tokenizer"))


def traces_of(n=20, **fields):
    base = {"task": TASK, "split": "train", "answer_type": "number", "method": "vanilla"}
    return [
        make_trace(
            **{
                **base,
                "question": f"What is {i} + 3?",
                "target": f"{i} + 3 = {i + 3}\nThe answer is {i + 3}.",
                "gold_answer": str(i + 3),
                **fields,
            }
        )
        for i in range(n)
    ]


# --- student ----------------------------------------------------------------------------------------------------------


def test_embedded_student(embedded, tok, tmp_path):
    result, artifact = embedded
    about = artifact.json("student")
    assert about["model"]["vocab_size"] == len(tok) == about["tokenizer"]["tokens"] <= tokenizer.VOCAB_SIZE
    assert about["weights"]["kind"] == "random"
    assert about["tokenizer"]["eos_id"] == tok.eos_token_id == about["model"]["eos_token_ids"][0] != about["tokenizer"]["pad_id"]
    assert result.facts["tokenizer_hash"] == tokenizer.tokenizer_hash(artifact.file("tokenizer"))
    again = ArtifactWriter(tmp_path / "again")
    assert student.run(config(), {}, again, Context(tmp_path)).logical_hash == result.logical_hash
    for name in ("student.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        assert again.file(name).read_bytes() == artifact.file(name).read_bytes()


def test_seed_changes_the_weights_and_not_the_tokenizer(embedded, tmp_path):
    result, artifact = embedded
    other = student.run(
        config(seed=1, student__tokenizer=str(artifact.file("tokenizer"))), {}, ArtifactWriter(tmp_path / "other"), Context(tmp_path)
    )
    assert other.logical_hash != result.logical_hash
    assert other.facts["tokenizer_hash"] == result.facts["tokenizer_hash"]


def hf_directory(path, embedded, vocab_size=512):
    """A Hugging Face directory with a config, the embedded tokenizer and a stand-in for weights."""
    tokenizer.copy_tokenizer(embedded[1].file("tokenizer"), path)
    fields = {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "eos_token_id": 1, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(fields))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_pretrained_student_is_known_by_its_files(embedded, tmp_path):
    def stage(name):
        out = ArtifactWriter(tmp_path / f"out-{name}")
        return student.run(config(student__path=str(tmp_path / name)), {}, out, Context(tmp_path)), out

    first, second = hf_directory(tmp_path / "a", embedded), hf_directory(tmp_path / "b", embedded)
    (one, out), (two, _) = stage("a"), stage("b")
    assert one.logical_hash == two.logical_hash  # the place does not matter
    about = json.loads(out.file("student.json").read_text())
    assert about["weights"]["path"] == str(first.resolve()) and about["model"]["hidden_size"] == 16
    (second / "model.safetensors").write_bytes(b"other weights")
    assert stage("b")[0].logical_hash != one.logical_hash


def test_a_pretrained_student_keeps_every_file_and_stop_token(embedded, tmp_path):
    path = hf_directory(tmp_path / "hf", embedded)
    extra = {"vocab.txt": "a", "chat_template.json": json.dumps({"chat_template": tokenizer.CHAT_TEMPLATE})}
    extra["generation_config.json"] = json.dumps({"eos_token_id": [1, 7]})
    for name, text in extra.items():
        (path / name).write_text(text)
    out = ArtifactWriter(tmp_path / "out")
    student.run(config(student__path=str(path)), {}, out, Context(tmp_path))
    record = json.loads(out.file("student.json").read_text())
    assert record["model"]["eos_token_ids"] == [1, 7]  # as generation_config.json lists them
    mc = ModelConfig.from_dict(record["model"])
    params = jax.tree.map(lambda shape: jnp.zeros(shape), weight_shapes(mc), is_leaf=lambda x: isinstance(x, tuple))
    hf.save_hf(params, mc, out.file("tokenizer"), tmp_path / "export")
    for name, text in extra.items():
        assert (tmp_path / "export" / name).read_text() == text
    assert hf.read_config(tmp_path / "export") == mc


def test_student_errors_name_the_field(embedded, tmp_path):
    def stage(**changes):
        student.run(config(**changes), {}, ArtifactWriter(tmp_path / "out"), Context(tmp_path))

    with pytest.raises(ConfigError, match=r"config\.student\.path: no config\.json"):
        stage(student__path=str(tmp_path))
    path = hf_directory(tmp_path / "hf", embedded, vocab_size=100)
    with pytest.raises(ConfigError, match="model's vocabulary only 100"):
        stage(student__path=str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        stage(student__path=str(path))
    path = hf_directory(tmp_path / "no-template", embedded)
    about = json.loads((path / "tokenizer_config.json").read_text())
    del about["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(template.TemplateError, match=f"the tokenizer at {path} has no chat template"):  # not the copy in the artifact
        stage(student__path=str(path))


# --- tokenize ---------------------------------------------------------------------------------------------------------


def test_stage(embedded, tok, tmp_path):
    traces = [*traces_of(), *traces_of(1, question="A long one?", target="word " * 400)]
    inputs = {"verify": fake(tmp_path, "verify", {"traces": traces_to_table(traces)}), "student": embedded[1]}
    out = ArtifactWriter(tmp_path / "tokenize")
    result = tokenize.run(config(tokens__max_length=128), inputs, out, Context(tmp_path))
    table = Artifact(out.path, {}).table("tokens")
    assert (result.rows_in, result.rows_out, result.dropped) == (21, 20, {"too_long": 1})
    assert result.facts["tokenizer_hash"] == embedded[0].facts["tokenizer_hash"]
    assert table.schema == tokenize.TOKENS_SCHEMA
    assert table["id"].to_pylist() == sorted(trace.id for trace in traces[:20])
    assert result.facts["completion_tokens"] == sum(table["completion_tokens"].to_pylist())
    by_id = {trace.id: trace for trace in traces}
    for row in table.to_pylist():
        ids, border, trace = row["input_ids"], row["prompt_tokens"], by_id[row["id"]]
        assert len(ids) == border + row["completion_tokens"]
        assert ids[:border] == template.render_prompt(tok, build_prompt(get_task(TASK), trace.question, trace.choices))
        assert tok.decode(ids[border:-1]) == trace.target and ids[-1] == tok.eos_token_id
    shuffled = {"verify": fake(tmp_path / "s", "verify", {"traces": traces_to_table(traces[::-1])}), "student": embedded[1]}
    assert (
        tokenize.run(config(tokens__max_length=128), shuffled, ArtifactWriter(tmp_path / "x"), Context(tmp_path)).logical_hash
        == result.logical_hash
    )
    assert (
        tokenize.run(config(), inputs, ArtifactWriter(tmp_path / "y"), Context(tmp_path, process_index=1, process_count=2)).logical_hash
        == ""
    )


def test_full_length_row_stays_and_one_token_more_goes(tok):
    traces = traces_of(1)
    [row], _ = tokenize.tokenize_traces(traces, tok, max_length=10**6)
    n = len(row.input_ids)
    kept, dropped = tokenize.tokenize_traces(traces, tok, max_length=n)
    assert [len(row.input_ids) for row in kept] == [n] and not dropped
    kept, dropped = tokenize.tokenize_traces(traces, tok, max_length=n - 1)
    assert not kept and dropped[0].reason == "too_long" and f"{n} tokens, at most {n - 1}" in dropped[0].detail


def test_a_group_leaves_as_a_whole(tok):
    parts = [
        make_trace(
            task=TASK,
            split="train",
            question="q",
            target=target,
            part=part,
            group_id="g",
            method="reverse",
            prompt="p",
            answer_type="number",
        )
        for part, target in (("forward", "1"), ("backward_question", "long " * 200), ("backward_reasoning", "2"))
    ]
    kept, dropped = tokenize.tokenize_traces([*parts, *traces_of(2)], tok, max_length=150)
    assert len(kept) == 2 and all(row.group_id != "g" for row in kept)
    assert collections.Counter(row.reason for row in dropped) == {"too_long": 1, "group_incomplete": 2}
    assert {row.id for row in dropped} == {trace.id for trace in parts}


def test_no_cot_trains_on_the_gold_answer_alone(tok):
    traces = [*traces_of(2), *traces_of(1, question="no gold", gold_answer=None), *traces_of(1, part="backward_question")]
    kept, dropped = tokenize.tokenize_traces(traces, tok, max_length=200, no_cot=True)
    assert [tok.decode(list(row.input_ids[row.prompt_tokens : -1])) for row in kept] == ["The answer is 3.", "The answer is 4."]
    assert {row.id: row.reason for row in dropped} == {traces[2].id: "missing_gold", traces[3].id: "no_cot_part"}


def test_prompts(tok):
    [trace] = traces_of(1)
    suffix = get_task(TASK).prompt_suffix
    assert suffix and tokenize.training_prompt(trace).endswith(suffix)
    assert not tokenize.training_prompt(trace, suffix=False).endswith(suffix)
    own = dataclasses.replace(trace, prompt="Invert this question.")
    assert tokenize.training_prompt(own) == tokenize.training_prompt(own, suffix=False) == "Invert this question."


def test_a_template_that_drops_reasoning_refuses_and_a_bad_row_is_counted(tok, embedded):
    own = tokenizer.load_tokenizer(embedded[1].file("tokenizer"))
    own.chat_template = str(own.chat_template).replace("message['content']", "message['content'].split('</think>')[-1]")
    thinking = traces_of(3, target="<think>\nhm\n</think>\nThe answer is 3.")
    with pytest.raises(template.TemplateError, match=rf"trace {thinking[0].id}: the chat template drops or rewrites"):
        tokenize.tokenize_traces(thinking, own, max_length=200)
    kept, dropped = tokenize.tokenize_traces([*traces_of(2), *traces_of(1, target="a <|end|> b")], tok, max_length=200)
    assert len(kept) == 2 and [row.reason for row in dropped] == ["end_of_turn_in_text"]


def test_batches_do_not_matter(tok, monkeypatch):
    traces = traces_of(30)
    whole, _ = tokenize.tokenize_traces(traces, tok, max_length=200)
    monkeypatch.setattr(tokenize, "_BATCH_ROWS", 7)
    assert tokenize.tokenize_traces(traces, tok, max_length=200)[0] == whole


def test_a_group_over_a_batch_border_still_leaves_as_a_whole(tok, monkeypatch):
    monkeypatch.setattr(tokenize, "_BATCH_ROWS", 2)
    first, *others = traces_of(4)
    traces = [dataclasses.replace(first, group_id="g"), *others[:2], dataclasses.replace(others[2], group_id="g", target="long " * 200)]
    kept, dropped = tokenize.tokenize_traces(traces, tok, max_length=150)
    assert [row.id for row in kept] == [trace.id for trace in others[:2]]
    assert {row.reason for row in dropped} == {"too_long", "group_incomplete"}


def test_empty_table():
    table = tokenize.tokens_table([])
    assert table.num_rows == 0 and table.schema == tokenize.TOKENS_SCHEMA


@pytest.mark.realdata
def test_smollm2_student_and_tokens(smollm2_dir, tmp_path):
    out = ArtifactWriter(tmp_path / "student")
    result = student.run(config(student__path=str(smollm2_dir)), {}, out, Context(tmp_path))
    about = json.loads(out.file("student.json").read_text())
    assert about["model"]["num_layers"] == 30 and about["weights"]["kind"] == "hf" and about["tokenizer"]["stop_ids"] == [2]
    inputs = {
        "verify": fake(tmp_path, "verify", {"traces": traces_to_table(traces_of(50))}),
        "student": Artifact(out.path, {"logical_hash": result.logical_hash}),
    }
    done = tokenize.run(config(tokens__max_length=512), inputs, ArtifactWriter(tmp_path / "tokens"), Context(tmp_path))
    assert done.rows_out == 50 and not done.dropped
    table = Artifact(tmp_path / "tokens", {}).table("tokens")  # type: ignore[arg-type]
    assert all(ids[-1] == 2 for ids in table["input_ids"].to_pylist())
    assert np.all(table["completion_tokens"].to_numpy() > 5)
