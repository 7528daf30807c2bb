"""Start-up on this machine: how long from the command to the first step, in a first and in a second process.

    python benchmarks/startup.py --json startup.json

The train step of a 135M student is traced, lowered and compiled in a fresh process with an empty cache of compiled programs, and
again in a second one. Importing is listed apart. The goal is on trace + lower + compile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import SHAPE_25M, SHAPE_135M, finish, machine

GOAL = 0.34
PHASES = ("trace", "lower", "compile")
COMMANDS = {"dccot --help": ["-m", "dccot_jax", "--help"], "import dccot_jax": ["-c", "import dccot_jax"]}


def child(shape: str, dtype: str) -> None:
    """Print the seconds of each phase of one start."""
    started = time.perf_counter()
    from dccot_jax import compile_cache
    from dccot_jax.train import loop

    imported = time.perf_counter()
    import jax
    import jax.numpy as jnp

    from dccot_jax.config import default_config
    from dccot_jax.model.hf_config import from_hf
    from dccot_jax.model.sharding import make_mesh
    from dccot_jax.train.adapters import abstract_trained
    from dccot_jax.train.feed import abstract_batch
    from dccot_jax.train.step import abstract_state, make_train_step

    compile_cache.enable()
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    ready = time.perf_counter()
    train = default_config().train
    mc = from_hf({"model_type": "llama", **(SHAPE_135M if shape == "135m" else SHAPE_25M)})
    state = abstract_state(abstract_trained(mc, mesh, train)[0], loop.make_optimizer(train), mesh)
    batch = abstract_batch(mesh, train.rows_per_step, train.row_tokens)
    step = make_train_step(mc, mesh, train, jnp.dtype(dtype), steps=100)
    times = [time.perf_counter()]
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        lowered.compile()
        times.append(time.perf_counter())
    found = {"import": imported - started, "devices": ready - imported}
    print(json.dumps(found | {name: b - a for name, a, b in zip(PHASES, times, times[1:])}))


def run(command: Sequence[str], cache: str) -> tuple[float, str]:
    """(seconds, standard output) of a Python command with its own cache of compiled programs."""
    environment = {**os.environ, "DCCOT_COMPILE_CACHE": cache}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started, done.stdout


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("135m", "25m"), default="135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.shape, args.dtype)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        command = [__file__, "--child", "--shape", args.shape, "--dtype", args.dtype]
        starts = []
        for _ in range(2):
            total, text = run(command, folder)
            starts.append({**json.loads(text.splitlines()[-1]), "process": total})
        kept = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        commands = {name: run(words, folder)[0] for name, words in COMMANDS.items()}
    first, second = (sum(start[name] for name in PHASES) for start in starts)
    detail = {
        "machine": machine(),
        "shape": args.shape,
        "dtype": args.dtype,
        "starts": starts,
        "cache_mb": kept / 2**20,
        "commands": commands,
    }
    result = {"ratio_second_start": second / first, "goals": {"ratio_second_start": GOAL}, "lower_is_better": ["ratio_second_start"]}
    result["detail"] = detail
    print(f"{detail['machine']}; {args.shape}, {args.dtype}; {detail['cache_mb']:.1f} MB kept")
    for number, start in zip(("first", "second"), starts):
        print(f"{number:7s}" + "".join(f"{name} {seconds:6.2f} s   " for name, seconds in start.items()))
    print("".join(f"{name}: {seconds:.2f} s   " for name, seconds in commands.items()))
    finish(result, args.json)
    return result


if __name__ == "__main__":
    main()
