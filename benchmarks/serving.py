"""Serving a fleet of robots: libra_ray beside other policy servers, and what it does under stress.

`uv run -m benchmarks.serving compare` runs us and the peers on the same checkpoint and observations: a plain blocking
openpi-style loop (a restatement), `vla-eval`, LeRobot's `PolicyServer`, and the bare batched forward pass as the limit.
The other sections (`cost`, `isolation`, `faults`, `soak`, `autoscaling`) are of libra_ray alone. Each writes a JSON, a table
and a plot, `benchmarks/results/serving*`. Run again, `compare` goes on with the cells in `runs/benchmarks/` that are missing,
and measures those again during which others took more of the machine than `benchmarks/stolen.py` allows.
"""

import argparse
import asyncio
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import serving_pages as pages
from benchmarks import serving_stress as stress
from benchmarks.files import RESULTS, ROOT, RUNS, command_line, origin, read_result, write_result
from benchmarks.peers.work import Work
from benchmarks.results_table import write_between
from benchmarks.serving_cost import ROBOTS as FLEET
from benchmarks.serving_cost import bare
from benchmarks.serving_load import Judge, Load, measure, observations
from benchmarks.serving_servers import Server, ours, peer
from benchmarks.stolen import MOST_STOLEN, StolenCpu
from libra_ray.common.gc_freeze import freeze_startup_objects
from libra_ray.common.progress import ProgressBar
from libra_ray.types import Json

ROBOTS = (1, 4, 16, 64, 96, 112, 128, 144, 168, 192)
COMPARISON = "serving.json"
"""What the README shows of."""
RULES = {"libra_fifo": "fifo", "libra_ray": "overlap"}
"""Ours twice: with every plan waited for, as by the others, and as by default."""
SYSTEMS = ("bare", "plain", "vla", "lerobot_server", *RULES)
CLIENTS = {"plain": "PlainClient", "vla": "VlaClient", "lerobot_server": "LerobotClient"}
LOOPS = ("closed", "open")
ONLY_LOOP = {"bare": ("closed",), "libra_ray": ("open",)}
"""Without a clock robots would leave any free-running planner behind, and be told to hold for nothing."""


def server(system: str, given: argparse.Namespace, execute_steps: int) -> Server:
    """A system's server, not yet started."""
    if system in RULES:
        # Its own idea of a deadline is that of the robots: one request period.
        settings = {"control_hz": given.hz * execute_steps, "rule": RULES[system], **dict(given.set)}
        return ours(given.checkpoint, given.threads, settings)
    # Only what is asked for: LeRobot's imports take long.
    client = getattr(importlib.import_module(f"benchmarks.peers.{system}"), CLIENTS[system])
    return peer(system, given.checkpoint, given.threads, client)


def compare(given: argparse.Namespace, bench: "Bench") -> None:
    """Every system at every number of robots, open and closed loop; what the JSON has, undisturbed, is not measured again."""
    cells = [(s, m, n) for s in given.systems for m in ONLY_LOOP.get(s, LOOPS) for n in given.robots]
    missing = [cell for cell in cells if not bench.has("|".join(map(str, cell)))]
    with ProgressBar("serving", len(cells), "cells") as bar:
        bar.to(len(cells) - len(missing))
        for system, mode in dict.fromkeys((s, m) for s, m, _ in missing):
            fleets = [n for s, m, n in missing if (s, m) == (system, mode)]
            if system == "bare":
                for robots in fleets:
                    stolen = StolenCpu()
                    cell = bare(given, robots)
                    bench.keep(f"bare|{mode}|{robots}", cell, stolen.share)
                    bar.to(bar.count + 1)
                continue
            with server(system, given, bench.execute_steps) as running:
                for robots in fleets:
                    load = bench.load(running, given.hz if mode == "open" else 0.0)
                    timing = {"seconds": given.seconds, "warmup_s": given.warmup}
                    # The judge's and earlier cells' garbage is not the server's latency, nor is the search for it.
                    freeze_startup_objects()
                    stolen = StolenCpu()
                    try:
                        cell = asyncio.run(measure(running, load, robots, judge=bench.judge, **timing))
                    except (ConnectionError, TimeoutError) as error:
                        cell = {"failed": f"{type(error).__name__}: {error}"}
                    bench.keep(f"{system}|{mode}|{robots}", cell, stolen.share)
                    bar.to(bar.count + 1)


