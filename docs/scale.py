"""Make docs/scale.md: `dccot estimate` for five students on four slices.

  python docs/scale.py            analytic figures of all cells; the compiler's figures of the same trainings in docs/scale.json are kept
  python docs/scale.py --aot CELL [CELL ...]   compile these cells too, e.g. qwen2.5-0.5b/v5e-16 (needs the extra `aot`)

Every figure comes from the command's JSON, kept in docs/scale.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from dccot_jax.cli import main as main_command

ROOT = Path(__file__).resolve().parent.parent
STORE, PAGE = ROOT / "docs" / "scale.json", ROOT / "docs" / "scale.md"
OPEN, CLOSE = "<!-- cells -->", "<!-- /cells -->"
STUDENTS = {
    "qwen2.5-0.5b": "qwen2_5_svamp.py:0.5b",
    "qwen2.5-1.5b": "qwen2_5_svamp.py:1.5b",
    "qwen2.5-3b": "qwen2_5_svamp.py:3b",
    "llama-3.1-8b": "llama3_1_svamp.py",
    "qwen2.5-32b": "qwen2_5_svamp.py:32b",
}
SLICES = {"v5e-16": 16, "v5p-128": 64, "v6e-256": 256, "h100x8": 8}  # chips
ROWS = 256  # of 4,096 tokens: about a million tokens per step, one row per chip and micro-batch
GIB = 2**30


def estimate(student: str, slice_: str, compiled: bool) -> dict[str, Any]:
    """One cell, by the command (in this process, which saves its start)."""
    command = [
        *("estimate", f"--config={ROOT / 'configs' / STUDENTS[student]}", f"--topology={slice_}", "--json"),
        *(
            f"--config.train.rows_per_step={ROWS}",
            f"--config.train.microbatches={ROWS // SLICES[slice_]}",
            "--aot" if compiled else "--noaot",
        ),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main_command(command)
    if code:
        sys.exit(f"dccot {' '.join(command)}: exit code {code}")
    return json.loads(printed.getvalue())


def row(cell: str, result: dict[str, Any]) -> str:
    student, slice_ = cell.split("/")
    memory, compiler, speed = result["memory"], result["compiler"], result["prediction"]
    change = (
        " ".join(f"{key.removeprefix('train.')}={value}" for key, value in result["advice"][0]["change"].items())
        if result["advice"]
        else ""
    )
    larger = result["advice"] and result["advice"][0]["topology"] != slice_
    where = result["advice"][0]["topology"] if larger else ""
    columns = (
        student,
        slice_,
        result["training"]["attention"],
        result["training"]["microbatches"],
        f"{(memory['parameters'] + memory['optimizer']) / GIB:.2f}",
        *against(memory, compiler, "allocated"),
        *against(memory, compiler, "total"),
        f"{memory['available'] / GIB:.1f}",
        "yes" if result["fits"] else "no",
        ("yes" if compiler["fits"] else "no") if compiler else "",
        f"{speed['step_seconds']:.2f}",
        speed["bound"],
        f"{speed['mfu']:.0%}",
        " ".join((where, change)).strip() or ("" if result["fits"] else "none found"),
    )
    return "| " + " | ".join(map(str, columns)) + " |"


def against(memory: dict[str, Any], compiler: dict[str, Any] | None, key: str) -> tuple[str, str, str]:
    """A figure, the compiler's, and by how much the first is off; the latter empty where there is none."""
    ours = memory[key]
    theirs = compiler[key] if compiler else None
    return (f"{ours / GIB:.1f}", *((f"{theirs / GIB:.1f}", f"{ours / theirs - 1:+.1%}") if theirs else ("", "")))


def main(arguments: list[str]) -> None:
    compiled = set(arguments[1:]) if arguments[:1] == ["--aot"] else set()
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    cells = [f"{student}/{slice_}" for student in STUDENTS for slice_ in SLICES]
    unknown = compiled - set(cells)
    if unknown:
        sys.exit(f"unknown cell {', '.join(sorted(unknown))}; cells are {', '.join(cells)}")
    for cell in cells:
        known, result = store.get(cell, {}), estimate(*cell.split("/"), cell in compiled)
        if known.get("training") == result["training"]:
            result["compiler"] = result["compiler"] or known["compiler"]
        store[cell] = {key: value for key, value in result.items() if key != "data"}
        print(row(cell, store[cell]), flush=True)
        STORE.write_text(json.dumps(store, indent=1) + "\n")
    before, rest = PAGE.read_text().split(OPEN)
    _, after = rest.split(CLOSE)
    heads = (
        *("student", "slice", "attention", "micro-batches", "state GiB", "needed GiB", "compiler: needed", "off by"),
        *("total GiB", "compiler: total", "off by", "available GiB", "fits", "compiler: fits"),
        *("step s", "bound by", "MFU", "smallest change that fits"),
    )
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- | --- |" + " ---: |" * (len(heads) - 4) + " --- |"]
    lines += [row(cell, store[cell]) for cell in cells]
    PAGE.write_text(before + OPEN + "\n" + "\n".join(lines) + "\n" + CLOSE + after)


if __name__ == "__main__":
    main(sys.argv[1:])
