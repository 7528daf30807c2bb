"""The command export-traces: which traces of a run it writes, as which user messages, and what it refuses."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_config

from dccot_jax import pipeline
from dccot_jax.cli import main
from dccot_jax.context import Context
from dccot_jax.formats import import_records
from dccot_jax.records import table_to_traces
from dccot_jax.run_record import load_runs
from dccot_jax.tasks.registry import build_prompt, get_task

NOISY = ({"kind": "scripted", "style": "noisy"},)
ARMS = (
    {"name": "all", "select.steps": ()},
    {"name": "right", "select.steps": ({"name": "teacher_correct"},)},
    {"name": "some", "select.steps": ({"name": "random", "share": 0.5},)},
    {"name": "bare", "select.steps": (), "tokens.train_suffix": False},
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    changes = {"score__signals": (), "curriculum__kind": "none", "evaluate__base": False, "traces__teachers": NOISY}
    pipeline.run(tiny_config(arms=ARMS, seeds=(0, 1), **changes), Context(workdir=path), until="select")
    return path


@pytest.fixture
def export(workdir, tmp_path, capsys):
    """Runs the command; returns the rows it wrote, or the one line it complained with."""

    def call(*arguments, out="t.jsonl", **given):
        flags = {"workdir": workdir, "format": "messages", "out": tmp_path / out, **given}
        code = main(["export-traces", *(f"--{name}={value}" for name, value in flags.items() if value is not None), *arguments])
        said = capsys.readouterr().err.strip()
        if code == 0:
            rows = [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]
            assert said.endswith(f"{len(rows)} rows")
            (tmp_path / out).unlink()
            return rows
        assert code == 2 and "\n" not in said and not (tmp_path / out).exists()
        return said

    return call


def artifacts(workdir, arm, seed=0):
    return next(run.artifacts for run in load_runs(workdir)[1] if (run.arm, run.seed) == (arm, seed))


def test_the_kept_traces_of_an_arm_are_the_default(export, workdir):
    found = artifacts(workdir, "right")
    kept = set(found["select"].table("kept")["id"].to_pylist())
    verified = table_to_traces(found["verify"].table("traces"))
    rows = export("--arm=right")  # the same for both seeds
    assert 0 < len(kept) < len(verified) and {trace.id for trace in verified if trace.verdict} == kept
    assert [row["trace_id"] for row in rows] == [trace.id for trace in verified if trace.id in kept]
    by_id = {trace.id: trace for trace in verified}
    for row in rows:
        trace = by_id[row["trace_id"]]
        prompt = build_prompt(get_task(trace.task), trace.question, trace.choices)
        assert row["messages"] == [{"role": "user", "content": prompt}, {"role": "assistant", "content": trace.target}]
    assert [row["messages"][0]["content"] for row in export("--arm=bare")] == [trace.question for trace in verified]


def test_a_choice_is_asked_for_only_where_it_matters(export, workdir):
    said = export("--arm=some")  # seeds differ
    assert "some/0, some/1 are not the same" in said
    for seed in (0, 1):
        kept = artifacts(workdir, "some", seed)["select"].table("kept")["id"].to_pylist()
        assert sorted(row["trace_id"] for row in export(f"--arm=some/{seed}")) == kept
    assert "--arm" in export() and "right/1" in export()
    assert "--arm=" in export(stage="traces")  # one artifact, but arm `bare` is trained with other prompts
    assert len(export("--arm=some", stage="traces")) == len(artifacts(workdir, "all")["traces"].table("traces"))
    assert len(export("--arm=right", stage="verify")) == 48


@pytest.mark.parametrize("kind", ["prompt_completion", "sharegpt", "alpaca", "eit", "dccot", "trace"])
def test_every_format_reads_back(workdir, tmp_path, kind):
    path = tmp_path / "t.json.gz"
    assert main(["export-traces", f"--workdir={workdir}", f"--format={kind}", f"--out={path}", "--arm=right"]) == 0
    found, traces = import_records(path), table_to_traces(artifacts(workdir, "right")["verify"].table("traces"))
    assert found.format == kind and not found.dropped
    assert {record["target"] for record in found.records} == {trace.target for trace in traces if trace.verdict}


def test_what_cannot_work_is_one_line(export, workdir, tmp_path, capsys):
    assert "--format=csv: must be one of" in export(format="csv") and "sharegpt" in export(format=None)
    assert "--stage=train: must be one of traces, augment, verify, select" in export(stage="train")
    assert "--stage=augment: not made by this run; it has traces, verify, select" in export(stage="augment")
    assert "--arm=rihgt: no such arm in this run; it has all/0, all/1" in export(arm="rihgt")
    assert "no runs.json" in export(workdir=tmp_path / "nothing")
    (tmp_path / "runs.json").write_text("[]")
    (tmp_path / "config.json").write_text("{}")
    assert "an evaluation, which holds no traces" in export(workdir=tmp_path)
    assert "cannot tell what to write" in export(arm="right", out="t.csv")
    assert main(["export-traces", f"--workdir={workdir}", "--format=eit"]) == 2
    assert "--out=FILE is needed" in capsys.readouterr().err
    (tmp_path / "there.jsonl").write_text("mine")
    assert main(["export-traces", f"--workdir={workdir}", "--format=eit", f"--out={tmp_path / 'there.jsonl'}", "--arm=right"]) == 2
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert main(["report", f"--workdir={workdir}", "--arm=right"]) == 2
    assert "--arm goes with export-traces" in capsys.readouterr().err
