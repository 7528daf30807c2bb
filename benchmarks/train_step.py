"""Training speed on this machine: dccot_jax against TRL's `SFTTrainer` and Tunix's `PeftTrainer`, in one run, alternately.

    python benchmarks/train_step.py --data ../shared/data --student DIR --json train_step.json

All sides train all weights of the same model on the same packed rows of real traces (SVAMP and GSM8K, as TRL's packing="bfd"
lays them out), the same number of rows per optimizer step, loss on completions, AdamW with clipping by the global norm. In
bfloat16 weights and moments are float32 for TRL (autocast) and here, bfloat16 for Tunix, which knows nothing else. Rows per
micro-batch are searched for each side (`--batches`), here also what is recomputed (`--remat`). Non-padding tokens a second from
the second step on, the best of `--repeats`; loading, packing and compiling are not in it. The float32 losses of all sides
must agree. The workers in `peers/` run in `--peer-python` and `--tunix-python`, by default a virtual environment made with the
extra `bench`; where Tunix cannot be imported its ratios are left out and the reason is in the result.
With `--shape 25m` a random model of 25 million parameters is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Peer, finish, machine, make_rows, mixed_pairs, peer_python, random_student

GOALS = {("trl", "float32"): 1.0, ("trl", "bfloat16"): 1.2, ("tunix", "float32"): 1.2, ("tunix", "bfloat16"): 1.2}
SETTINGS = {"rows_per_step": 8, "learning_rate": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": 1.0}
SAME = 5e-3  # nats: how far a float32 loss may lie from a peer's, after steps of both


class Ours:
    """The trainer's own step, compiled for each setting that is asked for."""

    def __init__(self, student: Path, batches: Sequence[dict[str, Any]]):
        from dccot_jax.model.sharding import make_mesh

        self.student, self.batches, self.compiled = student, batches, {}
        self.mesh = make_mesh({"fsdp": 1})

    def train(self, dtype: str, batch: int, remat: str, steps: int) -> dict[str, Any]:
        """Seconds of each step from the second on, and losses; fed and waited for as `train/loop.py` does."""
        import jax

        from dccot_jax.model import hf
        from dccot_jax.train.feed import local_rows, to_global
        from dccot_jax.train.logs import to_host
        from dccot_jax.train.optimizer import make_optimizer
        from dccot_jax.train.step import init_state, make_train_step

        train = train_group(batch, remat)
        rows = local_rows(self.mesh, train.rows_per_step)
        with jax.set_mesh(self.mesh):
            mc, params = hf.load_hf(self.student, self.mesh)
            state = init_state(params, make_optimizer(train), self.mesh)
            found, pending, ends = [], None, []
            key = (dtype, batch, remat)
            for local in self.batches[:steps]:
                arrays = to_global(local, self.mesh, rows, train.rows_per_step)
                if key not in self.compiled:
                    self.compiled[key] = (
                        make_train_step(mc, self.mesh, train, jax.numpy.dtype(dtype), steps=100).lower(state, arrays).compile()
                    )
                state, metrics = self.compiled[key](state, arrays)
                if pending is not None:
                    found.append(to_host(pending))
                    ends.append(time.perf_counter())
                pending = metrics
            found.append(to_host(pending))
            jax.block_until_ready(state)
            ends.append(time.perf_counter())
        losses = [metrics["loss"][0] / metrics["loss"][1] for metrics in found]
        return {"seconds": [b - a for a, b in itertools.pairwise(ends)], "losses": losses}


def train_group(batch: int, remat: str) -> Any:
    """The config's ``train`` group with the benchmark's settings."""
    from dccot_jax.config import default_config

    train = default_config().train
    train.update({**SETTINGS, "schedule": "constant", "warmup_steps": 0, "remat": remat})
    train.microbatches = train.rows_per_step // batch
    return train


