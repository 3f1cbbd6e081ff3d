"""The fleet against a server of the test's own: every count is what the server did, and a bad `LoadSpec` is refused at once."""

import asyncio
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from libra_ray.client.protocol import GOING_AWAY, Handshake, Reply, pack, unpack
from libra_ray.common.json_text import dump, read
from libra_ray.config import DelayConfig, SimConfig
from libra_ray.control.delays import open_delays
from libra_ray.fleet.log import DriveLog, FinishedEpisode, RequestRecord
from libra_ray.fleet.records import Rates
from libra_ray.fleet.replay import open_recording, synthetic
from libra_ray.fleet.robot import drive
from libra_ray.fleet.robots import MotionResult, PhysicsRobot
from libra_ray.fleet.run import SYNTHETIC, WRIST, DriveResult, LoadSpec, picture_size, run, simulation, table
from libra_ray.fleet.simulated import SimulatedFleet
from libra_ray.spec import VectorSpec
from libra_ray.stats.intervals import wilson
from libra_ray.types import IMAGE_KEY, STATE_KEY, Json, Level, Observation
from tests.data.builders import make_recorded
from tests.processes import command, family

H, D, S = 5, 4, 4
HANDSHAKE = Handshake(
    observation={IMAGE_KEY: {"dtype": "uint8", "shape": [16, 16, 3]}, STATE_KEY: {"dtype": "float32", "shape": [S]}},
    action={"dtype": "float32", "shape": [H, D]},
    control_hz=10, horizon=H, levels=(Level(name="policy", covers=5),), execute_steps=H, history=1, rule="overlap",
    checkpoint_digest="none", normalisation_digest="none", max_message_bytes=2**20, instructions=("a", "b"),
)  # fmt: skip


def echo(message: Json) -> Json:
    """The right answer of a server that sends identities back."""
    actions = np.zeros((H, D), np.float32)
    actions[:, 0] = message[STATE_KEY][0]
    return {
        "actions": actions,
        "first_step": int(message["step"]),
        "robot": message["robot"],
        "seq": message["seq"],
        "intent_age_steps": 3,
        "intent_age_ms": 30.0,
        "held": False,
        "server_timing": {"batch": 2.0},
    }


class StubServer:
    """A server in a thread, whose answers a function makes; it counts, hangs up and closes as it is told."""

    def __init__(self, answer: Callable[[Json], Json | str], *, delay_s: float = 0.0, hang_up_every: int = 0) -> None:
        self.answer, self.delay_s, self.hang_up_every = answer, delay_s, hang_up_every
        self.requests: list[Json] = []
        self.connections = 0
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def address(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        async with serve(self._handle, "127.0.0.1", 0, compression=None) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stop.wait()

    async def _handle(self, socket: ServerConnection) -> None:
        self.connections += 1
        try:
            await socket.send(pack(HANDSHAKE.message()))
            async for data in socket:
                message = unpack(data)
                self.requests.append(message)
                if self.hang_up_every and len(self.requests) % self.hang_up_every == 0:
                    await socket.close(GOING_AWAY)
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), self.delay_s)
                answer = self.answer(message)
                await socket.send(answer if isinstance(answer, str) else pack(answer))
        except ConnectionClosed:
            pass