class Bench:
    """One section's JSON, and the policy and observations that all of it uses.

    Raises:
        ValueError: what a stopped comparison has left was measured under other settings.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.path: Path = given.out
        self.kept: Path = given.runs / "benchmarks" / given.out.name
        self.work = Work.open(given.checkpoint, given.threads)
        dataset = given.dataset or given.checkpoint.parent / "dataset"
        self.judge = Judge(self.work, observations(self.work, 64, dataset if dataset.is_dir() else None))
        self.execute_steps = self.work.horizon
        known = {"checkpoint_digest": self.work.policy.source.manifest.digest, "execute_steps": self.execute_steps}
        known |= {name: getattr(given, name) for name in ("hz", "seconds", "warmup", "threads", "set")}
        settings = json.loads(json.dumps(known | {"recorded_observations": dataset.is_dir()}))
        self.result: Json = {"section": given.section, "settings": settings, "cells": {}}
        if given.section == "compare" and self.kept.exists() and not given.fresh:
            self.result = read_result(self.kept)
            if self.result["settings"] != settings:
                raise ValueError(f"{self.kept} was measured under other settings; give --fresh to begin anew, or another --out")
        self.result |= origin()
        self.result["confusable_pairs"] = self.judge.confusable()

    def load(self, running: Server, hz: float) -> Load:
        """Stub robots for a running server."""
        return Load(client=running.client, shown=self.judge.shown, execute_steps=self.execute_steps, hz=hz)

    def has(self, name: str) -> bool:
        """Whether a cell is measured, and others have let it."""
        cell = self.result["cells"].get(name)
        return cell is not None and cell.get("stolen", 0.0) <= MOST_STOLEN

    def keep(self, name: str, cell: Json, stolen: float) -> None:
        """Keep a measured cell at once, for whoever goes on, unless the one that is there was disturbed less."""
        before = self.result["cells"].get(name)
        if before is None or stolen <= before["stolen"]:
            self.result["cells"][name] = cell | {"stolen": stolen}
        write_result(self.kept, self.result)

    def write(self) -> None:
        """JSON, table and plot."""
        write_result(self.path, self.result)
        pages.write(self.path, self.result)
        if self.path == RESULTS / COMPARISON:
            write_between(ROOT / "README.md", Path(__file__).name, pages.for_readme(self.result))


def _parser() -> argparse.ArgumentParser:
    p = command_line("serving", __doc__)
    p.add_argument("section", choices=("compare", *stress.SECTIONS), help="what to measure")
    p.add_argument("--checkpoint", type=Path, default=ROOT / "runs/quickstart/checkpoint", help="served by everybody")
    p.add_argument("--dataset", type=Path, help="data set to show (default: the run's, random pictures where there is none)")
    p.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="compare: who")
    p.add_argument(
        "--robots",
        type=int,
        nargs="+",
        help=f"numbers of robots (default: {' '.join(map(str, ROBOTS))}; {FLEET}, 16)",
    )
    p.add_argument("--hz", type=float, default=10.0, help="chunk requests per second and robot (default: %(default)s)")
    p.add_argument("--seconds", type=float, help="measured time of a cell or section (default: depends on the section)")
    p.add_argument("--warmup", type=float, default=3, help="seconds before, not counted (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="torch threads of every server (default: %(default)s)")
    p.add_argument("--set", type=_setting, nargs="*", default=[], metavar="NAME=VALUE", help="further settings of ours")
    p.add_argument("--quick", action="store_true", help="a few robots for a few seconds, its JSON below --runs")
    p.add_argument("--fresh", action="store_true", help="compare: measure everything again")
    p.add_argument("--runs", type=Path, default=RUNS, help="folder for what a stopped comparison goes on with (default: runs)")
    p.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/serving[_SECTION].json)")
    return p


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write NAME=VALUE, e.g. levels.planner.replicas=2")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line with its defaults filled in; a mistake ends the program with one line."""
    parser = _parser()
    given = parser.parse_args(argv)
    usual = {"compare": ROBOTS, "cost": (FLEET,)}.get(given.section, (16,))
    given.robots = given.robots or ((1, 4) if given.quick else usual)
    given.seconds = given.seconds or (3.0 if given.quick else stress.SECTIONS.get(given.section, (None, 15.0))[1])
    given.warmup = min(given.warmup, 1.0) if given.quick else given.warmup
    name = COMPARISON if given.section == "compare" else f"serving_{given.section}.json"
    given.out = given.out or (given.runs / f"quick_{name}" if given.quick else RESULTS / name)
    if min(given.robots) < 1 or given.hz <= 0 or given.seconds <= 0 or given.threads < 1:
        parser.error("--robots, --threads, --hz and --seconds must be above 0")
    if not (given.checkpoint / "manifest.json").is_file():
        parser.error(
            f"--checkpoint {given.checkpoint} is no checkpoint; run `make quickstart`, or give one that training wrote"
        )
    return given


def main() -> None:
    """Measure one section."""
    given = arguments()
    # Servers have process groups of their own: they are ended here, whatever ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        bench = Bench(given)
        if given.section == "compare":
            compare(given, bench)
        else:
            bench.result |= stress.SECTIONS[given.section][0](given, bench)
        bench.write()
    except (ValueError, RuntimeError) as mistake:
        raise SystemExit(f"serving.py: error: {mistake}") from mistake
    except KeyboardInterrupt:
        raise SystemExit("serving.py: interrupted; compare keeps what it has measured") from None
    print(pages.markdown(bench.result))


if __name__ == "__main__":
    main()
