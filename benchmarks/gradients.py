"""Speed of per-example gradients of LoRA factors on this machine: dccot_jax against Hugging Face torch, in one run, alternately.

    python benchmarks/gradients.py --data ../shared/data --student DIR --json gradients.json

Both sides make, for every row, the gradient of its mean completion loss with respect to adapters of rank 16 on the query and value
projections: `grand` its norm, `less` the vector preconditioned by Adam. The random projection, which torch is not asked for, is
timed apart: `less` with it, and it alone. The peer is `peers/gradients_torch.py`, one row at a time as published, in an interpreter
that has torch and transformers. Real traces, one per question (SVAMP and GSM8K), and the adapters and moments of a made-up training.
Every figure is the best of `--repeats`; compilation and loading are not in it. With `--shape 25m` a random model of 25 million
parameters takes the student's place.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import HERE, Peer, machine, make_rows, mixed_pairs, peer_python, random_student
from scoring import save_rows

RANK, SCALE = 16, 2.0
NAMES = ("wq_a", "wq_b", "wv_a", "wv_b")
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
GOALS = {"float32": 1.1, "bfloat16": 2.0}
SAME = 1e-3  # of a gradient's length: how far a float32 one may lie from the peer's; norms and Adam's steps alike


def make_adapters(path: Path, mc: Any) -> dict[str, Any]:
    """Adapters and Adam moments as a short training leaves them, as files for both sides."""
    import numpy as np

    from dccot_jax.model.sharding import weight_shapes

    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"scale": SCALE, **ADAM}
    for name in NAMES:
        shape = weight_shapes(mc)["layers"][name]
        found[name] = (0.02 * rng.standard_normal(shape)).astype(np.float32)
        mean = 1e-3 * rng.standard_normal(shape)
        found[f"mu.{name}"] = mean.astype(np.float32)
        found[f"nu.{name}"] = (mean**2 + 1e-6 * rng.uniform(0.5, 2.0, shape)).astype(np.float32)
    np.savez(path, **found)
    return found


class Ours:
    """The programs of the score stage, and one that hands out the gradients that `less` projects."""

    def __init__(self, student: Path, adapters: Path, dtype: str, tile_tokens: int, remat: str):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from dccot_jax.model import hf
        from dccot_jax.model.lora import with_adapters
        from dccot_jax.model.sharding import make_mesh
        from dccot_jax.select.engine import cast_matrices

        self.mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        base, params = hf.load_hf(student, self.mesh)
        self.mc = with_adapters(base, RANK, SCALE * RANK, 0.0, ("q_proj", "v_proj"))
        data = np.load(adapters)
        own = {name: jnp.asarray(data[name]) for name in NAMES}
        params = cast_matrices({**params, "layers": {**params["layers"], **own}}, dtype, self.mesh)
        moments = {side: {"layers": {name: jnp.asarray(data[f"{side}.{name}"]) for name in NAMES}} for side in ("mu", "nu")}
        self.states = {"grand": params, "less": {"params": params, **moments}}
        self.dtype, self.tile_tokens, self.remat = dtype, tile_tokens, remat
        self.collected = jax.jit(self._collect)

    def _collect(self, state: Any, x: Any) -> Any:
        """As `features.make_features`, without the projection: the preconditioned gradients [B, S, all numbers]."""
        import jax.numpy as jnp

        from dccot_jax.select.gradients.features import Adam, Feature, Projection
        from dccot_jax.select.gradients.rows import backward, by_stream

        @dataclasses.dataclass(frozen=True)
        class Whole(Feature):
            size: int = 0

            @property
            def width(self) -> int:
                return self.size

            def _project(self, values: Any, key: Any, first: Any) -> Any:
                return values

        measures = {}
        for name in NAMES:
            layers, *shape = state["params"]["layers"][name].shape
            aux = {"layer": jnp.arange(layers), **{side: state[side]["layers"][name] for side in ("mu", "nu")}}
            measures[name] = (Whole(name, Projection(0, 0, ""), Adam(**ADAM), shape[0] * shape[1]), aux)
        found = backward(state["params"], self.mc, x, measures, compute_dtype=self.dtype, remat=self.remat)
        parts = jnp.concatenate([found.reports[name] for name in NAMES], axis=2)  # [L, R, numbers]
        return by_stream(jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1), x)

    def measure(self, what: str, rows: Sequence[Any], dim: int = 0) -> tuple[float, Any]:
        """(seconds, [N, K]); planning and laying out are in the time, writing files is not."""
        import numpy as np

        from dccot_jax.select.gradients.features import Adam, Projection, make_features
        from dccot_jax.select.gradients.layout import measure_streams, plan_streams
        from dccot_jax.select.gradients.norms import make_ghost

        if dim:
            program: Any = make_features(self.mc, NAMES, Projection(dim, 0, "rademacher"), Adam(**ADAM), self.dtype, self.remat)
        else:
            program = make_ghost(self.mc, NAMES, self.dtype, self.remat) if what == "grand" else self.collected
        started = time.perf_counter()
        tiles = plan_streams(rows, shards=1, tile_tokens=self.tile_tokens)
        parts = list(measure_streams(program, self.states[what], self.mesh, rows, tiles, in_flight=2))
        seconds = time.perf_counter() - started
        order = np.argsort([i for index, _ in parts for i in index])
        return seconds, np.concatenate([values for _, values in parts])[order]


def project_seconds(mc: Any, rows: int, dim: int) -> float:
    """The projection alone of so many rows' numbers, all weights and layers."""
    import jax
    import jax.numpy as jnp

    from dccot_jax.model.sharding import weight_shapes
    from dccot_jax.select.gradients.projection import project, weight_key

    @jax.jit
    def run(values: Any, layer: Any) -> Any:
        return [project(v, weight_key(0, name, layer), 0, dim, "rademacher") for name, v in values.items()]

    shapes = weight_shapes(mc)["layers"]
    values = {name: jnp.ones((rows, shapes[name][1] * shapes[name][2])) for name in NAMES}
    jax.block_until_ready(run(values, 0))
    started = time.perf_counter()
    jax.block_until_ready(run(values, 1))
    return (time.perf_counter() - started) * mc.num_layers


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, default=Path("~/.cache/dccot_jax/smollm2-135m-instruct").expanduser())
    parser.add_argument("--shape", choices=("student", "25m"), default="student", help="25m: a random model, the student's tokenizer")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--single_rows", type=int, default=16, help="of these the peer is timed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--what", nargs="+", choices=("grand", "less"), default=["grand", "less"])
    parser.add_argument("--tile_tokens", type=int, help="default: as the score stage has it")
    parser.add_argument("--remat", default="dots", help="as config.train.remat; the score stage takes dots where there is memory")
    parser.add_argument("--dim", type=int, default=8192, help="of the projection that is timed apart; 0: not")
    parser.add_argument("--peer-python", help="an interpreter with torch and transformers")
    parser.add_argument("--peer-venv", type=Path, default=Path("~/.cache/dccot_jax/bench-venv").expanduser())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    import jax

    from dccot_jax import cpu_memory
    from dccot_jax.data.tokenizer import load_tokenizer
    from dccot_jax.select.gradients.chunks import TILE_TOKENS, TILE_TOKENS_ACCELERATOR

    cpu_memory.keep()  # as every `dccot` command does
    tile_tokens = args.tile_tokens or TILE_TOKENS.get(jax.default_backend(), TILE_TOKENS_ACCELERATOR)
    python = peer_python(args.peer_python, args.peer_venv)
    rows = make_rows(load_tokenizer(args.student), mixed_pairs(args.data, args.rows))
    result: dict[str, Any] = {"goals": {}, "detail": {"machine": machine(), "student": args.shape, "rows": len(rows), "samples": {}}}
    result["detail"]["tokens"] = sum(len(row.input_ids) for row in rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = save_rows(folder / "rows.json", rows, [])
        student = args.student if args.shape == "student" else random_student(folder / "25m", python)
        peer = Peer(python, "gradients_torch.py")
        for dtype in args.dtypes:
            adapters = prepare(student, folder / "adapters.npz")
            result["detail"]["peer"] = peer.ask(do="load", model=str(student), adapters=str(adapters), dtype=dtype)
            ours = Ours(student, adapters, dtype, tile_tokens, args.remat)
            found = compare(ours, peer, rows, file, folder / "found.npy", args)
            result["detail"]["samples"][dtype] = found
            for what in args.what:
                result[f"ratio_{what}_{dtype}"] = found[what]["ours_rows_per_s"] / found[what]["single_rows_per_s"]
                result["goals"][f"ratio_{what}_{dtype}"] = GOALS[dtype]
        peer.close()
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return result


def prepare(student: Path, path: Path) -> Path:
    from dccot_jax.model.hf import read_config
    from dccot_jax.model.lora import with_adapters

    if not path.exists():
        make_adapters(path, with_adapters(read_config(student), RANK, SCALE * RANK, 0.0, ("q_proj", "v_proj")))
    return path


def compare(ours: Ours, peer: Peer, rows: Sequence[Any], file: Path, out: Path, args: Any) -> dict[str, Any]:
    """Rows per second of both sides, in turn, over the peer's rows and over all, and how far the results lie apart.

    The ratio takes ours over all rows and the peer's over its first `--single_rows`, weighted by tokens.
    """
    import numpy as np

    few = min(args.single_rows, len(rows))
    share = sum(len(row.input_ids) for row in rows[:few]) / sum(len(row.input_ids) for row in rows)
    found: dict[str, Any] = {}
    for what in args.what:
        first_call, values = ours.measure(what, rows)
        peer.ask(do=what, rows=str(file), first=few, out=str(out))
        theirs = np.load(out).reshape(few, -1)
        apart = np.linalg.norm(values[:few] - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        if ours.dtype == "float32" and apart.max() > SAME:
            raise SystemExit(f"{what}: float32 results differ from the peer's by up to {apart.max():.1e} of their length, more than {SAME}")
        times: dict[str, list[float]] = {"ours": [], "single": []}
        for _ in range(args.repeats):
            times["single"].append(peer.ask(do=what, rows=str(file), first=few)["seconds"])
            times["ours"].append(ours.measure(what, rows)[0])
        found[what] = {
            "ours_rows_per_s": len(rows) / min(times["ours"]),
            "single_rows_per_s": len(rows) * share / min(times["single"]),
            "first_call_s": first_call,
            "largest_difference": float(apart.max()),
        }
        if what == "less" and args.dim:
            ours.measure(what, rows, args.dim)
            found[what]["projected_rows_per_s"] = len(rows) / ours.measure(what, rows, args.dim)[0]
            found[what]["projection_s_per_stream"] = {str(n): project_seconds(ours.mc, n, args.dim) for n in (1, 16)}
    return found


def show(result: dict[str, Any]) -> None:
    detail = result["detail"]
    print(f"{detail['machine']}  peer {detail['peer']}  {detail['student']}, {detail['rows']} rows, {detail['tokens']} tokens")
    print(f"{'':20s} {'ours':>8s} {'single':>8s}  rows/s; largest difference, of the result's length")
    for dtype, found in detail["samples"].items():
        for what, x in found.items():
            line = f"{dtype + ' ' + what:20s} {x['ours_rows_per_s']:8.2f} {x['single_rows_per_s']:8.2f}  {x['largest_difference']:.1e}"
            if "projected_rows_per_s" in x:
                line += f"; projected {x['projected_rows_per_s']:.2f}; projection alone, s for n rows: {x['projection_s_per_stream']}"
            print(line)
    for name, goal in result["goals"].items():
        print(f"{name:28s} {result[name]:6.2f}  goal {goal:4.2f}  {'met' if result[name] >= goal else 'NOT MET'}")


if __name__ == "__main__":
    main()
