"""What the serving benchmark measured, as Markdown tables and plots."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from libra_ray.common.files import write_text
from libra_ray.types import Json

NAMES = {
    "bare": "bare batched forward pass (the limit)",
    "plain": "plain blocking loop (openpi's, restated)",
    "vla": "vla-eval",
    "lerobot_server": "LeRobot PolicyServer",
    "libra_fifo": "**libra_ray**, plans waited for, as by the others",
    "libra_ray": "**libra_ray**, planner running freely (default)",
}
COLOURS = {
    "bare": "#888888",
    "plain": "#c8622b",
    "vla": "#2b7bba",
    "lerobot_server": "#b5a11d",
    "libra_fifo": "#8fc49b",
    "libra_ray": "#3a8f4d",
}
MOST_MISSES = 0.01
"""Share of missed deadlines up to which robots are held."""
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def write(path: Path, result: Json) -> None:
    """The table and the plot beside the JSON at `path`."""
    write_text(path.with_suffix(".md"), markdown(result) + "\n")
    if (figure := plot(result)) is not None:
        staging = path.with_name(f".{path.stem}.svg")
        figure.savefig(staging, format="svg", metadata={"Date": None})
        staging.replace(path.with_suffix(".svg"))


def markdown(result: Json) -> str:
    """The section's table with the machine it was measured on."""
    body = _comparison(result) if result["section"] == "compare" else _facts(result)
    return "\n".join([*body, "", machine(result)])


def machine(result: Json) -> str:
    """What it was measured on."""
    hardware, settings = result["hardware"], result["settings"]
    cores = f"{hardware['cores']} cores of {hardware['cpu']}, GPU: {hardware['gpu'] or 'none'}"
    return f"{settings['threads']} torch thread(s) per process, {settings['seconds']:g} s each, {cores}."


def for_readme(result: Json) -> str:
    """The comparison in short."""
    return f"{comparison(result)}\n\n{machine(result)}"


def summary(cells: Mapping[str, Json]) -> Json:
    """What the issue asks: robots held at the open loop's rate, saturation, latency of one robot; by system."""
    found: Json = {}
    for system in NAMES:
        mine = {tuple(key.split("|")[1:]): c for key, c in cells.items() if key.startswith(f"{system}|") and "failed" not in c}
        rates = [fresh_per_s(c) for (mode, _), c in mine.items() if mode == "closed"]
        if not mine:
            continue
        held = 0
        for robots in sorted(int(n) for mode, n in mine if mode == "open"):
            share = lost(mine["open", str(robots)])
            if share is None or share >= MOST_MISSES:
                break
            held = robots
        one = {mode: mine.get((mode, "1"), {}).get("latency_ms", {}).get("p50") for mode in ("open", "closed")}
        wrong = sum(c["wrong_robot"] for c in mine.values())
        found[system] = {"held": held, "saturation": max(rates, default=None), "one_robot_p50_ms": one, "wrong_robot": wrong}
    return found


def lost(cell: Json) -> float | None:
    """Share of the deadlines at which there was no fresh chunk: missed, or answered with safe actions. None without any."""
    due = cell.get("deadlines", {}).get("due")
    return (cell["deadlines"]["missed"] + cell["held_replies"]) / due if due else None


def fresh_per_s(cell: Json) -> float:
    """Requests per second that were answered with a fresh chunk."""
    return float(cell["chunk_requests_per_s"] - cell.get("held_replies", 0) / cell.get("seconds", 1))


def comparison(result: Json) -> str:
    """A line per system."""
    cells, settings = result["cells"], result["settings"]
    held_words = f"robots held at {settings['hz']:g} chunk requests/s with < 1 % misses"
    lines = [
        f"| system | {held_words} | requests/s at saturation | one robot's p50, open / closed loop, ms | wrong-robot replies |",
        "|---|---|---|---|---|",
    ]
    for system, facts in summary(cells).items():
        held = "–" if system == "bare" else f"{facts['held']}"
        one = " / ".join(_number(facts["one_robot_p50_ms"][mode]) for mode in ("open", "closed"))
        lines.append(f"| {NAMES[system]} | {held} | {_number(facts['saturation'])} | {one} | {facts['wrong_robot']} |")
    return "\n".join(lines)


