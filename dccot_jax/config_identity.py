"""What of a config decides a result: the part that is hashed into the identity of a stage's artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.config import flatten, lookup

# Keys that change speed, place or appearance and never a result: recorded in manifests, not hashed. (Of files, the content is.)
UNHASHED = frozenset(
    {
        "name",
        "data_dir",
        "mesh",
        "attention",
        "score.batch_tiles",
        "score.chunk_rows",
        "score.deita.complexity_model",
        "score.deita.quality_model",
        "score.models",
        "score.sentences.model",
        "select.tables",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_best",
        "train.max_skipped",
        "train.step_deadline_seconds",
        "train.log_every",
        "evaluate.batch_rows",
    }
)

# Keys that came later, with the value at which they change nothing: left out there, so that older runs keep their identities.
ADDED_LATER = {
    "score.gradients.norm": "ghost",
    "score.gradients.norm_subset": ["*"],
    "score.gradients.subset": [],
    "score.gradients.checkpoints": 4,
    "score.gradients.dim": 8192,
    "score.gradients.projection": "rademacher",
    "score.gradients.seed": 0,
    "score.gradients.validation": [],
    "student.model.sliding_window": 0,
    "student.model.attn_softcap": 0.0,
    "student.model.final_softcap": 0.0,
    "train.decay_share": 0.2,
    "train.distill.kind": "none",
    "train.distill.teacher": "",
    "train.distill.weight": 1.0,
    "train.distill.temperature": 1.0,
    "train.distill.beta": 0.5,
    "train.distill.teacher_dtype": "bfloat16",
    "train.distill.top_k": 0,
    "train.distill.top_k_dtype": "float32",
    "train.lora.preset": "",
    "train.lora.rank": 0,
    "train.lora.alpha": 0.0,
    "train.lora.dropout": 0.0,
    "train.lora.targets": [],
    "train.lora.frozen_dtype": "float32",
    "train.moment_dtype": "float32",
    "train.snapshots": 0,
}

# What still has a meaning in a section whose kind is "none".
SWITCHED_OFF = frozenset({"mix.kind", "mix.total_examples", "mix.total_tokens", "curriculum.kind"})


def config_slice(config: ConfigDict, keys: Sequence[str]) -> dict[str, Any]:
    """The part of a config that a stage depends on, as {dotted key: plain value}, without `UNHASHED` keys and
    without those of `ADDED_LATER` that are off.

    A section that is switched off (its ``kind`` is "none") counts with what still works in it (`SWITCHED_OFF`) alone.
    Adapters are drawn by the run's seed: where ``train`` asks for them, ``seed`` counts too.
    """
    found: dict[str, Any] = {}
    for key in keys:
        value = lookup(config, key)
        off = isinstance(value, ConfigDict) and value.get("kind") == "none"
        for name, item in flatten(key, value):
            later = name in ADDED_LATER and item == ADDED_LATER[name]
            if not (_unhashed(name) or later or (off and name not in SWITCHED_OFF)):
                found[name] = item
    if "train" in keys and (config.train.lora.rank or config.train.lora.preset):
        found["seed"] = config.seed
    return found


def _unhashed(name: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in UNHASHED)
