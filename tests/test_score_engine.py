"""The scoring engine on a tiny decoder: closed forms in float64, bitwise invariance, meshes, resume, bad rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from etils import epath
from kept_cases import assert_kept_agree
from reference_decoder import log_softmax, reference_hidden, reference_logits
from rich.console import Console
from select_cases import ids, select, with_text

from dccot_jax import config as config_lib
from dccot_jax.artifact import Artifact, ArtifactWriter
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.model import decoder
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh, param_shardings, weight_shapes
from dccot_jax.records import Dropped
from dccot_jax.select import engine, sampled, signals
from dccot_jax.select.candidates import Candidate
from dccot_jax.select.signals import VIEWS
from dccot_jax.select.views import Row, bucket_length, bucket_of, chunk_tiles, completion_context, plan_tiles, view_arrays
from dccot_jax.standalone.recipe import read_recipe
from dccot_jax.train.checkpoint import Student

MC = ModelConfig("llama", 97, 32, 48, 2, 4, 2, 16, rope_theta=500.0, tie_embeddings=False, max_positions=300)
SIGNALS = ("el2n", "entropy", "ifd_loss", "ifd_ppl", "margin", "nll", "nll_unconditional", "ppl", "rank_surprisal")
VECTORS = ("embedding_prompt", "embedding_rationale")
CONTEXT = [5, 6, 7]
TILE_TOKENS = 192  # 6 short or 2 long rows per tile and device
RECIPES = ("cherry_ifd", "el2n", "perplexity_middle", "rank_surprisal")  # of configs/select, which read these signals alone


class FakeTokenizer:
    """Just enough of a tokenizer for the assistant header: ids are 5, 6, 7."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 3

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        return "user 1" + (" head" if add_generation_prompt else "")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return CONTEXT if text else []


def make_rows(n: int, seed: int = 0) -> list[Row]:
    """Random rows in two buckets: (32, 32) and (96, 64)."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        short = rng.random() < 0.5
        prompt = int(rng.integers(4, 14) if short else rng.integers(30, 40))
        completion = int(rng.integers(1, 18) if short else rng.integers(35, 56))
        found.append(Row(f"{i:04d}", rng.integers(8, MC.vocab_size, prompt + completion).astype(np.int32), prompt))
    return found


def tokens_table(rows: Sequence[Row]) -> pa.Table:
    return pa.table(
        {
            "id": [r.id for r in rows],
            "group_id": [r.id for r in rows],
            "input_ids": pa.array([r.input_ids.tolist() for r in rows], pa.list_(pa.int32())),
            "prompt_tokens": pa.array([r.prompt_tokens for r in rows], pa.int32()),
            "completion_tokens": pa.array([r.completion_tokens for r in rows], pa.int32()),
        }
    )


@dataclasses.dataclass
class Fake:
    """An input artifact that lives in memory: rows, or a student. Both know one tokenizer."""

    tables: Mapping[str, pa.Table]
    kind: str = "student"
    identity: str = "0" * 64
    tokenizer: str = "a" * 64
    path: str = "somewhere"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"tokenizer_hash": self.tokenizer}

    def json(self, name: str) -> Any:
        assert name == "student"
        return {"tokenizer": {"hash": self.tokenizer}}

    def table(self, name: str) -> pa.Table:
        return self.tables[name]


@pytest.fixture(scope="module")
def host() -> Any:
    """Parameters on the host: drawn like the decoder's own, biases and norms away from their trivial values."""
    rng = np.random.default_rng(3)
    scale = MC.hidden_size**-0.5
    shapes = weight_shapes(MC)
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape) + (len(shape) < 3) * 0.5).astype(np.float32), shapes, is_leaf=is_shape
    )


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


