"""Input pipeline: a tokenised plan to device arrays, and the rate of tokenising.

  python benchmarks/input_pipeline.py [--json PATH] [--rows 1000000] [--traces FILE.jsonl]

Measures, on one core where the system lets a process choose: non-padding tokens a second from ``tokens.parquet`` and
``plan.parquet`` through packing and Grain's threads to arrays on the device, for packed rows of 512 and 4,096 tokens; anonymous
host memory over a plan of `--rows` documents, from a tenth of the way to the end; and the tokenising rate of the embedded
tokenizer, or of `--tokenizer`, on traces (`--traces`, else synthetic ones).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GOAL_TOKENS_PER_SECOND = 1_000_000
MEAN_TOKENS = 150  # of a document, as in distilled traces of short word problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--rows", type=int, default=1_000_000, help="documents of the plan (default 1,000,000)")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each rate is measured (default 15)")
    parser.add_argument("--tokenizer", default="", help="Hugging Face directory; default: the embedded tokenizer")
    parser.add_argument("--traces", default="", help="JSONL of traces to tokenise; default: synthetic ones")
    args = parser.parse_args()
    one_core = _one_core()
    detail: dict[str, Any] = {"rows": args.rows, "one_core": one_core, "row_tokens": {}}
    with tempfile.TemporaryDirectory() as folder:
        for row_tokens in (512, 4096):
            detail["row_tokens"][row_tokens] = measure(Path(folder), args.rows, row_tokens, args.seconds)
    detail["tokenising"] = tokenising(args.tokenizer, args.traces, args.seconds)
    slowest = min(found["tokens_per_second"] for found in detail["row_tokens"].values())
    growth = max(found["memory_end_mib"] / found["memory_tenth_mib"] for found in detail["row_tokens"].values())
    result = {
        "ratio_tokens_per_second_to_goal": slowest / GOAL_TOKENS_PER_SECOND,
        "ratio_memory_end_to_tenth": growth,
        "goals": {"ratio_tokens_per_second_to_goal": 1.0},
        "detail": detail,
    }
    print_table(detail)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def _one_core() -> bool:
    """Keep to one core, so that the figure is one core's; before JAX starts its threads."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return True


