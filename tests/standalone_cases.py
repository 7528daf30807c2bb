"""A tiny Hugging Face student and files of traces for the commands that work alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from dccot_jax.data.tokenizer import train_tokenizer, write_tokenizer
from dccot_jax.model import hf
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh
from dccot_jax.train.checkpoint import random_params

POSITIONS = 288
PAIRS = [(f"What is {a} + {a * 7 % 10}?", f"{a} + {a * 7 % 10} = {a + a * 7 % 10}.\nThe answer is {a + a * 7 % 10}.") for a in range(12)]


def make_student(folder: Path) -> Path:
    """A random Llama of one layer with its own tokenizer; some 20,000 parameters."""
    write_tokenizer(folder / "tok", train_tokenizer([text for pair in PAIRS for text in pair], 300))
    mc = ModelConfig("llama", 300, 16, 32, 1, 2, 2, 8, max_positions=POSITIONS, eos_token_ids=(1,), pad_token_id=0)
    hf.save_hf(random_params(mc, make_mesh({"fsdp": 1}, jax.devices()[:1]), 4), mc, folder / "tok", folder / "hf")
    return folder / "hf"


ROW = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "question_answer": lambda q, a: {"question": q, "answer": a},
    "eit": lambda q, a: {"instruction": q, "output": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "dccot": lambda q, a: {"question": q, "forward_reasoning": a},
}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(kind: str, count: int = len(PAIRS), **columns: Any) -> list[dict[str, Any]]:
    """`count` rows of a format; a column may be a function of the row's number."""
    extra = lambda n: {name: value(n) if callable(value) else value for name, value in columns.items()}  # noqa: E731
    return [ROW[kind](*pair) | extra(n) for n, pair in enumerate(PAIRS[:count])]
