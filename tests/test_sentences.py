"""Vectors of a sentence encoder: which text, equal bits whatever the order and the chunks, resume, refusals; against torch."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
from rich.console import Console
from tiny import tiny_config

from dccot_jax import pipeline
from dccot_jax.artifact import ArtifactWriter, open_artifact
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.external import score_files
from dccot_jax.preflight import check
from dccot_jax.records import make_trace
from dccot_jax.select import sentences
from dccot_jax.select.signals import SENTENCES


def rows(count=150):
    made = []
    for n in range(count):
        fields = {"task": "svamp", "split": "train", "answer_type": "number", "gold_answer": str(n)}
        made.append(make_trace(question=f"How many is {n % 40}?", target=f"It is {'so ' * (n % 7)}{n}.", **fields))
    return made


class Encoder:
    """Vectors from a text and, as real kernels do, from its place in the batch and the batch's longest text."""

    def __init__(self, fail_after=None):
        self.batches, self.fail_after = [], fail_after

    def __call__(self, texts):
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(list(texts))
        longest = max(map(len, texts))
        return np.array([[zlib.crc32(text.encode()) / 2**32, place, longest] for place, text in enumerate(texts)], np.float32)


def score(folder, traces, encoder, *, names=SENTENCES, chunk_rows=64):
    cfg = tiny_config(score__signals=names, score__sentences__model="./encoder", score__chunk_rows=chunk_rows)
    return sentences.score(cfg, names, traces, ArtifactWriter(folder), Context(folder, console=Console(quiet=True)), opened=lambda: encoder)


def test_a_vector_of_the_question_and_of_the_target_for_every_row(tmp_path):
    traces, encoder = [*rows(), make_trace(question="q", prompt="asked so", target="t", task="svamp", split="train")], Encoder()
    columns, facts = score(tmp_path, traces, encoder)
    assert set(columns) == set(SENTENCES) and all(len(column) == len(traces) for column in columns.values())
    for trace in traces:
        prompt = trace.prompt or trace.question
        assert columns["sentence_prompt"][trace.id][0] == np.float32(zlib.crc32(prompt.encode()) / 2**32)
        assert columns["sentence_rationale"][trace.id][0] == np.float32(zlib.crc32(trace.target.encode()) / 2**32)
    asked = [text for batch in encoder.batches for text in batch]
    assert len(asked) == len(set(asked)) == 40 + 150 + 2 == facts["sentences"]["texts"]


def test_neither_order_nor_chunks_change_a_bit(tmp_path):
    traces = rows()
    shuffled = random.Random(0).sample(traces, len(traces))
    alone, _ = score(tmp_path / "a", traces, Encoder(), chunk_rows=1)
    other, _ = score(tmp_path / "b", shuffled, Encoder(), chunk_rows=1000)
    for name in SENTENCES:
        for trace in traces:
            np.testing.assert_array_equal(alone[name][trace.id], other[name][trace.id])


def test_a_stopped_run_goes_on_behind_its_last_chunk(tmp_path):
    traces, first, second, whole = rows(), Encoder(fail_after=3), Encoder(), Encoder()
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "a", traces, first)
    found, _ = score(tmp_path / "a", traces, second)
    wanted, _ = score(tmp_path / "b", traces, whole)
    assert [*first.batches[:2], *second.batches] == whole.batches  # chunks of two batches: the third was lost with its chunk
    for name in SENTENCES:
        assert all(np.array_equal(found[name][i], vector) for i, vector in wanted[name].items())
    again = Encoder(fail_after=0)
    score(tmp_path / "a", traces, again)
    assert not again.batches


