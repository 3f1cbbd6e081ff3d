"""Ray Serve's own means of carrying requests, beside ours: the same fleets, checkpoint and rule, in turns, in one run.

Two things carry a request: the way in (the gateways' own port, Serve's proxy, Serve's listener in the replica itself, HAProxy)
and the way from the gateway to the levels (in the gateway's own loop or another, by actor calls or gRPC). Ours is asked for by
private options of Serve's handles (`on_ray/ray_private.py`); each other row changes one or both by what Serve offers:
environment variables. A few servers run at a time, ours always among them, and are loaded in turns for seconds each; ratios are
made within a turn, and the figure is the median over the rounds, so that a machine whose speed drifts falsifies none.

    uv run -m benchmarks.serve_means --checkpoint runs/quickstart/checkpoint

HAProxy opens a port for its metrics to all interfaces, so it is measured only where asked for with `--haproxy`, e.g. below
`unshare -rn sh -c 'ip link set lo up && exec uv run -m benchmarks.serve_means --haproxy'`.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from statistics import median

from benchmarks.files import ROOT, command_line, write_result
from benchmarks.peers.work import Work
from benchmarks.serving_load import Judge, Load, measure, observations
from benchmarks.serving_servers import APP, Server, Way, free_port, ours
from benchmarks.stolen import StolenCpu
from libra_ray.common.files import write_text
from libra_ray.common.gc_freeze import freeze_startup_objects
from libra_ray.common.progress import ProgressBar
from libra_ray.common.provenance import describe_hardware, git_revision
from libra_ray.types import Json

ROBOTS = (1, 16, 96)
OURS = "ours"
PLAIN = "benchmarks.serve_plain_calls:app"
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
GRPC = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
OWN_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
DIRECT = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1"}
TOGETHER = 3
"""Servers that run beside ours; each takes about 1.5 GiB."""
MEASURES = ("requests/s", "p50 ms", "p99 ms", "CPU ms/request")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: an application, and how it is reached."""

    way: Way
    app: str = APP


