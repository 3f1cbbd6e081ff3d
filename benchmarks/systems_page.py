"""The tables and plots of the study of systems, as docs/systems.md shows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.files import ROOT
from benchmarks.results_table import write_between
from benchmarks.studies import difference, success, won, words
from benchmarks.systems_tables import DOMAINS, LATENCY, POLICY, ROUTER, TABLES, Domain, Row, variants_of
from benchmarks.systems_times import LATENCY_BATCHES, SystemTime
from benchmarks.systems_training import Cell
from libra_ray.common.files import write_text
from libra_ray.report.comparison import Line, Sample, summarise
from libra_ray.report.interval_plot import Mark, Panel, interval_plot
from libra_ray.stats.granularity_peak import Outcomes

PAGE = ROOT / "docs" / "systems.md"
MOST_TASKS = 4
"""Tasks of which each has a panel of its own, and columns on the page."""
SHARE = "share_"
RESAMPLES = 1000
"""Of the bootstrap of a median error, which is slow."""
GRIPPER = {"val_gripper_error_anchor": "anchor's gripper errors", "val_gripper_error": "gripper errors"}
"""Held-out measures of AnchorRefine: shares of steps on which the gripper is commanded wrongly."""
NOTHING = "no cell is measured yet"


def of_row(cells: Sequence[Cell], row: Row) -> list[Cell]:
    """The cells behind a row, by seed."""
    mine = (cell for cell in cells if cell.variant == row.variant and row.controller in cell.played)
    return sorted(mine, key=lambda cell: cell.seed)


def outcomes(cells: Sequence[Cell], row: Row, task: str = "") -> dict[int, Outcomes]:
    """Seed -> whether each episode succeeded, of all tasks or one."""
    played = {cell.seed: cell.played[row.controller].outcomes for cell in of_row(cells, row)}
    return {seed: won({task: of[task]} if task else of) for seed, of in played.items()}


def errors_mm(cells: Sequence[Cell], row: Row, task: str = "") -> list[NDArray[np.float64]]:
    """Per seed the final errors of all episodes that have one; an episode that raised ended nowhere near its goal."""
    found = []
    for cell in of_row(cells, row):
        errors = cell.played[row.controller].errors_mm
        of = [mm for name, each in errors.items() if task in ("", name) for mm in each]
        found.append(np.array([np.inf if mm is None else mm for mm in of]))
    return [errors for errors in found if len(errors)]


def lines_of(cells: Sequence[Cell], table: str) -> dict[str, Line]:
    """Label -> figures of the rows that have been measured."""
    rows = [row for row in TABLES[table] if of_row(cells, row)]
    samples = [
        Sample(label=row.label, outcomes=list(outcomes(cells, row).values()), errors_mm=errors_mm(cells, row)) for row in rows
    ]
    return {line.sample.label: line for line in summarise(samples, RESAMPLES)} if samples else {}


def measured(cells: Sequence[Cell], table: str, lines: Mapping[str, Line]) -> str:
    """A row a policy: success, error, what it cost, and gripper errors where any policy knows them."""
    gripper = {
        key: name for key, name in GRIPPER.items() if any(key in c.held_out for r in TABLES[table] for c in of_row(cells, r))
    }
    errors = any(line.error_mm for line in lines.values())
    names = [
        "policy",
        "success",
        *(["median final error, mm"] if errors else []),
        "seeds × episodes",
        "weights",
        "steps",
        "training, s",
    ]
    names += gripper.values() if table == "anchor" else ()
    found = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in (row for row in TABLES[table] if row.label in lines):
        mine, line = of_row(cells, row), lines[row.label]
        counts = sorted({sum(map(len, of)) for of in outcomes(cells, row).values()})
        shown = [row.label, _mark(line.success, ".2f"), *([_mark(line.error_mm, ".1f")] if errors else [])]
        shown += [f"{len(mine)} × {'/'.join(map(str, counts))}", f"{mine[0].parameters / 1e6:.2f} M"]
        shown += ["/".join(f"{steps:,}" for steps in sorted({cell.steps for cell in mine}))]
        shown += [f"{np.mean([cell.spent_s for cell in mine]):.0f}"]
        if table == "anchor":
            shown += [_share([cell.held_out[key] for cell in mine if key in cell.held_out]) for key in gripper]
        found.append(f"| {' | '.join(shown)} |")
    return "\n".join(found)


def by_task(cells: Sequence[Cell], table: str, domain: Domain) -> str:
    """A row a policy, a column a task: success, and the median error or the parts done where there are such."""
    found = [f"| success by task | {' | '.join(domain.tasks)} |", "|---" * (len(domain.tasks) + 1) + "|"]
    for row in TABLES[table]:
        if not (mine := of_row(cells, row)):
            continue
        shown = []
        for task in domain.tasks:
            text, errors = words(success(list(outcomes(cells, row, task).values()))), errors_mm(cells, row, task)
            if errors:
                text += f"; {np.median(np.concatenate(errors)):.1f} mm"
            parts = "".join(cell.played[row.controller].parts_done.get(task, "") for cell in mine)
            shown.append(text + (f"; {np.mean([int(done) for done in parts]):.2f} parts" if parts else ""))
        found.append(f"| {row.label} | {' | '.join(shown)} |")
    return "\n".join(found)


def paired(cells: Sequence[Cell], table: str, domain: Domain, tasks: Sequence[str]) -> str:
    """How much more often the first of two succeeds, episode by episode, over all tasks and in those; empty without a pair."""
    rows, columns = {row.label: row for row in TABLES[table]}, ("", *tasks)
    names = ["difference in success", "all tasks", *tasks]
    found = []
    for row in TABLES[table]:
        for other in row.against:
            apart = [difference(outcomes(cells, row, task), outcomes(cells, rows[other], task)) for task in columns]
            if any(apart):
                found.append(f"| {row.label} minus {other} | {' | '.join(words(d, '+.2f') for d in apart)} |")
    if table == "experts" and (line := against_best(cells, domain, tasks)):
        found.append(line)
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *found]) if found else ""


def against_best(cells: Sequence[Cell], domain: Domain, tasks: Sequence[str]) -> str:
    """The router against the best expert of its mixture in each task, chosen by these very episodes: a hard opponent."""
    rows = {row.label: row for row in TABLES["experts"]}
    router, singles = (
        rows[ROUTER],
        [row for row in rows.values() if row.variant == rows[ROUTER].variant and row.controller != POLICY],
    )
    seeds = outcomes(cells, router)
    if not seeds:
        return ""
    best = {
        task: max(singles, key=lambda row: np.mean([of[0].mean() for of in outcomes(cells, row, task).values()]))
        for task in domain.tasks
    }
    each = {task: outcomes(cells, row, task) for task, row in best.items()}
    whole = {seed: [each[task][seed][0] for task in domain.tasks] for seed in seeds}
    apart = [difference(seeds, whole)]
    apart += [difference(outcomes(cells, router, task), each[task]) for task in tasks]
    return f"| {ROUTER} minus the best of its experts in each task | {' | '.join(words(d, '+.2f') for d in apart)} |"


def shares(cells: Sequence[Cell], domain: Domain) -> str:
    """Which expert acted in which task, by the router, mean over seeds; empty where no router was measured."""
    found = []
    for row in (row for row in TABLES["experts"] if row.label.startswith("router")):
        said = [cell.played[row.controller].measures for cell in of_row(cells, row)]
        for name in dict.fromkeys(name for of in said for task in of.values() for name in task if name.startswith(SHARE)):
            each = [f"{np.mean([of[task][name] for of in said if task in of]):.2f}" for task in domain.tasks]
            found.append(f"| {row.label}: {name.removeprefix(SHARE)} | {' | '.join(each)} |")
    head = [f"| share of the actions | {' | '.join(domain.tasks)} |", "|---" * (len(domain.tasks) + 1) + "|"]
    return "\n".join([*head, *found]) if found else ""


def latencies(times: Sequence[SystemTime], domain: Domain) -> str:
    """A row a level: milliseconds for one robot and for many; with a system's last level what is proposed for 20 Hz."""
    robots = [f"{batch} robot{'s' if batch > 1 else ''}, p50 / p95, ms" for batch in LATENCY_BATCHES]
    names = ["policy", "level", *robots, "proposed for 20 Hz", "ms a decision"]
    found = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    by_name = {time.variant: time for time in times}
    for time in (by_name[name] for name in variants_of(LATENCY, domain) if name in by_name):
        levels = dict.fromkeys(row.level for row in time.levels)
        for number, level in enumerate(levels, 1):
            calls = {row.batch: row for row in time.levels if row.level == level}
            cells = [f"{calls[b].p50_ms:.3g} / {calls[b].p95_ms:.3g}" if b in calls else "–" for b in LATENCY_BATCHES]
            last = number == len(levels)
            said = _proposed(time) if last else ["", ""]
            found.append(f"| {' | '.join([time.variant.replace('_', ' '), level, *cells, *said])} |")
    return "\n".join(found)


