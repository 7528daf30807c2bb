"""Scoring speed on this machine: dccot_jax against Hugging Face torch, in one run, alternately, on the same rows.

    python benchmarks/scoring.py --data ../shared/data --student DIR --json scoring.json

Both sides compute nll, entropy, ifd_loss and ifd_ppl (a conditional and an unconditional view). Two samples of real traces:
`mixed` has one trace per question (SVAMP and GSM8K), `shared` 16 traces of each question (SVAMP). The peer is
`peers/score_torch.py`, in an interpreter that has torch and transformers (`--peer-python`, else a virtual environment made
with the extra `bench`): one row at a time as published (`published`: Cherry LLM's script; `single`: the same without its loop over
tokens), and batched, sorted by length, with logits of completion positions only, at the best of several batch sizes. Every figure
is the best of `--repeats`; compilation and loading are not in it.
Without `--student`, or with `--shape 25m`, a random model of 25 million parameters is scored.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import SVAMP, Peer, finish, machine, make_rows, mixed_pairs, peer_python, plain, random_student, read  # noqa: E402

SIGNALS = ("nll", "entropy", "ifd_loss", "ifd_ppl")
GOALS = {
    "ratio_batched_float32": 1.0,
    "ratio_batched_bfloat16": 1.3,
    "ratio_published_float32": 1.5,
    "ratio_published_bfloat16": 3.5,
    "ratio_shared_float32": 1.3,
    "ratio_shared_bfloat16": 2.0,
}
ROW_BY_ROW = ("published", "single")  # ways of the peer that read one row at a time
COLUMNS = ("ours", "batched", *ROW_BY_ROW)
SAME = 1e-4  # nats: how far float32 scores may lie from the peer's


# --- rows -----------------------------------------------------------------------------------------------------------------


def shared_pairs(data: Path, questions: int) -> list[tuple[str, str]]:
    """16 traces of each of a few questions."""
    tables = [{plain(row["instruction"]): row for row in read(data / name)} for name in SVAMP]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    chosen = random.Random(0).sample(common, questions)
    return [(tables[0][key]["instruction"], table[key]["output"]) for key in chosen for table in tables]


def save_rows(path: Path, rows: Sequence[Any], context: Sequence[int]) -> Path:
    found = [{"input_ids": row.input_ids.tolist(), "prompt_tokens": row.prompt_tokens} for row in rows]
    path.write_text(json.dumps({"context": list(context), "rows": found}))
    return path


# --- the two sides --------------------------------------------------------------------------------------------------------


class Ours:
    """The packed scorer of dccot_jax, compiled once per sample."""

    def __init__(self, student: Path, dtype: str):
        import jax

        from dccot_jax.model import hf
        from dccot_jax.model.sharding import make_mesh
        from dccot_jax.select import engine
        from dccot_jax.select.signals import split_signals

        self.mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        self.mc, params = hf.load_hf(student, self.mesh)
        self.params = engine.cast_matrices(params, dtype, self.mesh)
        self.signals, _ = split_signals(SIGNALS)
        self.columns = [[signal.name for signal in self.signals].index(name) for name in SIGNALS]
        self.dtype = dtype

    def score(self, rows: Sequence[Any], context: Sequence[int], tile_tokens: int | None = None) -> tuple[float, Any]:
        """(seconds, [N, 4] scores in the order of SIGNALS); planning and laying out are in the time, writing files is not."""
        import jax
        import numpy as np

        from dccot_jax.select import packed, packing
        from dccot_jax.select.views import TILE_TOKENS, TILE_TOKENS_ACCELERATOR

        started = time.perf_counter()
        reading = packing.find_reading(rows, context, whole=False)
        size = tile_tokens or TILE_TOKENS.get(jax.default_backend(), TILE_TOKENS_ACCELERATOR)
        tiles = packing.plan_packed(rows, reading, shards=1, tile_tokens=size)
        program = packed.make_packed_program(self.mc, self.signals, self.dtype)
        scores = np.zeros((len(rows), len(SIGNALS)), np.float32)
        for index, values in packed.score_bins(program, self.params, self.mesh, rows, reading, tiles, in_flight=4):
            scores[index] = values[:, self.columns]
        return time.perf_counter() - started, scores


# --- measurements ---------------------------------------------------------------------------------------------------------


def compare(
    ours: Ours, peer: Peer, files: dict[str, Path], rows: dict[str, list[Any]], context: Sequence[int], args: Any
) -> dict[str, Any]:
    """Rows per second of both sides on every sample, measured in turn, and how far the scores lie apart."""
    import numpy as np

    found: dict[str, Any] = {}
    for sample in rows:
        compile_s, scores = ours.score(rows[sample], context)
        peer.ask(do="score", rows=str(files[sample]), way="batched", batch=8, first=8)  # warm
        trials = {b: peer.ask(do="score", rows=str(files[sample]), way="batched", batch=b)["seconds"] for b in args.batches}
        batch = min(trials, key=lambda b: trials[b])
        times: dict[str, list[float]] = {"ours": [], "batched": [trials[batch]]}
        theirs = None
        for _ in range(args.repeats):
            times["ours"].append(ours.score(rows[sample], context)[0])
            answer = peer.ask(do="score", rows=str(files[sample]), way="batched", batch=batch)
            times["batched"].append(answer["seconds"])
            theirs = np.array(answer["scores"])
            for way in ROW_BY_ROW if sample == "mixed" else ():
                answer = peer.ask(do="score", rows=str(files[sample]), way=way)
                times.setdefault(way, []).append(answer["seconds"])
                if ours.dtype == "float32" and (worst := np.abs(np.array(answer["scores"]) - theirs).max()) > SAME:
                    raise SystemExit(f"the peer's ways differ by up to {worst:.2e}: {way} and batched")
        count = len(rows[sample])
        found[sample] = {
            "rows": count,
            "ours_rows_per_s": count / min(times["ours"]),
            "batched_rows_per_s": count / min(times["batched"]),
            "batch": batch,
            "batched_rows_per_s_by_batch": {str(b): count / s for b, s in trials.items()},
            "first_call_s": compile_s,
            "largest_difference": dict(zip(SIGNALS, np.abs(scores - theirs).max(0).tolist())),
        }
        found[sample] |= {f"{way}_rows_per_s": count / min(times[way]) for way in ROW_BY_ROW if way in times}
    return found


SYNTHETIC = 100_000  # rows scored in all, for every number of rows


def scaling(counts: Sequence[int], rounds: int = 2) -> dict[str, Any]:
    """Seconds (mean of the rounds) and peak memory of scoring synthetic rows with a tiny model, per number of rows; fresh processes."""
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            run = subprocess.run([sys.executable, __file__, "--synthetic", str(count)], check=True, capture_output=True, text=True)
            runs[count].append(json.loads(run.stdout.splitlines()[-1]))
    found = {count: {key: sum(run[key] for run in own) / rounds for key in own[0]} for count, own in runs.items()}
    first, last = min(counts), max(counts)
    slope = (found[last]["seconds"] / last) / (found[first]["seconds"] / first)
    per_row = (found[last]["peak_mb"] - found[first]["peak_mb"]) * 2**20 / (last - first)
    return {"runs": {str(n): own for n, own in runs.items()}, "seconds_per_row_ratio": slope, "peak_bytes_per_row": per_row}


def synthetic(count: int) -> None:
    """Score `count` random rows with a tiny random model; print seconds and peak memory beside what the rows themselves take."""
    import jax
    import numpy as np

    from dccot_jax.model import decoder
    from dccot_jax.model.config import ModelConfig
    from dccot_jax.model.sharding import make_mesh
    from dccot_jax.select.signals import split_signals
    from dccot_jax.select.views import Row

    rng = np.random.default_rng(0)
    mc = ModelConfig("llama", 512, 32, 64, 2, 2, 1, 16, tie_embeddings=True, max_positions=512)
    lengths = rng.integers(20, 120, (count, 2))
    buffer = rng.integers(8, 512, int(lengths.sum()), dtype=np.int32)
    ends = lengths.sum(1).cumsum()
    rows = [Row(f"{n:06d}", buffer[end - sum(own) : end], int(own[0])) for n, (end, own) in enumerate(zip(ends, lengths))]
    ours = object.__new__(Ours)
    ours.mesh, ours.mc, ours.dtype = make_mesh({"fsdp": 1}, jax.devices()[:1]), mc, "float32"
    ours.signals, _ = split_signals(SIGNALS)
    ours.columns = [[signal.name for signal in ours.signals].index(name) for name in SIGNALS]
    with jax.set_mesh(ours.mesh):
        ours.params = decoder.init_params(mc, 0)
    ours.score(rows[:5000], [1, 2, 3])  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    repeats = max(1, SYNTHETIC // count)  # as many rows for every count: a busy moment of the machine weighs alike
    seconds = sum(ours.score(rows, [1, 2, 3])[0] for _ in range(repeats)) / repeats
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024, "grown_mb": (peak - before) / 1024, "tokens_mb": buffer.nbytes / 2**20}))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, default=Path("~/.cache/dccot_jax/smollm2-135m-instruct").expanduser())
    parser.add_argument("--shape", choices=("student", "25m"), default="student", help="25m: a random model, the student's tokenizer")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--samples", nargs="+", choices=("mixed", "shared"), default=["mixed", "shared"])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--questions", type=int, default=6, help="of the sample with 16 traces each")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--scale", type=int, nargs="*", default=[1000, 10000, 100000], help="synthetic rows; nothing: skip")
    parser.add_argument("--peer-python", help="an interpreter with torch and transformers")
    parser.add_argument("--peer-venv", type=Path, default=Path("~/.cache/dccot_jax/bench-venv").expanduser())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--synthetic", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.synthetic:
        synthetic(args.synthetic)
        return {}

    from dccot_jax import cpu_memory
    from dccot_jax.data.tokenizer import load_tokenizer
    from dccot_jax.select.views import completion_context

    cpu_memory.keep()  # as every `dccot` command does
    python = peer_python(args.peer_python, args.peer_venv)
    tokenizer = load_tokenizer(args.student)
    pairs = {"mixed": mixed_pairs(args.data, args.rows), "shared": shared_pairs(args.data, args.questions)}
    rows = {name: make_rows(tokenizer, pairs[name]) for name in args.samples}
    context = completion_context(tokenizer, rows[args.samples[0]])
    result: dict[str, Any] = {"goals": {}, "detail": {"machine": machine(), "student": args.shape, "samples": {}}}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: save_rows(Path(folder) / f"{name}.json", chosen, context) for name, chosen in rows.items()}
        student = args.student if args.shape == "student" else random_student(Path(folder) / "25m", python)
        peer = Peer(python, "score_torch.py")
        for dtype in args.dtypes:
            result["detail"]["peer"] = peer.ask(do="load", model=str(student), dtype=dtype)
            found = compare(Ours(student, dtype), peer, files, rows, context, args)
            result["detail"]["samples"][dtype] = found
            ratios = {}
            compared = [*(("mixed", way, way) for way in ("batched", *ROW_BY_ROW)), ("shared", "batched", "shared")]
            for sample, way, name in compared:
                if sample in found:
                    ratios[f"ratio_{name}_{dtype}"] = found[sample]["ours_rows_per_s"] / found[sample][f"{way}_rows_per_s"]
            result |= ratios
            result["goals"] |= {name: GOALS[name] for name in ratios if name in GOALS}
            if dtype == "float32":
                worst = max(max(found[sample]["largest_difference"].values()) for sample in found)
                if worst > SAME:
                    raise SystemExit(f"float32 scores differ from the peer's by up to {worst:.2e}, more than {SAME}")
        peer.close()
    if args.scale:
        result["detail"]["scaling"] = scaled = scaling(args.scale)
        result["ratio_linear_in_rows"] = 1 / scaled["seconds_per_row_ratio"]
        result["goals"]["ratio_linear_in_rows"] = 0.95
    show(result)
    finish(result, args.json)
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['detail']['machine']}  peer {result['detail']['peer']}")
    print(f"{'':20s} {' '.join(f'{way:>9s}' for way in COLUMNS)}  rows/s; largest difference of a score")
    for dtype, found in result["detail"]["samples"].items():
        for sample, x in found.items():
            worst = max(x["largest_difference"].values())
            rates = (f"{x[f'{way}_rows_per_s']:9.2f}" if f"{way}_rows_per_s" in x else " " * 9 for way in COLUMNS)
            print(f"{dtype + ' ' + sample:20s} {' '.join(rates)}  {worst:.1e}")
    if "scaling" in result["detail"]:
        for count, run in result["detail"]["scaling"]["runs"].items():
            memory = f"peak {run['peak_mb']:.0f} MB, of that tokens {run['tokens_mb']:.0f} MB"
            print(f"{count:>8s} synthetic rows: {run['seconds']:.2f} s, {memory}")


if __name__ == "__main__":
    main()
