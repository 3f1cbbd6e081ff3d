"""The report's plots, as SVG text to be set inside a page.

Colours are CSS variables of the page (`--ink`, `--line`, `--first`, ...), so one drawing serves light and
dark; text stays text.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from libra_ray.report.asynchrony import AgeGroup
from libra_ray.report.names import title_of
from libra_ray.report.records import IntentAge, LevelLatency, TaskRow
from libra_ray.runs.results import TrainingLog
from libra_ray.stats.intervals import Percentiles

SERIES = ("first", "second", "third", "fourth")
"""Colours of things that a plot draws several of: levels, losses, parts."""
VARIABLES = ("ink", "line", *SERIES, "expert", "policy", "variant", "zero_action", "mark")
COLOUR = {name: f"#0{index + 1:x}0d0e" for index, name in enumerate(VARIABLES)}
"""Stand-ins that matplotlib accepts; in the SVG text each becomes `var(--name)`."""

MARKERS = {"expert": "D", "policy": "o", "zero_action": "v"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["ink"],
    "axes.edgecolor": COLOUR["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOUR["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOUR["line"],
    "ytick.color": COLOUR["line"],
    "xtick.labelcolor": COLOUR["ink"],
    "ytick.labelcolor": COLOUR["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
}
HELD_OUT, NORM, NORM_OF_LOSS = "val_", "grad_norm_", "grad_norm_loss_"
"""Beginnings of names in a training log."""
CARD_INCHES = (4.8, 2.7)


def controller_name(controller: str) -> str:
    """How a controller is called in tables and plots."""
    return controller.replace("_", " ")


def success_plot(tasks: Sequence[TaskRow], means: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> str:
    """Success with Wilson 95 % intervals: one band per task, one mark per controller, the mean over tasks below.

    Empty text where nothing was evaluated.
    """
    if not tasks:
        return ""
    names = [*dict.fromkeys(row.task for row in tasks), "mean"]
    controllers = list(means)
    cells: dict[tuple[str, str], tuple[float, Sequence[float]]]
    cells = {(row.task, row.controller): (row.success, row.interval) for row in tasks}
    cells |= {("mean", controller): (means[controller], intervals[controller]) for controller in controllers}
    with mpl.rc_context({**STYLE, "svg.hashsalt": "success"}):
        figure = Figure(figsize=(6.4, 0.9 + len(names) * max(0.34, 0.13 * len(controllers))), layout="constrained")
        axes = figure.add_subplot()
        offsets = np.linspace(-0.3, 0.3, len(controllers)) if len(controllers) > 1 else np.zeros(1)
        for controller, offset in zip(controllers, offsets, strict=True):
            rows = [(row + offset, cells.get((name, controller))) for row, name in enumerate(names)]
            _success_marks(axes, controller, [(height, *cell) for height, cell in rows if cell])
        for border in range(1, len(names)):
            axes.axhline(border - 0.5, color=COLOUR["line"], linewidth=1.4 if border == len(names) - 1 else 0.5)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
        axes.set_xlabel("share of successful episodes, with Wilson 95 % interval")
        axes.tick_params(left=False)
        axes.grid(visible=False, axis="y")
        legend(axes, columns=4)
        return svg_text(figure, "Success per task and controller")


def _success_marks(axes: Axes, controller: str, marks: Sequence[tuple[float, float, Sequence[float]]]) -> None:
    heights, shares = [height for height, _, _ in marks], np.array([share for _, share, _ in marks])
    bounds = np.array([interval for _, _, interval in marks]).reshape(-1, 2)
    below_above = np.clip(np.stack([shares - bounds[:, 0], bounds[:, 1] - shares]), 0, None)
    colour = COLOUR.get(controller, COLOUR["variant"])
    marker, name = MARKERS.get(controller, "s"), controller_name(controller)
    axes.errorbar(shares, heights, xerr=below_above, fmt=marker, color=colour, markersize=4.5, elinewidth=1.6, label=name)


def training_plots(log: TrainingLog, thresholds: Mapping[str, float]) -> dict[str, str]:
    """Title -> SVG of every loss, of the metrics that are also held out, and of the gradient norms of all parts.

    Args:
        thresholds: metric -> a value that something depends on, drawn beside it.
    """
    names, plots = log.names, {}
    losses = [name for name in names if name.startswith("loss_")]
    measured = [name for name in names if f"{HELD_OUT}{name}" in names and name not in losses]
    for index, name in enumerate([*losses, *measured]):
        lines = {"training": (name, series_colour(index), "-"), "held-out episodes": (f"{HELD_OUT}{name}", COLOUR["ink"], ":")}
        plots[title_of(name)] = _curves(log, title_of(name), lines, level=thresholds.get(name))
    parts = [name for name in names if name.startswith(NORM) and not name.startswith(NORM_OF_LOSS)]
    norms = {name.removeprefix(NORM): (name, series_colour(index), "-") for index, name in enumerate(parts)}
    plots["Gradient norms"] = _curves(log, "Gradient norms", norms, logarithmic=True)
    return {title: plot for title, plot in plots.items() if plot}


def series_colour(index: int) -> str:
    """The colour of the `index`-th of several; after the last, the first comes again."""
    return COLOUR[SERIES[index % len(SERIES)]]


def _curves(
    log: TrainingLog,
    title: str,
    lines: Mapping[str, tuple[str, str, str]],
    *,
    level: float | None = None,
    logarithmic: bool = False,
) -> str:
    known = {name: (*log.series(key), colour, style) for name, (key, colour, style) in lines.items() if log.series(key)[0]}
    if not known:
        return ""
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=CARD_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for name, (steps, values, colour, style) in known.items():
            marker = "." if style == ":" or len(steps) < 3 else ""
            axes.plot(steps, values, color=colour, linestyle=style, marker=marker, label=name)
        for phase in log.phases[1:]:
            label = f"{phase.name.replace('_', ' ')} from {phase.first_step:,}"
            axes.axvline(phase.first_step, color=COLOUR["mark"], linestyle="--", linewidth=1.2, label=label)
        if level is not None:
            axes.axhline(level, color=COLOUR["mark"], linestyle=":", linewidth=1.2, label=f"threshold {level:g}")
        positive = all(value > 0 for _, values, _, _ in known.values() for value in values)
        if logarithmic and positive:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(axes, columns=2)
        return svg_text(figure, title)


def latency_plot(level: str, latency: LevelLatency, index: int) -> str:
    """Histogram of the `index`-th level's wall time per batched call; empty text where it was never called."""
    counts = latency.histogram.counts
    if not counts:
        return ""
    edges = np.asarray(latency.histogram.edges, dtype=float)
    title = f"{level.capitalize()} latency"
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=CARD_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=series_colour(index), alpha=0.75)
        _percentile_lines(axes, latency, "ms")
        axes.set_xlabel("milliseconds per batched call (above p99: last bar)")
        axes.set_ylabel("calls")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(axes, columns=3)
        return svg_text(figure, title)


