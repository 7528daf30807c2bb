"""Signals over pieces of rows and over a question's candidates, against float64 on unpadded sequences made by hand."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pytest
from etils import epath
from reference_decoder import log_softmax, reference_logits
from rich.console import Console
from test_score_engine import Fake, tokens_table
from toy_task import FakeTeacher, install

from dccot_jax import config as config_lib
from dccot_jax.artifact import Artifact, ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.data.template import render
from dccot_jax.data.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh, param_shardings, weight_shapes
from dccot_jax.records import make_trace, traces_to_table
from dccot_jax.select import engine, items
from dccot_jax.select.relative import grape
from dccot_jax.select.views import Row
from dccot_jax.train.checkpoint import Student

NAMES = ("answer_gain", "grape", "local_naturalness")
TEXTS = [
    ("Ann has 3 pens and gets 4.", "3 pens. Then 4 more.\n3+4=7. So 7.\nThe answer is 7.", "7"),
    ("Ann has 3 pens and gets 4.", "It is 3.5 times 2! That is 7.\nThe answer is 7.", "7"),
    ("Bob has 9 hats.", "He has 9 hats.\nHe keeps them.\nAll of them.\nEvery one.\nEach.\nOne more line.\nThe answer is 9.", "9"),
    ("Bob has 12 hats.", "One line only", "12"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer([text for row in TEXTS for text in row] * 3, vocab_size=300))
    return load_tokenizer(folder)


@pytest.fixture
def traces(monkeypatch):
    install(monkeypatch, FakeTeacher())
    made = []
    for question, target, gold in TEXTS:
        reasoning = target.rpartition("\n")[0] or target
        made.append(
            make_trace(
                task="toy", split="train", question=question, target=target, reasoning=reasoning, gold_answer=gold, answer_type="number"
            )
        )
    return made


def rows_of(tokenizer, traces):
    found = []
    for t in traces:
        row = render(tokenizer, t.question, t.target)
        found.append(Row(t.id, np.asarray(row.input_ids, np.int32), row.prompt_tokens))
    return found


# --- pieces ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces, ends",
    [
        (["One", ".", " Two", "!", " three"], [2, 4, 5]),
        (["a", "\n", "\n", "b"], [3, 4]),
        (["3", ".", "5", " is", " it"], [5]),
        (["end", ".\n", "next"], [2, 3]),
        (['said "', "no", '."', " Then", "\n"], [3, 5]),
        (["a.", " b.\nc", " d"], [1, 2, 3]),  # the break inside a token waits for its end
        (["Yes", "."], [2]),
        ([], []),
    ],
)
def test_steps_end_after_lines_and_sentences(pieces, ends):
    assert items.step_ends(pieces) == ends


def test_step_items_hold_the_prompt_a_window_and_one_step(tokenizer, traces, monkeypatch):
    monkeypatch.setattr(items, "WINDOW_STEPS", 2)
    rows = rows_of(tokenizer, traces)
    found = items.expand("local_naturalness", rows, {}, tokenizer, 10_000)
    by_id = {item.id: item for item in found.rows}
    steps = [
        "He has 9 hats.\n",
        "He keeps them.\n",
        "All of them.\n",
        "Every one.\n",
        "Each.\n",
        "One more line.\n",
        "The answer is 9.<|end|>",
    ]
    chosen = [by_id[i] for i in found.uses[rows[2].id]]
    prompt = rows[2].input_ids[: rows[2].prompt_tokens].tolist()
    assert [tokenizer.decode(item.input_ids[item.prompt_tokens :]) for item in chosen] == steps
    for k, item in enumerate(chosen):
        assert item.input_ids[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(item.input_ids[len(prompt) : item.prompt_tokens]) == "".join(steps[max(0, k - 2) : k])
    [only] = found.uses[rows[3].id]
    np.testing.assert_array_equal(by_id[only].input_ids, rows[3].input_ids)
    spoken = [tokenizer.decode(by_id[i].input_ids[by_id[i].prompt_tokens :]) for i in found.uses[rows[1].id]]
    assert spoken == ["It is 3.5 times 2!", " That is 7.\n", "The answer is 7.<|end|>"]


def test_answer_items_give_the_stem_and_score_the_answer_alone(tokenizer, traces):
    rows = rows_of(tokenizer, traces)
    found = items.expand("answer_gain", rows, {t.id: t for t in traces}, tokenizer, 10_000)
    by_id = {item.id: item for item in found.rows}
    given, alone = (by_id[i] for i in found.uses[rows[0].id])
    for item in (given, alone):
        assert tokenizer.decode(item.input_ids[item.prompt_tokens :]) == " 7."
    prompt = tokenizer.decode(rows[0].input_ids[: rows[0].prompt_tokens])
    assert tokenizer.decode(given.input_ids) == f"{prompt}{traces[0].reasoning}\nThe answer is 7."
    assert tokenizer.decode(alone.input_ids) == f"{prompt}The answer is 7."
    assert found.uses[rows[1].id][1] == found.uses[rows[0].id][1]  # one question, one answer: scored once
    assert not found.dropped


def test_rows_without_an_answer_gain_say_why(tokenizer, traces):
    base = dataclasses.replace(traces[0], group_id="G")
    others = [
        dataclasses.replace(traces[1], gold_answer=None),
        dataclasses.replace(traces[2], reasoning=" "),
        dataclasses.replace(traces[3], group_id="H", part="backward_question"),
    ]
    part = make_trace(task="toy", split="train", question="back", target="b", part="backward_reasoning", group_id="G")
    chosen = [base, *others, part]
    found = items.expand("answer_gain", rows_of(tokenizer, chosen), {t.id: t for t in chosen}, tokenizer, 10_000)
    assert {d.id: d.reason for d in found.dropped} == dict(zip((t.id for t in others), ("missing_gold", "no_reasoning", "no_forward_part")))
    assert found.uses[part.id] == found.uses[base.id]
    short = items.expand("answer_gain", rows_of(tokenizer, [base]), {base.id: base}, tokenizer, 20)
    assert [d.reason for d in short.dropped] == ["exceeds_positions"]


def test_grape_is_relative_to_the_best_of_its_question(traces):
    values = {traces[0].id: 2.0, traces[1].id: 0.5, traces[2].id: 9.0}
    assert grape(traces, values) == {traces[0].id: -1.5, traces[1].id: 0.0, traces[2].id: 0.0}


# --- through the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(monkeypatch, tmp_path, tokenizer):
    mc = ModelConfig("llama", len(tokenizer), 16, 32, 1, 2, 1, 8, tie_embeddings=True, max_positions=400)
    rng = np.random.default_rng(0)
    host = jax.tree.map(
        lambda shape: (0.4 * rng.normal(size=shape)).astype(np.float32), weight_shapes(mc), is_leaf=lambda x: isinstance(x, tuple)
    )
    monkeypatch.setattr(engine, "make_mesh", lambda _: make_mesh({"fsdp": 1}, jax.devices()[:1]))
    monkeypatch.setattr(engine, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(engine, "TILE_TOKENS", {"cpu": 256})
    made = {"tokenizer_dir": epath.Path("."), "eos_id": 1, "stop_ids": (1,), "pad_id": 0, "source": "test"}
    monkeypatch.setattr(
        engine, "load_student", lambda _, mesh: Student(mc=mc, params=jax.device_put(host, param_shardings(mc, mesh)), **made)
    )

    def run(traces, name, **changes):
        settings = {"score.signals": NAMES} | {f"score.{key}": value for key, value in changes.items()}
        given = {
            "tokenize": Fake({"tokens": tokens_table(rows_of(tokenizer, traces))}),
            "verify": Fake({"traces": traces_to_table(traces)}),
            "student": Fake({}),
        }
        out = ArtifactWriter(tmp_path / name)
        result = engine.run(
            config_lib.override(config_lib.default_config(), settings), given, out, Context(tmp_path, console=Console(quiet=True))
        )
        return Artifact(out.path, {}).table("scores"), result

    return run, mc, host


def test_values_equal_float64_and_no_bit_depends_on_batch_or_order(stage, tokenizer, traces):
    run, mc, host = stage
    table, result = run(traces, "a", batch_tiles=1)
    assert set(result.facts) >= {"answer_gain", "local_naturalness", "rows_scored"}
    found = {row["id"]: row for row in table.to_pylist()}
    assert set(found[traces[0].id]) == {"id", "completion_tokens", *NAMES}  # nll was scored for grape and not asked for

    def logp(ids, scored):
        z = log_softmax(reference_logits(host, mc, np.asarray(ids)))
        return [z[i - 1, ids[i]] for i in range(len(ids) - scored, len(ids))]

    rows = {row.id: row for row in rows_of(tokenizer, traces)}
    mean = {i: np.mean(logp(row.input_ids, row.completion_tokens)) for i, row in rows.items()}
    for trace in traces:
        same = [mean[t.id] for t in traces if t.question == trace.question]
        assert found[trace.id]["grape"] == pytest.approx(mean[trace.id] - max(same), abs=2e-5)
        prompt = rows[trace.id].input_ids[: rows[trace.id].prompt_tokens].tolist()
        stem, answer = tokenizer.encode("The answer is"), tokenizer.encode(f" {trace.gold_answer}.")
        given = prompt + tokenizer.encode(trace.reasoning + "\n") + stem + answer
        gain = sum(logp(given, len(answer))) - sum(logp(prompt + stem + answer, len(answer)))
        assert found[trace.id]["answer_gain"] == pytest.approx(gain, abs=5e-5)
        steps = items.expand("local_naturalness", [rows[trace.id]], {}, tokenizer, 400)
        by_id = {item.id: item for item in steps.rows}
        local = [np.mean(logp(by_id[i].input_ids, by_id[i].completion_tokens)) for i in steps.uses[trace.id]]
        assert found[trace.id]["local_naturalness"] == pytest.approx(np.mean(local), abs=2e-5)
    assert found[traces[3].id]["local_naturalness"] == pytest.approx(mean[traces[3].id], abs=2e-5)  # a single step

    for name, order, changes in (("b", traces[::-1], {"batch_tiles": 64}), ("c", traces[2:] + traces[:2], {"chunk_rows": 2})):
        again, _ = run(order, name, **changes)
        assert again.equals(table)


def test_finished_chunks_of_items_are_not_scored_again(stage, traces, tmp_path, monkeypatch):
    run, _, _ = stage
    table, _ = run(traces, "whole", chunk_rows=3)
    (tmp_path / "whole" / "scores.parquet").unlink()
    again, result = run(traces, "whole", chunk_rows=3)
    assert again.equals(table)
    assert all(result.facts[name]["rows_scored"] == 0 for name in ("answer_gain", "local_naturalness"))


def test_scores_table_of_vectors_has_a_hash_that_reads_them():
    from dccot_jax.artifact import table_hash
    from dccot_jax.select.tables import vector_array

    def table(x):
        return pa.table({"id": ["a", "b"], "v": vector_array([np.array([1, 2]), np.array([3, x])])})

    assert table_hash(table(4)) == table_hash(table(4).take([1, 0])) != table_hash(table(5))
