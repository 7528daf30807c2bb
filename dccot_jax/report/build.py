"""Build the report of a run from its finished artifacts: results.json, samples, figures, table, page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from etils.epath import Path
from ml_collections import ConfigDict
from rich.console import Console

from dccot_jax.artifact import ArmRun, write_atomic, write_table
from dccot_jax.config import to_plain
from dccot_jax.context import Context
from dccot_jax.records import derive_seed
from dccot_jax.report import data
from dccot_jax.report.evaluations import Evaluation, read_evaluations
from dccot_jax.report.html import draw_figures, render_page
from dccot_jax.report.judges import judges
from dccot_jax.report.overlap import overlap
from dccot_jax.report.results import build_results, compare_arms, lm_eval_results, summarise_arms
from dccot_jax.report.selection import selection
from dccot_jax.report.tables import print_tables

_WIDTH = 160  # of the table where there is no terminal to fit


def build_report(runs: Sequence[ArmRun], out_dir: Path, cfg: ConfigDict, ctx: Context) -> dict[str, Any]:
    """Write the report and print its table; returns what results.json holds.

    Args:
      runs: every (arm, seed), the untrained student as arm ``base``. Runs without an evaluation still count for data and training.
      out_dir: directory of the report; files of an earlier report are replaced one by one.
    Files: ``results.json``; ``lm_eval/<arm>-seed<seed>.json`` (lm-eval's own layout, one per student);
    ``samples/<arm>-seed<seed>.jsonl``; ``lineage.parquet``; ``plots/*.svg``; ``table.txt``; ``report.html``.
    """
    out_dir, workdir = Path(out_dir), Path(out_dir).parent
    seed = derive_seed(cfg.seed, "report", "bootstrap")
    evaluations = read_evaluations(runs)
    arms = summarise_arms(evaluations, resamples=cfg.report.bootstrap, seed=seed)
    comparisons = compare_arms(evaluations, cfg.report.compare, resamples=cfg.report.bootstrap, seed=seed)
    results = build_results(evaluations, to_plain(cfg), arms, comparisons, workdir)
    table, index = data.lineage(runs, workdir)
    results |= {
        "data": {"funnel": data.funnel(runs), "overlap": overlap(runs), "judges": judges(runs)},
        "selection": selection(runs, workdir),
        "training": data.training(runs),
        "costs": data.costs(runs),
        "config_differences": data.config_differences(runs),
        "lineage": index,
        "bootstrap": {"resamples": cfg.report.bootstrap, "seed": seed},
    }
    _write_json(out_dir / "results.json", results)
    write_table(out_dir / "lineage.parquet", table)
    _write_students(out_dir, evaluations, index)
    figures = draw_figures(results)
    for name, svg in figures.items():
        write_atomic(out_dir / "plots" / f"{name.replace(':', '_')}.svg", svg.encode())
    write_atomic(out_dir / "report.html", render_page(results, evaluations, figures, samples=cfg.report.samples).encode())
    _write_table(out_dir / "table.txt", results)
    print_tables(ctx.console if ctx.console.is_terminal else Console(file=ctx.console.file, width=_WIDTH, quiet=ctx.console.quiet), results)
    return results


def _write_students(out_dir: Path, evaluations: Sequence[Evaluation], index: Sequence[dict[str, Any]]) -> None:
    """Samples and lm-eval results of every student; a sample names the plan and the trained parameters behind it."""
    artifacts = {(entry["arm"], entry["seed"]): entry["artifacts"] for entry in index}
    for item in evaluations:
        made = artifacts[(item.arm, item.seed)]
        origin = {"arm": item.arm, "seed": item.seed} | {name: made[name]["path"] for name in ("train", "plan") if name in made}
        rows = [{**row, **origin} for rows in item.samples.values() for row in rows.values()]
        text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
        write_atomic(out_dir / "samples" / f"{item.arm}-seed{item.seed}.jsonl", text.encode())
        _write_json(out_dir / "lm_eval" / f"{item.arm}-seed{item.seed}.json", lm_eval_results([item], item.arm, [item.seed]))


def _write_table(path: Path, results: dict[str, Any]) -> None:
    text = io.StringIO()
    print_tables(Console(file=text, width=_WIDTH, color_system=None), results)
    write_atomic(path, text.getvalue().encode())


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode())
