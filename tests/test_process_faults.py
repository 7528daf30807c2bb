"""Real processes that are told to stop, killed or frozen, and the same command afterwards: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import tiny_config

from dccot_jax import pipeline
from dccot_jax.context import Context
from dccot_jax.processes import HEARTBEAT_SECONDS
from dccot_jax.stopping import LOST_PEER, STOPPED
from dccot_jax.train.logs import read_log

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
DEVICES = 4  # of a run, however many processes share them
STEPS = 56
PATIENCE = 900  # seconds: what is noticed by its closed connections is so at once, and a machine that stands still is no fault
CONFIG = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
from dccot_jax import processes
from test_process_faults import config as get_config
processes.HEARTBEAT_SECONDS = int(os.environ["TEST_HEARTBEAT"])
"""


def config():
    """A training of some seconds on the base student's rows; every process of the run has the same mesh."""
    return tiny_config(
        score__signals=(), select__steps=({"name": "teacher_correct"},), curriculum__kind="none", evaluate__base=False,
        evaluate__limit=8, evaluate__max_new_tokens=8, train__steps=STEPS, train__checkpoint_every=16, train__row_tokens=192,
    )  # fmt: skip


class Run:
    """The processes of one attempt at the command."""

    def __init__(self, workdir: Path, processes: int, *, heartbeat: int = PATIENCE):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes} --xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TEST_HEARTBEAT": str(heartbeat),
        }
        command = [
            sys.executable,
            "-m",
            "dccot_jax",
            "run",
            f"--config={workdir.parent / 'config.py'}",
            f"--workdir={workdir}",
            "--until=train",
        ]
        if processes > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
        self.workdir = workdir
        self.logs = [workdir.parent / f"{workdir.name}-{time.monotonic_ns()}-{index}.txt" for index in range(processes)]
        self.processes = []
        for index, log in enumerate(self.logs):
            own = [f"--process_id={index}"] if processes > 1 else []
            with log.open("w") as file:
                self.processes.append(subprocess.Popen([*command, *own], env=environment, stdout=file, stderr=subprocess.STDOUT))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def reach(self, step: int) -> None:
        """Wait until the log has a step."""
        while _last_step(self.workdir) < step:
            assert all(process.poll() is None for process in self.processes), self.text()
            time.sleep(0.02)

    def end(self, timeout: float = 1500) -> list[int]:
        return [process.wait(timeout) for process in self.processes]

    def text(self, index: int | None = None) -> str:
        return "\n".join(log.read_text()[-3000:] for log in (self.logs if index is None else [self.logs[index]]))


def _train_dir(workdir: Path) -> Path:
    return next(iter((workdir / "artifacts").glob("train-*")), workdir / "none")


def _last_step(workdir: Path) -> int:
    lines = read_log(_train_dir(workdir))
    return lines[-1]["step"] if lines else 0


