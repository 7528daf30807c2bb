"""Trains in forked children that are killed at random steps; see test_soak.py.

A parent that has imported everything, and has not started JAX's backend, forks one child per attempt, so that an attempt costs
no import time. Prints one JSON report. Usage: python soak_driver.py FOLDER SEED KILLS
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(Path(sys.argv[1]) / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from training_cases import TINY, run_config, write_training

from dccot_jax.artifact import ArtifactWriter, open_artifact
from dccot_jax.context import Context
from dccot_jax.stopping import STOPPED, Stopped, StopRequest
from dccot_jax.train.logs import read_log
from dccot_jax.train.loop import run

STEPS = 150
CONFIG = run_config(steps=STEPS, checkpoint_every=3, log_every=7)
TIMES = ("seconds", "tokens_per_second", "time")


def child(folder: Path, name: str, at: int, delay: float, number: int) -> None:
    """Train; `delay` seconds after the first step from `at` on was dispatched this process sends itself signal `number`."""
    timer = threading.Timer(delay, os.kill, (os.getpid(), number))
    inputs = {kind: open_artifact(folder / kind) for kind in ("student", "tokenize", "plan")}

    def on_step(step: int) -> None:
        time.sleep(0.004)  # a few steps pass between the kill's step and the kill
        if number and step >= at and timer.ident is None:
            timer.start()

    with StopRequest().on_signals() as stop:
        try:
            result = run(CONFIG, inputs, ArtifactWriter(folder / name), Context(folder, stop=stop), on_step=on_step)
        except Stopped:
            os._exit(STOPPED)
    (folder / f"{name}.json").write_text(json.dumps([result.logical_hash, dict(result.facts)]))
    os._exit(0)


def attempt(folder: Path, name: str, at: int = 0, delay: float = 0.0, number: int = 0) -> int:
    """Exit code of a forked child; negative: the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            child(folder, name, at, delay, number)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path, name: str) -> dict[str, object]:
    """Everything a training leaves that has a meaning."""
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in read_log(folder / name)]
    return {"result": json.loads((folder / f"{name}.json").read_text()), "log": lines}


def main(folder: Path, seed: int, kills: int) -> None:
    write_training(folder, TINY, CONFIG)
    codes = [attempt(folder, "alone")]
    rng = random.Random(seed)
    for place, step in enumerate(sorted(rng.sample(range(2, STEPS - 10), kills))):
        number = signal.SIGTERM if place % 5 == 4 else signal.SIGKILL
        codes.append(attempt(folder, "killed", step, rng.uniform(0.0, 0.03), number))
    codes.append(attempt(folder, "killed"))
    print(json.dumps({"codes": codes, "alone": outcome(folder, "alone"), "killed": outcome(folder, "killed")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