def lay_out(packed: Sequence[Any], row_tokens: int) -> list[dict[str, Any]]:
    """TRL's packed rows as batches of `train/losses.py: BATCH_FIELDS`, one for each step."""
    import numpy as np

    size = SETTINGS["rows_per_step"]
    batches = []
    for at in range(0, len(packed) - size + 1, size):
        batch = {name: np.zeros((size, row_tokens), np.int32) for name in ("tokens", "labels", "segment_ids", "positions")}
        batch["weights"] = np.zeros((size, row_tokens), np.float32)
        for row, (ids, labels, lengths) in enumerate(packed[at : at + size]):
            start = 0
            for segment, length in enumerate(lengths, 1):
                end = start + length
                batch["tokens"][row, start:end] = ids[start:end]
                batch["segment_ids"][row, start:end] = segment
                batch["positions"][row, start:end] = np.arange(length)
                batch["labels"][row, start : end - 1] = ids[start + 1 : end]
                batch["weights"][row, start : end - 1] = np.asarray(labels[start + 1 : end]) != -100
                start = end
        batches.append(batch)
    return batches


def save_batches(path: Path, batches: Sequence[dict[str, Any]]) -> Path:
    """The same rows for Tunix, which shifts by itself: `trained` is true where a token is to be predicted."""
    import numpy as np

    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    trained = np.zeros_like(whole["tokens"], bool)
    trained[:, 1:] = whole["weights"][:, :-1] > 0
    np.savez(path, trained=trained, **{name: whole[name] for name in ("tokens", "positions", "segment_ids")})
    return path


def compare(ours: Ours, peers: dict[str, Peer], dtype: str, args: Any) -> dict[str, Any]:
    """Tokens per second of all sides at their best settings, measured in turn; their losses."""
    remats = {"ours": args.remat, **{name: [""] for name in peers}}

    def train(side: str, batch: int, remat: str, steps: int) -> dict[str, Any]:
        if side == "ours":
            return ours.train(dtype, batch, remat, steps)
        return peers[side].ask(do="train", dtype=dtype, batch=batch, steps=steps)

    found: dict[str, Any] = {}
    for side, remat in remats.items():
        settings = [(b, r) for b, r in itertools.product(args.batches, remat)]
        trials = {choice: rate(ours, train(side, *choice, 2)) for choice in settings} if len(settings) > 1 else {settings[0]: 0.0}
        best = max(trials, key=lambda choice: trials[choice])
        by_setting = {f"{b} rows {r}".strip(): speed for (b, r), speed in trials.items()}
        found[side] = {"batch": best[0], "remat": best[1], "tokens_per_s": trials[best], "by_setting": by_setting}
        print(f"{dtype} {side}: {by_setting}", flush=True)
    for side in [side for _ in range(args.repeats) for side in found]:
        answer = train(side, found[side]["batch"], found[side]["remat"], args.steps)
        found[side]["tokens_per_s"] = max(found[side]["tokens_per_s"], rate(ours, answer))
        found[side]["losses"] = answer["losses"]
    return found