def _proposed(time: SystemTime) -> list[str]:
    """The split in words, and what a decision takes."""
    chosen = time.proposal
    if chosen is None:
        return ["nothing fits", "–"]
    parts = [f"{time.setting} {chosen.denoising_steps}"] if time.setting else []
    parts += [f"execute {chosen.execute_steps}", *([f"M ≥ {time.least_chunks}"] if time.least_chunks else []), time.rule]
    return [", ".join(parts), f"{chosen.ms:.3g}"]


def _mark(mark: Mark | None, form: str) -> str:
    return "–" if mark is None else f"{mark.value:{form}} ({mark.low:{form}}–{mark.high:{form}})"


def _share(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.1f} %" if values else "–"


def panels_of(cells: Sequence[Cell], table: str, domain: Domain, lines: Mapping[str, Line]) -> list[Panel]:
    """Success over all tasks, in each where they are few, and errors where there are some."""
    panels = [Panel(title=f"{table}: all tasks", unit="success", marks=[line.success for line in lines.values()])]
    if 1 < len(domain.tasks) <= MOST_TASKS:
        for task in domain.tasks:
            marks = []
            for row in (row for row in TABLES[table] if row.label in lines):
                of = list(outcomes(cells, row, task).values())
                found = success(of)
                seeds = [float(tasks[0].mean()) for tasks in of]
                marks.append(Mark(label=row.label, value=found.value, low=found.low, high=found.high, seeds=seeds))
            panels.append(Panel(title=task, unit="success", marks=marks))
    errors = [line.error_mm for line in lines.values() if line.error_mm]
    return [*panels, Panel(title=f"{table}: error", unit="median final error, mm", marks=errors, share=False)]