@contextmanager
def serving(answer: Callable[[Json], Json | str] = echo, **options: float) -> Iterator[StubServer]:
    server = StubServer(answer, **options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


def stubs(server: StubServer, **changes: object) -> LoadSpec:
    return LoadSpec(**{"endpoint": server.address, "robots": 4, "hz": 20.0, "seconds": 1.0, "stub": SYNTHETIC, **changes})


def test_simulated_robots_see_as_the_demonstrations_robots_saw():
    load = LoadSpec(endpoint="ws://127.0.0.1:1", robots=1, hz=10, seconds=1, family="tabletop", tasks=("touch",))
    cameras = {IMAGE_KEY: HANDSHAKE.observation[IMAGE_KEY], WRIST: HANDSHAKE.observation[IMAGE_KEY]}
    server = replace(HANDSHAKE, observation=cameras, supersample=2)
    sim = simulation(load, server)
    assert (sim.family, sim.tasks, sim.supersample, sim.wrist_camera) == ("tabletop", ("touch",), 2, True)
    assert picture_size(server) == 16


def test_simulated_robots_are_not_driven_by_another_robots_policy(monkeypatch):
    load = {"stub": "", "family": "tabletop", "tasks": ("touch",), "robots": 1}
    with serving() as server:
        monkeypatch.setitem(HANDSHAKE.action, "spec", VectorSpec(delta=False).tree())
        said = r"policy at ws:.* of another robot .*=tabletop: action values absolute \(simulator: delta\); give --family"
        with pytest.raises(ValueError, match=said):
            asyncio.run(run(stubs(server, **load)))
        assert server.requests == []


def test_all_is_well_where_the_server_answers_at_once():
    with serving() as server:
        result = asyncio.run(run(stubs(server, echo=True)))
    deadlines = result.deadlines
    assert result.wrong_robot == 0
    assert result.errors == {}
    assert result.reconnects == 0
    assert deadlines.due >= 20
    assert 0 <= deadlines.missed < deadlines.due  # a loaded machine may be late; of a server that is, see below
    answered = round(result.chunk_requests_per_s * result.seconds)
    assert 0 <= len(server.requests) - answered <= 8  # those under way at the end
    assert result.actions_per_s == pytest.approx(H * result.chunk_requests_per_s, rel=0.1)
    assert result.intent_age_steps.p50 == 3
    assert result.mean_batch == 2
    assert result.server["horizon"] == H
    assert result.driver_lateness_ms.p99 is not None
    assert {m["robot"] for m in server.requests} == {f"robot-{i:04d}" for i in range(4)}
    written = json.loads(dump(result))
    assert written["rates"]["chunk_requests_hz_per_robot"] == 20
    assert {"order", "server", "timeline", "hardware"} < set(written)
    assert "physics_cpu_share" not in written
    assert "wrong-robot replies" in table(result)


def test_robots_ask_at_the_given_rate_and_no_faster():
    with serving() as server:
        result = asyncio.run(run(stubs(server, robots=2, hz=10.0)))
        by_rate = len(server.requests)
        asyncio.run(run(stubs(server, robots=2, hz=0.0, seconds=0.5)))
    assert by_rate <= 2 * 11
    assert result.deadlines.due <= 2 * 11
    assert len(server.requests) - by_rate > 4 * by_rate


def test_an_answer_for_another_robot_counts_as_wrong_whatever_it_says():
    def swapped_name(message: Json) -> Json:
        return echo(message) | {"robot": "robot-9999"}

    def swapped_content(message: Json) -> Json:
        return echo({**message, STATE_KEY: -message[STATE_KEY]}) | {"robot": message["robot"]}

    for swap in (swapped_name, swapped_content):
        with serving(swap) as server:
            result = asyncio.run(run(stubs(server, echo=True, robots=2, seconds=0.6)))
        assert result.wrong_robot > 0
        assert result.actions_per_s == 0  # nothing of it is executed
        assert result.deadlines.missed > 0


def test_a_server_that_sleeps_misses_every_deadline_that_goes_by():
    with serving(delay_s=0.26) as server:
        result = asyncio.run(run(stubs(server, robots=2, hz=10.0, seconds=1.2)))
    deadlines = result.deadlines
    assert deadlines.missed == deadlines.due
    # 0.26 s are two whole periods beyond the deadline of 0.1 s: waiting robots do not hide them.
    assert deadlines.missed >= 2 * len(server.requests) - 4
    assert result.latency_ms.p50 >= 260


def test_a_server_that_hangs_is_not_one_that_was_not_asked():
    with serving(delay_s=60) as server:
        result = asyncio.run(run(stubs(server, robots=2, hz=10.0, seconds=1.0)))
    assert result.chunk_requests_per_s == 0
    assert result.deadlines.missed >= 10


def test_robots_come_back_when_the_gateway_goes():
    with serving(hang_up_every=15) as server:
        result = asyncio.run(run(stubs(server)))
    assert result.reconnects >= 3
    assert result.errors == {}
    assert result.deadlines.due - result.deadlines.missed > 10


def test_refusals_are_counted_with_the_servers_words():
    with serving(lambda _: "observation.state must be 9 numbers") as server:
        result = asyncio.run(run(stubs(server, robots=1, seconds=0.5)))
    assert result.errors["refused"] >= 1
    assert result.error_examples["refused"] == "observation.state must be 9 numbers"
    assert "must be 9 numbers" in table(result)


def test_a_missing_and_a_vanished_server_are_one_clear_error():
    with serving() as server:
        load = stubs(server, patience_s=0.3, seconds=600.0)
        threading.Timer(0.7, server.close).start()
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=r"no server at ws://127\.0\.0\.1"):
            asyncio.run(run(load))
        assert time.monotonic() - began < load.seconds
    with pytest.raises(ConnectionError, match="no server at"):
        asyncio.run(run(load))


