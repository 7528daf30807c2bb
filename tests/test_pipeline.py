"""The whole loop on the tiny config: everything is made once, a second run does nothing, a change re-runs what hangs on it."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import pytest
from rich.console import Console
from tiny import tiny_config

from dccot_jax import external, pipeline
from dccot_jax.cli import main
from dccot_jax.config import ConfigError, override
from dccot_jax.context import Context
from dccot_jax.records import InputError
from dccot_jax.tasks.registry import get_task, local_files


def _context(path) -> Context:
    return Context(workdir=path, console=Console(file=io.StringIO(), highlight=False, width=200))


def _output(ctx: Context) -> str:
    return ctx.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    ctx = _context(workdir)
    runs = pipeline.run(tiny_config(), ctx)
    return workdir, runs, _output(ctx)


def _manifests(workdir) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in (workdir / "artifacts").glob("*/manifest.json")}


def test_every_stage_wrote_a_manifest_with_counts(finished):
    workdir, runs, output = finished
    assert [run.arm for run in runs] == ["base", "tiny"]
    kinds = {manifest["kind"] for manifest in _manifests(workdir).values()}
    assert kinds == set(pipeline.ORDER) - {"augment", "distill"}
    for name, manifest in _manifests(workdir).items():
        assert manifest["files"] and manifest["versions"]["jax"] and manifest["wall_seconds"] >= 0, name
        if manifest["kind"] in ("verify", "tokenize", "select"):
            assert manifest["rows_in"] - manifest["rows_out"] == sum(manifest["dropped"].values()), name
    assert "config" in output or "report" in output.lower()
    for name in ("results.json", "report.html"):
        assert (workdir / "report" / name).stat().st_size > 0


def test_ids_lead_from_a_plan_row_back_to_the_teacher(finished):
    _, runs, _ = finished
    artifacts = runs[1].artifacts
    traces = {row["id"]: row for row in artifacts["traces"].table("traces").to_pylist()}
    planned = set(artifacts["plan"].table("plan").column("id").to_pylist())
    kept = set(artifacts["select"].table("kept").column("id").to_pylist())
    assert planned and planned <= kept <= set(traces)
    assert all(traces[name]["teacher"] and traces[name]["source"] for name in planned)


def test_second_run_does_no_work_and_says_so(finished):
    workdir, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (workdir / "artifacts").rglob("*") if path.is_file()}
    ctx = _context(workdir)
    pipeline.run(tiny_config(), ctx)
    assert "Nothing to do" in _output(ctx)
    assert before == {path: path.stat().st_mtime_ns for path in (workdir / "artifacts").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "made_again"),
    [
        ({"train__log_every": 5, "score__batch_tiles": 1, "evaluate__batch_rows": 4}, set()),
        ({"evaluate__max_new_tokens": 20, "score__signals": ("nll", "ifd_ppl")}, None),
        ({"train__learning_rate": 2e-3}, {"train:warmup", "score", "select", "plan", "train", "evaluate"}),
        ({"curriculum__stages": 4}, {"plan", "train", "evaluate"}),
    ],
)
def test_one_changed_value_reruns_only_what_depends_on_it(finished, tmp_path, changes, made_again):
    workdir, _, _ = finished
    store = pipeline.Store(workdir / "artifacts")

    def identities(config):
        found = {}
        done = {}
        for node in pipeline.graph(config, base=True).values():
            inputs = {role: done[name] for role, name in node.inputs.items() if name in done}
            if len(inputs) < len(node.inputs):
                continue
            identity, _, _ = pipeline._identity(node, inputs)
            found[node.name] = identity
            artifact = store.find(node.name, identity)
            if artifact is not None:
                done[node.name] = artifact
        return found, done

    config = tiny_config(**changes)
    _, old = identities(tiny_config())
    _, new = identities(config)
    missing = set(old) - set(new)
    if made_again is None:  # evaluation and everything scored depend on it, training data do not
        assert {"evaluate", "evaluate:base"} <= missing
        assert not missing & {"student", "traces", "verify", "tokenize", "train:warmup"}
    else:
        assert missing == made_again


def test_until_and_only(tmp_path):
    ctx = _context(tmp_path)
    pipeline.run(tiny_config(evaluate__base=False), ctx, until="verify")
    assert {manifest["kind"] for manifest in _manifests(tmp_path).values()} == {"student", "traces", "verify"}
    pipeline.run(tiny_config(evaluate__base=False), _context(tmp_path), only="tokenize")
    assert "tokenize" in {manifest["kind"] for manifest in _manifests(tmp_path).values()}
    with pytest.raises(ConfigError, match="has not been made"):
        pipeline.run(tiny_config(evaluate__base=False), _context(tmp_path), only="train")
    with pytest.raises(ConfigError, match="no such stage"):
        pipeline.run(tiny_config(), _context(tmp_path), until="trian")


def test_only_the_stage_asked_for_complains(tmp_path):
    config = tiny_config(evaluate__base=False)
    pipeline.run(config, _context(tmp_path), until="verify")
    ctx = _context(tmp_path)
    pipeline.run(config, ctx, only="tokenize")
    assert "train" not in _output(ctx) and "has not been made" not in _output(ctx)
    with pytest.raises(ConfigError, match="augment: no arm of this config has this stage; they have student, traces, verify"):
        pipeline.run(config, ctx, only="augment")


def test_an_unfinished_run_does_not_replace_a_finished_record(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = {name: (workdir / name).read_bytes() for name in ("runs.json", "config.json", "report/results.json", "report/report.html")}

    def unchanged(*names: str) -> bool:
        return all((workdir / name).read_bytes() == before[name] for name in names)

    ctx = _context(workdir)
    pipeline.run(tiny_config(train__steps=3), ctx, until="student")
    assert "Not finished" in _output(ctx) and unchanged(*before)

    (workdir / "runs.json").unlink()
    pipeline.run(tiny_config(train__steps=3), _context(workdir), until="student")
    capsys.readouterr()
    assert main(["report", f"--workdir={workdir}"]) == 2
    assert "nothing to report" in capsys.readouterr().err
    assert unchanged("report/results.json", "report/report.html")


@pytest.mark.parametrize("text", ['[{"arm": "ti', "{}", "[1]", b"\xff\xfe"])
def test_a_damaged_record_is_one_line_that_names_it(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "runs.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{tmp_path}/runs.json: damaged" in said and len(said.splitlines()) == 1


def test_damaged_artifact_is_reported_and_made_again(finished, tmp_path):
    ctx = _context(tmp_path)
    config = tiny_config(evaluate__base=False)
    pipeline.run(config, ctx, until="traces")
    (path,) = (tmp_path / "artifacts").glob("traces-*/traces.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ctx = _context(tmp_path)
    pipeline.run(config, ctx, until="traces")
    assert "damaged" in _output(ctx) and "traces.parquet" in _output(ctx)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"traces__task": "synth_arithmetik"}, ["synth_arithmetik", "synth_arithmetic"]),
        ({"evaluate__iid": ("svmap",)}, ["svmap", "svamp"]),
        ({"score__signals": ("iffd_loss",)}, ["iffd_loss", "ifd_loss"]),
        ({"select__steps": ({"name": "tpo", "signal": "nll"},)}, ["tpo", "top"]),
        ({"select__steps": ({"name": "top", "signal": "entropy", "rows": 3},)}, ["entropy", "score.signals"]),
        ({"traces__teachers": ({"kind": "replya"},)}, ["replya", "replay"]),
        ({"curriculum__kind": "staged", "curriculum__difficulty": "entropy"}, ["entropy", "score.signals"]),
    ],
)
def test_names_that_cannot_work_fail_before_any_work(tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        pipeline.run(tiny_config(**changes), _context(tmp_path))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "artifacts").exists()


def test_report_can_be_made_again_from_a_workdir(finished, capsys):
    workdir, _, _ = finished
    (workdir / "report" / "results.json").unlink()
    assert main(["report", f"--workdir={workdir}"]) == 0
    assert json.loads((workdir / "report" / "results.json").read_text())["results"]
    assert main(["report", f"--workdir={workdir / 'nothing'}"]) == 2
    assert "runs.json" in capsys.readouterr().err


def test_empty_selection_is_a_clear_error(tmp_path):
    config = tiny_config(score__signals=("nll",), select__steps=({"name": "threshold", "signal": "nll", "max": -1.0},))
    with pytest.raises(InputError, match=r"threshold.*kept 0 of"):
        pipeline.run(config, _context(tmp_path))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_local_files_are_hashed_under_either_name(tmp_path, ending):
    """Identities see the file that is read: plain or .gz, declared or <task>/<split>.jsonl."""
    replayed = ({"kind": "replay", "name": "t", "files": ("r.jsonl",)},)
    cfg = tiny_config(data_dir=str(tmp_path), traces__task="math500", evaluate__iid=("math500",), evaluate__ood=("openbookqa", "aqua"))
    cfg = override(cfg, {"traces.teachers": replayed, "evaluate.cross": ("boolq",)})
    hub_only = dataclasses.replace(get_task("boolq"), local_files=())
    assert external.task_files(cfg) == {} == local_files(hub_only, tmp_path)
    for task in ("math500", "aqua", "boolq"):
        (tmp_path / task).mkdir()
        (tmp_path / task / f"test{ending}").write_text(task)
    (tmp_path / "r.jsonl").write_text("rows")
    before = external.task_files(cfg)
    assert sorted(before) == [f"file:{task}/test{ending}" for task in ("aqua", "boolq", "math500")]
    assert local_files(hub_only, tmp_path) == {f"boolq/test{ending}": tmp_path / "boolq" / f"test{ending}"}
    assert sorted(external.trace_files(cfg)) == [f"file:math500/test{ending}", "file:r.jsonl"]
    (tmp_path / "boolq" / f"test{ending}").write_text("other rows")
    after = external.task_files(cfg)
    assert {name for name in after if after[name] != before[name]} == {f"file:boolq/test{ending}"}


def test_a_student_counts_by_what_its_file_holds(tmp_path):
    cfg = tiny_config(student__path=str(tmp_path / "student.gguf"))
    assert external.student_files(cfg) == {}
    found = []
    for data in (b"GGUF1", b"GGUF22", b"GGUF1"):
        (tmp_path / "student.gguf").write_bytes(data)
        found.append(external.student_files(cfg))
    assert found[0] == found[2] != found[1] and list(found[0]) == ["path:student.gguf"]
