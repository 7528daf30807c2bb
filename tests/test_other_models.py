"""Signals of other models and over time, through the pipeline: they equal separate scorings, and their settings enter identities."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
from reference_decoder import log_softmax, reference_logits
from rich.console import Console
from tiny import tiny_config

from dccot_jax import pipeline
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data.tokenizer import train_tokenizer, write_tokenizer
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh
from dccot_jax.preflight import check
from dccot_jax.report.judges import judges
from dccot_jax.select import trajectories
from dccot_jax.select.tables import read_rows
from dccot_jax.train.checkpoint import export_hf
from dccot_jax.train.snapshots import restore_snapshot_params

SETTINGS = {
    "traces__questions": 24,
    "traces__teachers": ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "noisy"}),
    "curriculum__kind": "none",
    "evaluate__base": False,
    "score__warmup__steps": 9,
    "train__learning_rate": 0.01,
}
OVER_TIME = {"score__signals": ("forgetting", "learning_speed", "s2l"), "score__over_time__snapshots": 3, "score__over_time__learned": 0.1}
S2L = ({"name": "s2l", "vector": "s2l", "clusters": 4, "share": 0.5},)


def run(workdir, **changes):
    """Artifacts of a run up to select."""
    ctx = Context(workdir=workdir, console=Console(file=io.StringIO(), width=200))
    [found] = pipeline.run(tiny_config(**(SETTINGS | {"select__steps": ()} | changes)), ctx, until="select")
    return found


def column(run, name):
    return {row["id"]: row[name] for row in run.artifacts["score"].table("scores").select(["id", name]).to_pylist()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def watched(workdir):
    return run(workdir, **OVER_TIME, select__steps=S2L)


@pytest.fixture(scope="module")
def base_dir(workdir, watched):
    """The untrained student as a Hugging Face directory."""
    export_hf(watched.artifacts["student"], workdir / "hf")
    return workdir / "hf"


@pytest.fixture(scope="module")
def compared(workdir, watched, base_dir):
    changes = {
        "score__signals": ("excess", "judge", "judge_correctness", "proxy_quality", "rho", "teacher_student_gap"),
        "score__student": "base",
        "score__models__holdout": str(watched.artifacts["train:warmup"].path),
        "score__models__teacher": str(watched.artifacts["train:warmup"].path),
        "score__models__reference": str(base_dir),
        "score__judge__judges": ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "noisy"}),
        "select__steps": ({"name": "threshold", "signal": "judge", "min": 8}, {"name": "top", "signal": "rho", "share": 0.5}),
    }
    return run(workdir, **changes)


# --- over time --------------------------------------------------------------------------------------------------------


def test_trajectories_are_the_losses_at_each_snapshot(watched, workdir):
    train = watched.artifacts["train:warmup"]
    assert [s["step"] for s in train.facts["snapshots"]] == [3, 6, 9]
    curve = column(watched, "s2l")
    assert len(curve) > 40 and {len(values) for values in curve.values()} == {3}
    last = column(run(workdir, score__signals=("nll",), score__student=str(train.path)), "nll")
    assert {row: values[-1] for row, values in curve.items()} == last  # to the bit: the same program

    mc = ModelConfig.from_dict(train.json("student")["model"])
    rows = {row.id: row for row in read_rows(watched.artifacts["tokenize"].table("tokens"))}
    accuracy = {}
    for place, step in enumerate((3, 6, 9)):
        params = jax.device_get(restore_snapshot_params(train, step, mc, make_mesh({"fsdp": 1}, jax.devices()[:1])))
        for row in sorted(rows)[:4]:
            z = reference_logits(params, mc, rows[row].input_ids)[rows[row].prompt_tokens - 1 : -1]
            labels = rows[row].input_ids[rows[row].prompt_tokens :]
            nll = -log_softmax(z)[np.arange(len(labels)), labels].mean()
            assert curve[row][place] == pytest.approx(nll, abs=2e-5)
            accuracy.setdefault(row, []).append(np.mean(z.argmax(-1) == labels))
    for row, values in accuracy.items():
        assert column(watched, "learning_speed")[row] == pytest.approx(np.mean(values), abs=1e-6)
        assert column(watched, "forgetting")[row] == trajectories.forgetting_events(values, 0.1)
    assert len(set(column(watched, "learning_speed").values())) > 5


def test_the_selector_s2l_reads_the_trajectories(watched):
    select = watched.artifacts["select"]
    kept, all_rows = select.table("kept").num_rows, watched.artifacts["tokenize"].table("tokens").num_rows
    assert kept == all_rows // 2 and set(select.manifest["dropped"]) == {"not_in_s2l"}


@pytest.mark.parametrize(
    "accuracy, events",
    [
        ([0, 0.9, 0.2, 0.8, 0.79, 1.0], 2),  # learned three times, lost twice
        ([0.9, 0.9, 0.9], 0),
        ([0.1, 0.5, 0.9], 0),
        ([0.9, 0.5, 0.1], 1),
        ([0.9, 0.1, 0.9, 0.1], 2),
        ([0.1, 0.79, 0.3], 3),  # never learned: as often as it was looked at
        ([np.float32(0.8), np.float32(0.7)], 1),
    ],
)
def test_forgetting_counts_the_flips_from_learned_to_not(accuracy, events):
    assert trajectories.forgetting_events(accuracy, 0.8) == events


def test_a_loss_that_is_not_finite_is_no_score():
    assert np.isnan(trajectories.forgetting_events([0.9, np.nan], 0.8)) and np.isnan(trajectories.learning_speed([0.9, np.nan]))


# --- other models -----------------------------------------------------------------------------------------------------


def test_differences_equal_separate_scorings(compared, watched, workdir):
    base = column(run(workdir, score__signals=("nll",), score__student="base"), "nll")
    warm = column(run(workdir, score__signals=("nll",), score__student=str(watched.artifacts["train:warmup"].path)), "nll")
    rho = column(compared, "rho")
    assert len(rho) > 40 and rho == {row: float(np.float32(base[row] - warm[row])) for row in base}
    assert min(rho.values()) > 0.5  # the untrained student can learn a lot
    assert column(compared, "teacher_student_gap") == rho
    assert set(column(compared, "excess").values()) == {0.0}  # the same weights from a Hugging Face directory
    facts = compared.artifacts["score"].facts
    assert facts["other_models"]["reference"]["model"].endswith("hf") and facts["signals"] == sorted(compared.config["score"]["signals"])


def test_a_judge_selects_and_its_agreement_is_reported(compared):
    traces = {row["id"]: row for row in compared.artifacts["verify"].table("traces").to_pylist()}
    correctness = column(compared, "judge_correctness")
    assert all(grade >= 6 for row, grade in correctness.items() if traces[row]["verdict"])
    assert min(correctness.values()) < 10 and set(column(compared, "proxy_quality").values()) <= {2.0, 3.0, 4.0, 5.0, 6.0}
    grades, dropped = column(compared, "judge"), compared.artifacts["select"].table("dropped").to_pylist()
    assert (
        {row["id"] for row in dropped if row["reason"] == "judge_below_min"} == {row for row, grade in grades.items() if grade < 8} != set()
    )
    [entry] = judges([compared])
    assert entry["arms"] == [compared.arm]
    [pair] = entry["rubrics"]["judge"]["agreement"]
    assert pair["judges"] == ["scripted-verbose", "scripted-noisy"] and pair["criteria"]["clarity"]["equal"] == 1.0
    assert -1 <= pair["criteria"]["correctness"]["kappa"] < 1
    lines = compared.artifacts["score"].file("judgements.jsonl").read_text().splitlines()
    assert len(lines) == 4 * len(correctness) and set(json.loads(lines[0])) >= {"id", "judge", "grades", "explanation", "attempts"}


def test_rows_beyond_the_other_models_positions_are_dropped(workdir, base_dir, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    for file in base_dir.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 90}))
    found = run(workdir, score__signals=("excess",), score__student="base", score__models__reference=str(short))
    rows = {row.id: len(row.input_ids) for row in read_rows(found.artifacts["tokenize"].table("tokens"))}
    long = {row for row, length in rows.items() if length > 90}
    lost = {row["id"]: row for row in found.artifacts["score"].table("dropped").to_pylist()}
    assert 0 < len(long) < len(rows) and set(lost) == long and set(column(found, "excess")) == set(rows) - long
    assert all(row["reason"] == "exceeds_positions" and "short has 90 positions" in row["detail"] for row in lost.values())


# --- settings and identity --------------------------------------------------------------------------------------------


def identities(**changes):
    found = {}
    for node in pipeline.graph(tiny_config(**(SETTINGS | changes)), base=False).values():
        inputs = {}
        found[node.name] = pipeline._identity(node, inputs)[0]
    return found


def test_settings_count_where_a_signal_reads_them(watched, base_dir, tmp_path):
    plain = identities()
    for changes in (
        {"score__over_time__learned": 0.5},
        {"score__judge__retries": 7},
        {"score__gradients__dim": 64},
        {"score__models__holdout": str(base_dir)},
    ):
        assert identities(**changes) == plain
    over = identities(**OVER_TIME)
    assert identities(**OVER_TIME | {"score__over_time__learned": 0.2})["score"] != over["score"]
    more = identities(**OVER_TIME | {"score__over_time__snapshots": 2})
    assert more["score"] != over["score"] and more["train:warmup"] != over["train:warmup"] != plain["train:warmup"]
    judge = {"score__signals": ("judge",), "score__judge__judges": ({"kind": "scripted", "style": "noisy"},)}
    assert identities(**judge | {"score__judge__retries": 7})["score"] != identities(**judge)["score"]

    # another model counts by what it is, not by where it is
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    rho = [identities(score__signals=("rho",), score__models__holdout=str(path))["score"] for path in (base_dir, copy)]
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    other = identities(score__signals=("rho",), score__models__holdout=str(copy))["score"]
    trained = identities(score__signals=("rho",), score__models__holdout=str(watched.artifacts["train:warmup"].path))["score"]
    assert rho[0] == rho[1] and len({rho[0], other, trained}) == 3


def test_another_tokenizer_is_refused_before_any_work(base_dir, tmp_path):
    for file in base_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    check(tiny_config(score__signals=("rho",), select__steps=(), score__models__holdout=str(base_dir)))
    write_tokenizer(tmp_path, train_tokenizer(["another text"] * 9, vocab_size=300))
    with pytest.raises(ConfigError) as caught:
        check(tiny_config(score__signals=("rho",), select__steps=(), score__models__holdout=str(tmp_path)))
    assert all(word in str(caught.value) for word in ("score.models.holdout", str(tmp_path), "both models must share the tokenizer"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score__signals": ("excess",)}, ["score.models.reference: empty", "'excess'", "train artifact or a Hugging Face directory"]),
        ({"score__signals": ("rho",), "score__models__holdout": "nowhere"}, ["score.models.holdout", "nowhere", "neither an artifact"]),
        ({"score__signals": ("deita_quality",), "score__deita__quality_model": "nowhere"}, ["score.deita.quality_model", "nowhere"]),
        ({"score__signals": ("s2l",), "score__student": "base"}, ["score.signals: 's2l'", "'warmup'", "train.snapshots"]),
        ({"score__signals": ("s2l",), "score__over_time__snapshots": 1}, ["score.over_time.snapshots: 1", "at least 2"]),
        ({"score__signals": ("s2l",), "score__over_time__snapshots": 5}, ["over_time.snapshots: 5", "score.warmup.steps = 4"]),
        (
            {"score__signals": ("less", "s2l"), "score__over_time__snapshots": 3, "train__optimizer": "adamw"},
            ["score.gradients.checkpoints: 4 and config.score.over_time.snapshots: 3", "the same number"],
        ),
        ({"score__signals": ("forgetting",), "score__over_time__learned": 0.0}, ["score.over_time.learned: 0.0", "(0, 1]"]),
        ({"score__signals": ("rho", "s2l"), "select__steps": ({"name": "top", "signal": "s2l", "rows": 5},)}, ["s2l"]),
    ],
)
def test_settings_that_cannot_work_say_so(changes, words):
    with pytest.raises(ConfigError) as caught:
        check(tiny_config(**({"select__steps": ()} | changes)))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_train_artifact_must_hold_the_snapshots(watched):
    path = str(watched.artifacts["train:warmup"].path)
    check(tiny_config(**OVER_TIME, select__steps=S2L, score__student=path))
    with pytest.raises(ConfigError, match=r"over_time.snapshots: 4, but .* holds 3 snapshots"):
        check(tiny_config(**OVER_TIME | {"score__over_time__snapshots": 4}, select__steps=S2L, score__student=path))
