"""A teacher's stored tokens: the loss they give, how they lie in packed rows, the stage that stores them, and a whole run."""

from __future__ import annotations

import functools
import io
import re

import jax
import numpy as np
import pyarrow as pa
import pytest
from plan_cases import case
from rich.console import Console
from test_loader import ROWS, TOKENS, build
from tiny import tiny_config
from training_cases import TINY, host_params, mesh, pack, params_on, place, sequences

from dccot_jax import pipeline
from dccot_jax.artifact import ArtifactError, ArtifactWriter
from dccot_jax.config import ConfigError, override
from dccot_jax.context import Context
from dccot_jax.data.loader import PlanSource
from dccot_jax.data.teacher_store import TeacherStore
from dccot_jax.mix.groups import PlanError
from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig
from dccot_jax.train.losses import Distillation
from dccot_jax.train.step import loss_and_grads

TEACHER = ModelConfig("llama", 48, 24, 24, 2, 2, 1, 12, tie_embeddings=True, max_positions=64)
BETAS = (0.0, 0.3, 1.0)


# --- the loss ---------------------------------------------------------------------------------------------------------


@functools.cache
def _batch(k: int):
    """A packed batch with the teacher's k likeliest tokens, as they come out of the head, 0 where nothing is trained."""
    rng = np.random.default_rng(3)
    batch = pack([sequences(rng, 1 + g % 3) for g in range(8)], 48)

    @jax.jit
    def likeliest(params):
        hidden = decoder.forward(params, TEACHER, batch["tokens"], batch["segment_ids"], batch["positions"])
        return head.top_tokens(params, TEACHER, hidden, k, temperature=1.5)

    ids, logp = jax.device_get(likeliest(host_params(TEACHER, 1)))
    trained = batch["weights"][..., None] > 0
    return {**batch, "teacher_ids": np.where(trained, ids, 0), "teacher_logp": np.where(trained, logp, np.float32(0))}


def _loss(settings, batch, sizes=(1, 1, 1), microbatches=1):
    on = mesh(*sizes)
    with jax.set_mesh(on):
        constants = {} if settings.teacher is None else {"teacher": params_on(TEACHER, on, 1)}
        run = functools.partial(loss_and_grads, mc=TINY, microbatches=microbatches, remat="none", distill=settings)
        return jax.device_get(jax.jit(run)(params_on(TINY, on), batch=place(batch, on), constants=constants))


@pytest.mark.parametrize("beta", BETAS)
def test_with_every_token_stored_loss_and_gradient_are_those_of_the_teacher_beside_the_student(beta):
    beside = Distillation(TEACHER, beta, 1.5, 0.5)
    total, weight, grads = _loss(beside._replace(teacher=None), _batch(48))
    expected, mass, theirs = _loss(beside, _batch(48))
    assert float(weight) == float(mass) and float(total) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a / weight, b / mass, rtol=1e-4, atol=1e-5)


def test_few_tokens_give_the_same_loss_over_microbatches_and_devices_and_a_smaller_one_than_all():
    stored = Distillation(None, 0.3, 1.5, 1.0)
    one, _, grads = _loss(stored, _batch(4))
    eight, _, sharded = _loss(stored, _batch(4), (2, 2, 2), 2)
    assert float(eight) == pytest.approx(float(one), rel=1e-5)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert 0.0 < float(one) < float(_loss(stored, _batch(48))[0])


# --- the loader -------------------------------------------------------------------------------------------------------


def _stored(rows, k, loss_mask="response", dtype=np.float32):
    """A made-up store of token rows, last row first: the ids of a position begin with its label."""
    ids, logp = [], []
    rows = list(rows.values())[::-1]
    for row in rows:
        first = 0 if loss_mask == "full" else row["prompt_tokens"] - 1
        labels = np.asarray(row["input_ids"][first + 1 :])
        ids.append((labels[:, None] + np.arange(k)).ravel())
        logp.append(-(labels[:, None] + np.arange(k + 1) / 8).ravel())
    table = pa.table(
        {
            "id": [row["id"] for row in rows],
            "ids": pa.array([x.tolist() for x in ids], pa.list_(pa.int32())),
            "logp": pa.array([x.astype(dtype) for x in logp], pa.list_(pa.from_numpy_dtype(dtype))),
        }
    )
    return functools.partial(TeacherStore, table.to_batches(max_chunksize=3), k=k)


