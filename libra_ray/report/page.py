"""The report as one self-contained HTML page: no script, no request, light and dark."""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import jinja2
import numpy as np

from libra_ray.common.json_text import plain
from libra_ray.report.measures import means_by_name
from libra_ray.report.names import CONTROLLERS, title_of
from libra_ray.report.plots import (
    controller_name,
    intent_age_plot,
    latency_plot,
    success_by_age_plot,
    success_plot,
    training_plots,
)
from libra_ray.report.records import Report, TaskRow
from libra_ray.runs.results import RolloutVideo, TrainingLog

VIDEO_BUDGET_BYTES = 3_500_000
"""All videos of a page together, before base64 makes them a third larger: the page stays below 6 MB."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One figure at the page's head."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A rollout as the page shows it; `video` is a `data:` address."""

    rollout: RolloutVideo
    video: str


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """A task's rows, by controller."""

    task: str
    instruction: str
    rows: dict[str, TaskRow] = field(default_factory=dict)


def render_page(report: Report, rollouts: Sequence[RolloutVideo], training_log: TrainingLog) -> str:
    """The page of a report.

    Args:
        rollouts: shown as looping videos, failures first; those beyond `VIDEO_BUDGET_BYTES` are only counted.
    """
    clips = _clips(rollouts)
    config = report.config
    thresholds = {"plan_accuracy": config["train.tau"]} if config.get("train.curriculum") == "threshold" else {}
    timing = {
        f"{level.capitalize()} latency": latency_plot(level, marks, index)
        for index, (level, marks) in enumerate(report.latency_ms.items())
    }
    timing["Age of the intent at each executed action"] = intent_age_plot(report.intent_age_steps)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            headlines=_headlines(report),
            tasks=_by_task(report.tasks),
            measured=[row for row in report.tasks if row.measures],
            measures=means_by_name(row.measures or {} for row in report.tasks),
            controllers=list(report.success_mean),
            success_svg=success_plot(report.tasks, report.success_mean, report.success_interval),
            training=training_plots(training_log, thresholds),
            sentences=[CONTROLLERS[name] for name in report.success_mean if name in CONTROLLERS],
            success_by_age_svg=success_by_age_plot(report.asynchrony.success_by_age if report.asynchrony else ()),
            timing={title: svg for title, svg in timing.items() if svg},
            clips=clips,
            hidden_rollouts=len(rollouts) - len(clips),
            facts=_facts(report),
        )
    )


def page_environment() -> jinja2.Environment:
    """Where the pages' templates and filters are."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("libra_ray.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["controller"] = controller_name
    environment.filters["number"] = _number
    environment.filters["measure"] = title_of
    return environment


def _headlines(report: Report) -> list[Headline]:
    headlines = []
    for controller, success in report.success_mean.items():
        low, high = report.success_interval[controller]
        label = f"success, {controller_name(controller)}"
        headlines.append(Headline(label=label, value=f"{success:.0%}", note=f"{low:.1%} to {high:.1%}"))
    headlines.sort(key=lambda headline: headline.label != "success, policy")
    for level, latency in report.latency_ms.items():
        if latency.count:
            note = f"p95 {latency.p95:.1f}, p99 {latency.p99:.1f}"
            headlines.append(Headline(label=f"{level} latency", value=f"{latency.p50:.1f} ms", note=note))
    stages = ", ".join(f"{stage} {duration(getattr(report.wall_s, stage))}" for stage in ("record", "train", "evaluate"))
    return [*headlines, Headline(label="wall time", value=duration(report.wall_s.total), note=stages)]


def duration(seconds: float) -> str:
    """Seconds in the words of a clock: `48 s`, `7 min 12 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: object) -> str:
    """A value as a reader wants it: counts with separators, measures with few digits."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(_number, value)) if isinstance(value, list | tuple) else str(value)
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _by_task(rows: Sequence[TaskRow]) -> list[TaskRows]:
    """One entry per task with its rows by controller."""
    tasks: dict[str, TaskRows] = {}
    for row in rows:
        tasks.setdefault(row.task, TaskRows(task=row.task, instruction=row.instruction)).rows[row.controller] = row
    return list(tasks.values())


def _facts(report: Report) -> dict[str, dict[str, Any]]:
    """The run facts, section by section, as names and values to show."""
    held = {f"held actions, {name}": value for name, value in plain(report.held_actions).items()}
    sections = {
        "Run": {name: getattr(report, name) for name in ("preset", "created_at", "git_revision", "mlflow_run_id")},
        "Wall time": {stage: duration(seconds) for stage, seconds in plain(report.wall_s).items()},
        "Throughput": plain(report.throughput) | held,
        "Hardware": plain(report.hardware),
        "Dataset": plain(report.dataset),
        "Checkpoint": plain(report.checkpoint),
    }
    return {title: _flat(section) for title, section in sections.items()}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}".replace("_", " ")
        flat |= _flat(value, f"{name} ") if isinstance(value, dict) else {name: value}
    return flat


def _clips(rollouts: Sequence[RolloutVideo]) -> list[Clip]:
    """The videos that fit the budget, failures first."""
    clips, spent = [], 0
    for rollout in sorted(rollouts, key=lambda rollout: (rollout.success, rollout.task, rollout.controller, rollout.seed)):
        if not len(rollout.frames):
            continue
        video = encode_mp4(rollout)
        if spent + len(video) > VIDEO_BUDGET_BYTES:
            continue
        spent += len(video)
        clips.append(Clip(rollout=rollout, video=f"data:video/mp4;base64,{base64.b64encode(video).decode()}"))
    return clips


def encode_mp4(rollout: RolloutVideo) -> bytes:
    """The rollout's frames as H.264 in MP4, which every current browser plays; the last frame stays for a moment.

    An odd row or column at the border is left out: the format halves the colour planes.
    """
    height, width = (side // 2 * 2 for side in rollout.frames[0].shape[:2])
    pause = max(1, round(rollout.fps * 0.8))
    # A real file, because "faststart" (the index before the pictures) makes the muxer open its output a second time.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rollout.mp4")
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(rollout.fps).limit_denominator(1000), options={"crf": "25"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for picture in [*rollout.frames, *[rollout.frames[-1]] * pause]:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()
