"""What serving itself costs: the CPU of an idle server, of one robot, and of a request where a fleet asks without a pause."""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.files import ROOT
from benchmarks.serving_isolation import settings_of
from benchmarks.serving_load import measure
from benchmarks.serving_servers import Server, ours
from libra_ray.types import Json

ROBOTS = 96
"""That ask without a pause, each waiting for its plans as the peers' do; `--robots` says otherwise."""
SETTLED_S = 5.0
"""After the start of a server."""


def bare(given: argparse.Namespace, robots: int) -> Json:
    """The limit: the policy's batches without a server, in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.peers.bare", given.checkpoint, robots, given.threads, given.seconds]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True, encoding="utf-8", errors="replace"
    )
    cell: Json = json.loads(done.stdout.splitlines()[-1])
    return cell


def cost(given: argparse.Namespace, bench: Any) -> Json:
    """Servers as `serve run` starts them: one idle and with one robot, one with a fleet under `fifo`, as in `compare`."""
    robots, facts = given.robots[-1], {}
    with _typed(given, bench, "overlap") as running:
        time.sleep(SETTLED_S)
        before = running.cpu_s()
        time.sleep(given.seconds)
        facts["idle: cores"] = (running.cpu_s() - before) / given.seconds
        one = _cell(given, bench, running, 1, given.hz)
        facts[f"one robot, {given.hz:g} requests/s: cores"] = one["cpu_s_per_request"] * one["chunk_requests_per_s"]
    with _typed(given, bench, "fifo") as running:
        fleet = _cell(given, bench, running, robots, 0.0)
    limit = bare(given, robots)
    facts[f"{robots} robots without a pause: requests/s"] = fleet["chunk_requests_per_s"]
    facts["of the bare pass's"] = fleet["chunk_requests_per_s"] / limit["chunk_requests_per_s"]
    facts["CPU ms a request"] = 1000 * fleet["cpu_s_per_request"]
    facts["of it the bare pass, ms"] = 1000 * limit["cpu_s_per_request"]
    facts["wrong-robot replies"] = one["wrong_robot"] + fleet["wrong_robot"]
    return {"facts": facts, "cells": {"one": one, "fleet": fleet, "bare": limit}}


def _typed(given: argparse.Namespace, bench: Any, rule: str) -> Server:
    return ours(given.checkpoint, given.threads, {"rule": rule, **settings_of(given, bench)}, typed=True)


def _cell(given: argparse.Namespace, bench: Any, running: Server, robots: int, hz: float) -> Json:
    load = bench.load(running, hz)
    return asyncio.run(measure(running, load, robots, seconds=given.seconds, warmup_s=given.warmup, judge=bench.judge))
