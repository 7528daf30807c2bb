"""`dccot doctor`: says what is there, and one line for each thing that is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from dccot_jax import cli
from dccot_jax.doctor import examine, storage
from dccot_jax.doctor.examine import Host
from dccot_jax.doctor.findings import problems
from dccot_jax.doctor.lines import spell
from dccot_jax.doctor.storage import Storage, probe

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.0)


def test_one_process(tmp_path, capsys):
    assert cli.main(["doctor", f"--config={QUICKSTART}", f"--workdir={tmp_path / 'new'}"]) == 0
    out, err = capsys.readouterr()
    assert not err
    for fact in (f"{jax.device_count()} × cpu", socket.gethostname(), "write, read, delete", jax.__version__, "orbax-checkpoint"):
        assert fact in out
    assert f"mesh: data 1 × fsdp {jax.device_count()} × tensor 1 = {jax.device_count()} device(s)" in out
    assert not list((tmp_path / "new").iterdir())  # nothing is left behind


def test_nothing_is_needed(capsys):
    assert cli.main(["doctor"]) == 0
    assert "mesh:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--workdir={tmp}/file/x"], "workdir: no writing on host 0: [Errno 20] Not a directory: '{tmp}/file/x'"),
        ([f"--config={QUICKSTART}", "--config.mesh.data=3"], "config.mesh: 8 devices cannot be split by {mesh} (on host 0)"),
        ([f"--config={QUICKSTART}", "--config.student.path=/nowhere"], "config.student.path: '/nowhere' is not a Hugging Face directory"),
    ],
)
def test_one_line_and_exit_code_1(arguments, line, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("dccot doctor: " + line.format(tmp=tmp_path, mesh="{'data': 3, 'fsdp': -1, 'tensor': 1}"))


def test_broken_collectives(monkeypatch, capsys):
    def broken() -> float:
        raise RuntimeError("NCCL says\nno")

    monkeypatch.setattr(examine, "_sum_over_devices", broken)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "dccot doctor: collectives: NCCL says no (on host 0)\n"
    monkeypatch.setattr(examine, "_sum_over_devices", lambda: 7.0)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "dccot doctor: collectives: the sum of a one from each of 8 devices is 7 on host 0\n"


def test_hosts_that_cannot_exchange_data(monkeypatch, capsys):
    def broken(_: Any) -> list[Any]:
        raise RuntimeError("connection closed")

    monkeypatch.setattr(examine, "gather", broken)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "dccot doctor: host 0 cannot exchange data with the others: connection closed\n"


def test_no_cluster_to_join(monkeypatch, capsys):
    def initialize(**_) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert cli.main(["doctor", "--distributed"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--distributed: no cluster detected" in err and "--coordinator=HOST:PORT" in err


WELL = [
    Host(
        index=i, name=f"n{i}", kinds={"TPU v5": 4}, memory=[1], versions={"python": "3.12", "jax": "0.12"}, device_sum=16, storage=Storage()
    )
    for i in range(4)
]


def test_no_findings_among_equals():
    assert problems(WELL) == []
    assert problems([dataclasses.replace(WELL[0], versions={"python": "3.11", "jax": "0.12"}), *WELL[1:]]) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"versions": {"jax": "0.11"}}, "jax: 0.12 on hosts 0, 2-3, 0.11 on host 1; they must be equal"),
        ({"versions": {}}, "jax: 0.12 on hosts 0, 2-3, none on host 1; they must be equal"),
        ({"kinds": {"TPU v4": 4}}, "device kinds: TPU v5 on hosts 0, 2-3, TPU v4 on host 1; they must be equal"),
        ({"device_sum": 12}, "collectives: the sum of a one from each of 16 devices is 12 on host 1"),
        ({"config": "config.student.path: no"}, "config.student.path: no (on host 1)"),
        ({"storage": Storage(write="read-only")}, "workdir: no writing on host 1: read-only"),
        ({"storage": Storage(delete="denied")}, "workdir: no deleting on host 1: denied"),
        (
            {"storage": Storage(unseen=(0, 2, 3))},
            "workdir: not shared: host 1 cannot see what hosts 0, 2-3 wrote; give the path of a disk that all hosts mount, or gs://BUCKET/PATH",
        ),
    ],
)
def test_one_host_differs(change, line):
    hosts = [dataclasses.replace(host, **change) if host.index == 1 else host for host in WELL]
    assert problems(hosts) == [line]


def test_a_lost_device_is_named():
    hosts = [*WELL[:3], dataclasses.replace(WELL[3], kinds={"TPU v5": 3}, device_sum=15)]
    assert problems([dataclasses.replace(host, device_sum=15) for host in hosts]) == [
        "devices per host: 4 on hosts 0-2, 3 on host 3; they must be equal"
    ]


def test_hosts_are_spelled_as_ranges():
    assert [spell([3]), spell([1, 0]), spell([5, 0, 2, 3])] == ["host 3", "hosts 0-1", "hosts 0, 2-3, 5"]


def _probe_on(*workdirs: Path) -> list[Storage]:
    """`probe` on as many hosts as workdirs, each a thread; `gather` waits for all of them."""
    barrier, given, found = threading.Barrier(len(workdirs), timeout=20), {}, {}

    def host(index: int) -> None:
        def gather(value: Any) -> list[Any]:
            given[index] = json.loads(json.dumps(value))
            barrier.wait()
            values = [given[other] for other in range(len(workdirs))]
            barrier.wait()
            return values

        found[index] = probe(epath.Path(workdirs[index]), index, gather)

    threads = [threading.Thread(target=host, args=(index,)) for index in range(len(workdirs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(workdirs))]


def test_shared_workdir(tmp_path):
    assert _probe_on(tmp_path / "w", tmp_path / "w", tmp_path / "w") == [Storage()] * 3
    assert list((tmp_path / "w").iterdir()) == []


def test_second_host_sees_another_directory(tmp_path):
    assert _probe_on(tmp_path / "a", tmp_path / "b") == [Storage(unseen=(1,)), Storage(unseen=(0,))]
    assert list((tmp_path / "a").iterdir()) == list((tmp_path / "b").iterdir()) == []


def test_host_that_cannot_write_is_not_reported_as_unseen(tmp_path):
    (tmp_path / "file").write_text("")
    first, second = _probe_on(tmp_path / "w", tmp_path / "file" / "w")
    assert first == Storage()
    assert "Not a directory" in second.write and second.unseen == (0,)


def test_files_that_stay_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(type(epath.Path(tmp_path)), "unlink", lambda self: None)
    assert "is still there after its deletion" in _probe_on(tmp_path)[0].delete


@pytest.mark.slow
def test_two_processes_with_different_workdirs(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dccot_jax.doctor", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*command, f"--process_id={i}", f"--workdir={tmp_path / str(i)}"], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True
        )
        for i in range(2)
    ]
    try:
        (out, err), (silent, _) = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [1, 1]
    findings = [line for line in err.splitlines() if line.startswith("dccot doctor: ")]
    assert len(findings) == 2 and all("workdir: not shared" in line for line in findings), err
    assert out.count("2 × cpu") == 2 and out.count("failed") == 2
    assert "cpu" not in silent  # only the main host prints