def intent_age_plot(intent_age: IntentAge) -> str:
    """Histogram of the intent's age at each executed action; empty text where no action had an intent."""
    ages, counts = intent_age.histogram.ages, intent_age.histogram.counts
    if not counts:
        return ""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "intent"}):
        figure = Figure(figsize=CARD_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.bar(ages, counts, width=0.85, color=COLOUR["policy"], alpha=0.75)
        _percentile_lines(axes, intent_age, "steps")
        axes.set_xlabel("control steps since the picture behind the intent")
        axes.set_ylabel("executed actions")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(axes, columns=3)
        return svg_text(figure, "Age of the intent")


def success_by_age_plot(groups: Sequence[AgeGroup]) -> str:
    """Success with Wilson 95 % intervals over the ages of each group of episodes; empty text where there is no group."""
    if not groups:
        return ""
    title = "Success by the intent’s age"
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=CARD_INCHES, layout="constrained")
        axes = figure.add_subplot()
        shares = np.array([group.success for group in groups])
        bounds = np.array([group.interval for group in groups])
        reach = np.clip(np.stack([shares - bounds[:, 0], bounds[:, 1] - shares]), 0, None)
        axes.errorbar(range(len(groups)), shares, yerr=reach, fmt="o", color=COLOUR["policy"], markersize=4.5, elinewidth=1.6)
        names = [f"{group.lowest:.1f} to {group.highest:.1f}\n{group.successes} of {group.episodes}" for group in groups]
        axes.set_xticks(range(len(groups)), names)
        axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(-0.03, 1.03))
        axes.set_xlabel("mean age of an episode’s intents, control steps; successes of episodes")
        axes.grid(visible=False, axis="x")
        return svg_text(figure, title)


def _percentile_lines(axes: Axes, marks: Percentiles, unit: str) -> None:
    for name, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
        value = getattr(marks, name)
        label = f"{name} {value:.3g} {unit}"
        axes.axvline(value, color=COLOUR["mark"], linestyle=style, linewidth=1.2, label=label)


def legend(axes: Axes, columns: int) -> None:
    """A legend above the axes, where it hides nothing."""
    spacing = {"borderaxespad": 0.1, "handlelength": 1.6, "columnspacing": 1.2}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, **spacing)


def svg_text(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element that scales with its place and is named for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in COLOUR.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
