"""What the commands print: tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from dccot_jax.records import Dropped
from dccot_jax.select.columns import read_columns

_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_REASONS = 12  # most frequent ones shown


def scores(table: pa.Table, dropped: Sequence[Dropped]) -> None:
    """Distribution of every column, and how many rows were dropped for what."""
    columns = read_columns([table.drop_columns(["source"])])
    shown = _table("Scores", "signal", "rows", "mean", "std", "min", "5 %", "median", "95 %", "max")
    for name, values in columns.numbers.items():
        x = np.array(list(values.values()), np.float64)
        spread = [f"{q:.4g}" for q in (x.mean(), x.std(), *np.quantile(x, _QUANTILES))] if len(x) else []
        shown.add_row(name, f"{len(x):,}", *spread)
    for name, vectors in columns.vectors.items():
        size = len(next(iter(vectors.values()), ()))
        shown.add_row(name, f"{len(vectors):,}", f"vectors of {size:,} numbers")
    _print(shown)
    _reasons(dropped)


def selection(funnel: Sequence[Mapping[str, Any]], dropped: Sequence[Dropped], tables: Sequence[pa.Table], kept: Collection[str]) -> None:
    """What every step did, the reasons, and the means of the finite scores over the rows kept and dropped."""
    steps = _table("Selection", "step", "rows in", "rows out", "groups in", "groups out", "tokens in", "tokens out")
    for step in funnel:
        figures = (step[f"{what}_{side}"] for what in ("rows", "groups", "tokens") for side in ("in", "out"))
        steps.add_row(step["step"], *(f"{figure:,}" for figure in figures))
    _print(steps)
    _reasons(dropped)
    means = _table("Kept and dropped", "signal", "mean kept", "mean dropped", "not finite")
    for name, values in read_columns(tables).numbers.items():
        finite = {i: value for i, value in values.items() if np.isfinite(value)}
        sides = [[value for i, value in finite.items() if (i in kept) is side] for side in (True, False)]
        means.add_row(name, *(f"{np.mean(side):.4g}" if side else "-" for side in sides), f"{len(values) - len(finite):,}")
    if means.row_count:
        _print(means)


def stability(report: Mapping[str, Any]) -> None:
    """One line per change and signal."""
    base = ", ".join(f"{name} {value}" for name, value in report["baseline"].items())
    shown = _table(
        f"Stability against {base}",
        *("change", "kept", "Jaccard", "by chance", "moved", "at the cut", "signal", "Spearman", "Kendall", "largest difference"),
    )
    for change in report["changes"]:
        head = [
            f"{change['factor']} {change['value']}",
            f"{change['kept_rows']:,}",
            _number(change["jaccard"]),
            _number(change["jaccard_expected"]),
            f"{change['moved']:,}",
            f"{change['moved_in_band']:,}",
        ]
        for name, found in change["signals"].items():
            size = f"{found['max_difference']:.3g}" if found["max_difference"] is not None else "-"
            rank = ("vectors", "-") if found["kind"] == "vector" else (_number(found["spearman"]), _number(found["kendall"]))
            shown.add_row(*head, name, *rank, size)
            head = [""] * len(head)
        if not change["signals"]:
            shown.add_row(*head, "none read", "-", "-", "-")
    _print(shown)


def files(out: Path, beside: Path, *, rows: int | None = None) -> None:
    _console().print(f"wrote {out}{'' if rows is None else f': {rows:,} rows'}; every other row with its reason: {beside}", soft_wrap=True)


def _reasons(dropped: Sequence[Dropped]) -> None:
    examples: dict[str, list[Dropped]] = {}
    for row in dropped:
        examples.setdefault(row.reason, []).append(row)
    if not examples:
        return
    shown = _table("Dropped", "reason", "rows", "for example")
    ordered = sorted(examples.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    for reason, found in ordered[:_REASONS]:
        shown.add_row(reason, f"{len(found):,}", f"{found[0].id}: {found[0].detail}".rstrip(": "))
    if len(ordered) > _REASONS:
        shown.add_row(f"{len(ordered) - _REASONS} more", f"{sum(len(found) for _, found in ordered[_REASONS:]):,}")
    _print(shown)


def _number(value: float | None) -> str:
    """Four decimals, but 1.0 only where it is exactly one."""
    if value is None:
        return "-"
    return "1.0" if value == 1.0 else f"{min(value, 0.9999):.4f}" if value > 0 else f"{value:.4f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, overflow="fold", justify="left" if number == 0 or name in ("signal", "for example") else "right")
    return table


def _print(table: Table) -> None:
    _console().print(table)


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
