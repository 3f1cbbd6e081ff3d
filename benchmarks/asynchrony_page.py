"""The study of late networks: its policies, its curves, and their tables and plot for docs/asynchrony.md."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks import studies
from benchmarks.files import ROOT
from benchmarks.results_table import write_between
from benchmarks.studies import won, words
from libra_ray.common.files import write_text
from libra_ray.config.presets import AS_PUBLISHED, LATE_IS_NORMAL
from libra_ray.report.interval_plot import INK, LINE, STYLE
from libra_ray.stats.granularity_peak import Estimate

PAGE = ROOT / "docs" / "asynchrony.md"
DELAYS = (0, 2, 5, 10, 15, 20)
"""Control steps that the network is late by; at 80 Hz 10 are 125 ms."""
PUBLISHED, LATE = (
    {name: value for name, value in of.items() if not name.startswith("control.")} for of in (AS_PUBLISHED, LATE_IS_NORMAL)
)
LONG = {"action.horizon": 20, "action.chunks": 1, "refiner.max_staleness": 0, "control.execute_steps": 5}
"""A network of one level answers as many steps as the dual system's plan, and is asked as often."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A policy as it is trained.

    Attributes:
        changes: of the domain's settings.
        cloning: plain behaviour cloning (`baseline.py`) in place of a system.
    """

    changes: Mapping[str, Any]
    cloning: bool = False


VARIANTS = {
    "late": Variant(changes=LATE),
    "published": Variant(changes=PUBLISHED),
    "monolithic": Variant(changes={"model.system": "monolithic", **LONG}),
    "cloning": Variant(changes=LONG, cloning=True),
    "late-chunking": Variant(changes={**LATE, "refiner.max_committed_steps": 2}),
    "monolithic-chunking": Variant(changes={"model.system": "monolithic", **LONG, "refiner.max_committed_steps": 10}),
    "published-chunking": Variant(changes={**PUBLISHED, "refiner.max_committed_steps": 2}),
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Success over the delay of a policy under a rule.

    Attributes:
        panel: which picture it is drawn in; `label` says what it is there.
        variant: of `VARIANTS`.
        control: further settings of the closed loop.
        whole: the only network is late, and the robot goes on with its chunk meanwhile; otherwise the planner alone is.
    """

    panel: str
    label: str
    variant: str
    control: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        return f"{self.panel} {self.label}".replace(" ", "-").replace(",", "").replace("+", "")

    def late(self, delay: int) -> dict[str, Any]:
        """The settings of a delay of so many control steps."""
        if not self.whole:
            return {"delay.intent_steps": delay}
        return {"delay.chunk_steps": delay, "control.committed_steps": min(delay, LONG["action.horizon"] // 2)}


SPLIT, RULES, REFINER = PANELS = ("what the split is for", "rules", "refiner 2 steps late")
BUSY = {"control.rule": "overlap", "delay.chunk_steps": 2, "control.committed_steps": 2}
CURVES = (
    Curve(panel=SPLIT, label="dual, overlap", variant="late", control={"control.rule": "overlap"}),
    Curve(panel=SPLIT, label="dual, as published", variant="published", control={"control.rule": "fifo"}),
    Curve(panel=SPLIT, label="monolithic", variant="monolithic", whole=True),
    Curve(panel=SPLIT, label="behaviour cloning", variant="cloning", whole=True),
    Curve(panel=SPLIT, label="monolithic, real-time chunking", variant="monolithic-chunking", whole=True),
    Curve(panel=RULES, label="fifo", variant="late", control={"control.rule": "fifo"}),
    Curve(panel=RULES, label="event", variant="late", control={"control.rule": "event"}),
    Curve(panel=RULES, label="published, overlap", variant="published", control={"control.rule": "overlap"}),
    Curve(panel=RULES, label="published, event", variant="published", control={"control.rule": "event"}),
    Curve(panel=REFINER, label="naive", variant="late", control=BUSY),
    Curve(panel=REFINER, label="real-time chunking", variant="late-chunking", control=BUSY),
    Curve(panel=REFINER, label="published, naive", variant="published", control=BUSY),
    Curve(panel=REFINER, label="published, real-time chunking", variant="published-chunking", control=BUSY),
)
REFERENCE = "dual, overlap"
"""What the other curves are compared with, episode by episode."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Tasks and data: changes of a preset.

    Attributes:
        episodes: of each task and cell, where the command line says nothing: at least 100 a cell.
        pretrained: all systems begin with one backbone (`pretraining.py`).
    """

    preset: str
    episodes: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False


WORDED: dict[str, Any] = {
    "sim.tasks": "touch,push,putdown-5mm",
    "sim.max_steps": 60,
    "sim.wrist_camera": True,
    "record.noise_std": 0.5,
    # Of 250 a task no policy learns which words mean which block: 0.06 in time, too little to lose.
    "record.episodes_per_task": 1500,
    # A pixel of the wrist camera is a millimetre: pictures shifted at random would teach errors of that size.
    "train.augment_pixels": 0,
    "train.steps": 1500,
    "train.checkpoint_every": 500,
    "train.validate_every": 500,
}
DOMAINS = {
    "metaworld": Domain(preset="quickstart", episodes=20),
    # From scratch tokens teach the words sooner than actions do: the curves would show who understood them, not who is late.
    "tabletop": Domain(preset="tabletop", episodes=34, changes=WORDED, pretrained=True),
    # What is to be touched or pushed moves in mid-episode: an intent that is late leads to where it was.
    "moved": Domain(
        preset="tabletop",
        episodes=50,
        changes=WORDED | {"sim.tasks": "touch,push", "sim.goal_moves_at": 4},
        pretrained=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One curve at one delay, by a policy of one training seed.

    Attributes:
        cpu: that it was run on.
        outcomes: task -> an episode each, in the order of the seeds: `1` succeeded, `0` did not.
        held_share: of the executed actions.
    """

    panel: str
    label: str
    delay_steps: int
    seed: int
    cpu: str
    outcomes: Mapping[str, str]
    held_share: float
    intent_age_p50: float | None
    train_s: float

    @property
    def tasks(self) -> list[NDArray[np.bool_]]:
        """Whether each episode succeeded, an array per task."""
        return won(self.outcomes)

    @property
    def rate(self) -> float:
        """Mean over tasks."""
        return float(np.mean([task.mean() for task in self.tasks]))


Found = Mapping[tuple[str, str, int], Sequence[Cell]]
"""Panel, label and delay -> a cell a seed."""


def by_place(cells: Sequence[Cell]) -> Found:
    """The cells of every point of the curves, in the order of their seeds."""
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        found.setdefault((cell.panel, cell.label, cell.delay_steps), []).append(cell)
    return found


def success(cells: Sequence[Cell]) -> Estimate:
    """Mean over seeds and tasks, with its interval."""
    return studies.success([cell.tasks for cell in cells])


def difference(ours: Sequence[Cell], theirs: Sequence[Cell]) -> Estimate | None:
    """How much more often the first succeed, episode by episode, over the seeds that both have; None without any."""
    return studies.difference(*({cell.seed: cell.tasks for cell in side} for side in (ours, theirs)))


def table(found: Found, panel: str) -> str:
    """A row a curve: success by delay."""
    lines = [
        "| policy, rule | seeds | " + " | ".join(f"{d} steps late" for d in DELAYS) + " |",
        "|---" * (len(DELAYS) + 2) + "|",
    ]
    for curve in shown(panel):
        points = [found.get((curve.panel, curve.label, delay), ()) for delay in DELAYS]
        if any(points):
            seeds = max(map(len, points))
            lines.append(f"| {curve.label} | {seeds} | " + " | ".join(words(success(p)) if p else "–" for p in points) + " |")
    return "\n".join(lines)


def differences(found: Found) -> str:
    """What the dual system loses by being late, and how much oftener it succeeds than the others of its panel, by delay."""
    lines = ["| | " + " | ".join(f"{d} steps late" for d in DELAYS) + " |", "|---" * (len(DELAYS) + 1) + "|"]

    def row(name: str, pairs: Sequence[tuple[Sequence[Cell], Sequence[Cell]]]) -> None:
        values = [difference(*pair) for pair in pairs]
        if any(values):
            lines.append(f"| {name} | " + " | ".join(words(v, "+.2f") for v in values) + " |")

    dual = [found.get((SPLIT, REFERENCE, delay), ()) for delay in DELAYS]
    row(f"{REFERENCE}, against itself in time", [(late, dual[0]) for late in dual])
    for curve in CURVES:
        if curve.panel == SPLIT and curve.label != REFERENCE:
            theirs = [found.get((SPLIT, curve.label, delay), ()) for delay in DELAYS]
            row(f"{REFERENCE} minus {curve.label}", list(zip(dual, theirs, strict=True)))
    return "\n".join(lines)


def there(found: Found) -> list[str]:
    """The panels of which a curve of their own is measured: with another panel's alone there is nothing to compare."""
    return [panel for panel in PANELS if any(place == panel for place, _, _ in found)]


def shown(panel: str) -> list[Curve]:
    """The curves of a panel; each begins with the dual system's."""
    first = [curve for curve in CURVES if curve.panel == SPLIT and curve.label == REFERENCE and panel == RULES]
    return first + [curve for curve in CURVES if curve.panel == panel]


def plot(found: Found, title: str) -> str:
    """Success over delay, a panel beside the other, as SVG text with its own background."""
    panels = there(found)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * len(panels), 4.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            for number, curve in enumerate(shown(panel)):
                points = {
                    d: success(found[curve.panel, curve.label, d]) for d in DELAYS if (curve.panel, curve.label, d) in found
                }
                if not points:
                    continue
                (line,) = axes.plot(list(points), [p.value for p in points.values()], "o-", markersize=3.5, color=f"C{number}")
                axes.fill_between(
                    list(points), [p.low for p in points.values()], [p.high for p in points.values()],
                    color=line.get_color(), alpha=0.15, linewidth=0,
                )  # fmt: skip
                line.set_label(curve.label)
            axes.set_title(panel, loc="left", fontsize=9.5, color=INK)
            axes.set_xlabel("control steps late", color=INK)
            axes.set_xticks(DELAYS)
            axes.set_ylim(-0.03, 1.03)
            axes.grid(visible=True, color=LINE, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.16))
        figure.supylabel("success", fontsize=9, color=INK)
        figure.suptitle(title, fontsize=10, color=INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
        return buffer.getvalue()


def publish(out: Path, domain: str, cells: Sequence[Cell], *, page: bool) -> str:
    """Write tables and plot beside the JSON at `out`, and into the page; returns the tables."""
    if not cells:
        return "no cell is measured yet"
    found = by_place(cells)
    parts = [f"**{panel}**\n\n{table(found, panel)}" for panel in there(found)]
    text = "\n\n".join([*parts, f"**paired, episode by episode**\n\n{differences(found)}"])
    write_text(out.with_suffix(".md"), text + "\n")
    write_text(out.with_suffix(".svg"), plot(found, domain))
    if page:
        write_between(PAGE, f"asynchrony.py {domain}", text)
    return text