class FallingRobot:
    """A robot that counts its control steps and ends after a few; what it was told to do is kept."""

    task = "fall"

    def __init__(self, steps: int) -> None:
        self.steps, self.actions = steps, []

    async def begin(self) -> MotionResult:
        self.at = 0
        return self._motion(0)

    async def execute(self, actions: np.ndarray) -> MotionResult:
        executed = min(len(actions), self.steps - self.at)
        self.actions += list(actions[:executed])
        self.at += executed
        return self._motion(executed)

    def _motion(self, executed: int) -> MotionResult:
        observation = Observation(images={}, state=np.zeros(S, np.float32), instruction="", step=self.at)
        return MotionResult(observation=observation, executed=executed, success=True if self.at >= self.steps else None)


class SlowEndpoint:
    """Answers after a while with actions that name their own step, from 1 on."""

    reconnects = 0

    def __init__(self, delay_s: float) -> None:
        self.delay_s, self.extras = delay_s, []

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def act(self, observation: Observation, **extra: object) -> Reply:
        self.extras.append(extra)
        await asyncio.sleep(self.delay_s)
        numbers = 1 + np.arange(observation.step, observation.step + H, dtype=np.float32)
        return Reply(actions=np.stack([numbers] * D, axis=1), first_step=observation.step, robot="r")


@pytest.mark.parametrize("delay_s", [0.25, 0.1 * H + 0.15])
def test_a_simulated_robot_holds_still_until_its_late_chunk_and_goes_on_at_the_right_step(delay_s):
    """Before its first chunk it stands where it was when it asked: that one is used from its beginning, however late it is."""
    simulated, endpoint, log = FallingRobot(steps=40), SlowEndpoint(delay_s), DriveLog()
    robot = PhysicsRobot(name="r", client=endpoint, log=log, simulated=simulated, period_s=0.1, execute_steps=H, action_dim=D)
    asyncio.run(drive([robot], 2.0))
    executed = np.stack(simulated.actions)
    still = executed[:, 0] == 0
    awaited = np.flatnonzero(~still)[0]
    assert awaited == sum(n for _, n in log.awaited)
    np.testing.assert_array_equal(executed[awaited : awaited + H, 0], 1 + np.arange(H))
    # What is not held is the action of that very step, counted from the first action.
    steps = 1 + np.arange(len(executed)) - awaited
    np.testing.assert_array_equal(executed[~still, 0], steps[~still])
    assert len(log.missed) >= 2 * 2
    assert not log.met
    assert sum(n for _, n in log.held) == still.sum()
    # The gripper stays as the last fresh action had it.
    held_later = np.flatnonzero(still & (np.arange(len(executed)) > awaited))
    assert len(held_later)
    assert (executed[held_later, -1] > 0).all()


