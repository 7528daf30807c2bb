"""Runs the tiny config in forked children and kills them; see test_kill_resume.py.

A parent that has imported everything, and has not started JAX's backend, forks one child per attempt, so that an attempt costs
no import time. A child can be told to kill itself in the middle of a file write; otherwise the parent kills it after a delay.
Usage: python kill_driver.py WORKDIR SEED KILLS_PER_STAGE
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(Path(sys.argv[1]) / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import transformers  # noqa: F401  (imported once, before the forks)
from rich.console import Console
from tiny import tiny_config

from dccot_jax import artifact, pipeline
from dccot_jax.context import Context
from dccot_jax.records import derive_seed

for _stage in pipeline.STAGES.values():
    _stage.load()

CONFIG = tiny_config(augment__methods=("answer",), augment__answers=1)


def child(workdir: Path, write_to_die_at: int, stage: str) -> None:
    """One attempt. Journals every finished stage and committed chunk.

    Dies inside write number `write_to_die_at` of `stage` or, where the stage has fewer left, inside that of its manifest.
    """
    journal = (workdir / "journal.jsonl").open("a")

    def note(**entry: object) -> None:
        journal.write(json.dumps(entry) + "\n")
        journal.flush()
        os.fsync(journal.fileno())

    finish, commit, write = pipeline.finish, artifact.ArtifactWriter.commit_chunk, artifact.write_atomic
    writes = 0

    def noting_finish(writer, **fields):
        done = finish(writer, **fields)
        note(finished=writer.path.name)
        return done

    def noting_commit(self, series, index, table):
        commit(self, series, index, table)
        note(chunk=f"{self.path.name}/{series}-{index}")

    def dying_write(path, data):
        nonlocal writes
        if f"/{stage.replace(':', '_')}-" in str(path):
            writes += 1
            if write_to_die_at and (writes == write_to_die_at or Path(path).name == artifact.MANIFEST):
                beside = Path(path).parent / f".{Path(path).name}.{os.getpid()}.tmp"
                beside.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    pipeline.finish, artifact.ArtifactWriter.commit_chunk, artifact.write_atomic = noting_finish, noting_commit, dying_write  # type: ignore[assignment]
    console = Console(file=(workdir / "log.txt").open("a"), highlight=False)
    pipeline.run(CONFIG, Context(workdir=workdir, console=console), until=stage)  # a kill that comes too late ends its own stage only
    os._exit(0)


def attempt(workdir: Path, *, stage: str = "", delay: float | None = None, die_at_write: int = 0, marker: str = "") -> str:
    """Fork a child; kill it `delay` seconds after `stage` began (or once a file matching `marker` appears). Returns what happened."""
    pid = os.fork()
    if pid == 0:
        try:
            child(workdir, die_at_write, stage)
        finally:
            os._exit(1)
    prefix = f"{stage.replace(':', '_')}-"
    began = None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                return "killed itself"
            return "finished" if os.WEXITSTATUS(status) == 0 else f"failed with {os.WEXITSTATUS(status)}"
        running = [p for p in (workdir / "artifacts").glob(f"{prefix}*") if not (p / "manifest.json").exists()] if stage else []
        if running and began is None:
            began = time.monotonic()
        seen = not marker or any(any(path.rglob(marker)) for path in running)
        if began is not None and delay is not None and seen and time.monotonic() - began >= delay:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "killed"
        time.sleep(0.005)


def hashes(workdir: Path) -> dict[str, str]:
    """Logical hash per artifact directory."""
    return {
        path.parent.name: json.loads(path.read_text())["logical_hash"] for path in sorted((workdir / "artifacts").glob("*/manifest.json"))
    }


def main(root: Path, seed: int, kills: int) -> None:
    quiet, rough = root / "quiet", root / "rough"
    for path in (quiet, rough):
        path.mkdir(parents=True)
    outcome = attempt(quiet)
    if outcome != "finished":
        sys.exit(f"undisturbed run: {outcome}\n{(quiet / 'log.txt').read_text()}")
    seconds = {}
    for path in (quiet / "artifacts").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        seconds[manifest["recorded"]["node"]] = manifest["wall_seconds"]
    rng = random.Random(derive_seed(seed, "kills"))
    counts: dict[str, list[str]] = {}
    for stage in pipeline.graph(CONFIG, base=True):
        # Five kills that are sure to hit: in a first, second or third write, in the manifest. Then some at random moments,
        # the first of train's while a checkpoint is being written; the last of them may come too late.
        sure = [1, 1, rng.randint(1, 2), rng.randint(1, 3), 1 << 30]
        outcomes = [attempt(rough, stage=stage, delay=0.0, marker="*.orbax-checkpoint-tmp*")] if stage == "train" else []
        outcomes += [attempt(rough, stage=stage, die_at_write=write) for write in sure[:kills]]
        while len(outcomes) < kills + 2 and outcomes[-1] != "finished":
            outcomes.append(attempt(rough, stage=stage, delay=rng.uniform(0.0, max(seconds.get(stage, 0.1), 0.05))))
        counts[stage] = outcomes
        failed = [outcome for outcome in outcomes if outcome.startswith("failed")]
        if failed:
            sys.exit(f"{stage}: {failed[0]}\n{(rough / 'log.txt').read_text()}")
    last = attempt(rough)
    journal = [json.loads(line) for line in (rough / "journal.jsonl").read_text().splitlines()]
    print(json.dumps({"last": last, "kills": counts, "quiet": hashes(quiet), "rough": hashes(rough), "journal": journal}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
