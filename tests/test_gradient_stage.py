"""Gradient signals through the pipeline: columns, feature files, held-out rows, resume by chunk, settings that cannot work."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
from reference_gradient import row_gradient
from rich.console import Console
from test_less import explicit
from tiny import tiny_config

from dccot_jax import pipeline
from dccot_jax.artifact import ArtifactWriter
from dccot_jax.config import ConfigError
from dccot_jax.config_identity import config_slice
from dccot_jax.context import Context
from dccot_jax.model.sharding import make_mesh
from dccot_jax.preflight import check
from dccot_jax.records import normalise_question, table_to_traces
from dccot_jax.select.candidates import Candidate
from dccot_jax.select.gradients import chunks
from dccot_jax.select.gradients.features import Adam, Projection
from dccot_jax.select.gradients.influence import influence, most_influenced, subtask_directions
from dccot_jax.select.selectors import apply_steps
from dccot_jax.select.tables import read_rows
from dccot_jax.tasks.registry import load_items
from dccot_jax.train.checkpoint import load_student
from dccot_jax.train.snapshots import restore_snapshot, restore_snapshot_params, snapshot_model

NORMED = ("wo", "mlp_norm", "embed")
SUBTASKS = ({"task": "synth_arithmetic", "rows": 5, "name": "gold"}, {"traces": 3})


def settings(**changes):
    """One length bucket: rows, and the sub-tasks' items, of more than 96 tokens do not fit."""
    base = {
        "traces__questions": 80,
        "tokens__max_length": 96,
        "train__row_tokens": 96,
        "student__model__max_positions": 96,
        "score__signals": ("grand", "less"),
        "score__gradients__norm_subset": NORMED,
        "score__gradients__checkpoints": 2,
        "score__gradients__dim": 64,
        "score__gradients__validation": SUBTASKS,
        "select__steps": ({"name": "less_topk", "rows": 6},),
        "evaluate__base": False,
    }
    return tiny_config(**base | changes)