@pytest.mark.parametrize("chunk_rows", [32, 64, 1000])
def test_two_processes_share_the_chunks_and_meet_as_often(monkeypatch, tmp_path, chunk_rows):
    traces, met, encoders = rows(), {0: [], 1: []}, {0: Encoder(), 1: Encoder()}
    monkeypatch.setattr(Context, "_meet", lambda self, name, leaving: met[self.process_index].append(name))
    monkeypatch.setattr(sentences, "committed", lambda out, ctx, series, count: [False] * count)
    cfg = tiny_config(score__signals=SENTENCES, score__sentences__model="./encoder", score__chunk_rows=chunk_rows)
    found = {}
    for process in (1, 0):
        ctx = Context(tmp_path, console=Console(quiet=True), process_index=process, process_count=2)
        opened = encoders[process]
        found[process], _ = sentences.score(
            cfg, SENTENCES, traces, ArtifactWriter(tmp_path / "a"), ctx, opened=lambda opened=opened: opened
        )
    assert met[0] == met[1] and found[1] == {}
    alone, _ = score(tmp_path / "b", traces, Encoder())
    assert not {str(batch) for batch in encoders[0].batches} & {str(batch) for batch in encoders[1].batches}
    for name in SENTENCES:
        assert all(np.array_equal(found[0][name][i], vector) for i, vector in alone[name].items())


def test_what_is_missing_is_named_before_any_work(monkeypatch):
    def refused(name, model, words):
        with pytest.raises(ConfigError, match=words):
            check(tiny_config(score__signals=(name,), score__sentences__model=model, select__steps=()))

    refused("sentence_rationale", "", r"config\.score\.sentences\.model: empty; sentence_rationale needs a sentence encoder")
    refused("sentence_rationale", "/no/such", r"config\.score\.sentences\.model: '/no/such' is not a directory")
    refused(
        "sentence_rationale", "models/no/such", r"config\.score\.sentences\.model: 'models/no/such' is not a directory; accepted: a dir"
    )
    monkeypatch.setattr(sentences.importlib.util, "find_spec", lambda name: None)
    refused("sentence_prompt", "hub/name", r"sentence_prompt needs sentence-transformers: pip install -e '\.\[sentences\]'")


def test_scores_know_the_encoder_by_its_files(tmp_path):
    (tmp_path / "a" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "a" / "1_Pooling" / "config.json").write_text("{}")

    def identity(model):
        return score_files(tiny_config(score__signals=("sentence_prompt",), score__sentences__model=str(model)))

    before = identity(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert identity(tmp_path / "b") == before
    (tmp_path / "b" / "1_Pooling" / "config.json").write_text("{ }")
    assert identity(tmp_path / "b") != before != identity("hub/name") != identity("hub/other")


@pytest.mark.parity
def test_a_real_encoder_against_torch_and_through_the_stages(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,?$+-*/=()<>'\":!%"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"##{word}" for word in words[5:])]))
    torch.manual_seed(0)
    mc = transformers.BertConfig(
        vocab_size=2 * len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    bert, tokenizer = transformers.BertModel(mc).eval(), transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    steps = ({"name": "kcenter", "vector": "sentence_rationale", "rows": 8},)
    changes = {
        "score__signals": ("nll", "sentence_rationale"),
        "score__sentences__model": str(tmp_path / "bert"),
        "select__steps": steps,
    }
    cfg = tiny_config(**changes)
    ctx = Context(tmp_path / "run", console=Console(quiet=True))
    pipeline.run(cfg, ctx, until="select")
    folder = {name: open_artifact(next((tmp_path / "run" / "artifacts").glob(f"{name}-*"))) for name in ("score", "select", "verify")}
    assert folder["select"].table("kept").num_rows == 8
    targets = dict(zip(*(folder["verify"].table("traces")[name].to_pylist() for name in ("id", "target"))))
    scores = folder["score"].table("scores")
    assert scores.num_rows > 20
    for row in scores.select(["id", "sentence_rationale"]).to_pylist()[:20]:
        with torch.no_grad():
            read = tokenizer(targets[row["id"]], return_tensors="pt", truncation=True, max_length=256)
            wanted = bert(**read).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row["sentence_rationale"], wanted, atol=1e-5)
