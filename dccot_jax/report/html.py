"""report.html: one self-contained page, light and dark, without scripts and without anything fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from dccot_jax.evaluate.metrics import FORMAT_FAILURE_RATE, SMALL_N
from dccot_jax.records import content_hash
from dccot_jax.report import plots
from dccot_jax.report.evaluations import BASE, GROUP_TITLES, Evaluation, arm_names
from dccot_jax.report.tables import footnotes, format_p, marks

_STAGE_TITLES = {
    "traces": "teacher traces",
    "augment": "augmented",
    "verify": "verified",
    "tokenize": "tokenised",
    "score": "scored",
    "select": "selected",
    "plan": "trained on",
}


def render_page(results: Mapping[str, Any], evaluations: Sequence[Evaluation], figures: Mapping[str, str], *, samples: int) -> str:
    """The page as HTML text.

    Args:
      results: the finished results.json. figures: SVG documents by name, see `draw_figures`. samples: items shown side by side.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("dccot_jax.report")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text())
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "pct": _percent,
        "points": _points,
        "p": format_p,
        "num": _number,
        "marks": marks,
        "compact": _compact,
        "signed": _signed,
        "sig": _significant,
        "heat": _heat,
        "passes": _passes,
    }
    arms = list(results["arms"])
    styles = {arm: {**style, "glyph": _GLYPHS[style["marker"]]} for arm, style in plots.arm_styles(arms, BASE).items()}
    declared = [row for row in results["comparisons"] if row["kind"] == "declared"]
    return environment.get_template("template.html.jinja").render(
        r=results,
        arms=arms,
        trained=[arm for arm in arms if arm != BASE],
        base=BASE,
        styles=styles,
        groups=results["groups"],
        group_titles=GROUP_TITLES,
        tasks=[task for tasks in results["groups"].values() for task in tasks],
        declared=declared,
        references=_reference_tables(results),
        forest=_forest_scale(declared),
        funnels=_funnels(results["data"]["funnel"]),
        stage_titles=_STAGE_TITLES,
        figures={
            name: plots.inline(svg, f"Figure {position}: {_alternative(name, results)}")
            for position, (name, svg) in enumerate(figures.items(), 1)
        },
        samples=choose_samples(evaluations, results["groups"], samples),
        footnotes=footnotes(results["arms"]),
        has_nll=any(cell["gold_nll"] for cells in results["arms"].values() for cell in cells.values()),
        config_text=json.dumps(results["config"], indent=1, sort_keys=True),
        small_n=SMALL_N,
        format_failure_rate=FORMAT_FAILURE_RATE,
    )