def _comparison(result: Json) -> list[str]:
    cells, settings = result["cells"], result["settings"]
    lines = [comparison(result)]
    for mode, words in (("open", f"Open loop, {settings['hz']:g} requests/s each"), ("closed", "Closed loop")):
        lines += ["", f"{words}:", ""]
        lines += ["| system | robots | requests/s | p50 / p95 / p99, ms | misses | wrong robot | errors | CPU ms/request |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_row(key, cell) for key, cell in cells.items() if key.split("|")[1] == mode]
    return [*lines, "", _note(result)]


def _row(key: str, cell: Json) -> str:
    system, _, robots = key.split("|")
    if "failed" in cell:
        return f"| {NAMES[system]} | {robots} | failed: {cell['failed']} |" + " – |" * 5
    share = lost(cell)
    marks = " / ".join(_number(cell["latency_ms"][p]) for p in ("p50", "p95", "p99"))
    wrong = f"{cell['wrong_robot']} of {cell['checked_replies']}" if "checked_replies" in cell else "–"
    cpu = "–" if cell["cpu_s_per_request"] is None else f"{1e3 * cell['cpu_s_per_request']:.1f}"
    misses = "–" if share is None else f"{share:.1%}"
    errors = sum(cell["errors"].values())
    rate = f"{fresh_per_s(cell):.1f}"
    return f"| {NAMES[system]} | {robots} | {rate} | {marks} | {misses} | {wrong} | {errors} | {cpu} |"


def _note(result: Json) -> str:
    taken = [cell.get("stolen", 0.0) for cell in result["cells"].values()]
    return (
        "Per request every server refines from a fresh picture; peers, limit and the first of our lines also plan every M-th "
        "request (the published FIFO). By default our planner runs freely beside: nobody waits for a plan, and with M = 2 "
        "there are twice as many. That needs a clock, so it is measured in the open loop only. A chunk is missed if no fresh "
        "one is there one request period after its observation, held replies included; every period that a robot waits longer "
        "is another miss, and one that was told to hold asks again at its next control "
        "step. A sample of the replies is compared with the "
        f"policy's own answer to that robot's observation ({result['confusable_pairs']} pairs of robots cannot be told apart). "
        "CPU is that of all the server's processes, Ray's included; the robots' own is not. "
        f"While a cell was measured, others took at most {max(taken, default=0.0):.0%} of the machine."
    )


def _facts(result: Json) -> list[str]:
    lines = ["| measure | value |", "|---|---|"]
    return lines + [f"| {name} | {_shown(value)} |" for name, value in result.get("facts", {}).items()]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return _number(value) if isinstance(value, float) or value is None else str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def plot(result: Json) -> Figure | None:
    """The section's plot; None where there is nothing to draw yet."""
    with mpl.rc_context(STYLE):
        if result["section"] == "compare":
            return _comparison_plot(result["cells"])
        return _timeline_plot(result) if result.get("timeline") else None


def _comparison_plot(cells: Mapping[str, Json]) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels: dict[str, tuple[str, Callable[[Json], float | None]]] = {
        "requests/s, closed loop": ("closed", lambda c: c["chunk_requests_per_s"]),
        "p99 in ms, open loop": ("open", lambda c: c["latency_ms"]["p99"]),
        "missed deadlines in %, open loop": ("open", lambda c: 100 * (lost(c) or 0.0)),
    }
    for axes, (title, (mode, value)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for system, colour in COLOURS.items():
            points = [
                (int(key.split("|")[2]), value(cell))
                for key, cell in cells.items()
                if key.startswith(f"{system}|{mode}|") and "failed" not in cell
            ]
            if points:
                points.sort()
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, label=NAMES[system].replace("*", ""))
        axes.set(title=title, xlabel="robots")
    figure.axes[1].set(yscale="log")
    # Whoever misses more does not hold its robots, however much more it is.
    figure.axes[2].set(ylim=(-0.2, 12))
    drawn = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _timeline_plot(result: Json) -> Figure:
    """One panel per series of the time line; the section says which, and marks what happened when."""
    panels: Mapping[str, Mapping[str, list[list[float]]]] = result["timeline"]
    figure = Figure(figsize=(8, 1.7 * len(panels) + 0.5), layout="constrained")
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(every, panels.items(), strict=True):
        for name, points in lines.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        for at_s, what in result.get("marks", []):
            axes.axvline(at_s, color="#b03030", linestyle="--", linewidth=0.9)
            if axes is every[0]:
                axes.annotate(what, (at_s, 1), xycoords=("data", "axes fraction"), fontsize=7, color="#b03030")
        axes.set_ylabel(title, fontsize=8)
        axes.set_ylim(bottom=0)
        if sum(map(bool, lines.values())) > 1:
            axes.legend(frameon=False, fontsize=7, loc="upper right")
    every[-1].set_xlabel("seconds")
    return figure
