"""A study's rows with their intervals, as one SVG file that stands alone."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, LINE, MARK = "#24292f", "#d0d7de", "#0b62a4"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.axisbelow": True,
}
ROW_INCHES, PANEL_INCHES = 0.32, 0.85


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A measured value with its interval, `low <= value <= high`, and the value of every seed."""

    label: str
    value: float
    low: float
    high: float
    seeds: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Rows that share an axis; success rates have the fixed axis [0, 1]."""

    title: str
    unit: str
    marks: Sequence[Mark]
    share: bool = True


def interval_plot(panels: Sequence[Panel]) -> str:
    """One panel below the other: a dot with its interval per row, a small dot per seed. SVG text with its own background.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = [panel for panel in panels if panel.marks]
    if not drawn:
        raise ValueError("no panel has a mark; measure something first")
    rows = [len(panel.marks) for panel in drawn]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, sum(rows) * ROW_INCHES + len(rows) * PANEL_INCHES), layout="constrained")
        axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=[count + 0.8 for count in rows])
        for panel, place in zip(drawn, axes[:, 0], strict=True):
            _draw(place, panel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
        return buffer.getvalue()


def _draw(axes: Axes, panel: Panel) -> None:
    for y, mark in enumerate(panel.marks):
        reach = [[max(0.0, mark.value - mark.low)], [max(0.0, mark.high - mark.value)]]
        axes.errorbar([mark.value], [y], xerr=reach, color=MARK, marker="o", markersize=5, elinewidth=1.5, capsize=2)
        axes.plot(mark.seeds, [y] * len(mark.seeds), ".", color=MARK, alpha=0.35, markersize=5)
    axes.set_yticks(range(len(panel.marks)), [mark.label for mark in panel.marks])
    axes.set_ylim(len(panel.marks) - 0.4, -0.6)
    axes.set_title(panel.title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(panel.unit, color=INK)
    axes.set_xlim(*((-0.02, 1.02) if panel.share else (0, None)))
    axes.grid(visible=True, axis="x", color=LINE, linewidth=0.6)
    axes.tick_params(left=False, color=LINE, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