@pytest.fixture
def stage(monkeypatch, tmp_path, host):
    """Runs the stage on rows; `stage(rows, params=None, mesh=..., **config)` -> (score table, dropped, result)."""

    def run(
        rows: Sequence[Row],
        *,
        name: str = "score",
        params: Any = None,
        devices: int = 1,
        mesh: Any = None,
        inputs: Any = None,
        **changes: Any,
    ):
        sizes = mesh or {"data": 1, "fsdp": -1, "tensor": 1}
        monkeypatch.setattr(engine, "make_mesh", lambda _: make_mesh(sizes, jax.devices()[:devices]))
        monkeypatch.setattr(engine, "load_tokenizer", lambda _: FakeTokenizer())

        def load(source: Any, mesh: Any) -> Student:
            placed = jax.device_put(params or host, param_shardings(MC, mesh))
            return Student(mc=MC, params=placed, tokenizer_dir=epath.Path("."), eos_id=3, stop_ids=(3,), pad_id=0, source="test")

        monkeypatch.setattr(engine, "load_student", load)
        monkeypatch.setattr(engine, "TILE_TOKENS", {"cpu": TILE_TOKENS})
        settings = {"score.signals": SIGNALS} | {f"score.{key}": value for key, value in changes.items()}
        cfg = config_lib.override(config_lib.default_config(), settings)
        out = ArtifactWriter(tmp_path / name)
        given: dict[str, Any] = {"tokenize": Fake({"tokens": tokens_table(rows)}), "student": Fake({}), **(inputs or {})}
        result = engine.run(cfg, given, out, Context(tmp_path, console=Console(quiet=True)))
        found = Artifact(out.path, {})
        return found.table("scores"), found.table("dropped").to_pylist(), result

    return run


def reference(params: Any, row: Row) -> dict[str, float]:
    """All signals in float64 numpy from the full logits of the unpadded views."""

    def stats(ids: np.ndarray, completion: int) -> tuple[np.ndarray, np.ndarray]:
        logp = log_softmax(reference_logits(params, MC, ids))[len(ids) - completion - 1 : -1]
        return logp, logp[np.arange(completion), ids[-completion:]]

    n = row.completion_tokens
    logp, conditional = stats(row.input_ids, n)
    _, unconditional = stats(np.concatenate([CONTEXT, row.input_ids[row.prompt_tokens :]]), n)
    nll, alone = -conditional.mean(), -unconditional.mean()
    p = np.exp(logp)
    sorted_p = np.sort(p, axis=-1)
    rank = 1 + (logp > conditional[:, None]).sum(-1)
    return {
        "nll": nll,
        "ppl": np.exp(nll),
        "nll_unconditional": alone,
        "ifd_loss": nll / alone,
        "ifd_ppl": np.exp(-conditional.mean()) / np.exp(-unconditional.mean()),
        "entropy": -(p * logp).sum(-1).mean(),
        "margin": (sorted_p[:, -1] - sorted_p[:, -2]).mean(),
        "el2n": np.sqrt((p * p).sum(-1) - 2 * np.exp(conditional) + 1).mean(),
        "rank_surprisal": np.minimum(rank, 100).sum() / -conditional.sum(),
    }


def matrix(table: pa.Table, name: str) -> np.ndarray:
    return np.stack(table[name].to_numpy())


def columns(table: pa.Table) -> dict[str, dict[str, float]]:
    return {row["id"]: {name: row[name] for name in SIGNALS} for row in table.to_pylist()}