def latency_panels(times: Sequence[SystemTime], domain: Domain) -> list[Panel]:
    """Of every number of robots the median milliseconds of each level, up to the p95."""
    known = [time for name in variants_of(LATENCY, domain) for time in times if time.variant == name]
    return [
        Panel(
            title=f"latency: {batch} robot{'s' if batch > 1 else ''} in a call",
            unit="ms, median up to p95",
            share=False,
            marks=[
                Mark(label=f"{time.variant.replace('_', ' ')}: {row.level}", value=row.p50_ms, low=row.p50_ms, high=row.p95_ms)
                for time in known
                for row in time.levels
                if row.batch == batch
            ],
        )
        for batch in LATENCY_BATCHES
    ]


def texts_of(cells: Sequence[Cell], table: str, domain: Domain, lines: Mapping[str, Line], *, brief: bool) -> list[str]:
    """The tables of episodes of one of the study's; in brief of many tasks only what they have in common."""
    tasks = () if brief and len(domain.tasks) > MOST_TASKS else domain.tasks
    texts = [measured(cells, table, lines), *([by_task(cells, table, domain)] if tasks else [])]
    texts.append(paired(cells, table, domain, tasks))
    return texts + ([shares(cells, domain)] if table == "experts" else [])


def publish(out: Path, name: str, cells: Sequence[Cell], times: Sequence[SystemTime], *, page: bool) -> str:
    """Write tables and a plot each beside the JSON at `out`, and in brief into the page; returns the tables."""
    domain, whole, brief = DOMAINS[name], list[str](), list[str]()
    for table in domain.tables:
        lines = lines_of(cells, table) if table != LATENCY else {}
        if not lines and not (table == LATENCY and times):
            continue
        plot = out.with_name(f"{out.stem}_{table}.svg")
        panels = latency_panels(times, domain) if table == LATENCY else panels_of(cells, table, domain, lines)
        write_text(plot, interval_plot(panels))
        head, picture = f"**{name}, {table}**", f"![{table} on {name}]({{}}{plot.name})"
        for parts, folder, shortened in ((whole, "", False), (brief, "../benchmarks/results/", True)):
            texts = [latencies(times, domain)] if table == LATENCY else texts_of(cells, table, domain, lines, brief=shortened)
            parts.append("\n\n".join(text for text in (head, picture.format(folder), *texts) if text))
    if not whole:
        return NOTHING
    text = "\n\n".join(whole)
    write_text(out.with_suffix(".md"), text + "\n")
    if page:
        more = f"By task, and every difference: [systems_{name}.md](../benchmarks/results/systems_{name}.md)."
        write_between(PAGE, f"systems.py {name}", "\n\n".join([*brief, more]))
    return text
