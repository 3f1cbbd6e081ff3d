"""A budget's answer on a terminal."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from libra_ray.budget.records import REST, WHOLE, BudgetReport, Candidate, ComponentTime

WIDTH = 150
BUSY = 0.25
"""An error of the model that speaks of disturbed measurements."""


def budget_table(report: BudgetReport) -> str:
    """Components, candidates, and what is proposed, as plain text."""
    profile = report.profile
    gpu, cpu = profile.machine.gpu, f"threads: {profile.threads} of {profile.machine.cpu}"
    gpu, cpu = profile.machine.gpu, f"threads: {profile.threads} of {profile.machine.cpu}"
    place = gpu if profile.device.startswith("cuda") and gpu else cpu
    title = f"ms, p50 / p95, by robots in one call ({profile.system} on {place})"
    text = _shown(_components(profile.components, title)) + _shown(_candidates(report))
    return text + "".join(f"{line}\n" for line in _words(report))


def _components(rows: Sequence[ComponentTime], title: str) -> Table:
    batches = sorted({row.batch for row in rows})
    table = Table("where", "component", title=title, title_justify="left")
    for batch in batches:
        table.add_column(str(batch), justify="right")
    places = dict.fromkeys(row.where for row in rows)
    for where in places:
        mine = [row for row in rows if row.where == where]
        for name in dict.fromkeys(row.name for row in mine):
            by_batch = {row.batch: row for row in mine if row.name == name}
            calls = next(iter(by_batch.values())).calls
            label = name + (f" (each of {calls})" if calls > 1 else "")
            cells = [_cell(by_batch.get(batch), calls) for batch in batches]
            table.add_row(where, label, *cells, style="bold" if name == WHOLE else None, end_section=name == WHOLE)
        if not any(row.name == REST for row in mine):
            table.add_section()
    return table


def _cell(row: ComponentTime | None, calls: int) -> str:
    return "" if row is None else f"{row.p50_ms / calls:.3g} / {row.p95_ms / calls:.3g}"


def _candidates(report: BudgetReport) -> Table:
    shape = f"{report.budget_ms:g} ms a decision, {report.control_hz:g} Hz, robots: {report.robots}, rule {report.rule}"
    table = Table(title=f"settings for {shape}", title_justify="left")
    for name in ("denoising steps", "execute steps", "batch", "ms (p95)", "margins", "robots", "success", "front", "fits"):
        table.add_column(name, justify="left" if name in ("margins", "fits") else "right")
    for c in report.candidates:
        margins = ", ".join(f"{name} {steps:+d}" for name, steps in c.margin_steps.items())
        success = "–" if c.success is None else f"{c.success.rate:.2f} ({c.success.low:.2f}–{c.success.high:.2f})"
        style = "bold" if c == report.proposal else None
        numbers = [str(c.denoising_steps or "–"), str(c.execute_steps), str(c.batch), f"{c.ms:.3g}"]
        table.add_row(
            *numbers, margins, str(c.most_robots), success, "*" if c.front else "", "; ".join(c.misses) or "yes", style=style
        )
    return table


def _words(report: BudgetReport) -> list[str]:
    lines = []
    if report.proposal is None:
        nearest = min(report.candidates, key=lambda c: c.ms)
        lines.append(f"nothing fits: the fastest takes {nearest.ms:.3g} ms ({_said(nearest, report)})")
    else:
        lines.append(f"proposed: {_said(report.proposal, report)}")
    if report.least_chunks is not None and report.chunks is not None:
        more = "" if report.least_chunks <= report.chunks else ": less is in time only after training with it"
        lines.append(f"M is fixed in training: action.chunks={report.chunks}; this needs at least {report.least_chunks}{more}")
    worst = max(model.worst_error for model in report.models.values())
    busy = "; the machine was busy, --fresh measures again" if worst > BUSY else ""
    lines.append(f"model: fitted to the p95 of whole calls, off by at most {worst:.0%} where it was measured{busy}")
    lines.append(
        "transport: measured between two processes of this machine (WebSocket, loopback); a network, Ray's own calls and "
        "waiting for others in a batch come on top"
    )
    if report.measured:
        lines.append("front: over latency and success in simulated time, with each level as late as the model says")
    else:
        lines.append("front: over latency and settings only; success was not measured, --episodes N does")
    return lines


def _said(c: Candidate, report: BudgetReport) -> str:
    setting = report.profile.denoising_setting
    parts = [f"{setting}={c.denoising_steps}"] if setting else []
    parts += [f"control.execute_steps={c.execute_steps}", f"robots in one call: {c.batch}"]
    rate = "" if c.success is None else f", success {c.success.rate:.2f}"
    return f"{', '.join(parts)}; {c.ms:.3g} ms{rate}"


def _shown(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return text.getvalue()
