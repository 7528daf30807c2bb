"""The terminal table: arms down, tasks across in their groups, mean over seeds with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dccot_jax.evaluate.metrics import FORMAT_FAILURE_RATE, SMALL_N
from dccot_jax.report.evaluations import BASE, GROUP_TITLES

FORMAT_MARK, SMALL_MARK = "†", "‡"
_CELL_WIDTH = 15


def print_tables(console: Console, results: Mapping[str, Any]) -> None:
    """Print accuracies and the declared paired comparisons of a results.json."""
    groups, arms = results["groups"], results["arms"]
    if not groups:
        console.print("No evaluations to report.")
        return
    widest = max(len(arm) for arm in arms) + 12
    columns = sum(len(tasks) for tasks in groups.values())
    parts: Sequence[Mapping[str, Sequence[str]]] = (
        [groups] if widest + columns * (_CELL_WIDTH + 3) <= console.width else [{group: tasks} for group, tasks in groups.items()]
    )
    for part in parts:
        console.print(accuracy_table(part, arms))
    for line in footnotes(arms):
        console.print(line, style="dim", highlight=False)
    declared = [row for row in results["comparisons"] if row["kind"] == "declared"]
    if declared:
        console.print(comparison_table(declared))


def accuracy_table(groups: Mapping[str, Sequence[str]], arms: Mapping[str, Any]) -> Table:
    """Flexible accuracy in percent, its 95 % interval below, marks for format failures and small n."""
    title = "Accuracy (flexible, %), mean over seeds [95 % interval]"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("arm")
    table.add_column("seeds", justify="right")
    for group, tasks in groups.items():
        for task in tasks:
            n = next((cells[task]["n"] for cells in arms.values() if task in cells), 0)
            header = Text(f"{GROUP_TITLES[group]}\n", style="dim")
            table.add_column(header + Text(task, style="bold") + Text(f"\nn = {n}", style="dim"), justify="right")
    for arm, cells in arms.items():
        seeds = max((cell["n_seeds"] for cell in cells.values()), default=0)
        row = [cell_text(cells.get(task)) for tasks in groups.values() for task in tasks]
        table.add_row(arm, str(seeds), *row, style="dim" if arm == BASE else None)
    return table


def cell_text(cell: Mapping[str, Any] | None) -> Text:
    """``91.3†`` over ``[88.4, 93.7]``; a dash where nothing was evaluated."""
    if cell is None or cell["mean"]["accuracy_flexible"] is None:
        return Text("-")
    found = Text(f"{100 * cell['mean']['accuracy_flexible']:.1f}{marks(cell)}", style="bold")
    if cell["interval"]:
        low, high = cell["interval"]
        found.append(f"\n[{100 * low:.1f}, {100 * high:.1f}]", style="dim not bold")
    return found


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Paired differences in points with interval, p and Holm-adjusted p; a null result is shown as null."""
    table = Table(title="Paired comparisons (bootstrap over items × seeds)", title_justify="left")
    for name in ("first - second", "task", "difference", "95 % interval", "p", "p (Holm)", "verdict"):
        table.add_column(name, justify="left" if name in ("first - second", "task", "verdict") else "right")
    for row in rows:
        pair = f"{row['first']} - {row['second']}"
        if "undefined" in row:
            table.add_row(pair, row["task"], "-", "-", "-", "-", row["undefined"])
            continue
        interval = "-" if row["low"] is None else f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        table.add_row(
            pair,
            row["task"],
            f"{100 * row['difference']:+.1f}",
            interval,
            format_p(row["p_value"]),
            format_p(row["p_holm"]),
            row["verdict"],
        )
    return table


def marks(cell: Mapping[str, Any]) -> str:
    """Marks of a cell: † format failure, ‡ fewer than 200 items."""
    return (FORMAT_MARK if cell["format_failure"] else "") + (SMALL_MARK if cell["small_n"] else "")


def footnotes(arms: Mapping[str, Any]) -> list[str]:
    """What the marks mean, for the marks that occur; small n with the reason per task."""
    cells = [(task, cell) for tasks in arms.values() for task, cell in tasks.items()]
    notes = []
    if any(cell["format_failure"] for _, cell in cells):
        notes.append(
            f"{FORMAT_MARK} format failure: no answer could be read in more than {FORMAT_FAILURE_RATE:.0%} of the replies of some seed"
        )
    reasons = dict.fromkeys(f"{task}: {cell['small_n']}" for task, cell in cells if cell["small_n"])
    if reasons:
        notes.append(f"{SMALL_MARK} fewer than {SMALL_N} items ({'; '.join(reasons)})")
    return notes


def format_p(value: float | None) -> str:
    """A p-value for people; a dash where undefined."""
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