def test_a_simulated_robot_goes_on_with_its_chunk_while_the_next_one_comes():
    """Only before its first chunk does it hold; afterwards every step has the action of that very step."""
    simulated, endpoint, log = FallingRobot(steps=40), SlowEndpoint(0.25), DriveLog()
    robot = PhysicsRobot(
        name="r", client=endpoint, log=log, simulated=simulated, period_s=0.2, execute_steps=H - 2, action_dim=D, lifetime_s=3.0
    )
    asyncio.run(drive([robot], 4))
    executed = np.stack(simulated.actions)[:, 0]
    first = np.flatnonzero(executed)[0]
    np.testing.assert_array_equal(executed[first:], 1 + np.arange(len(executed) - first))
    assert len(executed) > 2 * H
    assert len(log.missed) == first
    assert len(log.met) >= 2


def test_a_simulated_robot_uses_what_is_left_of_a_chunk_that_is_later_than_what_it_executes():
    simulated, log = FallingRobot(steps=40), DriveLog()
    robot = PhysicsRobot(
        name="r", client=SlowEndpoint(0.25), log=log, simulated=simulated, period_s=0.1, execute_steps=1, action_dim=D,
        lifetime_s=2.0,
    )  # fmt: skip
    asyncio.run(drive([robot], 4))
    executed = np.stack(simulated.actions)[:, 0]
    first = np.flatnonzero(executed)[0]
    moved = executed[first:] > 0
    np.testing.assert_array_equal(executed[first:][moved], (1 + np.arange(len(moved)))[moved])
    assert moved.mean() > 0.8, "H steps of every answer, of which three are late"


def test_an_episode_begins_until_it_is_answered():
    class Deaf(SlowEndpoint):
        async def act(self, observation: Observation, **extra: object) -> Reply:
            reply = await super().act(observation, **extra)
            if len(self.extras) < 3:
                raise TimeoutError
            return reply

    simulated, endpoint, log = FallingRobot(steps=40), Deaf(0.0), DriveLog()
    robot = PhysicsRobot(
        name="r", client=endpoint, log=log, simulated=simulated, period_s=0.1, execute_steps=H, action_dim=D, lifetime_s=1.5
    )
    asyncio.run(drive([robot], 2.0))
    assert [extra.get("reset", False) for extra in endpoint.extras[:4]] == [True, True, True, False]
    executed = np.stack(simulated.actions)[:, 0]
    assert np.flatnonzero(executed)[0] == sum(n for _, n in log.awaited)
    assert executed[executed > 0][0] == 1


def test_the_log_is_a_trace_of_every_levels_latency():
    """An intent that several answers follow counts once; the last level's latencies are what the robot saw."""
    log = DriveLog(levels=["planner", "refiner"])
    for robot, at_s, planner_ms in [("a", 0.5, 9.0), ("a", 1.0, 80.0), ("b", 1.1, 81.0), ("a", 1.5, 80.0), ("a", 2.0, 90.0)]:
        reply = Reply(actions=np.zeros((H, D), np.float32), first_step=0, robot=robot, server_timing={"planner_ms": planner_ms})
        log.answers.append(RequestRecord.of(robot, at_s, 0.01, reply, log.levels[:-1]))
    assert log.level_latencies_ms(after_s=0.9) == {"planner": [80.0, 81.0, 90.0], "refiner": [10.0] * 4}


def test_a_simulated_robot_that_is_told_to_hold_asks_again_at_its_next_step():
    class Holding(SlowEndpoint):
        async def act(self, observation: Observation, **extra: object) -> Reply:
            return replace(await super().act(observation, **extra), held=observation.step < 3)

    simulated, log = FallingRobot(steps=8), DriveLog()
    robot = PhysicsRobot(
        name="r", client=Holding(0.0), log=log, simulated=simulated, period_s=0.1, execute_steps=H, action_dim=D, lifetime_s=1.0
    )
    asyncio.run(drive([robot], 1.5))
    assert [a[0] for a in simulated.actions[:8]] == list(range(1, 9))
    assert [n for _, n in log.held[:2]] == [1, 2], "twice as long where it is told so again"
    assert log.fresh[0][1] == H