def rate(ours: Ours, answer: dict[str, Any]) -> float:
    """Non-padding tokens per second over the steps that were timed."""
    tokens = [int((batch["segment_ids"] > 0).sum()) for batch in ours.batches[1 : len(answer["seconds"]) + 1]]
    return sum(tokens) / sum(answer["seconds"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--student", type=Path, default=Path("~/.cache/dccot_jax/smollm2-135m-instruct").expanduser())
    parser.add_argument("--shape", choices=("student", "25m"), default="student", help="25m: a random model, the student's tokenizer")
    parser.add_argument("--data", type=Path, default=here.parent.parent / "shared" / "data")
    parser.add_argument("--row_tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of one measurement; the first is not timed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="rows per micro-batch that are tried")
    parser.add_argument("--remat", nargs="+", default=["none", "dots"], help="settings of train.remat that are tried")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", choices=("trl", "tunix"), default=["trl", "tunix"])
    parser.add_argument("--peer-python", help="an interpreter with torch, transformers and trl")
    parser.add_argument("--tunix-python", help="an interpreter with google-tunix; default: the peer's")
    parser.add_argument("--peer-venv", type=Path, default=Path("~/.cache/dccot_jax/bench-venv").expanduser())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    from dccot_jax.data.tokenizer import load_tokenizer

    python = peer_python(args.peer_python, args.peer_venv)
    tokens = args.row_tokens * SETTINGS["rows_per_step"] * args.steps
    rows = make_rows(load_tokenizer(args.student), mixed_pairs(args.data, tokens // 150))
    rows = [row for row in rows if len(row.input_ids) <= args.row_tokens]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps([{"input_ids": row.input_ids.tolist(), "prompt_tokens": row.prompt_tokens} for row in rows]))
        student = args.student if args.shape == "student" else random_student(Path(folder) / "25m", python)
        trl = Peer(python, "train_trl.py")
        known = {"model": str(student), "settings": SETTINGS}
        answer = trl.ask(do="load", tokenizer=str(args.student), rows=str(file), row_tokens=args.row_tokens, **known)
        batches = lay_out(answer["packed"], args.row_tokens)[: args.steps]
        if len(batches) < args.steps:
            raise SystemExit(f"{len(rows)} traces fill {len(batches)} steps, {args.steps} are asked for")
        shares = [float((b[name] > 0).mean()) for name in ("segment_ids", "weights") for b in batches]
        detail: dict[str, Any] = {"machine": machine(), "student": args.shape, "row_tokens": args.row_tokens, **SETTINGS}
        detail |= {"filled": sum(shares[: args.steps]) / args.steps, "trained": sum(shares[args.steps :]) / args.steps}
        detail["trl"] = {"versions": answer["versions"], "threads": answer["threads"]}
        peers = {"trl": trl}
        if "tunix" in args.peers:
            tunix = Peer(args.tunix_python or python, "train_tunix.py")
            detail["tunix"] = tunix.ask(do="load", batches=str(save_batches(Path(folder) / "batches.npz", batches)), **known)
            if "missing" in detail["tunix"]:
                print(f"without Tunix: {detail['tunix']['missing']}")
            else:
                peers["tunix"] = tunix
        if "trl" not in args.peers:
            del peers["trl"]
        result: dict[str, Any] = {"goals": {}, "detail": detail}
        ours = Ours(student, batches)
        for dtype in args.dtypes:
            detail[dtype] = found = compare(ours, peers, dtype, args)
            for side in peers:
                name = f"ratio_{side}_{dtype}"
                result[name] = found["ours"]["tokens_per_s"] / found[side]["tokens_per_s"]
                result["goals"][name] = GOALS[side, dtype]
                apart = max(abs(a - b) for a, b in zip(found["ours"]["losses"], found[side]["losses"]))
                found[side]["loss_difference"] = apart
                # Tunix averages the means of its micro-batches, whatever they hold: comparable only where it has one.
                if dtype == "float32" and apart > SAME and (side == "trl" or found[side]["batch"] == SETTINGS["rows_per_step"]):
                    raise SystemExit(f"float32 losses differ from {side}'s by up to {apart:.2e}, more than {SAME}: {found}")
        trl.close()
        if "tunix" in args.peers:
            tunix.close()
    show(detail, args.dtypes)
    finish(result, args.json)
    return result


def show(detail: dict[str, Any], dtypes: Sequence[str]) -> None:
    print(f"{detail['machine']}; rows {detail['filled']:.0%} full, {detail['trained']:.0%} of the positions trained")
    for dtype in dtypes:
        for side, x in detail[dtype].items():
            apart = f"  losses differ by {x['loss_difference']:.1e}" if "loss_difference" in x else ""
            print(f"{dtype:9s} {side:6s} {x['tokens_per_s']:9.1f} tokens/s  {x['batch']} rows at a time {x['remat']}{apart}")


if __name__ == "__main__":
    main()
