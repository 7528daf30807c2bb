"""An estimate for people: a few short tables. For programs it is printed as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dccot_jax.estimate.topologies import GIB

_MEMORY_ROWS = (
    ("parameters", "parameters"),
    ("optimizer", "optimizer state"),
    ("teacher", "teacher"),
    ("batch", "batch"),
    ("gradients", "gradients, float32"),
    ("activations", "activations kept for the backward pass"),
    ("copies", "the layers' matrices in the compute dtype"),
    ("logits", "logits of one chunk of the head"),
    ("temporaries", "other temporaries at the peak"),
)


def render(result: Mapping[str, Any], console: Console) -> None:
    """Print an estimate of `assess`."""
    topology, training, student = result["topology"], result["training"], result["student"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in training["mesh"].items())
    first = "" if training["moment_dtype"] == "float32" else f" with first moments in {training['moment_dtype']}"
    shape = f", {'x'.join(map(str, topology['shape']))}" if topology["shape"] else ""
    console.print(
        f"{result['config']} (arm {result['arm']}) on {topology['name']}: {topology['chips']} chip(s) on {topology['hosts']} host(s){shape}"
    )
    console.print(
        f"{student['family']} student of {student['parameters']:,} parameters; mesh {mesh}; {training['rows_per_step']} × "
        f"{training['row_tokens']} tokens per step in {training['microbatches']} micro-batch(es); remat {training['remat']}; "
        f"{training['optimizer']}{first}; {training['compute_dtype']}; attention {training['attention']}"
    )
    console.print(_memory_table(result))
    console.print(_speed_table(result))
    console.print(_data_table(result["data"]))
    for remark in result["remarks"]:
        console.print(f"note: {remark}", markup=False)
    if result["problem"]:
        console.print(f"cannot run: {result['problem']}", style="bold red", markup=False)
    elif result["fits"]:
        console.print("fits", style="bold green")
    else:
        console.print("does not fit", style="bold red")
    for place, option in enumerate(result["advice"]):
        where = "" if option["topology"] == topology["name"] else f" --topology={option['topology']}"
        flags = " ".join(f"--config.{key}={value}" for key, value in option["change"].items())
        learned = f"; changes what is learned: {' and '.join(option['alters'])}" if option["alters"] else ""
        console.print(
            f"{'smallest change that fits' if place == 0 else '  or'}:{where} {flags}  "
            f"({_gib(option['allocated_bytes'])} GiB, {_seconds(option['step_seconds'])} per step{learned})",
            markup=False,
            soft_wrap=True,
        )
    if not result["fits"] and not result["advice"]:
        console.print(
            "no micro-batches, remat, mesh, dtype of moments, adapters or slice of this kind makes it fit; train fewer tokens per row, or a"
            " smaller student"
        )


def _memory_table(result: Mapping[str, Any]) -> Table:
    memory, compiler = result["memory"], result["compiler"]
    table = Table(title="Memory per chip, GiB")
    for column in ("", "analytic", *(("compiler",) if compiler else ())):
        table.add_column(column, justify="left" if not column else "right")
    for key, label in _MEMORY_ROWS:
        table.add_row(label, _gib(memory[key]))
    table.add_section()
    rows = [("arguments", "arguments"), ("allocated", f"in all, peak in {memory['peak']}")]
    rows += [("total", "arguments + temporaries + outputs - aliases, as the compiler sums them")] if compiler else []
    for key, label in rows:
        table.add_row(label, _gib(memory[key]), *((_gib(compiler[key]),) if compiler else ()))
    table.add_row("available", _gib(memory["available"]))
    return table


def _speed_table(result: Mapping[str, Any]) -> Table:
    found = result["prediction"]
    table = Table(title="One step, at the roofline (an upper bound on speed)", show_header=False)
    table.add_row("model FLOPs (causal attention halved)", f"{result['flops_per_step']:.3e}")
    table.add_row("tokens", f"{result['tokens_per_step']:,}")
    table.add_row("step time", f"{_seconds(found['step_seconds'])}, bound by {found['bound']}")
    table.add_row("times", ", ".join(f"{name} {_seconds(value)}" for name, value in found["seconds"].items()))
    table.add_row("MFU", f"{100 * found['mfu']:.1f} %")
    table.add_row("tokens/s per chip", f"{found['tokens_per_second_per_chip']:,.0f}")
    if found["training_seconds"]:
        table.add_row(f"{result['training']['steps']:,} steps", f"{found['training_seconds'] / 3600:,.2f} h")
    return table


def _data_table(data: Mapping[str, Any]) -> Table:
    table = Table(title="Teacher calls, all arms")
    for column in ("stage", "teacher", "questions", "calls", "completion tokens, at most", "prompt tokens, about"):
        table.add_column(column, justify="left" if column in ("stage", "teacher") else "right")
    for part in data["parts"]:
        table.add_row(
            part["stage"],
            part["teacher"],
            *(_count(part[key]) for key in ("questions", "calls", "completion_tokens_at_most", "prompt_tokens")),
        )
    table.add_section()
    table.add_row("total", "", "", *(_count(data[key]) for key in ("calls", "completion_tokens_at_most", "prompt_tokens")))
    return table


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _gib(value: int | None) -> str:
    return "–" if value is None else f"{value / GIB:,.2f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"