def test_a_stub_robot_that_is_told_to_hold_asks_again_at_its_next_step():
    """Its clock goes on, so that no server takes a later chunk for the beginning of an episode."""

    def sometimes_held(message: Json) -> Json:
        return echo(message) | {"held": len(server.requests) in (2, 3)}

    with serving(sometimes_held) as server:
        asyncio.run(run(stubs(server, robots=1, hz=2.0, seconds=2.6)))
    steps = [message["step"] for message in server.requests[:5]]
    first, second, third, fourth = np.diff(steps)
    assert steps[0] == 0
    assert (first, fourth) == (H, H), "whole chunks where nothing is held"
    assert 1 <= second < H
    assert 1 <= third < H


def test_episodes_begin_with_a_reset_and_tell_how_the_last_one_went():
    simulated, endpoint, log = FallingRobot(steps=7), SlowEndpoint(0.0), DriveLog()
    robot = PhysicsRobot(name="r", client=endpoint, log=log, simulated=simulated, period_s=0.02, execute_steps=H, action_dim=D)
    asyncio.run(drive([robot], 0.6))
    beginnings = [extra for extra in endpoint.extras if extra.get("reset")]
    assert beginnings[0] == {"reset": True}
    assert len(beginnings) >= 2
    assert all(extra == {"reset": True, "success": True} for extra in beginnings[1:])
    assert endpoint.extras[1] == {}
    assert len(log.episodes) in (len(beginnings), len(beginnings) - 1)


def test_success_has_the_interval_of_wilson():
    log = DriveLog()
    log.episodes = [FinishedEpisode(task=task, success=ok, at_s=0.0) for task, ok in (("a", True), ("a", False), ("b", True))]
    found, interval = log.summary().success, wilson(2, 3)
    assert found.interval == (interval.low, interval.high)
    assert found.tasks["a"].rate == 0.5


def test_the_timeline_holds_what_the_summary_counts():
    with serving() as server:
        result = asyncio.run(run(stubs(server, warmup_s=0.0)))
    rows = result.timeline
    in_span = round(result.chunk_requests_per_s * result.seconds)
    assert in_span <= sum(row.chunk_requests_per_s for row in rows) <= len(server.requests)
    assert sum(row.missed for row in rows) >= result.deadlines.missed


def test_no_two_stub_robots_look_alike():
    shown = [next(synthetic(HANDSHAKE, robot)).observation for robot in range(64)]
    assert len({o.state.tobytes() for o in shown}) == 64
    assert len({o.images[IMAGE_KEY].tobytes() for o in shown}) == 64


