"""A sweep's plots, in the style of the report: success over N beside the measured difficulty, Pareto front, importance."""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from libra_ray.report.plots import COLOUR, STYLE, legend, svg_text
from libra_ray.runs.trials import PLAN_RESOLVED, VARIANCE_EXPLAINED, Configuration
from libra_ray.stats.granularity_peak import Peak

BINS = "action.bins"
SHARES = {
    PLAN_RESOLVED: ("first", "planner: entropy resolved"),
    VARIANCE_EXPLAINED: ("second", "refiner: variance explained"),
}
"""Drawn below the success."""
CURVES = ("policy", "third", "variant", "second", "first", "expert")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Success over N with everything else the same.

    Attributes:
        label: the values that are the same, in words; empty where there is only one curve.
        points: one configuration per N, ascending.
        peak: None where fewer than three N were finished.
    """

    label: str
    points: Sequence[Configuration]
    peak: Peak | None

    @property
    def bins(self) -> list[int]:
        """N of every point."""
        return [int(point.values[BINS]) for point in self.points]


def granularity_plot(curves: Sequence[Curve]) -> str:
    """Success over N with intervals over seeds and episodes, every seed as a dot; below, the difficulty of the first curve.

    Empty text where no curve has two points.
    """
    drawn = [curve for curve in curves if len(curve.points) > 1][: len(CURVES)]
    if not drawn:
        return ""
    shares = {name: values for name in SHARES if (values := _series(drawn[0], name))}
    with mpl.rc_context({**STYLE, "svg.hashsalt": "granularity"}):
        figure = Figure(figsize=(6.4, 5.2 if shares else 3.4), layout="constrained")
        panels = figure.subplots(
            2 if shares else 1, 1, sharex=True, squeeze=False, height_ratios=[1.4, 1][: 2 if shares else 1]
        )
        top: Axes = panels[0, 0]
        for index, curve in enumerate(drawn):
            _success(top, curve, COLOUR[CURVES[index]], shift=1.0 + 0.02 * (index - (len(drawn) - 1) / 2))
        if drawn[0].peak:
            peak = drawn[0].peak.n
            top.axvspan(peak.low, peak.high, color=COLOUR["mark"], alpha=0.13, linewidth=0)
            top.axvline(peak.value, color=COLOUR["mark"], linestyle="--", linewidth=1.1, label=f"peak {peak.value:.3g}")
        top.set(ylim=(-0.02, 1.02), ylabel="success, closed loop")
        legend(top, columns=3)
        if shares:
            _difficulty(panels[1, 0], drawn[0], shares)
        bottom: Axes = panels[-1, 0]
        ticks = sorted({n for curve in drawn for n in curve.bins})
        bottom.set_xscale("log")
        bottom.set_xticks(ticks, [str(n) for n in ticks])
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.set_xlabel("N, bins per action dimension")
        return svg_text(figure, "Success over the granularity")


def standalone(svg: str) -> str:
    """A plot for a file of its own: the page's light colours in place of its variables, on white."""
    style = importlib.resources.files("libra_ray.report").joinpath("templates/style.html.j2").read_text(encoding="utf-8")
    # The page says the light colours first.
    colours = dict(re.findall(r"--([a-z_]+): (#[0-9a-f]{6})", style.partition("@media")[0]))
    text = re.sub(r"var\(--([a-z_]+)\)", lambda name: colours[name[1]], svg)
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', text, count=1)


def _success(axes: Axes, curve: Curve, colour: str, shift: float) -> None:
    known = [point for point in curve.points if point.success is not None and point.interval]
    at = [int(point.values[BINS]) * shift for point in known]
    means = np.array([point.success for point in known], dtype=float)
    bounds = np.array([point.interval for point in known], dtype=float).reshape(-1, 2)
    errors = np.clip([means - bounds[:, 0], bounds[:, 1] - means], 0, None)
    label = curve.label or "mean over seeds"
    axes.errorbar(at, means, yerr=errors, color=colour, marker="o", markersize=4.5, elinewidth=1.4, label=label)
    dots = [
        (x, success)
        for x, point in zip(at, known, strict=True)
        for t in point.finished
        if (success := t.success_of(point.controller)) is not None
    ]
    axes.plot([x for x, _ in dots], [y for _, y in dots], ".", color=colour, alpha=0.35, markersize=5)


def _difficulty(axes: Axes, curve: Curve, shares: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for name, values in shares.items():
        colour, label = SHARES[name]
        axes.plot([n for n, _ in values], [v for _, v in values], color=COLOUR[colour], marker="s", markersize=3.5, label=label)
    left = _series(curve, "val_residual_share")
    if left:
        label = "variance left by the tokens"
        axes.plot([n for n, _ in left], [v for _, v in left], color=COLOUR["second"], linestyle=":", label=label)
    axes.set(ylabel="share, held-out episodes")
    # One that is worse than the mean has a large negative share: how large does not matter.
    low = min([0.0, *(v for values in shares.values() for _, v in values)])
    axes.set_ylim(max(-0.6, low) - 0.05, 1.05)
    legend(axes, columns=2)


def _series(curve: Curve, name: str) -> list[tuple[int, float]]:
    known = [(n, point.measure(name)) for n, point in zip(curve.bins, curve.points, strict=True)]
    return [(n, value) for n, value in known if value is not None]


def pareto_plot(found: Sequence[Configuration], front: Sequence[int]) -> str:
    """Success against latency, one mark per configuration, those of the front joined; empty text where nothing was finished."""
    known = [c for c in found if c.success is not None and c.latency_ms is not None]
    if not known:
        return ""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "pareto"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for configuration in known:
            chosen = configuration.number in front
            low, high = configuration.interval or (0.0, 0.0)
            mean = configuration.success or 0.0
            axes.errorbar(
                [configuration.latency_ms or 0.0],
                [mean],
                yerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
                fmt="o" if chosen else ".",
                color=COLOUR["policy" if chosen else "mark"],
                elinewidth=1.2,
                alpha=1.0 if chosen else 0.6,
            )
            if chosen:
                axes.annotate(
                    f"#{configuration.number}", (configuration.latency_ms or 0.0, mean), (5, 5), textcoords="offset points"
                )
        line = sorted([(c.latency_ms or 0.0, c.success or 0.0) for c in known if c.number in front])
        axes.plot([x for x, _ in line], [y for _, y in line], color=COLOUR["policy"], linewidth=1.1, drawstyle="steps-post")
        axes.set(ylim=(-0.02, 1.05), xlabel="inference, ms per control step of one robot", ylabel="success, closed loop")
        return svg_text(figure, "Success against latency")


def importance_plot(importance: Mapping[str, Mapping[str, float]]) -> str:
    """Share of an objective's variation that each parameter explains: objective -> parameter -> share; empty without any."""
    names = list(dict.fromkeys(name for shares in importance.values() for name in shares))
    if not names:
        return ""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "importance"}):
        figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        height = 0.8 / len(importance)
        for index, (objective, shares) in enumerate(importance.items()):
            at = [row - 0.4 + height * (index + 0.5) for row in range(len(names))]
            widths = [shares.get(name, 0.0) for name in names]
            axes.barh(
                at,
                widths,
                height=height * 0.9,
                color=COLOUR[("policy", "second")[index % 2]],
                label=objective.replace("_", " "),
            )
        axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(0, 1))
        axes.set_xlabel("share of the variation explained (fANOVA)")
        axes.grid(visible=False, axis="y")
        legend(axes, columns=2)
        return svg_text(figure, "Parameter importance")