@pytest.mark.parametrize("loss_mask", ["response", "full"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_stored_lies_under_its_labels_token_by_token(loss_mask, dtype):
    data = case(30)
    rows = {row["id"]: row for row in data[1].to_pylist()}
    source, _, table, _ = build(data, loss_mask=loss_mask)
    sizes = {"steps": len(source), "rows_per_step": ROWS, "row_tokens": TOKENS, "loss_mask": loss_mask}
    whole = PlanSource(table, data[1].to_batches(), **sizes, teacher=_stored(rows, 3, loss_mask, dtype))
    part = PlanSource(table, data[1].to_batches(), **sizes, rows=[1, 3], teacher=_stored(rows, 3, loss_mask, dtype))
    for step in range(len(whole)):
        batch, plain = whole[step], source[step]
        assert all(np.array_equal(batch[name], plain[name]) for name in plain)
        assert batch["teacher_ids"].shape == (ROWS, TOKENS, 3) and batch["teacher_logp"].shape == (ROWS, TOKENS, 4)
        for r in range(ROWS):
            for t in range(TOKENS):
                if batch["weights"][r, t] > 0:
                    label = int(batch["labels"][r, t])
                    assert batch["teacher_ids"][r, t].tolist() == [label, label + 1, label + 2]
                    expected = (-(label + np.arange(4) / 8)).astype(dtype).astype(np.float32)
                    assert np.array_equal(batch["teacher_logp"][r, t], expected)
                else:
                    assert not batch["teacher_ids"][r, t].any() and not batch["teacher_logp"][r, t].any()
        assert all(np.array_equal(part[step][name], batch[name][[1, 3]]) for name in batch)


def test_positions_stored_under_another_mask_are_refused():
    data = case(8)
    rows = {row["id"]: row for row in data[1].to_pylist()}
    _, plan, table, _ = build(data)
    source = PlanSource(
        table, data[1].to_batches(), steps=len(plan.steps), rows_per_step=ROWS, row_tokens=TOKENS, teacher=_stored(rows, 3, "full")
    )
    with pytest.raises(ArtifactError, match="positions where the row trains"):
        source[0]


# --- the stage, and a run ---------------------------------------------------------------------------------------------

# A stage through the pipeline: the teacher is another untrained student, with the same tokenizer.
RUN = {"score__signals": (), "select__steps": (), "curriculum__kind": "none", "evaluate__base": False, "train__steps": 3}


def _context(path) -> Context:
    return Context(workdir=path, console=Console(file=io.StringIO(), highlight=False, width=200))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, workdir) of a run up to `distill`; its teacher artifact lies elsewhere."""
    work = tmp_path_factory.mktemp("stored")
    [teacher] = pipeline.run(tiny_config(seed=7, student__model__hidden_size=48), _context(work / "teacher"), until="student")
    cfg = tiny_config(
        **RUN,
        train__distill__kind="jsd",
        train__distill__teacher=str(teacher.artifacts["student"].path),
        train__distill__top_k=4,
        train__distill__teacher_dtype="float32",
    )
    pipeline.run(cfg, _context(work / "run"), until="distill")
    return cfg, work / "run"


def _node(cfg, workdir, name):
    [run] = pipeline.run(cfg, _context(workdir), until=name)
    return run.artifacts


@pytest.mark.slow
def test_a_run_trains_from_the_store_as_it_would_beside_the_teacher(made):
    cfg, workdir = made
    exact = override(cfg, {"train.distill.top_k": 200})
    found = _node(exact, workdir, "train")
    assert found["distill"].facts["rows_stored"] == found["tokenize"].table("tokens").num_rows
    beside = _node(override(cfg, {"train.distill.top_k": 0}), workdir, "train")
    assert "distill" not in beside
    few = _node(cfg, workdir, "train")
    loss, most, least = (item["train"].json("final")["loss"] for item in (beside, found, few))
    assert 0.0 < least < most <= loss * (1 + 1e-5)


def test_every_position_of_every_row_is_stored_as_full_logits_say(made):
    cfg, workdir = made
    found = _node(cfg, workdir, "distill")
    rows = {row["id"]: row for row in found["tokenize"].table("tokens").to_pylist()}
    stored = {row["id"]: row for row in found["distill"].table("topk").to_pylist()}
    assert set(stored) == set(rows)
    from dccot_jax.train.checkpoint import load_student

    on = mesh(1, 1, 1)
    teacher = load_student(cfg.train.distill.teacher, on)
    for name in sorted(rows)[:3]:
        row, ids = rows[name], np.asarray(rows[name]["input_ids"])[None]
        with jax.set_mesh(on):
            hidden = decoder.forward(teacher.params, teacher.mc, ids, np.ones_like(ids), np.arange(ids.size)[None])
            z = np.asarray(head.logits(teacher.params, teacher.mc, hidden), np.float64)[0, row["prompt_tokens"] - 1 : -1]
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        likely = np.reshape(stored[name]["ids"], (-1, 4))
        values = np.reshape(stored[name]["logp"], (-1, 5))
        np.testing.assert_allclose(values[:, :4], np.take_along_axis(log_p, likely, -1), atol=2e-5)
        np.testing.assert_allclose(values[:, :4], -np.sort(-log_p, axis=-1)[:, :4], atol=2e-5)
        np.testing.assert_allclose(np.exp(values).sum(-1), 1.0, rtol=1e-5)


class Killed(RuntimeError):
    pass


def test_resume_repeats_no_committed_chunk(made, tmp_path, monkeypatch):
    cfg, workdir = made
    whole = _node(cfg, workdir, "distill")["distill"]
    real, committed, again = ArtifactWriter.commit_chunk, [], []

    def dying(self, series, index, table):
        if series.startswith("distill-") and len(committed) == 2:
            raise Killed
        real(self, series, index, table)
        committed.extend([index] * series.startswith("distill-"))

    monkeypatch.setattr(ArtifactWriter, "commit_chunk", dying)
    with pytest.raises(Killed):
        _node(cfg, tmp_path, "distill")

    def recording(self, series, index, table):
        again.append(index)
        real(self, series, index, table)

    monkeypatch.setattr(ArtifactWriter, "commit_chunk", recording)
    found = _node(cfg, tmp_path, "distill")["distill"]
    assert again and not set(again) & set(committed)
    assert found.logical_hash == whole.logical_hash and found.facts["rows_resumed"] > 0


def _with_a_short_teacher(cfg, folder, positions):
    """`cfg` with a teacher of that many positions, made in `folder`."""
    short = {"student__model__max_positions": positions, "train__row_tokens": positions - 1, "tokens__max_length": positions - 1}
    [other] = pipeline.run(tiny_config(**short, evaluate__max_new_tokens=8), _context(folder), until="student")
    return override(cfg, {"train.distill.teacher": str(other.artifacts["student"].path)})


def test_rows_the_teacher_cannot_read_are_dropped_and_no_plan_uses_them(made, tmp_path):
    cfg, workdir = made
    signals = {"score.signals": ("nll",), "score.student": "warmup", "score.warmup.share": 0.9, "score.warmup.steps": 2}
    found = _node(override(_with_a_short_teacher(cfg, tmp_path, 100), signals), workdir, "train")
    dropped = {row["id"]: row for row in found["distill"].table("dropped").to_pylist()}
    assert dropped and {row["reason"] for row in dropped.values()} == {"exceeds_positions"}
    assert found["distill"].manifest["rows_in"] == found["distill"].manifest["rows_out"] + len(dropped)
    for select, plan in (("select", "plan"), ("select:warmup", "plan:warmup")):
        lost = set(found[select].table("kept")["id"].to_pylist()) & set(dropped)
        assert lost and not lost & set(found[plan].table("plan")["id"].to_pylist())
        counted = {row["id"]: row for row in found[plan].table("dropped").to_pylist()}
        assert all(counted[i]["reason"] == "teacher_exceeds_positions" and counted[i]["detail"] == dropped[i]["detail"] for i in lost)
        about = found[plan].manifest
        assert about["dropped"]["teacher_exceeds_positions"] == len(lost)
        assert about["rows_in"] == about["rows_out"] + sum(about["dropped"].values())
    with pytest.raises(ArtifactError, match=re.escape(f"1 rows of the plan have no stored teacher log-probabilities, e.g. {min(dropped)}")):
        TeacherStore.from_artifact(found["distill"], [min(dropped)])


def test_a_teacher_that_can_read_no_selected_row_leaves_no_plan(made, tmp_path):
    cfg, workdir = made
    with pytest.raises(PlanError, match=r"train\.distill\.teacher can read 0 of .* \(teacher_exceeds_positions: .*has 10 positions\)"):
        _node(_with_a_short_teacher(cfg, tmp_path, 10), workdir, "plan")


def test_only_a_stored_teacher_is_part_of_the_plan():
    def readers(cfg):
        return {name for name, node in pipeline.graph(cfg, base=False).items() if "distill" in node.inputs}

    beside = tiny_config(train__distill__kind="jsd", train__distill__teacher="x")
    assert readers(beside) == set()
    assert readers(override(beside, {"train.distill.top_k": 4})) == {"plan", "plan:warmup", "train", "train:warmup"}


def test_more_tokens_than_there_are_are_refused(made):
    cfg, workdir = made
    with pytest.raises(ConfigError, match=r"train\.distill\.top_k: 99999 exceeds the teacher's"):
        _node(override(cfg, {"train.distill.top_k": 99999}), workdir, "distill")


def test_a_teacher_with_other_tokens_is_refused(made, monkeypatch):
    cfg, workdir = made
    monkeypatch.setattr("dccot_jax.train.teacher._same_tokens", lambda one, other: False)
    with pytest.raises(ConfigError, match="has other tokens than the student"):
        _node(override(cfg, {"train.distill.top_k": 5}), workdir, "distill")


def test_what_the_store_means_counts_and_how_it_is_read_does_not(made):
    cfg, workdir = made
    done = _node(cfg, workdir, "distill")

    def identity(**changes):
        node = pipeline.graph(override(cfg, {key.replace("__", "."): value for key, value in changes.items()}), base=False)["distill"]
        return pipeline._identity(node, {role: done[name] for role, name in node.inputs.items()})[0]

    same = identity()
    for changes in ({"top_k": 5}, {"top_k_dtype": "float16"}, {"temperature": 2.0}, {"teacher_dtype": "bfloat16"}):
        assert identity(**{f"train__distill__{name}": value for name, value in changes.items()}) != same
    assert identity(train__loss_mask="full") != same
    assert identity(train__distill__weight=0.5, train__distill__beta=0.3, train__learning_rate=0.1, score__chunk_rows=3) == same