def test_a_data_set_is_replayed_in_the_order_it_was_recorded(tmp_path, monkeypatch):
    data = make_recorded([12, 9, 15], ["open it", "push it", "open it"])
    pictures = np.arange(len(data), dtype=np.uint8)[None, :, None, None, None] * np.ones((1, 1, 16, 16, 3), np.uint8)
    monkeypatch.setattr("libra_ray.fleet.replay.open_dataset", lambda root, settings, state_dim: data)
    monkeypatch.setattr("libra_ray.fleet.replay.frame_cache", lambda *_: pictures)
    seen = list(islice(open_recording(HANDSHAKE, tmp_path).robot(1, 2), 5))
    assert [s.observation.step for s in seen] == [0, 5, 0, 5, 10]  # episode 1 of 9 frames, then episode 3, which is 0 again
    assert [s.begins for s in seen] == [True, False, True, False, False]
    np.testing.assert_array_equal(seen[1].observation.state, data.state[12 + 5])
    assert (seen[1].observation.images[IMAGE_KEY] == 12 + 5).all()
    assert seen[0].observation.instruction == "push it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"robots": 0}, "robots=0 is out of range"),
        ({"hz": -1.0}, "hz=-1"),
        ({"seconds": 0.0}, "seconds=0"),
        ({"stub": "/no/such/folder"}, "is no folder"),
        ({"stub": "", "family": "tabletop", "tasks": ("juggle",)}, "unknown tabletop task 'juggle'"),
        ({"tasks": ("drawer-open-v3",)}, "no tasks"),
        ({"stub": "", "echo": True}, "--stub synthetic"),
        ({"jpeg_quality": 200}, "jpeg_quality=200"),
        ({"endpoint": "http://127.0.0.1:1"}, "write ws://host:port"),
    ],
)
def test_orders_that_cannot_be_driven_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        LoadSpec(**{"endpoint": "ws://127.0.0.1:1", "stub": SYNTHETIC, **changes})


@pytest.fixture
def job(monkeypatch):
    """`jobs/drive.py` with these arguments, in this process."""
    import drive as module

    def call(*options: object) -> None:
        monkeypatch.setattr(sys, "argv", ["drive.py", *map(str, options)])
        module.main()

    return call


def test_the_job_drives_simulated_robots_in_their_own_processes(job, tmp_path, capsys):
    out = tmp_path / "drive.json"
    robots = ["--robots", 2, "--hz", 20, "--seconds", 1.5, "--family", "tabletop", "--tasks", "touch", "--max-steps", 15]
    with serving() as server:
        job(server.address, *robots, "--out", out)
    result = read(DriveResult, out)
    assert result.success.tasks["touch"].episodes >= 1  # cut off after 15 steps
    assert result.rates == Rates(control_hz=20, chunk_requests_hz_per_robot=4)
    assert result.physics_cpu_share > 0
    assert result.level_latencies_ms
    levels = [Level(name=name, covers=5) for name in result.level_latencies_ms]
    assert open_delays(DelayConfig(trace=str(out)), levels, control_hz=20).measured.keys() == result.level_latencies_ms.keys()
    picture = server.requests[0][IMAGE_KEY]
    assert picture.shape == (16, 16, 3)
    assert picture.std() > 5
    assert [m["step"] for m in server.requests if m["robot"] == "robot-0000"][:3] == [0, 5, 10]
    assert "success" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no server at ws://127.0.0.1:1"),
        (["--robots", 0], "robots=0 is out of range"),
        (["--out", "/no/such/folder/a.json"], "folder does not exist"),
        (["--out", "/tmp"], "is a folder itself"),
        (["--robot", 3], "unrecognized arguments: --robot"),
    ],
)
def test_the_job_refuses_in_one_line(job, capsys, options, words):
    with pytest.raises(SystemExit) as ended:
        job("127.0.0.1:1", "--stub", SYNTHETIC, "--patience", 0.2, *options)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert said.startswith("drive.py: error: ")
    assert words in said


def test_interrupted_while_still_importing(job, capsys, monkeypatch):
    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == "libra_ray.fleet.run":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "libra_ray.fleet.run")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        job("127.0.0.1:1", "--stub", SYNTHETIC)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "drive.py: interrupted\n"


def test_simulators_never_hear_ctrl_c_nor_while_they_start():
    """A terminal sends it to all of them; their tracebacks would stand beside the driver's one line."""
    below = set(family(os.getpid()))
    with SimulatedFleet(SimConfig(family="tabletop", tasks=("touch",)), 64, ["touch"], 1, processes=1):
        started = [pid for pid in family(os.getpid()) if pid not in below and "spawn_main" in command(pid)]
        masks = [re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1] for pid in started]
    assert [bool(int(mask, 16) & 1 << (signal.SIGINT - 1)) for mask in masks] == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the driver hears it"
