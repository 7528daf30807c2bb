"""Figures as SVG text. One colour and one marker per arm everywhere; no pyplot, so no global state.

Inline figures follow the page's light or dark theme: every colour of the palette is replaced by its CSS variable.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INK, MUTED, LINE = "#1c2530", "#5d6b7a", "#dde3ea"
BASE_COLOUR = "#7b8794"
# Distinguishable in the common forms of colour blindness, and by marker where not.
PALETTE = ("#2563c9", "#c2570c", "#0f8a5f", "#b8327a", "#6d4fd0", "#0b7f96", "#8a7a12", "#b3261e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
KEPT, DROPPED, RIDGE = PALETTE[0], PALETTE[1], PALETTE[5]
_RIDGE_COLUMNS = 3
_WIDE = 9.6  # inches: the page's text column


def arm_styles(arms: Sequence[str], base: str) -> dict[str, dict[str, str]]:
    """{arm: {colour, variable, marker}}; the untrained student is grey, trained arms take the palette in order."""
    found = {}
    index = 0
    for arm in arms:
        if arm == base:
            found[arm] = {"colour": BASE_COLOUR, "variable": "--arm-base", "marker": "x"}
        else:
            slot = index % len(PALETTE)
            found[arm] = {"colour": PALETTE[slot], "variable": f"--arm-{slot}", "marker": MARKERS[slot]}
            index += 1
    return found


def accuracy_against_tokens(groups: Mapping[str, Sequence[str]], arms: Mapping[str, Any], styles: Mapping[str, Mapping[str, str]]) -> str:
    """One panel per task: mean completion tokens across, flexible accuracy with its interval up, one mark per arm."""
    tasks = [task for names in groups.values() for task in names]

    def draw(axis: Any, task: str) -> None:
        for arm, style in styles.items():
            cell = arms[arm].get(task)
            if cell is None or cell["mean"]["accuracy_flexible"] is None:
                continue
            x, y = cell["mean"]["mean_completion_tokens"], 100 * cell["mean"]["accuracy_flexible"]
            if cell["interval"]:
                low, high = (100 * bound for bound in cell["interval"])
                axis.plot([x, x], [low, high], color=style["colour"], linewidth=1.4, solid_capstyle="butt")
            axis.plot(
                [x], [y], style["marker"], color=style["colour"], markersize=6.5, markeredgewidth=1.6 if style["marker"] == "x" else 0
            )
        axis.set_title(task, fontsize=9, loc="left", color=INK)
        axis.set_ylim(-4, 104)
        axis.margins(x=0.15)

    return _panels(tasks, draw, "mean completion tokens", "accuracy %", columns=3, name="tokens")


def accuracy_by_steps(tasks: Sequence[str], arms: Mapping[str, Any], styles: Mapping[str, Mapping[str, str]]) -> str:
    """One panel per task with known step counts: accuracy by number of reasoning steps, a line per arm."""

    def draw(axis: Any, task: str) -> None:
        ticks: set[int] = set()
        for position, (arm, style) in enumerate(styles.items()):
            cell = arms[arm].get(task)
            if cell is None or not cell["by_steps"]:
                continue
            rows = [row for row in cell["by_steps"] if row["accuracy"] is not None]
            x = [row["n_steps"] + 0.05 * (position - len(styles) / 2) for row in rows]
            ticks |= {row["n_steps"] for row in rows}
            for place, row in zip(x, rows):
                if row["interval"]:
                    axis.plot([place, place], [100 * bound for bound in row["interval"]], color=style["colour"], linewidth=0.9, alpha=0.55)
            y = [100 * row["accuracy"] for row in rows]
            axis.plot(x, y, marker=style["marker"], color=style["colour"], linewidth=1.4, markersize=4.5)
        axis.set_title(task, fontsize=9, loc="left", color=INK)
        axis.set_xticks(sorted(ticks))
        axis.set_ylim(-4, 104)

    return _panels(tasks, draw, "reasoning steps", "accuracy %", columns=3, name="steps")


def loss_curves(trainings: Sequence[Mapping[str, Any]], styles: Mapping[str, Mapping[str, str]]) -> str:
    """Training loss against step on log axes, one line per arm and seed."""

    def draw(axis: Any, _: str) -> None:
        for run in trainings:
            if run["steps"]:
                axis.plot(run["steps"], run["loss"], color=styles[run["arm"]]["colour"], linewidth=1.2, alpha=0.85)
        losses = [loss for run in trainings for loss in run["loss"] if loss > 0]
        if losses and max(losses) / min(losses) > 5:
            axis.set_yscale("log")
            from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())

    return _panels([""], draw, "optimizer step", "loss (nats per weighted token)", columns=1, height=3.1, name="loss")


def score_histograms(signals: Mapping[str, Any], name: str) -> str:
    """One panel per signal: rows kept and rows dropped by a selection, stacked."""

    def draw(axis: Any, signal: str) -> None:
        data = signals[signal]
        edges, kept, dropped = data["edges"], data["kept"], data["dropped"]
        width = edges[1] - edges[0]
        axis.bar(edges[:-1], kept, width=width, align="edge", color=KEPT, linewidth=0)
        axis.bar(edges[:-1], dropped, width=width, align="edge", bottom=kept, color=DROPPED, linewidth=0)
        _count_title(axis, signal, data)

    return _panels(list(signals), draw, "score", "rows", columns=3, height=2.1, name=name)


def signal_ridges(signals: Mapping[str, Any], label: str, sizes: Mapping[str, int], name: str) -> str:
    """One panel per signal: a histogram of all rows and one per group of `label` under it, each of height 1, a tick at its median.

    Args:
      signals: {title: `distributions`}. sizes: {group: rows}, shown beside the group's histogram.
    """
    groups = list(sizes) if len(sizes) > 1 else []
    rows = [f"all rows ({max((found['n'] for found in signals.values()), default=0):,})"]
    rows += [f"{_middle(group)} ({sizes[group]:,})" for group in groups]
    first = set(list(signals)[::_RIDGE_COLUMNS])

    def draw(axis: Any, signal: str) -> None:
        data = signals[signal]
        for place, found in enumerate((data["all"], *(data["by"][label][group] for group in groups))):
            most = max(found["counts"], default=0)
            if not most:
                continue
            top = [-place + 0.82 * count / most for count in found["counts"]]
            colour = RIDGE if place else MUTED
            axis.stairs(top, data["edges"], baseline=-place, fill=True, color=colour, alpha=0.5, linewidth=0)
            axis.stairs(top, data["edges"], baseline=-place, color=colour, linewidth=0.8)
            if data["edges"][0] <= found["quantiles"][2] <= data["edges"][-1]:
                axis.plot([found["quantiles"][2]] * 2, [-place, -place + 0.9], color=INK, linewidth=1.3, solid_capstyle="butt")
        axis.set_ylim(-len(rows) + 0.85, 1.05)
        axis.set_yticks(
            [-place for place in range(len(rows))], rows if signal in first else [""] * len(rows), parse_math=False, va="bottom"
        )
        axis.tick_params(axis="y", length=0)
        _count_title(axis, signal, data)

    return _panels(list(signals), draw, "", "", columns=_RIDGE_COLUMNS, height=0.75 + 0.42 * len(rows), name=name)


def _count_title(axis: Any, signal: str, data: Mapping[str, Any]) -> None:
    """The signal and its n; whole ticks for whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(f"{signal}  (n = {data['n']:,})", fontsize=9, loc="left", color=INK, parse_math=False)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=data["edges"][0] % 1 == data["edges"][1] % 1 == 0.5))


