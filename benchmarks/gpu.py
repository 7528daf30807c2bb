"""Training speed on one GPU: dccot_jax against Hugging Face torch (sdpa, compiled), same shapes, same rows, in one run.

    python benchmarks/gpu.py --peer-python PYTHON --json gpu.json

Random Llamas of 135M, 0.5B and 1B parameters, AdamW with float32 weights and moments, bfloat16 activations; packed rows of 4,096
tokens, four documents each; all positions are trained. Rows per micro-batch are searched on both sides, here also train.remat.
Model FLOPs are counted as `dccot_jax/estimate/flops.py` states: 6 per weight of the layers' matrices and of the head and token, and
6·N·H·S per layer and token for attention over documents of S tokens (causal: half of the scores). MFU = these per second
over the chip's dense bfloat16 peak, known for some GPUs, or --peak_tflops. Each measurement is a process of its own.
Without a GPU the script says so and exits with code 2; `--shape tiny --allow-cpu` tries it out on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
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

from common import HERE, SHAPE_135M, finish, machine, peer_python

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "vocab_size": 512, "max_position_embeddings": 4096,
    },
    "135m": SHAPE_135M,
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
}  # fmt: skip
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "GH200": 989, "B200": 2250}  # dense bfloat16, SXM where both
MFU_GOAL = {"1b": 0.50}
TORCH_GOAL = 1.2


def device() -> tuple[str, str]:
    """(platform, kind) of JAX's first device, asked in another process: the measurements need the memory."""
    code = "import jax; d = jax.devices()[0]; print(d.platform); print(d.device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return "none", done.stderr.strip().splitlines()[-1]
    return tuple(done.stdout.strip().splitlines()[-2:])  # type: ignore[return-value]


def save_rows(path: Path, vocab: int, rows: int, row_tokens: int, document: int) -> Path:
    import numpy as np

    tokens = np.random.default_rng(0).integers(5, vocab, (rows, row_tokens), np.int32)
    np.savez(path, tokens=tokens, positions=np.tile(np.arange(row_tokens, dtype=np.int32) % document, (rows, 1)))
    return path