ROWS = {
    OURS: Row(way=Way()),
    "own port, plain calls": Row(way=Way(), app=PLAIN),
    "own port, gRPC": Row(way=Way(replicas=GRPC), app=PLAIN),
    "own port, gRPC, router in the gateway's loop": Row(way=Way(replicas={**GRPC, **OWN_LOOP}), app=PLAIN),
    "own port, throughput": Row(way=Way(replicas={**THROUGHPUT, "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}), app=PLAIN),
    "proxy, our calls": Row(way=Way(entry="proxy")),
    "proxy, plain calls": Row(way=Way(entry="proxy"), app=PLAIN),
    "proxy, gRPC": Row(way=Way(entry="proxy", serve=GRPC), app=PLAIN),
    "direct ingress, plain calls": Row(way=Way(entry="replica", serve=DIRECT), app=PLAIN),
    "throughput optimised": Row(way=Way(entry="replica", serve=THROUGHPUT), app=PLAIN),
    "HAProxy, throughput optimised": Row(
        way=Way(entry="proxy", serve={**THROUGHPUT, "RAY_SERVE_ENABLE_HA_PROXY": "1"}), app=PLAIN
    ),
}


def compared(names: Sequence[str], given: argparse.Namespace, judge: Judge) -> list[Json]:
    """Rounds of a few servers' figures, by name and fleet."""
    rounds: list[Json] = [{name: {} for name in names} for _ in range(given.rounds)]
    settings = {"rule": "fifo", "control_hz": given.hz * judge.work.horizon}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-means-")))
        servers = {}
        for name in names:
            row = ROWS[name]
            way = replace(row.way, serve={**row.way.serve, **_haproxy(scratch)}) if "HAProxy" in name else row.way
            servers[name] = stack.enter_context(ours(given.checkpoint, 1, settings, way, row.app))
        for number, found in enumerate(rounds):
            for robots in given.robots:
                # Every other round the other way about.
                for name in names if number % 2 == 0 else names[::-1]:
                    found[name][str(robots)] = _figures(
                        *(_loaded(servers[name], robots, hz, given, judge) for hz in (0.0, given.hz))
                    )
    return rounds


def _loaded(server: Server, robots: int, hz: float, given: argparse.Namespace, judge: Judge) -> Json:
    """One load: closed loop (`hz` of 0) for the greatest rate, open loop for latencies at the fleet's own."""
    load = Load(client=server.client, shown=judge.shown, execute_steps=judge.work.horizon, hz=hz)
    freeze_startup_objects()
    return asyncio.run(measure(server, load, robots, seconds=given.seconds, warmup_s=given.warmup, judge=judge))


def _figures(closed: Json, paced: Json) -> Json:
    return {
        "requests/s": closed["chunk_requests_per_s"],
        "p50 ms": paced["latency_ms"]["p50"],
        "p99 ms": paced["latency_ms"]["p99"],
        "CPU ms/request": None if closed["cpu_s_per_request"] is None else 1e3 * closed["cpu_s_per_request"],
        "wrong_robot": closed["wrong_robot"] + paced["wrong_robot"],
        "errors": sum(sum(load["errors"].values()) for load in (closed, paced)),
    }


def _haproxy(scratch: Path) -> dict[str, str]:
    """Files and ports of its own."""
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "METRICS_SOCKET_PATH": "metrics.sock"}
    files |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "server-state"}
    found = {f"RAY_SERVE_HAPROXY_{name}": str(scratch / file) for name, file in files.items()}
    return found | {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}


def medians(rounds: Sequence[Json], robots: Sequence[int]) -> Json:
    """Per row and fleet the median figures, and the median of each round's ratio to ours."""
    found: Json = {}
    for name in rounds[0]:
        for fleet in map(str, robots):
            pairs = {m: [(one[name][fleet][m], one[OURS][fleet][m]) for one in rounds] for m in MEASURES}
            found[f"{name}|{fleet}"] = {
                **{m: _median([value for value, _ in of]) for m, of in pairs.items()},
                "to_ours": {
                    m: _median([value / base if value and base else None for value, base in of]) for m, of in pairs.items()
                },
                "wrong_robot": sum(one[name][fleet]["wrong_robot"] for one in rounds),
                "errors": sum(one[name][fleet]["errors"] for one in rounds),
            }
    return found


def _median(values: Sequence[float | None]) -> float | None:
    """None where nothing was answered in any round."""
    return median(known) if (known := [value for value in values if value is not None]) else None


def markdown(result: Json) -> str:
    """The table: every figure with its ratio to ours."""
    lines = [f"| | robots | {' | '.join(MEASURES)} | errors |", f"|---|---|{'---|' * len(MEASURES)}---|"]
    for key, cell in result["cells"].items():
        name, robots = key.split("|")
        figures = " | ".join(
            "–" if cell["to_ours"][m] is None else f"{cell[m]:.3g} ({cell['to_ours'][m]:.2f})" for m in MEASURES
        )
        lines.append(f"| {name} | {robots} | {figures} | {cell['errors'] + cell['wrong_robot']} |")
    return "\n".join([*lines, "", f"In brackets: as many times ours, the median of {result['settings']['rounds']} rounds."])


def main() -> None:
    """Measure, keep after every round, print."""
    p = command_line("serve_means", __doc__)
    p.add_argument("--checkpoint", type=Path, default=ROOT / "runs/quickstart/checkpoint", help="served by everybody")
    p.add_argument("--rows", nargs="+", choices=list(ROWS), help="only these, beside ours")
    p.add_argument("--haproxy", action="store_true", help="HAProxy too; see above")
    p.add_argument("--robots", type=int, nargs="+", default=ROBOTS, help="fleets (default: 1 16 96)")
    p.add_argument("--hz", type=float, default=5.0, help="chunk requests per second and robot in open loop (default: 5)")
    p.add_argument("--seconds", type=float, default=3.0, help="measured time of a load (default: 3)")
    p.add_argument("--warmup", type=float, default=1.0, help="seconds before, not counted (default: 1)")
    p.add_argument("--rounds", type=int, default=5, help="turns of every server (default: 5)")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serve_means.json", help="JSON to write")
    given = p.parse_args()
    if not (given.checkpoint / "manifest.json").is_file():
        p.error(f"--checkpoint {given.checkpoint} is no checkpoint; run `make quickstart`, or give one that training wrote")
    # Servers have process groups of their own: they are ended here, whatever ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = given.rows or [name for name in ROWS if name != OURS and (given.haproxy or "HAProxy" not in name)]
    work = Work.open(given.checkpoint, 1)
    judge = Judge(work, observations(work, 64, None))
    settings = {name: getattr(given, name) for name in ("hz", "seconds", "warmup", "robots", "rounds")}
    cells: Json = {}
    stolen = StolenCpu()
    with ProgressBar("serving", len(names), "ways") as bar:
        for group in batched(names, TOGETHER):
            found = medians(compared([OURS, *group], given, judge), given.robots)
            cells = found | cells
            result = {
                "hardware": describe_hardware(), "git_revision": git_revision(), "settings": settings,
                "checkpoint_digest": work.policy.source.manifest.digest, "stolen": stolen.share, "cells": cells,
            }  # fmt: skip
            write_result(given.out, result)
            write_text(given.out.with_suffix(".md"), markdown(result) + "\n")
            bar.to(bar.count + len(group))
    print(markdown(result))


if __name__ == "__main__":
    main()
