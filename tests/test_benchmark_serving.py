"""The serving benchmark: peers give the policy's own answers, the judge sees swapped ones, what is measured is told right."""

import asyncio
import json
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import serve_means, serving
from benchmarks.peers import bare, plain
from benchmarks.peers.work import Work
from benchmarks.serving_load import Judge, Load, Told, observations
from benchmarks.serving_pages import markdown, plot, summary
from benchmarks.serving_servers import Server, free_port
from benchmarks.serving_stress import aftermath, growth
from benchmarks.stolen import StolenCpu
from libra_ray.fleet.log import DriveLog, RequestRecord
from libra_ray.fleet.robot import drive
from tests.model.builders import save_checkpoint, tiny_model
from tests.processes import survivors

ROBOTS = 5
CHUNKS = 4
"""Of each robot; a plan covers two of them."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "checkpoint"
    save_checkpoint(folder, tiny_model())
    return folder


@pytest.fixture(scope="module")
def judge(checkpoint) -> Judge:
    work = Work.open(checkpoint, 1)
    return Judge(work, observations(work, ROBOTS, None))


@contextmanager
def in_thread(coroutine_of_port) -> Iterator[int]:
    """A server coroutine in an event loop of its own, to the end of the block."""
    port, loop = free_port(), asyncio.new_event_loop()
    task = loop.create_task(coroutine_of_port(port))
    thread = threading.Thread(target=_to_its_end, args=(loop, task), daemon=True)
    thread.start()
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


def _to_its_end(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    try:
        loop.run_until_complete(task)
    except asyncio.CancelledError:
        pass
    finally:
        loop.close()


async def _all_answer(clients, load: Load) -> None:
    for client in clients:  # a server in a thread is there within moments
        for _ in range(100):
            try:
                await client.connect()
                break
            except OSError:
                await asyncio.sleep(0.05)
        await client.close()
    fleet = load.fleet(ROBOTS)
    for robot in fleet:
        robot.seen = islice(robot.seen, CHUNKS)
    await drive(fleet, 60)


def assert_answers_as_the_policy(make_client, judge: Judge) -> None:
    steps = judge.work.horizon
    load = Load(client=make_client, shown=judge.shown, execute_steps=steps, hz=0.0)
    asyncio.run(_all_answer([make_client("first")], load))
    told = load.told
    assert sorted((t.robot, t.step) for t in told) == [(r, c * steps) for r in range(ROBOTS) for c in range(CHUNKS)]
    assert load.log.errors == []
    assert judge.wrong(told) == 0
    crossed = [replace(t, robot=(t.robot + 1) % ROBOTS) for t in told]
    assert judge.wrong(crossed) == len(told)


def test_the_plain_loop_answers_as_the_policy(checkpoint, judge):
    work = Work.open(checkpoint, 1)
    with in_thread(lambda port: plain.run(work, port)) as port:
        assert_answers_as_the_policy(lambda robot: plain.PlainClient(port, robot), judge)
    assert not work.robots  # gone with their connections


def test_vla_eval_answers_as_the_policy(checkpoint, judge):
    pytest.importorskip("vla_eval")
    from vla_eval.model_servers.serve import serve_async

    from benchmarks.peers.vla import LibraModelServer, VlaClient

    server = LibraModelServer(Work.open(checkpoint, 1))
    with in_thread(lambda port: serve_async(server, "127.0.0.1", port)) as port:
        assert_answers_as_the_policy(lambda robot: VlaClient(port, robot), judge)


def test_the_limit_does_the_same_work_and_counts_it(judge):
    cell = bare.measure(judge.work, judge.shown, 0.2)
    assert cell["chunk_requests_per_s"] == pytest.approx(ROBOTS * 1e3 / cell["latency_ms"]["mean"], rel=0.01)
    told = [
        Told(robot=i, step=chunk.first_step, intent_first_step=None, actions=chunk.actions)
        for step in (0, judge.work.horizon)
        for i, chunk in enumerate(
            judge.work.answer({str(i): replace(o, step=step) for i, o in enumerate(judge.shown)}).values()
        )
    ]
    assert judge.wrong(told) == 0
    assert judge.wrong([replace(t, actions=t.actions + 0.1) for t in told]) == len(told)


def test_robots_can_be_told_apart(judge):
    assert judge.confusable() == 0
    twins = Judge(judge.work, [judge.shown[0], judge.shown[0], judge.shown[1]])
    assert twins.confusable() == 1


SERVER_WITH_CHILD = """
import socket, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
sum(range(10**7))  # more than a tick of the processor's clock
listening = socket.create_server(("127.0.0.1", {port}))
time.sleep(600)
"""


def test_a_server_is_ended_with_its_children():
    port = free_port()
    command = [sys.executable, "-c", SERVER_WITH_CHILD.format(port=port)]
    with Server(name="nobody", command=command, port=port, client=lambda _: None) as running:
        processes = running.processes()
        assert len(processes) == 2
        assert running.cpu_s() > 0
    assert survivors([p.pid for p in processes], patience_s=5) == []


def test_a_server_that_ends_says_why():
    dying = Server(
        name="nobody", command=[sys.executable, "-c", "raise SystemExit('no weights here')"], port=1, client=lambda _: None
    )
    with pytest.raises(RuntimeError, match="no weights here"), dying:
        pass
    assert not [p for p in psutil.Process().children() if "no weights" in " ".join(p.cmdline())]


def cell(rate: float, missed: int | None = None, p50: float = 10.0, wrong: int = 0, held: int = 0) -> dict:
    """Of a thousand deadlines, where there are any."""
    return {
        "chunk_requests_per_s": rate,
        "latency_ms": {"p50": p50, "p95": 2 * p50, "p99": 3 * p50},
        "deadlines": {"due": 0 if missed is None else 1000, "missed": missed or 0},
        "held_replies": held,
        "wrong_robot": wrong,
        "checked_replies": 100,
        "errors": {},
        "cpu_s_per_request": 0.002,
    }


CELLS = {
    "libra_fifo|closed|1": cell(50, p50=20.0),
    "libra_fifo|closed|8": cell(300),
    "libra_fifo|open|1": cell(10, 0, p50=30.0),
    "libra_fifo|open|8": cell(80, 9),
    "libra_fifo|open|16": cell(120, 5, held=5),
    "libra_fifo|open|32": cell(120, 0),
    "libra_ray|open|1": cell(10, 0, p50=40.0),
    "plain|closed|1": cell(60, wrong=2),
    "plain|open|1": cell(10, 10),
    "vla|open|1": {"failed": "no server"},
}


def result() -> dict:
    hardware = {"cores": 2, "cpu": "some", "gpu": None}
    settings = {"hz": 10, "seconds": 5, "threads": 1}
    return {"section": "compare", "settings": settings, "hardware": hardware, "cells": CELLS, "confusable_pairs": 0}


def test_robots_are_held_up_to_the_first_number_that_is_not():
    found = summary(CELLS)
    one = {"open": 30.0, "closed": 20.0}
    assert found["libra_fifo"] == {"held": 8, "saturation": 300, "one_robot_p50_ms": one, "wrong_robot": 0}
    one = {"open": 40.0, "closed": None}
    assert found["libra_ray"] == {"held": 1, "saturation": None, "one_robot_p50_ms": one, "wrong_robot": 0}
    assert found["plain"]["held"] == 0
    assert found["plain"]["wrong_robot"] == 2
    assert "vla" not in found


def test_the_page_shows_every_cell():
    text = markdown(result())
    assert text.count("| **libra_ray**, plans waited for") == 1 + 6
    assert text.count("| **libra_ray**, planner running freely") == 1 + 1
    assert "failed: no server" in text
    assert "0.9%" in text
    assert plot(result()) is not None


def arguments(checkpoint: Path, out: Path, *more: str) -> Namespace:
    options = ["--seconds", "0.2", "--warmup", "0.1", "--robots", "2", "--systems", "bare", "--out", str(out)]
    options += ["--runs", str(out.parent / "runs")]
    return serving.arguments(["compare", "--checkpoint", str(checkpoint), *options, *more])


def test_a_measured_cell_is_kept_and_other_settings_are_refused(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "serving.json"
    monkeypatch.setattr(serving, "bare", lambda given, robots: cell(100.0 + robots))
    given = arguments(checkpoint, out)
    serving.compare(given, serving.Bench(given))
    assert not out.exists(), "a result is whole"
    monkeypatch.setattr(serving, "bare", lambda given, robots: pytest.fail("measured again"))
    bench = serving.Bench(given)
    serving.compare(given, bench)
    bench.write()
    assert json.loads(out.read_text())["cells"]["bare|closed|2"]["chunk_requests_per_s"] == 102
    assert out.with_suffix(".md").exists()
    assert out.with_suffix(".svg").exists()
    with pytest.raises(ValueError, match="other settings"):
        serving.Bench(arguments(checkpoint, out, "--hz", "3"))


def test_a_cell_that_others_disturbed_is_measured_again_until_it_is_not(checkpoint, tmp_path, monkeypatch):
    out, rates, shares = tmp_path / "serving.json", iter([1.0, 2.0, 3.0]), iter([0.2, 0.4, 0.01])
    monkeypatch.setattr(serving, "bare", lambda given, robots: cell(next(rates)))
    monkeypatch.setattr(serving.StolenCpu, "share", property(lambda self: next(shares)))
    found = []
    for _ in range(4):
        given = arguments(checkpoint, out)
        bench = serving.Bench(given)
        serving.compare(given, bench)
        bench.write()
        kept = json.loads(out.read_text())["cells"]["bare|closed|2"]
        found.append((kept["chunk_requests_per_s"], kept["stolen"]))
    assert found == [(1.0, 0.2), (1.0, 0.2), (3.0, 0.01), (3.0, 0.01)]
    assert "others took at most 1% of the machine" in out.with_suffix(".md").read_text()


def test_ratios_are_made_within_a_turn_and_nothing_answered_is_none():
    """On a machine that slows down tenfold between two turns, twice as fast is twice as fast."""

    def turn(speed, **rates):
        def figures(rate):
            cpu = 1 / speed if rate else None
            return dict(zip(serve_means.MEASURES, (rate * speed, cpu, cpu, cpu), strict=True)) | {"wrong_robot": 0, "errors": 1}

        return {name: {"16": figures(rate)} for name, rate in rates.items()}

    found = serve_means.medians([turn(s, ours=10, other=20, dead=0) for s in (1.0, 0.1, 0.1)], [16])
    assert found["other|16"]["to_ours"]["requests/s"] == pytest.approx(2)
    assert found["other|16"]["errors"] == 3
    assert found["dead|16"]["p50 ms"] is None
    table = serve_means.markdown({"cells": found, "settings": {"rounds": 3}})
    assert "| other | 16 | 2 (2.00) | 10 (1.00) |" in table


def test_stolen_time_is_a_share():
    assert 0 <= StolenCpu().share <= 1


@pytest.mark.parametrize(
    "options", [["--hz", "0"], ["--robots", "0"], ["--checkpoint", "/no/such"], ["--set", "levels.planner"]]
)
def test_mistakes_end_before_any_work(options, capsys):
    with pytest.raises(SystemExit) as ended:
        serving.arguments(["compare", *options])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_aftermath_of_a_fault_is_what_the_log_holds():
    """Ten answers a second; at 10 s a fault of two seconds, in which every deadline is missed and the intent grows old."""
    log = DriveLog()
    log.now = lambda: 20.0  # type: ignore[method-assign]
    for tick in range(200):
        at_s = tick / 10
        if 10 <= at_s < 12:
            log.missed.append(at_s)
            continue
        log.met.append(at_s)
        old = 12 <= at_s < 15
        log.answers.append(RequestRecord(robot="a", at_s=at_s, latency_s=0.01, intent_age_steps=40 if old else 5))
    found = aftermath(log, 10.0, 20.0)
    assert found["requests/s before"] == pytest.approx(10, abs=0.3)
    assert found["lowest requests/s"] == 0
    assert found["seconds until the rate is back"] == pytest.approx(2, abs=0.1)
    assert found["longest silence of a robot, s"] == pytest.approx(2.1)
    assert found["misses before, %"] == 0
    assert found["misses after, %"] == pytest.approx(20, abs=1)
    assert found["seconds until the intent age is back"] == pytest.approx(5, abs=0.1)


def test_growth_is_counted_after_the_warm_up():
    grown = np.concatenate([np.full(10, 50.0), np.linspace(100, 110, 90)])
    assert growth(list(grown)) == pytest.approx(9, abs=1)
    assert growth([1.0] * 100) == 0
    assert growth([1.0]) is None
