"""Print the Markdown tables of docs/results.md for a finished run: every arm and seed, and the paired comparisons.

python docs/tables.py WORKDIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def training_table(results: dict) -> str:
    """What each student was trained on: steps, non-padding tokens, tokens that carry loss, and the last loss in nats."""
    rows = []
    for run in results["training"]:
        facts = run["facts"]
        numbers = [f"{facts[name]:,}" for name in ("steps", "sequences", "tokens", "trained_tokens")]
        rows.append([f"{run['arm']}, seed {run['seed']}", *numbers, f"{run['final_loss']:.4f}"])
    return markdown(["arm", "steps", "sequences", "tokens", "trained tokens", "final loss"], rows)


def cells_table(results: dict) -> str:
    """Accuracy with its 95 % interval per arm, seed and task, then length, truncation, no answer and gold NLL."""
    rows = []
    for cell in results["cells"]:
        low, high = cell["accuracy_flexible_interval"]
        nll = (cell.get("gold_nll") or {}).get("mean")
        rows.append(
            [
                f"{cell['arm']}, seed {cell['seed']}",
                cell["task"],
                str(cell["n"]),
                f"{cell['accuracy_flexible']:.1%} [{low:.1%}, {high:.1%}]",
                f"{cell['mean_completion_tokens']:.0f}",
                f"{cell['truncation_rate']:.1%}",
                f"{cell['no_answer_rate']:.1%}",
                "" if nll is None else f"{nll:.3f}",
            ]
        )
    return markdown(["arm", "task", "n", "accuracy", "mean tokens", "truncated", "no answer", "gold NLL"], rows)


def comparisons_table(results: dict) -> str:
    """Difference in accuracy, its 95 % interval by paired bootstrap, p, p after Holm, and the change in gold NLL."""
    rows = []
    for pair in results["comparisons"]:
        interval = "" if pair["low"] is None else f"[{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}]"
        nll = pair.get("gold_nll")
        change = "" if nll is None else f"{nll['difference']:+.3f} [{nll['low']:+.3f}, {nll['high']:+.3f}]"
        rows.append(
            [
                f"{pair['first']} − {pair['second']}",
                pair["task"],
                f"{100 * pair['difference']:+.1f} {interval}".strip(),
                f"{pair['p_value']:.3f}",
                f"{pair['p_holm']:.3f}",
                change,
                pair["verdict"],
            ]
        )
    return markdown(["first − second", "task", "points [95 % interval]", "p", "p (Holm)", "gold NLL, nats", "verdict"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "report" / "results.json").exists():
        sys.exit("usage: python docs/tables.py WORKDIR, of a finished run (WORKDIR/report/results.json)")
    found = json.loads((Path(sys.argv[1]) / "report" / "results.json").read_text())
    print(training_table(found), cells_table(found), comparisons_table(found), sep="\n\n")