_GLYPHS = {"x": "×", "o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}  # of the figures' markers
_LABELS = {
    "tokens": "Accuracy against mean completion tokens",
    "steps": "Accuracy by number of reasoning steps",
    "loss": "Training loss",
}


def _alternative(name: str, results: Mapping[str, Any]) -> str:
    """What a figure shows, in words, for those who do not see it."""
    kind, *parts = name.split(":")
    if kind == "scores":
        one = results["selection"]["recipes"][int(parts[0])]
        return f"Rows kept and dropped by {', '.join(one['arms'])}, histograms of {', '.join(one['histograms'])}"
    if kind == "signals":
        pool = results["selection"]["pools"][int(parts[0])]
        sizes = ", ".join(f"{group} {rows} rows" for group, rows in pool["groups"].get(parts[1], {}).items())
        return f"Histograms per {parts[1]} ({sizes or 'all rows'}) of {', '.join(ridge_panels(pool))}; quantiles are in the table below it"
    return _LABELS[kind]


def ridge_panels(pool: Mapping[str, Any]) -> dict[str, Any]:
    """Distributions of a pool's signals and of the lengths of its vectors, by the title of their panel."""
    norms = {f"|{name}|": vector["norm"] for name, vector in pool["vectors"].items() if vector["norm"] is not None}
    return {**pool["signals"], **norms}


def draw_figures(results: Mapping[str, Any]) -> dict[str, str]:
    """Every figure that has data, as SVG documents by name: tokens, steps, loss, signals:<pool>:<label>, scores:<recipe>."""
    styles = plots.arm_styles(list(results["arms"]), BASE)
    figures = {}
    if results["groups"]:
        figures["tokens"] = plots.accuracy_against_tokens(results["groups"], results["arms"], styles)
    stepped = [
        task
        for tasks in results["groups"].values()
        for task in tasks
        if any(len(cells[task]["by_steps"]) > 1 for cells in results["arms"].values() if task in cells)
    ]
    if stepped:
        figures["steps"] = plots.accuracy_by_steps(stepped, results["arms"], styles)
    if any(run["steps"] for run in results["training"]):
        missing = [run["arm"] for run in results["training"] if run["arm"] not in styles]
        curve_styles = styles | plots.arm_styles(missing, BASE)
        figures["loss"] = plots.loss_curves(results["training"], curve_styles)
    for position, pool in enumerate(results["selection"]["pools"]):
        panels = ridge_panels(pool)
        for label in _ridge_labels(pool) if panels else ():
            figures[f"signals:{position}:{label}"] = plots.signal_ridges(panels, label, pool["groups"][label], f"signals{position}{label}")
    for position, one in enumerate(results["selection"]["recipes"]):
        if one["histograms"]:
            figures[f"scores:{position}"] = plots.score_histograms(one["histograms"], f"scores{position}")
    return figures


def _ridge_labels(pool: Mapping[str, Any]) -> list[str]:
    """Labels that cut a pool into groups, one of those that cut it alike; the first one where none does."""
    labels = [label for label, groups in pool["groups"].items() if len(groups) > 1] or list(pool["groups"])
    return labels[:1] if pool["same_groups"] else labels


def choose_samples(evaluations: Sequence[Evaluation], groups: Mapping[str, Sequence[str]], count: int) -> list[dict[str, Any]]:
    """Items shown with every arm's reply (first seed of each arm).

    The tasks take turns; inside a task, items on which the trained arms disagree come first, then by hash of the item id.
    Nothing is picked by hand, and every arm's reply to a picked item is shown.
    """
    cells = {arm: next(item for item in evaluations if item.arm == arm) for arm in arm_names(evaluations)}
    queues = []
    for task in (task for tasks in groups.values() for task in tasks):
        covered = {arm: cell for arm, cell in cells.items() if task in cell.samples}
        if not covered:
            continue
        common = set.intersection(*(set(cell.samples[task]) for cell in covered.values()))

        def order(item: str, task: str = task, covered: Mapping[str, Evaluation] = covered) -> tuple[bool, str]:
            verdicts = {bool(cell.samples[task][item]["correct_flexible"]) for arm, cell in covered.items() if arm != BASE}
            return len(verdicts) < 2, content_hash("shown", item)

        queues.append((task, covered, sorted(common, key=order)))
    found = []
    for turn in range(count):
        for task, covered, items in queues:
            if turn < len(items) and len(found) < count:
                first = next(iter(covered.values())).samples[task][items[turn]]
                found.append(
                    {
                        "task": task,
                        "group": first["group"],
                        "item_id": items[turn],
                        "question": first["doc"]["question"],
                        "prompt": first["prompt"],
                        "target": first["target"],
                        "replies": [{"arm": arm, "seed": cell.seed, **cell.samples[task][items[turn]]} for arm, cell in covered.items()],
                    }
                )
    return found


def _reference_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reference comparisons as one matrix per second arm: {second, rows: {first: {task: comparison}}}."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["comparisons"]:
        if row["kind"] == "reference":
            found.setdefault(row["second"], {}).setdefault(row["first"], {})[row["task"]] = row
    return [{"second": second, "rows": rows} for second, rows in found.items()]


def _forest_scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """Half-width of the forest plot's axis, as a fraction: the largest bound, rounded up to five points."""
    bounds = [abs(value) for row in rows for value in (row.get("low"), row.get("high"), row.get("difference")) if value is not None]
    return max(0.05, -(-max(bounds, default=0.05) // 0.05) * 0.05)


def _funnels(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Funnel rows and the stages that occur in any of them, in order."""
    names = [name for name in _STAGE_TITLES if any(stage["stage"] == name for entry in entries for stage in entry["stages"])]
    most = max((max(stage["rows_in"], stage["rows_out"]) for entry in entries for stage in entry["stages"]), default=1)
    return {
        "stages": names,
        "most": max(most, 1),
        "rows": [{**entry, "by_stage": {stage["stage"]: stage for stage in entry["stages"]}} for entry in entries],
    }


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _number(value: Any, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _significant(value: float | None) -> str:
    """Four significant digits; whole numbers as they are, thousands grouped."""
    if value is None:
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 1e4 or value == round(value) else f"{value:#.4g}").replace("-", "−")


def _heat(value: float | None) -> str:
    """Background of a cell for a number in [-1, 1]: the stronger, the darker; two hues for the two signs."""
    if value is None:
        return ""
    return f"background: color-mix(in srgb, var(--arm-{0 if value >= 0 else 1}) {round(55 * min(abs(value), 1.0))}%, transparent)"


def _passes(declared: Mapping[str, Any]) -> str:
    """`2 forward · 1 backward`: passes per row in words."""
    found = [f"{declared[key]} {key}" for key in ("forward", "backward") if declared[key]]
    if declared["generations"]:
        found.append(f"{declared['generations']} answer{'s' if declared['generations'] > 1 else ''} per question")
    if declared["undeclared"]:
        found.append(f"not declared: {', '.join(declared['undeclared'])}")
    return " · ".join(found) or "no model pass"


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