def run(config, workdir, until="plan"):
    ctx = Context(workdir=workdir, console=Console(file=io.StringIO(), width=200))
    return pipeline.run(config, ctx, until=until)[-1].artifacts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run as far as the plan, in tiles of a row per device: several chunks."""
    workdir = tmp_path_factory.mktemp("gradients")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.TILE_TOKENS, "cpu", 96)
        yield workdir, run(settings(), workdir)


def test_columns_files_and_drops(made):
    _, artifacts = made
    score = artifacts["score"]
    table = score.table("scores")
    assert table.column_names == ["id", "completion_tokens", "grand", "less", "less_gold", "less_traces"]
    less = np.stack([table["less_gold"].to_numpy(), table["less_traces"].to_numpy()])
    np.testing.assert_array_equal(table["less"].to_numpy(), less.max(axis=0))
    assert (np.abs(less) <= 1).all() and less.std() > 0.01 and (table["grand"].to_numpy() > 0).all()
    held = {row["id"] for row in score.table("dropped").to_pylist() if row["reason"] == "held_out"}
    traces = table_to_traces(artifacts["verify"].table("traces"))
    assert len({normalise_question(t.question) for t in traces if t.id in held}) == 3
    questions = {normalise_question(t.question) for t in traces if t.id in set(table["id"].to_pylist())}
    assert not questions & {normalise_question(t.question) for t in traces if t.id in held}
    features, validation = score.table("features"), score.table("validation")
    assert sorted(features["id"].to_pylist()) == table["id"].to_pylist()
    assert features.column_names[1:] == ["step_2", "step_4"] and features["step_4"].type.list_size == 64
    assert sorted(validation["subtask"].to_pylist()) == ["gold"] * 5 + ["traces"] * 3
    kept = artifacts["select"].table("kept")["id"].to_pylist()
    best = sorted(zip(-table["less"].to_numpy(), table["id"].to_pylist()))[:6]
    assert kept == sorted(i for _, i in best)
    assert set(artifacts["plan"].table("plan")["id"].to_pylist()) == set(kept)


def test_gold_items_are_new_questions(made):
    _, artifacts = made
    ids = [i.split("/")[1] for i in artifacts["score"].table("validation")["id"].to_pylist() if i.startswith("gold/")]
    items = {item.id: item for item in load_items("synth_arithmetic", "train")}
    pool = {normalise_question(t.question) for t in table_to_traces(artifacts["verify"].table("traces"))}
    assert len(ids) == 5 and not {normalise_question(items[i].question) for i in ids} & pool


def test_scores_are_what_the_files_and_the_formula_say(made):
    """From snapshot to column: explicit features of two rows, then the influence from the stored features."""
    _, artifacts = made
    score, train = artifacts["score"], artifacts["train:warmup"]
    features, validation = score.table("features"), score.table("validation")
    snapshots = train.facts["snapshots"]
    mc = snapshot_model(train)
    rows = {row.id: row for row in read_rows(artifacts["tokenize"].table("tokens"))}
    ids = features["id"].to_pylist()
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    state = jax.tree.map(np.asarray, restore_snapshot(train, 2, mesh))
    final = jax.tree.map(np.asarray, load_student(train, mesh).params)
    jax.tree.map(np.testing.assert_array_equal, restore_snapshot(train, 4, mesh)["params"], final)
    own = explicit(
        mc, state["params"], [rows[i] for i in ids[:2]], ("wq", "wv"), Projection(64, 0, "rademacher"), Adam(0.9, 0.95, 1e-8),
        state["mu"], state["nu"],
    )  # fmt: skip
    stored = np.array(features["step_2"].to_pylist())
    np.testing.assert_allclose(stored[:2], own, atol=1e-4 * np.linalg.norm(own, axis=1).min())

    grads = [row_gradient(final, mc, rows[i].input_ids, rows[i].prompt_tokens) for i in ids[:2]]
    norms = [np.sqrt(sum(((g["layers"] | g)[name] ** 2).sum() for name in NORMED)) for g in grads]
    table = {row["id"]: row for row in score.table("scores").to_pylist()}
    np.testing.assert_allclose([table[i]["grand"] for i in ids[:2]], norms, rtol=1e-5)

    known = [
        subtask_directions(np.array(validation[f"step_{s['step']}"].to_pylist()), validation["subtask"].to_pylist()) for s in snapshots
    ]
    found = influence(
        [np.array(features[f"step_{s['step']}"].to_pylist()) for s in snapshots], known, [s["learning_rate"] for s in snapshots]
    )
    np.testing.assert_allclose([table[i]["less"] for i in ids], most_influenced(found), rtol=1e-5)


@pytest.mark.slow
def test_adapters_alone_are_read_where_they_alone_were_trained(tmp_path):
    """As LESS has it: features over the adapters' factors, whose moments a snapshot holds."""
    lora = {"train__lora__rank": 2, "train__lora__targets": ("q_proj", "down_proj"), "train__lora__dropout": 0.1}
    artifacts = run(settings(**lora, score__signals=("less",)), tmp_path, "score")
    score, train = artifacts["score"], artifacts["train:warmup"]
    assert score.facts["less_weights"] == ["wq_a", "wq_b", "w_down_a", "w_down_b"]
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    state = jax.tree.map(np.asarray, restore_snapshot(train, 2, mesh))
    assert sorted(state["mu"]["layers"]) == sorted(score.facts["less_weights"]) and "embed" in state["params"]
    rows = {row.id: row for row in read_rows(artifacts["tokenize"].table("tokens"))}
    ids, stored = (score.table("features")[name].to_pylist()[:2] for name in ("id", "step_2"))
    own = explicit(
        snapshot_model(train), state["params"], [rows[i] for i in ids], score.facts["less_weights"], Projection(64, 0, "rademacher"),
        Adam(0.9, 0.95, 1e-8), state["mu"], state["nu"],
    )  # fmt: skip
    np.testing.assert_allclose(stored, own, atol=1e-4 * np.linalg.norm(own, axis=1).min())
    student = load_student(train, mesh)
    merged = restore_snapshot_params(train, 4, student.mc, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), merged, student.params)


class Killed(RuntimeError):
    pass


def test_resume_repeats_no_chunk_and_other_batches_change_nothing(made, monkeypatch):
    workdir, artifacts = made
    whole = artifacts["score"].table("scores")
    features = artifacts["score"].table("features")
    folder = artifacts["score"].path
    (folder / "manifest.json").unlink()
    real, done = ArtifactWriter.commit_chunk, []

    def dying(self, series, index, table):
        if len(done) == 5:
            raise Killed
        done.append((series, index))
        real(self, series, index, table)

    monkeypatch.setattr(ArtifactWriter, "commit_chunk", dying)
    with pytest.raises(Killed):
        run(settings(), workdir, "score")
    assert {series.split("-")[0] for series, _ in done} >= {"grand", "less"}
    again = []

    def noting(self, series, index, table):
        again.append((series, index))
        real(self, series, index, table)

    monkeypatch.setattr(ArtifactWriter, "commit_chunk", noting)
    resumed = run(settings(), workdir, "score")["score"]
    assert again and not set(again) & set(done)
    assert resumed.table("scores").equals(whole) and resumed.table("features").equals(features)
    (folder / "manifest.json").unlink()
    other = run(settings(score__chunk_rows=7, score__batch_tiles=64), workdir, "score")["score"]
    assert other.table("scores").equals(whole) and other.table("features").equals(features)


