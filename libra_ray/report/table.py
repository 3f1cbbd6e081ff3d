"""The one table that a run prints at its end."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from libra_ray.report.measures import mean_measures
from libra_ray.report.records import Report


def summary_table(report: Report, width: int | None = None) -> str:
    """Tasks by controllers with Wilson 95 % intervals, the means, then latency, intent age and throughput, as plain text.

    Args:
        width: columns of the terminal; by default wide enough that no cell is broken.
    """
    controllers = list(report.success_mean)
    cells = {(row.task, row.controller): row for row in report.tasks}
    table = Table("task", title=f"success ({report.preset})", title_justify="left")
    for controller in controllers:
        table.add_column(controller.replace("_", " "), justify="right")
    tasks = list(dict.fromkeys(row.task for row in report.tasks))
    for task in tasks:
        rows = [cells.get((task, controller)) for controller in controllers]
        table.add_row(task, *(_cell(row.success, row.interval, row.errors) if row else "–" for row in rows))
    table.add_section()
    table.add_row("mean", *(_cell(report.success_mean[name], report.success_interval[name]) for name in controllers))
    text = io.StringIO()
    console = Console(file=text, width=width or 40 + 28 * len(controllers), color_system=None)
    console.print(table)
    return text.getvalue() + "\n".join(_facts(report)) + "\n"


def _cell(success: float, interval: Sequence[float], errors: int = 0) -> str:
    note = f" {errors} error{'s' if errors > 1 else ''}" if errors else ""
    return f"{success:.2f} ({interval[0]:.2f}, {interval[1]:.2f}){note}"


def _asynchrony(report: Report) -> list[str]:
    found, lines = report.asynchrony, []
    for row in () if found is None else found.replans:
        changed = "" if row.share is None else f"{row.share:.1%} changed, "
        by = f"by {row.mean:.3g} on average, p95 {row.p95:.3g}"
        lines.append(f"{row.level} re-plans, {row.value}: {changed}{by} ({row.count} re-plans)")
    if found is not None and found.reaction is not None:
        for name, steps in (("chunk", found.reaction.chunk), ("intent", found.reaction.intent)):
            marks = f"{steps.p50:.0f}/{steps.p95:.0f} control steps" if steps.count else "–"
            lines.append(
                f"moved goal known to a {name} after p50/p95: {marks} ({steps.count} of {found.reaction.moved} episodes)"
            )
    return lines


def _facts(report: Report) -> list[str]:
    lines = []
    for system, latency in report.latency_ms.items():
        if latency.count:
            marks = f"{latency.p50:.1f}/{latency.p95:.1f}/{latency.p99:.1f}"
            robots = f"{latency.robots_per_call:.1f} robots a call"
            lines.append(f"{system} latency p50/p95/p99: {marks} ms ({latency.count} calls, {robots})")
    lines += [
        f"in time: {margin.text}" if margin.margin_steps >= 0 else f"LATE: {margin.text}" for margin in report.margins or ()
    ]
    age = report.intent_age_steps
    if age.count:
        lines.append(f"intent age p50/p95/p99: {age.p50:.0f}/{age.p95:.0f}/{age.p99:.0f} control steps")
    lines += _asynchrony(report)
    shown = [f"{name} {value:.3g}" for name, value in mean_measures(report.tasks, "policy").items()]
    lines += [f"of the policy's answers: {', '.join(shown)}"] if shown else []
    rates = {
        "training {:,.0f} samples/s": report.throughput.train_samples_per_s,
        "simulation {:,.0f} steps/s": report.throughput.env_steps_per_s,
        "waiting for data {:.1%}": report.throughput.data_wait_share,
    }
    speed = report.throughput.training or {}
    known = [text.format(value) for text, value in rates.items() if value is not None]
    lines += [f"throughput: {', '.join(known)}"] if known else []
    shares = [f"{name.removesuffix('_share')} {value:.0%}" for name, value in speed.items() if name.endswith("_share")]
    lines += [f"training steps: {', '.join(shares)}"] if shares else []
    if "mfu" in speed:
        share = f"{speed['mfu']:.0%} of this device's {speed['peak_tflops']:.0f}"
        lines.append(f"training arithmetic: {speed['tflops']:.0f} TFLOP/s a worker, {share}; {speed['memory_gib']:.1f} GiB")
    stages = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in vars(report.wall_s).items())
    return [*lines, f"wall time: {stages}"]