def child(request: dict[str, Any]) -> None:
    """Print seconds per step and peak memory of one setting of ours."""
    import jax
    import numpy as np

    from dccot_jax.config import default_config
    from dccot_jax.estimate.flops import forward_per_token
    from dccot_jax.model import decoder
    from dccot_jax.model.hf_config import from_hf
    from dccot_jax.model.sharding import make_mesh
    from dccot_jax.train.feed import local_rows, to_global
    from dccot_jax.train.optimizer import make_optimizer
    from dccot_jax.train.step import init_state, make_train_step

    with np.load(request["rows"]) as data:
        tokens, positions = data["tokens"], data["positions"]
    count, length = tokens.shape
    segments = np.cumsum(positions == 0, axis=1, dtype=np.int32)
    weights = np.ones((count, length), np.float32)
    weights[:, :-1] = segments[:, 1:] == segments[:, :-1]
    weights[:, -1] = 0.0
    local = {"tokens": tokens, "labels": np.roll(tokens, -1, axis=1), "segment_ids": segments, "positions": positions, "weights": weights}
    train = default_config().train
    train.update({"rows_per_step": count, "microbatches": count // request["batch"], "remat": request["remat"], "schedule": "constant"})
    mc = from_hf({"model_type": "llama", **request["shape"]})
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = to_global(local, mesh, local_rows(mesh, count), count)
        state = init_state(decoder.init_params(mc, 0), make_optimizer(train), mesh)
        step = make_train_step(mc, mesh, train, jax.numpy.bfloat16, steps=100).lower(state, batch).compile()
        for _ in range(2):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        started = time.perf_counter()
        for _ in range(request["steps"]):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
    seconds = (time.perf_counter() - started) / request["steps"]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
    flops = 3 * forward_per_token(mc, request["document"]).total * count * length
    print(json.dumps({"seconds": seconds, "peak_gb": peak, "flops": flops, "parameters": mc.num_params()}))


def ours(request: dict[str, Any], batches: Sequence[int], remats: Sequence[str]) -> dict[str, Any]:
    """{"rows, remat": what `child` prints, or {"error"} where it does not fit}."""
    found = {}
    for batch, remat in itertools.product(batches, remats):
        line = json.dumps({**request, "batch": batch, "remat": remat})
        environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        done = subprocess.run([sys.executable, __file__, "--child", line], capture_output=True, text=True, env=environment)
        good = done.returncode == 0
        found[f"{batch} {remat}"] = json.loads(done.stdout.splitlines()[-1]) if good else {"error": done.stderr[-300:]}
    return found


def torch_side(python: str, request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([python, str(HERE / "peers" / "train_torch_gpu.py")], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best(found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(setting, measurement) of the fastest that fits. Exits where none does."""
    fitting = {name: x for name, x in found.items() if "seconds" in x}
    if not fitting:
        raise SystemExit(f"nothing ran: {found}")
    name = min(fitting, key=lambda name: fitting[name]["seconds"])
    return name, fitting[name]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["135m", "0.5b", "1b"])
    parser.add_argument("--row_tokens", type=int, default=4096)
    parser.add_argument("--document_tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16, help="of an optimizer step")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8], help="rows per micro-batch that are tried")
    parser.add_argument("--remat", nargs="+", default=["dots", "nothing_saveable"], help="settings of train.remat that are tried")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak_tflops", type=float, help="dense bfloat16 peak of the chip")
    parser.add_argument("--allow-cpu", action="store_true", help="to try the script out; figures mean nothing")
    parser.add_argument("--no-peer", action="store_true", help="without torch")
    parser.add_argument("--peer-python", help="an interpreter with torch (CUDA) and transformers")
    parser.add_argument("--peer-venv", type=Path, default=Path("~/.cache/dccot_jax/bench-venv").expanduser())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(json.loads(args.child))
        return 0
    platform, kind = device()
    if platform not in ("gpu", "cuda", "rocm") and not args.allow_cpu:
        print(f"no GPU: JAX's first device is {platform} ({kind}); nothing was measured", file=sys.stderr)
        return 2
    peak = args.peak_tflops or next((rate for name, rate in PEAK_TFLOPS.items() if name in kind.split()), None)
    if peak is None and not args.allow_cpu:
        print(f"the bfloat16 peak of {kind!r} is not known; give --peak_tflops", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"goals": {}, "detail": {"machine": machine(), "device": kind, "peak_tflops": peak, "shapes": {}}}
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shape:
            file = save_rows(Path(folder) / f"{shape}.npz", SHAPES[shape]["vocab_size"], args.rows, args.row_tokens, args.document_tokens)
            request = {"shape": SHAPES[shape], "rows": str(file), "document": args.document_tokens, "steps": args.steps}
            found: dict[str, Any] = {"ours": ours(request, args.batches, args.remat)}
            setting, mine = best(found["ours"])
            tokens = args.rows * args.row_tokens
            found |= {"setting": setting, "tokens_per_s": tokens / mine["seconds"], "peak_gb": mine["peak_gb"]}
            line = f"{shape:5s} {found['tokens_per_s']:10.0f} tokens/s ({setting})  peak {mine['peak_gb']:.1f} GB"
            if peak:
                found["mfu"] = result[f"ratio_mfu_{shape}"] = mine["flops"] / mine["seconds"] / (peak * 1e12)
                result["goals"] |= {f"ratio_mfu_{shape}": goal for name, goal in MFU_GOAL.items() if name == shape}
                line += f"  MFU {found['mfu']:.2f}"
            if not args.no_peer:
                request |= {"batches": args.batches, "cpu": args.allow_cpu}
                found["torch"] = torch_side(peer_python(args.peer_python, args.peer_venv), request)
                batch, theirs = best(found["torch"]["by_batch"])
                result[f"ratio_torch_{shape}"] = theirs["seconds"] / mine["seconds"]
                result["goals"][f"ratio_torch_{shape}"] = TORCH_GOAL
                line += f"  torch {tokens / theirs['seconds']:.0f} tokens/s ({batch})  peak {theirs['peak_gb']:.1f} GB"
            result["detail"]["shapes"][shape] = found
            print(line, flush=True)
    finish(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
