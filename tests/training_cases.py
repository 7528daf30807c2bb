"""Small models, sequences and batches for the tests of training."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, open_artifact, table_hash
from dccot_jax.config import default_config
from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import BATCH, make_mesh, param_shardings, weight_shapes
from dccot_jax.records import content_hash

# H differs from D / N, K from N, the rotary base from its default, and the sizes divide a (2, 2, 2) mesh.
TINY = ModelConfig(
    family="llama", vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    rope_theta=500.0, tie_embeddings=True, max_positions=64,
)  # fmt: skip
Place = tuple[int, int, int]
UNTIED = dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tie_embeddings=False)


@dataclasses.dataclass(frozen=True)
class Sequence_:
    """Token ids, how many of them are prompt, and the weight of each completion token."""

    ids: np.ndarray
    prompt: int
    weight: float


def sequences(rng: np.random.Generator, count: int, *, longest: int = 16, vocab: int = 48, weight: float = 1.0) -> list[Sequence_]:
    found = []
    for _ in range(count):
        length = int(rng.integers(4, longest + 1))
        found.append(Sequence_(rng.integers(0, vocab, length).astype(np.int32), int(rng.integers(1, length - 1)), weight))
    return found


def pack(rows: Sequence[Sequence[Sequence_]], row_tokens: int) -> dict[str, np.ndarray]:
    """Lay out sequences: ``rows[g]`` are those of packed row g."""
    shape = (len(rows), row_tokens)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "labels", "segment_ids", "positions")}
    batch["weights"] = np.zeros(shape, np.float32)
    for g, row in enumerate(rows):
        start = 0
        for segment, seq in enumerate(row, 1):
            end = start + len(seq.ids)
            assert end <= row_tokens
            batch["tokens"][g, start:end] = seq.ids
            batch["labels"][g, start : end - 1] = seq.ids[1:]
            batch["segment_ids"][g, start:end] = segment
            batch["positions"][g, start:end] = np.arange(len(seq.ids))
            batch["weights"][g, start + seq.prompt - 1 : end - 1] = seq.weight
            start = end
    return batch


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, jax.devices()[: data * fsdp * tensor])


def place(batch: dict[str, np.ndarray], on: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return {name: jax.device_put(x, jax.NamedSharding(on, jax.P(BATCH, None))) for name, x in batch.items()}


@functools.cache
def host_params(mc: ModelConfig, seed: int = 0):
    """Random parameters on the host; nothing has to be compiled for them."""
    rng = np.random.default_rng(seed)

    def draw(shapes):
        return {
            name: draw(shape)
            if isinstance(shape, dict)
            else (1.0 + 0.1 * rng.standard_normal(shape) if name.endswith("norm") else 0.2 * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in sorted(shapes.items())
        }

    return draw(weight_shapes(mc))


def params_on(mc: ModelConfig, on: jax.sharding.Mesh, seed: int = 0):
    return jax.tree.map(jax.device_put, host_params(mc, seed), param_shardings(mc, on))


@functools.partial(jax.jit, static_argnums=1)
def _label_logp(params, mc: ModelConfig, batch) -> jax.Array:
    hidden = decoder.forward(params, mc, batch["tokens"], batch["segment_ids"], batch["positions"])
    return head.token_stats(params, mc, hidden, batch["labels"], want=("label_logp",))["label_logp"]


def sequence_nll(params, mc: ModelConfig, seq: Sequence_, on: jax.sharding.Mesh) -> np.ndarray:
    """NLL of each completion token of one sequence alone in its batch, float64 [n]."""
    batch = pack([[seq]], 16)  # padding on the right cannot be seen by a causal model
    with jax.set_mesh(on):
        logp = np.asarray(_label_logp(params, mc, batch), np.float64)
    return -logp[0, seq.prompt - 1 : len(seq.ids) - 1]


# --- a whole training -------------------------------------------------------------------------------------------------


def finished(
    path: Path, kind: str, logical_hash: str, facts: dict[str, Any] | None = None, config: dict[str, Any] | None = None
) -> Artifact:
    """Give a directory a manifest, as the pipeline does. config: the part of the run's that its stage depends on."""
    manifest = {"kind": kind, "identity": kind, "logical_hash": logical_hash, "config": config or {}, "facts": facts or {}, "files": {}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return open_artifact(path)


def write_student(path: Path, mc: ModelConfig, seed: int = 3) -> Artifact:
    writer = ArtifactWriter(path)
    about = {"hash": "t" * 64, "tokens": mc.vocab_size, "eos_id": 1, "stop_ids": [1], "pad_id": 0}
    record = {"model": mc.to_dict(), "weights": {"kind": "random", "seed": seed}, "tokenizer": about}
    writer.write_json("student", record)
    writer.write_text("tokenizer/tokenizer.json", "{}\n")
    return finished(path, "student", content_hash(record, digits=64), {"tokenizer_hash": about["hash"]})


def write_training(
    path: Path, mc: ModelConfig, cfg: ConfigDict, *, seed: int = 0, poison: Sequence[Place] = (), empty: Sequence[int] = ()
) -> dict[str, Artifact]:
    """Inputs of the train stage: student, tokens, and a plan with one to three sequences in every packed row.

    The weight of the sequences at `poison`, (step, row, slot) from 0, is not a number; of those in the steps `empty` it is zero.
    """
    rng = np.random.default_rng(seed)
    rows, row_tokens, steps = cfg.train.rows_per_step, cfg.train.row_tokens, cfg.train.steps
    pool = sequences(rng, 40, longest=row_tokens // 3, vocab=mc.vocab_size)
    tokens = ArtifactWriter(path / "tokenize")
    tokens.write_table(
        "tokens",
        pa.table(
            {
                "id": [f"{i:04d}" for i in range(len(pool))],
                "input_ids": pa.array([s.ids.tolist() for s in pool], pa.list_(pa.int32())),
                "prompt_tokens": pa.array([s.prompt for s in pool], pa.int32()),
            }
        ),
    )
    slots = [(step, row, slot) for step in range(steps) for row in range(rows) for slot in range(int(rng.integers(1, 4)))]
    places = [(*slot, int(rng.integers(len(pool)))) for slot in slots]
    columns = {name: pa.array([place[i] for place in places], pa.int32()) for i, name in enumerate(("step", "row", "slot", "token_row"))}
    columns["id"] = pa.array([f"{place[3]:04d}" for place in places])
    weight = rng.uniform(0.5, 2.0, len(places)).astype(np.float32)
    weight[[slots.index(place) for place in poison]] = np.nan
    weight[np.isin([place[0] for place in places], empty)] = 0.0
    table = pa.table({**columns, "weight": pa.array(weight)})
    plan = ArtifactWriter(path / "plan")
    plan.write_table("plan", table)
    plan_hash = table_hash(table, by=("step", "row", "slot"))
    plan.write_json(
        "plan",
        {
            "hash": plan_hash, "steps": steps, "rows_per_step": rows, "row_tokens": row_tokens, "loss_mask": "response",
            "tokenizer_hash": "t" * 64, "tokens_hash": "tokens", "sequences": {"unique": len(pool), "seen": len(places)},
        },
    )  # fmt: skip
    return {
        "student": write_student(path / "student", mc),
        "tokenize": finished(tokens.path, "tokenize", "tokens"),
        "plan": finished(plan.path, "plan", plan_hash),
    }


def run_config(**train) -> ConfigDict:
    cfg = default_config().copy_and_resolve_references().unlock()
    cfg.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    sizes = {"steps": 12, "rows_per_step": 8, "row_tokens": 32, "checkpoint_every": 4, "log_every": 3}
    cfg.train.update({**sizes, "warmup_steps": 2, "learning_rate": 1e-2, "remat": "none", **train})
    return cfg