def _middle(text: str, limit: int = 26) -> str:
    """A long name with its middle left out."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit // 2) :]}"


def _panels(
    names: Sequence[str], draw: Callable[[Any, str], None], xlabel: str, ylabel: str, *, columns: int, name: str, height: float = 2.5
) -> str:
    """A grid of panels as SVG text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(columns, max(1, len(names)))
    rows = math.ceil(len(names) / columns)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5, "axes.titleweight": "bold", "path.simplify": True}):
        figure = Figure(figsize=(_WIDE if columns > 1 else 7.6, height * rows + 0.25), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for position, axis in enumerate(axes):
            if position >= len(names):
                axis.set_axis_off()
                continue
            _plain(axis)
            draw(axis, names[position])
            if position % columns == 0:
                axis.set_ylabel(ylabel, color=MUTED)
            if position + columns >= len(names):
                axis.set_xlabel(xlabel, color=MUTED)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _plain(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(LINE)
    axis.tick_params(colors=MUTED, labelsize=8, length=3)
    axis.grid(axis="y", color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)


def inline(svg: str, label: str) -> str:
    """An SVG document as an element of the page: no prolog, an accessible name, colours by CSS variable, ids unique to it."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", body, count=1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}" class="figure"', 1)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    body = re.sub(r"font: ((?:[\w.]+ )*[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", body)
    tag = re.sub(r"\W+", "-", label.lower())[:24]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{tag}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{tag}-\1)", body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{tag}-\1"', body)
    variables = {INK: "--ink", MUTED: "--muted", LINE: "--line", BASE_COLOUR: "--arm-base"}
    variables |= {colour: f"--arm-{index}" for index, colour in enumerate(PALETTE)}
    for colour, variable in variables.items():
        body = body.replace(colour, f"var({variable})")
    return body


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
