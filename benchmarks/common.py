"""What the benchmark scripts share: rows of real traces, workers of other libraries, a random model, the machine."""

from __future__ import annotations

import gzip
import json
import os
import platform
import random
import re
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

QUESTION = "{}\nSolve step by step and end with 'The answer is <number>'."
TEACHERS = (("ChatGPT", 6), ("gemini", 6), ("llama", 4))
SVAMP = [f"svamp/eit/SVAMP_{name}_level{level}_ranked.json.gz" for name, levels in TEACHERS for level in range(1, levels + 1)]
GSM8K = [f"gsm8k/eit/gsm8k_{name}_level{level}_ranked.json.gz" for name in ("gemini", "llama") for level in (1, 2)]
SHAPE_135M = {  # SmolLM2's
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
SHAPE_25M = {  # 25 million parameters, half of them the embedding of the student's vocabulary
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
}


# --- rows -----------------------------------------------------------------------------------------------------------------


def mixed_pairs(data: Path, count: int) -> list[tuple[str, str]]:
    """(question, trace), one per question, evenly from all files."""
    files = [*SVAMP, *GSM8K * 4]
    chosen, asked = [], set()
    for n in range(count):
        rows = read(data / files[n % len(files)])
        pick = random.Random(n)
        row = pick.choice(rows)
        while row["instruction"] in asked:
            row = pick.choice(rows)
        asked.add(row["instruction"])
        chosen.append((row["instruction"], row["output"]))
    return chosen


def read(path: Path, cache: dict[Path, Any] = {}) -> list[dict[str, str]]:  # noqa: B006
    if path not in cache:
        with gzip.open(path, "rt") as file:
            cache[path] = json.load(file)
    return cache[path]


def plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def make_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Any]:
    import numpy as np

    from dccot_jax.data.template import render_many
    from dccot_jax.select.views import Row

    rendered = render_many(tokenizer, [(QUESTION.format(question), trace) for question, trace in pairs])
    return [
        Row(f"{n:05d}", np.asarray(row.input_ids, np.int32), row.prompt_tokens)
        for n, row in enumerate(rendered)
        if not isinstance(row, Exception)
    ]


# --- other libraries ------------------------------------------------------------------------------------------------------


class Peer:
    """A worker in `peers/` that answers a line of JSON with a line of JSON; it sleeps while another side is timed."""

    def __init__(self, python: str, script: str):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [python, str(HERE / "peers" / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer died on {str(request)[:500]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def peer_python(given: str | None, cache: Path) -> str:
    """An interpreter with the peers: the given one, or that of a virtual environment with the extra `bench`."""
    if given:
        return given
    python = cache / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(cache, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", f"{HERE.parent}[bench]"], check=True)
    return str(python)


def random_student(folder: Path, python: str) -> Path:
    """A random model of 25 million parameters in the Hugging Face layout, made by the peer's transformers."""
    code = (
        "import sys, json, torch, transformers; torch.manual_seed(0);"
        "transformers.LlamaForCausalLM(transformers.LlamaConfig(**json.loads(sys.argv[1]))).save_pretrained(sys.argv[2])"
    )
    subprocess.run([python, "-c", code, json.dumps(SHAPE_25M), str(folder)], check=True, capture_output=True)
    return folder


# --- results --------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    import jax

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Print each ratio beside its goal, and write the result where asked."""
    for name, goal in result["goals"].items():
        value, lower = result[name], name in result.get("lower_is_better", ())
        met = value <= goal if lower else value >= goal
        print(f"{name:36s} {value:6.2f}  goal {'<=' if lower else '>='} {goal:4.2f}  {'met' if met else 'NOT MET'}")
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