def measure(folder: Path, rows: int, row_tokens: int, seconds: float) -> dict[str, Any]:
    """Tokens a second for `seconds`, then memory over one pass of the whole plan."""
    import jax

    from dccot_jax.artifact import read_batches, read_table
    from dccot_jax.data.loader import PlanSource, batches
    from dccot_jax.data.token_store import TOKEN_COLUMNS
    from dccot_jax.model.sharding import make_mesh
    from dccot_jax.train.feed import local_rows, to_global

    per_step = max(16 * 512 // row_tokens, 2)
    write_tokens(folder / "tokens.parquet", rows)
    steps = write_plan(folder / "plan.parquet", rows, row_tokens, per_step)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    mine = local_rows(mesh, per_step)
    started = time.monotonic()
    source = PlanSource(
        read_table(folder / "plan.parquet"),
        read_batches(folder / "tokens.parquet", TOKEN_COLUMNS),
        steps=steps,
        rows_per_step=per_step,
        row_tokens=row_tokens,
        rows=mine,
    )
    opened = time.monotonic() - started

    def arrive(first: int) -> Iterator[dict[str, jax.Array]]:
        for local in batches(source, first):
            yield to_global(local, mesh, mine, per_step)

    # The rate, from the second step on: the first waits for the threads to start.
    feed, tokens, done = arrive(0), 0, 0
    jax.block_until_ready(next(feed))
    started = time.monotonic()
    for batch in feed:
        jax.block_until_ready(batch)
        tokens, done = tokens + int((source_tokens(batch)).sum()), done + 1
        if time.monotonic() - started > seconds:
            break
    spent = time.monotonic() - started
    memory = []
    for step, batch in enumerate(arrive(0)):
        jax.block_until_ready(batch)
        if step in (steps // 10, steps - 1):
            memory.append(anonymous_mib())
    return {
        "rows_per_step": per_step,
        "steps": steps,
        "open_seconds": opened,
        "tokens_per_second": tokens / spent,
        "steps_measured": done,
        "memory_tenth_mib": memory[0],
        "memory_end_mib": memory[-1],
    }


def source_tokens(batch: dict[str, Any]) -> Any:
    """Non-padding positions of a batch [rows, T]."""
    import numpy as np

    return np.asarray(batch["segment_ids"]) > 0


def write_tokens(path: Path, rows: int) -> None:
    """A token table of random documents, 20,000 rows at a time; lengths from 20 to twice the mean."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists():
        return
    rng = np.random.default_rng(0)
    schema = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("prompt_tokens", pa.int32())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, rows, 20_000):
            lengths = document_lengths(rows)[start : start + 20_000]
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(rng.integers(0, 49152, offsets[-1], np.int32)))
            names = pa.array([f"{i:09d}" for i in range(start, start + len(lengths))])
            writer.write_table(pa.table([names, ids, pa.array((lengths // 3).astype(np.int32))], schema=schema))


def document_lengths(rows: int) -> Any:
    import numpy as np

    return np.random.default_rng(1).integers(20, 2 * MEAN_TOKENS - 20, rows)


def write_plan(path: Path, rows: int, row_tokens: int, per_step: int) -> int:
    """A plan of every document once, shuffled, next fit into rows; returns the number of steps."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = np.random.default_rng(2).permutation(rows)
    lengths = document_lengths(rows)
    packed = np.zeros(rows, np.int32)
    row = used = 0
    for i, length in enumerate(lengths[order].tolist()):
        if used + length > row_tokens:
            row, used = row + 1, 0
        packed[i], used = row, used + length
    columns = {"step": packed // per_step, "row": packed % per_step, "token_row": order.astype(np.int32)}
    pq.write_table(pa.table({**columns, "weight": np.ones(rows, np.float32)}), path)
    return int(packed[-1]) // per_step + 1


def anonymous_mib() -> float:
    """Memory of this process that is no file's, MiB; NaN where the system does not tell."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in rollup.read_text().splitlines() if line.startswith("Anonymous:"))


def tokenising(folder: str, traces_file: str, seconds: float) -> dict[str, Any]:
    """Tokens a second through the chat template and the tokenizer, as stage `tokenize` renders them."""
    from dccot_jax.data.template import Rendered, render_many
    from dccot_jax.data.tokenizer import embedded_tokenizer_dir, load_tokenizer

    with tempfile.TemporaryDirectory() as made:
        if not folder:
            embedded_tokenizer_dir(made)
        tokenizer = load_tokenizer(folder or made)
        texts = trace_texts(traces_file)
        started, tokens, rows = time.monotonic(), 0, 0
        while time.monotonic() - started < seconds:
            found = [row for row in render_many(tokenizer, texts) if isinstance(row, Rendered)]
            tokens, rows = tokens + sum(len(row.input_ids) for row in found), rows + len(found)
        spent = time.monotonic() - started
    return {"tokens_per_second": tokens / spent, "rows_per_second": rows / spent, "texts": len(texts)}


def trace_texts(file: str) -> list[tuple[str, str]]:
    """(prompt, target) of 512 traces."""
    from dccot_jax.formats import import_records
    from dccot_jax.tasks.synthetic.corpus import corpus

    if not file:
        texts = list(itertools.islice(corpus(), 1024))
        return list(zip(texts[::2], texts[1::2]))
    return [(fields["question"], fields["target"]) for fields in import_records(file).records[:512]]


def print_table(detail: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "row tokens", "rows/step", "tokens/s", "memory at 1/10, MiB", "at the end, MiB", title=f"plan of {detail['rows']:,} documents"
    )
    for size, found in detail["row_tokens"].items():
        cells = (f"{found[name]:,.0f}" for name in ("rows_per_step", "tokens_per_second", "memory_tenth_mib", "memory_end_mib"))
        table.add_row(f"{size:,}", *cells)
    console = Console()
    console.print(table)
    one = detail["tokenising"]
    console.print(f"tokenising: {one['tokens_per_second']:,.0f} tokens/s, {one['rows_per_second']:,.0f} rows/s")


if __name__ == "__main__":
    main()
