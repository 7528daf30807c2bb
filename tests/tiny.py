"""The smallest config that passes through every stage; seconds on a laptop."""

from __future__ import annotations

from typing import Any

from dccot_jax import config as config_lib

TINY: dict[str, Any] = {
    "name": "tiny",
    "student.model": None,
    "traces.questions": 48,
    "tokens.max_length": 192,
    "train.row_tokens": 192,
    "train.rows_per_step": 8,
    "train.steps": 12,
    "train.warmup_steps": 2,
    "train.checkpoint_every": 3,
    "train.log_every": 1,
    "score.signals": ("nll", "ifd_ppl", "student_error"),
    "score.student": "warmup",
    "score.chunk_rows": 16,
    "score.warmup.share": 0.5,
    "score.warmup.steps": 4,
    "select.steps": ({"name": "teacher_correct"}, {"name": "top", "signal": "nll", "share": 0.8}),
    "curriculum.kind": "staged",
    "evaluate.iid": ("synth_arithmetic",),
    "evaluate.ood": ("synth_arithmetic_long",),
    "evaluate.limit": 12,
    "evaluate.max_new_tokens": 24,
    "evaluate.batch_rows": 8,
    "report.bootstrap": 50,
}

TINY_MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def tiny_config(**changes: Any) -> config_lib.ConfigDict:
    """`TINY` with dotted keys changed; write dots as double underscores."""
    settings = {key: value for key, value in TINY.items() if value is not None}
    settings |= {f"student.model.{key}": value for key, value in TINY_MODEL.items()}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return config_lib.override(config_lib.default_config(), settings)