def test_settings_of_gradients_matter_only_where_they_are_asked_for(made):
    def identity(config):
        node = pipeline.graph(config, base=False)["score"]
        return config_slice(node.config, node.stage.config_keys)

    assert identity(settings()) != identity(settings(score__gradients__dim=96))
    plain = {"score__signals": ("nll",), "select__steps": ()}
    assert identity(settings(**plain)) == identity(settings(**plain, score__gradients__dim=96))
    nodes = pipeline.graph(settings(), base=False)
    assert nodes["train:warmup"].config.train.snapshots == 2 and nodes["train"].config.train.snapshots == 0


def test_a_trained_student_by_path(made, tmp_path):
    """A train artifact with snapshots serves as well, and must hold as many as are asked for."""
    _, artifacts = made
    path = str(artifacts["train:warmup"].path)
    check(settings(score__student=path))
    with pytest.raises(ConfigError, match=r"checkpoints: 3, but .* holds 2 snapshots"):
        check(settings(score__student=path, score__gradients__checkpoints=3))
    config = json.loads((artifacts["train:warmup"].path / "manifest.json").read_text())["config"]
    assert config["train.snapshots"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score__student": "base"}, ["'less' needs checkpoints", "warmup"]),
        ({"train__optimizer": "muon"}, ["train.optimizer: 'muon'", "'adamw'"]),
        ({"score__gradients__checkpoints": 5}, ["checkpoints: 5", "score.warmup.steps = 4"]),
        ({"score__gradients__checkpoints": 0}, ["checkpoints: 0", "at least 1"]),
        ({"score__gradients__dim": 100}, ["dim: 100", "multiple of 32"]),
        ({"score__gradients__seed": -1}, ["seed: -1"]),
        ({"score__gradients__norm": "goost"}, ["norm: 'goost'", "did you mean 'ghost'"]),
        ({"score__gradients__projection": "sign"}, ["projection: 'sign'", "rademacher, normal"]),
        ({"score__gradients__subset": ("wq", "wb")}, ["subset: 'wb' matches no weight"]),
        ({"score__gradients__subset": ("embed",)}, ["subset: 'embed'", "row per token"]),
        ({"score__gradients__norm_subset": ()}, ["norm_subset: empty"]),
        ({"score__gradients__validation": ({"task": "svmap"},)}, ["validation[0].task", "svamp"]),
        ({"score__gradients__validation": ({"task": "svamp", "split": "test"},)}, ["validation[0].split: 'test'", "evaluation"]),
        ({"score__gradients__validation": ({"task": "svamp", "split": "dev"},)}, ["validation[0].split", "no dev split"]),
        ({"score__gradients__validation": ({"traces": 3}, {"traces": 4})}, ["validation[1]", "second sub-task named 'traces'"]),
        ({"score__gradients__validation": ({"traces": 0},)}, ["validation[0].traces: 0", "at least 1"]),
        ({"score__gradients__validation": ({"rows": 3},)}, ["validation[0]", "is not a sub-task"]),
        ({"score__gradients__validation": ({"task": "svamp", "row": 3},)}, ["validation[0].row", "accepted are task, split, rows"]),
        ({"score__signals": ("nll",)}, ["'less' has no scores"]),
        ({"train__lora__preset": "r16_qv", "score__gradients__subset": ("wq", "wq_a")}, ["subset: wq stayed", "wq_a, wq_b, wv_a, wv_b"]),
        ({"train__snapshots": -1}, ["train.snapshots: -1", "at least 0"]),
    ],
)
def test_what_cannot_work_is_said_before_any_work(changes, words):
    with pytest.raises(ConfigError) as caught:
        check(settings(**changes))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_less_topk_takes_the_maximum_over_subtasks_of_a_groups_mean():
    def group(name, **values):
        return Candidate(name, (name,), 1, True, "", {f"less_{k}": v for k, v in values.items()} | {"less": 0.9})

    pool = [group("a", x=0.1, y=0.5), group("b", x=0.4, y=0.2), group("c", x=0.3, y=0.3), Candidate("d", ("d",), 1, True, "", {})]

    def keep(**step):
        kept, dropped, _ = apply_steps(pool, [{"name": "less_topk", **step}], seed=0, available=["less", "less_x", "less_y"])
        return [c.group_id for c in kept], {d.id: d.reason for d in dropped}

    assert keep(rows=2) == (["a", "b"], {"c": "not_in_less_topk", "d": "no_score_less_x"})
    assert keep(rows=2, tasks=("x",))[0] == ["b", "c"]
    with pytest.raises(ConfigError, match=r"steps\[0\].tasks: 'z' is not one of x, y"):
        keep(rows=2, tasks=("z",))
    with pytest.raises(ConfigError, match=r"steps\[0\].tasks: 'x' must be one or more"):
        keep(rows=2, tasks="x")