def _finish(workdir: Path, processes: int) -> str:
    """Run the command to its end; the logical hash of the training."""
    codes, text = [], ""
    for _ in range(4):
        with Run(workdir, processes) as run:
            codes, text = run.end(), run.text()
        # JAX ends all processes where the machine stood still for a minute; the same command goes on.
        if not all(code == -signal.SIGABRT for code in codes) or "(stopped sending heartbeats)" not in text:
            break
    assert codes == [0] * processes, text
    return json.loads((_train_dir(workdir) / "manifest.json").read_text())["logical_hash"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A workdir in which only the training is left."""
    root = tmp_path_factory.mktemp("processes")
    (root / "config.py").write_text(CONFIG)
    pipeline.run(config(), Context(root / "planned"), until="plan")
    return root / "planned"


@pytest.fixture(scope="module")
def undisturbed(planned):
    """{processes: (workdir, logical hash)} of trainings that were left alone."""
    found = {}
    for processes in (1, 2):
        workdir = planned.parent / f"alone-{processes}"
        shutil.copytree(planned, workdir)
        found[processes] = (workdir, _finish(workdir, processes))
    return found


@pytest.fixture
def workdir(planned, request):
    path = planned.parent / request.node.name.replace("[", "-").replace("]", "")
    shutil.copytree(planned, path)
    return path


def _checkpoints(workdir: Path) -> Sequence[int]:
    return sorted(int(path.name) for path in (_train_dir(workdir) / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_process_saves_on_both(undisturbed, workdir, told):
    with Run(workdir, 2) as run:
        run.reach(24)
        run.processes[told].send_signal(signal.SIGTERM)
        assert run.end() == [STOPPED, STOPPED], run.text()
        texts = [run.text(index) for index in (0, 1)]
    saved = _checkpoints(workdir)[-1]
    for text in texts:
        assert f"stopped (training saved after step {saved} of {STEPS}); run the same command again" in text
        assert "Traceback" not in text
    assert ["SIGTERM: stopping at" in text for text in texts] == [index == told for index in (0, 1)]
    assert _finish(workdir, 2) == undisturbed[2][1]


@pytest.mark.parametrize("killed", [0, 1])
def test_sigkill_of_one_ends_the_other_with_a_clear_line(undisturbed, workdir, killed):
    with Run(workdir, 2, heartbeat=HEARTBEAT_SECONDS) as run:  # a closed connection does not reach every wait
        run.reach(24)
        run.processes[killed].kill()
        codes = run.end(timeout=120)
        texts = [run.text(index) for index in (0, 1)]
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] in (LOST_PEER, -signal.SIGABRT), texts
    lines = texts[1 - killed].strip().splitlines()
    assert "another process" in lines[-1] and "the same command on every process goes on" in lines[-1], texts[1 - killed]
    assert f"process {killed} of 0..1 was killed" in texts[killed].strip().splitlines()[-1]
    assert _finish(workdir, 2) == undisturbed[2][1]


@pytest.mark.parametrize("filled", [0, 1])
def test_a_disk_full_for_one_process_ends_both_and_leaves_the_checkpoint_before(undisturbed, workdir, filled):
    """A limit on the size of files stands in for the disk."""
    with Run(workdir, 2, heartbeat=25) as run:
        run.reach(20)
        resource.prlimit(run.processes[filled].pid, resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        codes = run.end(timeout=180)
        texts = [run.text(index) for index in (0, 1)]
    assert codes[filled] == 2 and codes[1 - filled] in (LOST_PEER, -signal.SIGABRT), texts
    assert "checkpoint 32 could not be written (File too large); checkpoint 16 is whole. Make room" in texts[filled], texts[filled]
    assert "Traceback" not in texts[filled]
    assert 16 in _checkpoints(workdir)
    assert _finish(workdir, 2) == undisturbed[2][1]


def test_a_process_that_falls_silent_ends_the_other_within_two_minutes(workdir):
    with Run(workdir, 2, heartbeat=HEARTBEAT_SECONDS) as run:
        run.reach(24)
        run.processes[1].send_signal(signal.SIGSTOP)
        code = run.processes[0].wait(120)
        assert code in (LOST_PEER, -signal.SIGABRT)
        assert "another process" in run.text(0).strip().splitlines()[-1], run.text(0)


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_at_the_same_place_in_the_data(undisturbed, workdir, counts):
    before, after = counts
    with Run(workdir, before) as run:
        run.reach(40)
        run.processes[-1].send_signal(signal.SIGTERM)
        assert run.end() == [STOPPED] * before, run.text()
    _finish(workdir, after)
    moved, alone = read_log(_train_dir(workdir)), read_log(_train_dir(undisturbed[1][0]))
    for name in ("step", "epoch", "tokens", "trained_tokens"):  # every step saw the rows that it sees on one process
        assert [line[name] for line in moved] == [line[name] for line in alone]
    for left, right in zip(moved, alone, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=5e-3, abs=5e-4)


# --- stages in which the processes wait for each other ------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["traces", "verify", "score", "evaluate"])
def test_every_stage_stops_on_both(tmp_path, stage):
    """Asked where it is hardest: of work that process 0 does alone on process 0, else on process 1 only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, str(tmp_path), str(port), stage]
    started = [
        subprocess.Popen([*command, str(index)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=1500) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    reports = [json.loads(text.splitlines()[-1]) for text, _ in outputs]
    for report in reports:
        assert report["stopped"].startswith(stage) and report["hashes"] == reports[0]["hashes"]
        assert report["repeated"] == 0


def _worker(workdir: Path, port: int, stage: str, index: int) -> None:
    """One process: a run that is stopped in `stage`, then the same run to the end."""
    from collections import Counter

    import jax

    from dccot_jax import processes
    from dccot_jax.artifact import ArtifactWriter
    from dccot_jax.config import override
    from dccot_jax.evaluate import stage as evaluate
    from dccot_jax.select import verify
    from dccot_jax.stopping import Stopped
    from dccot_jax.teachers.cache import RequestCache

    processes.HEARTBEAT_SECONDS = PATIENCE
    processes.join(f"127.0.0.1:{port}", 2, index)
    verify.CHUNK_ROWS = 20
    ctx = Context(workdir, process_index=index, process_count=2)
    made: Counter[object] = Counter()
    commit, put, greedy = ArtifactWriter.commit_chunk, RequestCache.put, evaluate.greedy

    def counting_commit(self, series, number, table):
        made[self.path.name, series, number] += 1
        commit(self, series, number, table)
        if self.path.name.startswith(stage) and (stage == "verify" or index == 1):
            ctx.stop.ask("test")

    def counting_put(self, teacher, key, request, response):
        made[key] += 1
        put(self, teacher, key, request, response)
        if stage == "traces":
            ctx.stop.ask("test")

    def asking_greedy(*args, **kwargs):
        if stage == "evaluate" and index == 1:
            ctx.stop.ask("test")
        return greedy(*args, **kwargs)

    ArtifactWriter.commit_chunk, RequestCache.put, evaluate.greedy = counting_commit, counting_put, asking_greedy  # type: ignore[assignment]
    settings = {"score.signals": ("nll",), "score.student": "base", "train.steps": 4, "evaluate.max_new_tokens": 8, "evaluate.base": False}
    cfg = override(config(), settings)
    stopped = ""
    try:
        pipeline.run(cfg, ctx, until=stage)
    except Stopped as error:
        stopped = str(error)
    pipeline.run(cfg, Context(workdir, process_index=index, process_count=2), until=stage)
    hashes = {path.parent.name: json.loads(path.read_text())["logical_hash"] for path in (workdir / "artifacts").glob("*/manifest.json")}
    print(json.dumps({"stopped": stopped, "hashes": hashes, "repeated": max(made.values(), default=1) - 1}), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
