"""Requests to stop: signals, safe points, exit codes, and stages that go on from their chunks."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tiny import tiny_config

from dccot_jax import cli, pipeline, processes
from dccot_jax.artifact import ArtifactError, ArtifactWriter, write_atomic
from dccot_jax.command_errors import path_problem
from dccot_jax.context import Context
from dccot_jax.stopping import LOST_PEER, STOPPED, Stopped, StopRequest
from dccot_jax.teachers.cache import RequestCache

ROOT = Path(__file__).resolve().parent.parent


def test_the_first_signal_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().on_signals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_safe_points_of_one_process(tmp_path):
    ctx = Context(tmp_path)
    ctx.stop_point("here")
    ctx.stop_alone("here")
    ctx.stop.ask("test")
    ctx.barrier("no safe point")
    for point in (ctx.stop_point, ctx.stop_alone):
        with pytest.raises(Stopped, match="here") as stopped:
            point("here")
        assert stopped.value.agreed


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            Stopped("training saved after step 3 of 9", agreed=True),
            STOPPED,
            "stopped (training saved after step 3 of 9); run the same command",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log"), 2, "log: No space left on device; make room"),
        (ArtifactError("torn"), 2, "dccot run: torn"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(tmp_path, monkeypatch, capsys, error, code, line):
    def end(_console):
        raise error

    monkeypatch.setitem(cli.VERBS, "run", end)
    assert cli.main(["run"]) == code
    printed = capsys.readouterr().err
    assert line in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("file", "--workdir={}: exists and is not a directory"),
        ("file/x", "--workdir={}: Not a directory"),
        ("/proc/foo", "--workdir=/proc/foo: No such file or directory"),
    ],
)
def test_a_workdir_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, given, said):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / given

    def run(_config, ctx, **_):
        raise AssertionError("not reached")

    monkeypatch.setattr(pipeline, "run", run)
    assert cli.main(["run", f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--workdir={workdir}"]) == 2
    printed = capsys.readouterr().err.strip()
    assert said.format(workdir) in printed and len(printed.splitlines()) == 1


def test_an_error_inside_the_workdir_is_not_hidden(tmp_path):
    paths = {"--workdir=": str(tmp_path)}
    inside = str(tmp_path / "artifacts" / "x.json")
    assert path_problem(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), inside), paths) == ""
    assert path_problem(PermissionError(errno.EACCES, os.strerror(errno.EACCES), inside), paths).endswith(f"Permission denied ({inside})")
    assert path_problem(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/etc/shadow"), paths) == ""
    assert path_problem(OSError("no file named"), paths) == ""


def test_sigterm_during_a_command_ends_it_with_75(tmp_path, monkeypatch, capsys):
    def run(_config, ctx, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        ctx.stop_point("after something")

    monkeypatch.setattr(pipeline, "run", run)
    config = tmp_path / "config.py"
    config.write_text("from dccot_jax.config import default_config\n\n\ndef get_config():\n    return default_config()\n")
    assert cli.main(["run", f"--config={config}", f"--workdir={tmp_path / 'w'}"]) == STOPPED
    assert "stopped (after something)" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.parquet"
    write_atomic(path, b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"table\.parquet: No space left on device; make room"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [item.name for item in tmp_path.iterdir()] == ["table.parquet"]


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{last stage: a workdir} of runs that were left alone; made when asked for."""

    @functools.cache
    def make(until):
        workdir = tmp_path_factory.mktemp(until)
        pipeline.run(_config(), Context(workdir), until=until)
        return workdir

    return make


def _config():
    """Scored by the base student, in chunks small enough to stop between them; augmented, so that a teacher is asked twice."""
    return tiny_config(
        score__student="base", score__signals=("nll",), score__chunk_rows=8, select__steps=({"name": "teacher_correct"},),
        curriculum__kind="none", evaluate__base=False, evaluate__max_new_tokens=8, train__steps=4,
        augment__methods=("answer",), augment__answers=1,
    )  # fmt: skip


def _hashes(workdir):
    import json

    return {path.parent.name: json.loads(path.read_text())["logical_hash"] for path in (workdir / "artifacts").glob("*/manifest.json")}


SLOW = pytest.mark.slow  # models are compiled


@pytest.mark.parametrize("stage", ["traces", "augment", "verify", pytest.param("score", marks=SLOW), pytest.param("evaluate", marks=SLOW)])
def test_a_stage_ends_at_a_safe_point_and_goes_on_from_its_chunks(finished, tmp_path, monkeypatch, stage):
    alone = finished("evaluate" if stage in ("score", "evaluate") else "verify")
    workdir = tmp_path / "w"
    shutil.copytree(alone, workdir)
    (folder,) = (workdir / "artifacts").glob(f"{stage}-*")
    shutil.rmtree(folder)
    if stage in ("traces", "augment"):
        shutil.rmtree(workdir / "cache")
        pipeline.run(_config(), Context(workdir), until="student")
    ctx = Context(workdir)
    made: Counter[object] = Counter()
    commit, put = ArtifactWriter.commit_chunk, RequestCache.put

    def counting_commit(self, series, index, table):
        made[self.path.name, series, index] += 1
        commit(self, series, index, table)
        ctx.stop.ask("test")

    def counting_put(self, teacher, key, request, response):
        made[key] += 1
        put(self, teacher, key, request, response)
        ctx.stop.ask("test")

    monkeypatch.setattr(ArtifactWriter, "commit_chunk", counting_commit)
    monkeypatch.setattr(RequestCache, "put", counting_put)
    with pytest.raises(Stopped):
        pipeline.run(_config(), ctx, until=stage)
    assert not (folder / "manifest.json").exists() and made
    stopped_after = sum(made.values())
    pipeline.run(_config(), Context(workdir), until=stage)
    assert max(made.values()) == 1, "a chunk or a call was repeated"
    if stage not in ("verify", "score", "evaluate"):  # those have one chunk here
        assert stopped_after < sum(made.values())
    assert _hashes(workdir) == _hashes(alone)


# --- ends that a process does not choose --------------------------------------------------------------------------------


def _python(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300, check=False)


def test_the_watchdog_ends_a_process_that_does_not_move():
    start = ("import time", "from dccot_jax.processes import Watchdog", "with Watchdog(0.4, 'train on process 1') as dog:")
    done = _python(*start, " dog.beat('step 7')", " time.sleep(300)")
    assert done.returncode == LOST_PEER
    assert "train on process 1 has not moved for 0.4 s (last: step 7)" in done.stderr and 'File "<string>", line 5' in done.stderr
    beating = _python(*start, " for step in range(12):", "  time.sleep(0.05)", "  dog.beat('moving')")
    assert beating.returncode == 0


def test_last_words_are_for_those_who_cannot_speak():
    start = ("import os, signal", "from dccot_jax.processes import last_words", "with last_words('process 1 was killed'):")
    killed = _python(*start, " os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL and killed.stderr == "process 1 was killed\n"
    for ending in (" pass", " raise SystemExit(1)"):
        assert _python(*start, ending).stderr == ""


def test_only_errors_of_joined_processes_are_lost_peers(monkeypatch):
    import jax

    closed = ValueError("Gloo AllReduce failed: Connection closed by peer")
    assert not processes.joined() and not processes.is_lost_peer(closed)
    monkeypatch.setattr(processes, "joined", lambda: True)
    for error in (closed, jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer")):
        assert processes.is_lost_peer(error)
    for error in (ValueError("UNAVAILABLE: storage"), ConnectionResetError("Connection reset"), ValueError("wrong")):
        assert not processes.is_lost_peer(error)