def assert_close(found: pa.Table, expected: pa.Table) -> None:
    assert found["id"].to_pylist() == expected["id"].to_pylist()
    for name in SIGNALS:
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
    for name in VECTORS if VECTORS[0] in expected.column_names else ():
        np.testing.assert_allclose(matrix(found, name), matrix(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_every_signal_equals_float64_from_full_logits(stage, host):
    rows = make_rows(9)
    table, dropped, result = stage(rows, signals=(*SIGNALS, *VECTORS))
    assert not dropped and result.rows_in == result.rows_out == 9
    assert table["completion_tokens"].to_pylist() == [r.completion_tokens for r in rows]
    found = columns(table)
    for row in rows:
        for name, value in reference(host, row).items():
            assert found[row.id][name] == pytest.approx(value, rel=2e-5), (row.id, name)
    for i, row in enumerate(rows):
        hidden = reference_hidden(host, MC, row.input_ids)
        for name, part in zip(VECTORS, (hidden[: row.prompt_tokens], hidden[row.prompt_tokens :])):
            np.testing.assert_allclose(matrix(table, name)[i], part.mean(0), rtol=1e-4, atol=2e-6)
    alone, _, _ = stage(rows, name="alone", signals=VECTORS)  # no head, no second view
    for name in VECTORS:
        assert alone[name].equals(table[name]) and alone.schema.field(name).type.list_size == MC.hidden_size


def test_bitwise_independent_of_batch_order_and_chunks(stage):
    rows = make_rows(40)
    stage = functools.partial(stage, signals=(*SIGNALS, *VECTORS))
    first, _, result = stage(rows, name="a", batch_tiles=1)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    second, _, _ = stage(shuffled, name="b", batch_tiles=64)
    third, _, other = stage(shuffled, name="c", batch_tiles=3, chunk_rows=5)
    assert 3 < result.facts["tiles"] <= 64  # so that these are one, all and some of them at a time
    assert first.equals(second) and first.equals(third)
    assert result.logical_hash == other.logical_hash
    for recipe in RECIPES:
        chosen = kept_by(recipe, first, rows)
        assert 0 < len(chosen) < 40 and chosen == kept_by(recipe, second, shuffled) == kept_by(recipe, third, shuffled[::-1])
    assert result.facts["rows_scored"] == 40 and result.facts["rows_resumed"] == 0


def kept_by(recipe: str, table: pa.Table, rows: Sequence[Row]) -> set[str]:
    """Ids that a recipe keeps; four rows in a row, by id, answer one question."""
    scores = columns(table)
    candidates = [
        Candidate(r.id, (r.id,), r.completion_tokens, True, "", scores[r.id], {}, with_text(f"question {int(r.id) // 4}")) for r in rows
    ]
    steps = read_recipe(str(Path(__file__).parent.parent / "configs" / "select" / f"{recipe}.py")).steps
    return ids(select(candidates, *steps, available=SIGNALS)[0])


def test_in_buckets_a_score_does_not_hang_on_the_other_rows(stage):
    rows = make_rows(24)
    whole, _, _ = stage(rows, name="whole", layout="bucketed")
    part, _, _ = stage(rows[5:16], name="part", layout="bucketed")
    assert columns(part) == {i: scores for i, scores in columns(whole).items() if i in {row.id for row in rows[5:16]}}


@pytest.mark.parametrize("devices, mesh", [(2, None), (8, None), (8, {"data": 2, "fsdp": 2, "tensor": 2})], ids=["fsdp2", "fsdp8", "2x2x2"])
def test_meshes_agree(stage, devices, mesh):
    rows = make_rows(24)
    single, _, _ = stage(rows, name="one", signals=(*SIGNALS, *VECTORS))
    many, _, _ = stage(rows, name="many", devices=devices, mesh=mesh, signals=(*SIGNALS, *VECTORS))
    assert_close(many, single)
    assert_kept_agree(many, single, SIGNALS)


def test_one_forward_per_view_however_many_signals(monkeypatch, host):
    calls: list[int] = []
    real = decoder.forward

    def counting(params, mc, tokens, *args, **kwargs):
        calls.append(tokens.shape[1])
        return real(params, mc, tokens, *args, **kwargs)

    monkeypatch.setattr(engine.decoder, "forward", counting)
    rows = make_rows(3)
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    params = jax.device_put(host, jax.NamedSharding(mesh, jax.P()))
    engine.make_program.cache_clear()
    for names, views in ((SIGNALS, 2), (("nll", "ppl", "entropy"), 1)):
        chosen, _ = signals.split_signals(names)
        needed = list(signals.required_stats(chosen))
        calls.clear()
        program = engine.make_program(MC, chosen, "float32")
        tiles = plan_tiles(rows, len(CONTEXT), shards=1, tile_tokens=TILE_TOKENS)
        results = list(engine.score_tiles(program, params, mesh, rows, tiles, needed, CONTEXT, in_flight=2))
        assert len(results) == len(tiles) and results[0][1].shape[1] == len(chosen)
        assert len(calls) == views * len({t.bucket for t in tiles})  # one trace per bucket and view


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("after", [0, 2])
def test_resume_repeats_no_committed_chunk(stage, monkeypatch, after):
    rows = make_rows(40)
    whole, _, expected = stage(rows, name="whole", chunk_rows=6)
    real = ArtifactWriter.commit_chunk
    committed: list[int] = []

    def dying(self, series, index, table):
        if len(committed) == after:
            raise Killed
        committed.append(index)
        real(self, series, index, table)

    monkeypatch.setattr(ArtifactWriter, "commit_chunk", dying)
    with pytest.raises(Killed):
        stage(rows, name="torn", chunk_rows=6)
    again: list[int] = []

    def recording(self, series, index, table):
        again.append(index)
        real(self, series, index, table)

    monkeypatch.setattr(ArtifactWriter, "commit_chunk", recording)
    table, _, result = stage(rows, name="torn", chunk_rows=6)
    assert not set(again) & set(committed)
    assert table.equals(whole) and result.logical_hash == expected.logical_hash
    assert result.facts["rows_scored"] + result.facts["rows_resumed"] == 40
    assert (result.facts["rows_resumed"] > 0) == (after > 0)


def test_a_torn_chunk_is_scored_again_and_another_layout_is_discarded(stage, tmp_path):
    rows = make_rows(40)
    whole, _, _ = stage(rows, name="whole", chunk_rows=6)
    stage(rows, name="torn", chunk_rows=6)
    chunks = sorted((tmp_path / "torn" / "chunks").iterdir())
    chunks[1].write_bytes(chunks[1].read_bytes()[:40])
    table, _, result = stage(rows, name="torn", chunk_rows=6)
    assert table.equals(whole) and 0 < result.facts["rows_scored"] < 40
    table, _, result = stage(rows, name="torn", chunk_rows=13)
    assert table.equals(whole) and result.facts["rows_scored"] == 40
    assert not set((tmp_path / "torn" / "chunks").iterdir()) & set(chunks)


def test_rows_that_cannot_be_scored_are_dropped_with_a_reason(stage, host):
    rows = make_rows(6)
    params = jax.tree.map(np.array, host)
    params["embed"][7] = np.nan  # only the last token of the assistant header, and prompts that contain it
    poisoned = dataclasses.replace(rows[2], input_ids=rows[2].input_ids.copy())
    poisoned.input_ids[1] = 7
    long = Row("long", np.full(301, 9, np.int32), 10)
    full = Row("full", np.full(300, 9, np.int32), 10)
    empty = Row("none", np.full(12, 9, np.int32), 12)
    table, dropped, result = stage([*rows[:2], poisoned, *rows[3:], long, full, empty], params=params, signals=("nll", "ppl"))
    assert {d["id"]: d["reason"] for d in dropped} == {
        rows[2].id: "non_finite_nll",
        "long": "exceeds_positions",
        "none": "empty_completion",
    }
    assert set(table["id"].to_pylist()) == {r.id for r in rows if r is not rows[2]} | {"full"}
    assert result.rows_in == 9 and result.rows_out == 6 and sum(result.dropped.values()) == 3
    assert np.isfinite(table["nll"].to_numpy()).all()


def test_rows_in_are_the_rows_of_the_token_table_also_where_an_answer_is_lost(stage, monkeypatch):
    """A row lost by student_error is counted once."""
    rows = make_rows(8)
    none = Row("none", np.full(12, 9, np.int32), 12)

    def scripted(cfg, names, student, mesh, traces, out, ctx):
        return (
            {"student_error": {trace.id: 1.0 for trace in traces[3:]}},
            [Dropped(trace.id, "missing_gold", "") for trace in traces[:3]],
            {},
        )

    monkeypatch.setattr(sampled, "score", scripted)
    monkeypatch.setattr(engine, "table_to_traces", lambda _: [SimpleNamespace(id=row.id) for row in [*rows, none]])
    verify = {"verify": Fake({"traces": pa.table({})})}
    for name, chosen in (("sampled", ("student_error",)), ("both", ("nll", "student_error"))):
        table, dropped, result = stage([*rows, none], name=name, signals=chosen, inputs=verify)
        assert (result.rows_in, result.rows_out, result.dropped) == (9, 5, {"empty_completion": 1, "missing_gold": 3})
        assert table.num_rows == 5 and len(dropped) == 4


def test_a_student_with_another_tokenizer_is_refused(stage):
    with pytest.raises(ConfigError, match=r"score\.student: somewhere has tokenizer bbbb.*tokenised with aaaa"):
        stage(make_rows(2), inputs={"student": Fake({}, tokenizer="b" * 64)})


def test_unknown_signal_names_the_nearest(stage):
    with pytest.raises(ConfigError, match=r"score\.signals: 'ifd_los' .*did you mean 'ifd_loss'"):
        stage(make_rows(1), signals=("ifd_los",))


def test_casting_the_matrices_once_changes_no_bit(host):
    rows = [row for row in make_rows(8) if len(row.input_ids) <= 32]
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    cast = engine.cast_matrices(jax.device_put(host, jax.NamedSharding(mesh, jax.P())), "bfloat16", mesh)
    kinds = {name: leaf.dtype for name, leaf in cast["layers"].items()}
    assert kinds["wq"] == jnp.bfloat16 and kinds["attn_norm"] == jnp.float32 and cast["final_norm"].dtype == jnp.float32
    chosen, _ = signals.split_signals(["nll", "entropy"])
    tiles = plan_tiles(rows, len(CONTEXT), shards=1, tile_tokens=TILE_TOKENS)

    def scores(params):
        program = engine.make_program(MC, chosen, "bfloat16")
        return np.concatenate([v for _, v in engine.score_tiles(program, params, mesh, rows, tiles, VIEWS[:1], CONTEXT, in_flight=1)])

    plain = jax.device_put(host, jax.NamedSharding(mesh, jax.P()))
    np.testing.assert_array_equal(scores(cast), scores(plain))


# --- views ------------------------------------------------------------------------------------------------------------


def test_buckets_grow_gently_and_depend_on_the_row_alone():
    lengths = [bucket_length(n) for n in range(1, 5000)]
    assert lengths == sorted(lengths)
    assert all(length >= n for n, length in enumerate(lengths, start=1))
    assert sorted(set(lengths))[:9] == [32, 64, 96, 128, 192, 256, 384, 512, 768]
    assert all(length <= 1.5 * n for n, length in enumerate(lengths, start=1) if n > 64)
    rows = make_rows(30)
    tiles = plan_tiles(rows, 3, shards=2, tile_tokens=512)
    assert sorted(i for t in tiles for i in t.rows) == list(range(30))
    assert all(bucket_of(rows[i], 3) == t.bucket for t in tiles for i in t.rows)
    assert all(len(t.rows) <= t.slots and t.slots % 2 == 0 for t in tiles)
    chunks = chunk_tiles(tiles, 7)
    assert [t for c in chunks for t in c] == list(range(len(tiles)))
    assert all(sum(len(tiles[t].rows) for t in c) >= 7 for c in chunks[:-1])


def test_both_views_score_exactly_the_completion():
    rows = make_rows(5)
    for tile in plan_tiles(rows, len(CONTEXT), shards=1, tile_tokens=512):
        for view in VIEWS:
            x = view_arrays(view, rows, tile, CONTEXT)
            for slot, i in enumerate(tile.rows):
                n = rows[i].completion_tokens
                completion = rows[i].input_ids[rows[i].prompt_tokens :]
                assert x["mask"][slot].sum() == n and x["labels"][slot, :n].tolist() == completion.tolist()
                # the token after each scored position is the label
                assert x["tokens"][slot][x["index"][slot, :n] + 1].tolist() == completion.tolist()
                before = rows[i].input_ids[: rows[i].prompt_tokens].tolist() if view == "conditional" else CONTEXT
                assert x["tokens"][slot][: x["index"][slot, 0] + 1].tolist() == before
            assert not x["mask"][len(tile.rows) :].any() and not x["segment_ids"][len(tile.rows) :].any()


def test_context_falls_back_to_bos_then_eos():
    rows = make_rows(2)
    assert completion_context(FakeTokenizer(), rows) == CONTEXT
    with_bos = FakeTokenizer()
    with_bos.bos_token_id = int(rows[0].input_ids[0])
    assert completion_context(with_bos, rows) == [with_bos.bos_token_id, *CONTEXT]
    bare = FakeTokenizer()
    bare.apply_chat_template = lambda *a, **k: "user 1"
    assert completion_context(bare, rows) == [3]
    bare.eos_token_id = None
    with pytest.raises(ValueError, match="no assistant header"):
        completion_context(bare, rows)
