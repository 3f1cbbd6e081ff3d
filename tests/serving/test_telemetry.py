"""Telemetry's laws: windows slide, snapshots add up, memory is bounded, and Prometheus sees what was measured."""

import asyncio
import json
import pickle
import random
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from libra_ray.control.disagreement import Replan
from libra_ray.on_ray.serving.engine import AGGREGATOR_NAME, RayEngine
from libra_ray.serving.fleet_snapshot import (
    HISTORY_S,
    LISTED_ROBOTS,
    RECENT_S,
    REQUESTS,
    SILENT_S,
    WINDOW_S,
    FleetAggregator,
    FleetSnapshot,
    SlidingCounts,
    rounded,
    summary,
)
from libra_ray.serving.metrics import EVENTS, LEVEL_MEASURES, MARGIN_STEPS, MEASURES, ROBOTS_CONNECTED
from libra_ray.serving.robot_sessions import CONNECTIONLESS_S, FORGET_S, MAX_NAME, RobotSessions
from libra_ray.serving.telemetry import ENOUGH, MAX_REASONS, Telemetry
from tests.serving.fleet_builders import LEVELS, MAX_ROBOTS, Clock, Gateway, busy_fleet, judged, one_request

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "libra_ray.json"
DEPLOYMENT = "MeasuredGateway"
ALL_METRICS = (*MEASURES.values(), *LEVEL_MEASURES.values(), *EVENTS.values(), MARGIN_STEPS, ROBOTS_CONNECTED)


def tick(gateway, robot="a", latency_s=0.02, *, age=3, held=False, missed=False):
    ages = {} if age is None else {"planner": (age, 0.05 * age)}
    gateway.tick(robot, latency_s=latency_s, batch_size=4, ages=ages, intent_age_steps=age, held=held, missed=missed)


def exported(metric):
    """The names of a metric's time series as Prometheus sees them: Ray puts its prefix before."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}[metric.kind]
    return {f"ray_{metric.name}{suffix}" for suffix in suffixes}


def settled(value):
    """Without the last digits of sums, which depend on their order."""
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [settled(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_rounding_keeps_a_value_within_eight_thousandths(value):
    assert rounded(value) == pytest.approx(value, rel=0.008)


def test_small_whole_numbers_stay_exact():
    assert [rounded(value) for value in range(129)] == list(range(129))


@given(st.lists(st.floats(min_value=1e-5, max_value=100), min_size=1, max_size=200))
def test_percentiles_are_those_of_the_values(values):
    counts = SlidingCounts()
    for value in values:
        counts.add(rounded(value))
    found = summary(counts.total, 1000)
    for p in (50, 95, 99):
        expected = 1000 * np.percentile(values, p, method="inverted_cdf")
        assert found[f"p{p}"] == pytest.approx(expected, rel=0.008)
    assert found["mean"] == pytest.approx(1000 * np.mean(values), rel=0.008)
    assert found["count"] == len(values)


@pytest.mark.parametrize(("per_s", "observed_per_s"), [(50, 50), (2000, 100)])
def test_histograms_get_a_share_of_many_ticks_and_the_page_all(monkeypatch, per_s, observed_per_s):
    clock, seconds, observed = Clock(), 5, []
    gateway = Gateway(clock=clock)
    monkeypatch.setitem(gateway._observe, "latency_s", lambda value, tags: observed.append(value))
    for second in range(seconds + 1):
        if second == 1:  # of the first nobody knows how many will come
            observed.clear()
        for _ in range(per_s):
            tick(gateway)
            clock.now += 1 / per_s
    assert len(observed) == pytest.approx(observed_per_s * seconds, rel=0 if per_s == observed_per_s else 0.25)
    assert gateway.snapshot().summary("latency_s")["count"] == per_s * (seconds + 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), max_size=60), st.integers(1, 12))
def test_a_window_holds_exactly_its_last_seconds(events, seconds):
    window, now, expected = SlidingCounts(seconds), 0, []
    for key, pause in events:
        window.advance(pause)
        now += pause
        window.add(key)
        expected.append((now, key))
    assert sorted(window.total.elements()) == sorted(key for at, key in expected if at > now - seconds)
    recent = window.recent(3)
    assert sorted(recent.elements()) == sorted(key for at, key in expected if now - min(3, seconds - 1) <= at < now)


def test_a_snapshot_speaks_of_the_last_minute():
    clock = Clock()
    gateway = Gateway(clock=clock)
    for _ in range(100):
        tick(gateway, latency_s=9.0, missed=True)
    clock.now += WINDOW_S + 1
    for _ in range(3):
        tick(gateway, latency_s=0.02)
    tick(gateway, latency_s=0.04, held=True)
    clock.now += 1
    told = gateway.snapshot().to_json()
    assert told["latency_ms"]["count"] == 4
    assert told["latency_ms"]["max"] == pytest.approx(40, rel=0.01)
    assert told["missed"] == {"count": 0, "share": 0}
    assert told["held"] == {"count": 1, "share": 0.25}
    assert told["requests_per_s"] == 4 / RECENT_S
    assert told["robots"][0]["requests"] == 104


def test_snapshots_of_gateways_add_up_to_one_gateways():
    """Whichever gateway a request goes to, the fleet's figures are the same."""
    clock, noise = Clock(), random.Random(1)
    alone, shared = (
        Gateway(clock=clock),
        [Gateway(clock=clock) for _ in range(3)],
    )
    for i in range(300):
        clock.now += 0.05
        seed = noise.random()
        for gateway in (alone, shared[i % 3]):
            one_request(gateway, f"robot-{i % 7}", random.Random(seed), late=False)
            gateway.refused("wrong shape")
            gateway.episode_ended(f"robot-{i % 7}", [True, False, None][i % 3])
    clock.now += 1
    merged = FleetSnapshot.merged([gateway.snapshot() for gateway in shared], time=5.0).to_json()
    expected = FleetSnapshot.merged([alone.snapshot()], time=5.0).to_json()
    assert merged.pop("gateways") == 3
    assert expected.pop("gateways") == 1
    assert [level["name"] for level in merged["levels"]] == list(LEVELS)
    assert merged["levels"][0]["intent_age_steps"]["count"] == 300
    smoothed = ("latency_ms", "connected_s", "intent_age_steps", "holding")
    for fleet in (merged, expected):
        fleet["robots"] = [{key: value for key, value in row.items() if key not in smoothed} for row in fleet["robots"]]
    assert settled(merged) == settled(expected)


def test_a_snapshot_travels_and_becomes_strict_json():
    fleet = busy_fleet(5, seconds=10)
    json.dumps(fleet.fleet(), allow_nan=False)
    json.dumps(Gateway().snapshot().to_json(), allow_nan=False)
    snapshot = Gateway().snapshot()
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot


def test_a_robot_that_leaves_is_forgotten_after_a_minute():
    clock = Clock()
    gateway = Gateway(clock=clock)
    gateway.robots.named("a", "old connection")
    tick(gateway)
    gateway.robots.named("a", "new connection")
    gateway.robots.left("old connection")
    assert gateway.snapshot().robots[0].connected, "it reconnected before the old connection was closed"
    gateway.robots.left("new connection")
    clock.now += 5
    left = gateway.snapshot().robots[0]
    assert (left.connected, left.silent_s, left.requests) == (False, 5, 1)
    clock.now += WINDOW_S
    assert gateway.snapshot().robots == ()
    gateway.connected("a")
    assert gateway.snapshot().robots[0].requests == 1, "it came back"
    gateway.disconnected("a")
    clock.now += FORGET_S + 1
    gateway.robots.tidy()
    gateway.connected("a")
    assert gateway.snapshot().robots[0].requests == 0


def test_a_robot_whose_levels_changed_is_there_as_long_as_its_connection():
    """Its counts stay, and it leaves with the connection that it had before."""
    gateway = Gateway()
    gateway.connected("a")
    tick(gateway)
    gateway.robots.begin_anew()
    [there] = gateway.snapshot().robots
    gateway.disconnected("a")
    [left] = gateway.snapshot().robots
    assert (there.connected, there.requests, left.connected) == (True, 1, False)


def test_a_robot_without_a_connection_is_there_as_long_as_it_asks():
    clock = Clock()
    gateway = Gateway(clock=clock)
    tick(gateway, "by-http")
    assert gateway.snapshot().robots[0].connected
    clock.now += CONNECTIONLESS_S
    assert not gateway.snapshot().robots[0].connected


def test_a_robot_that_changes_gateways_keeps_its_counts():
    clock = Clock()
    old, new = Gateway(clock=clock), Gateway(clock=clock)
    old.connected("a")
    tick(old, age=9)
    old.episode_ended("a", True)
    old.disconnected("a")
    clock.now += 2
    new.connected("a")
    tick(new, age=2)
    new.episode_ended("a", False)
    [row] = FleetSnapshot.merged([old.snapshot(), new.snapshot()], time=0.0).robots
    assert (row.connected, row.intent_age_steps, row.requests, row.judged, row.successes) == (True, 2, 2, 2, 1)
    assert row.to_json()["success_rate"] == 0.5


def test_made_up_names_and_reasons_do_not_fill_memory():
    gateway = Gateway()
    gateway.connected("honest")
    for i in range(MAX_ROBOTS + 100):
        tick(gateway, f"{i}" + "x" * 10_000)
        gateway.refused(f"reason {i}")
    snapshot = gateway.snapshot()
    assert len(snapshot.robots) <= MAX_ROBOTS
    assert max(len(row.name) for row in snapshot.robots) == MAX_NAME
    assert "honest" in {row.name for row in snapshot.robots}
    assert len(snapshot.refused) == MAX_REASONS + 1
    assert sum(snapshot.refused.values()) == MAX_ROBOTS + 100
    told = snapshot.to_json()
    assert len(told["robots"]) == LISTED_ROBOTS
    assert told["robots_not_listed"] == len(snapshot.robots) - LISTED_ROBOTS


def test_any_latency_needs_few_counters():
    gateway, noise = Gateway(), random.Random(0)
    for _ in range(20_000):
        tick(gateway, latency_s=noise.lognormvariate(-4, 1))
    assert len(gateway.snapshot().window[REQUESTS, "latency_s"]) < 1000


def test_a_level_is_judged_by_its_last_minute_and_never_by_little():
    clock = Clock()
    gateway = Gateway(clock=clock)
    for _ in range(ENOUGH - 1):
        gateway.intent("planner", 0.1)
        tick(gateway)
    assert gateway.latencies() == {}
    gateway.intent("planner", 0.1)
    gateway.call("planner", seconds=0.05, batch_size=4, queued=0)
    tick(gateway, latency_s=0.02)
    found = gateway.latencies()
    assert found["planner"].p95_ms == pytest.approx(100, rel=0.01)
    assert (found["planner"].robots, found["refiner"].p50_ms) == (4, pytest.approx(20, rel=0.01))
    clock.now += WINDOW_S + 1
    assert gateway.latencies() == {}


def test_of_several_gateways_the_least_margin_is_the_fleets():
    quick, slow = (Gateway() for _ in range(2))
    for _ in range(ENOUGH):
        quick.intent("planner", 0.01)
        slow.intent("planner", 0.2)
    snapshots = [gateway.snapshot(judged(gateway)) for gateway in (quick, slow, quick)]
    planner, refiner = FleetSnapshot.merged(snapshots, time=0.0).to_json()["levels"]
    assert planner["margin"]["steps"] == judged(slow)["planner"].margin_steps < judged(quick)["planner"].margin_steps
    assert planner["margin"]["text"] == judged(slow)["planner"].text
    assert refiner["margin"] is None, "no request was seen"


def test_a_reply_without_a_plan_has_no_age():
    gateway = Gateway()
    tick(gateway, age=None, held=True)
    told = gateway.snapshot().to_json()
    for level in told["levels"]:
        assert level["intent_age_steps"]["count"] == level["intent_age_s"]["count"] == 0
    assert told["robots"][0]["intent_age_steps"] is None
    assert told["robots"][0]["holding"]


def test_replans_are_told_level_by_level():
    clock = Clock()
    gateway = Gateway(clock=clock)
    for share in (0.0, 0.0, 0.0, 0.5):
        gateway.replanned([Replan(level="planner", value="tokens", share=share, difference=2 * share)])
    gateway.replanned([Replan(level="planner", value="pace", share=None, difference=0.25)])
    planner, refiner = gateway.snapshot().to_json()["levels"]
    assert (planner["replan_share"]["count"], planner["replan_share"]["mean"], planner["replan_share"]["p95"]) == (
        4,
        0.125,
        0.5,
    )
    assert (planner["replan_difference"]["count"], planner["replan_difference"]["max"]) == (5, 1.0)
    assert refiner["replan_share"]["count"] == refiner["replan_difference"]["count"] == 0
    clock.now += WINDOW_S + 1
    assert gateway.snapshot().to_json()["levels"][0]["replan_share"]["count"] == 0


def test_the_board_forgets_a_silent_gateway():
    clock = Clock()
    aggregator, gateways = FleetAggregator(clock), [Gateway(clock=clock) for _ in range(2)]
    for name, gateway in zip("ab", gateways, strict=True):
        gateway.connected(f"robot-{name}")
        aggregator.report(name, gateway.snapshot())
    assert aggregator.fleet()["gateways"] == 2
    clock.now += SILENT_S - 1
    aggregator.report("a", gateways[0].snapshot())
    clock.now += 1
    fleet = aggregator.fleet()
    assert (fleet["gateways"], fleet["robots_connected"]) == (1, 1)


def test_the_only_gateway_adds_up_by_itself():
    engine, gateway = RayEngine("a", "app", alone=True), Gateway()
    gateway.connected("robot-a")
    asyncio.run(engine.report(gateway.snapshot()))
    fleet = asyncio.run(engine.fleet())
    assert (fleet["gateways"], fleet["robots_connected"], len(fleet["history"])) == (1, 1, 1)


def test_the_history_is_bounded_and_in_order():
    clock = Clock()
    aggregator, gateway = FleetAggregator(clock), Gateway(clock=clock)
    for _ in range(HISTORY_S + 20):
        clock.now += 1
        for name in "ab":
            aggregator.report(name, gateway.snapshot())
    ages = [point["seconds_ago"] for point in aggregator.fleet()["history"]]
    assert ages == list(range(HISTORY_S - 1, -1, -1))


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def expressions(dashboard):
    """Every query of the dashboard, those of its variables included."""
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return panels + [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]


def metrics_in(expression):
    return set(re.findall(r"\bray_\w+", expression))


def test_the_dashboard_shows_every_metric_and_no_other(dashboard):
    named = {name for expression in expressions(dashboard) for name in metrics_in(expression)}
    shown = {name for metric in ALL_METRICS for name in exported(metric)}
    assert named <= shown
    assert [metric.name for metric in ALL_METRICS if not exported(metric) & named] == []


def test_every_query_of_the_dashboard_is_whole(dashboard):
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"] in {"s", "short", "reqps", "cps", "percentunit"}
        for target in [panel, *panel["targets"]]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert target["legendFormat"]
            assert target["expr"].count("(") == target["expr"].count(")")
            for metric in metrics_in(target["expr"]):
                assert f'{metric}{{application=~"$application", deployment=~"$deployment"' in target["expr"]
            assert ("histogram_quantile" in target["expr"]) <= ("sum by (le" in target["expr"])
    misses = next(panel for panel in dashboard["panels"] if panel["title"] == "Deadline misses")
    assert [step["value"] for step in misses["fieldConfig"]["defaults"]["thresholds"]["steps"]] == [None, 0.01, 0.05]


def test_no_panel_of_the_dashboard_lies_on_another(dashboard):
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert dashboard["schemaVersion"] >= 39


def gateway_actor(name, application="app", deployment=DEPLOYMENT):
    """A process that measures as a gateway replica of that application does, of whose levels one is late."""
    import ray

    slow = Gateway()
    for _ in range(ENOUGH):
        slow.intent("planner", 0.2)
    late = judged(slow)

    @ray.remote(num_cpus=0)
    class Measuring:  # in here, so that it travels by value: workers do not know the tests
        def __init__(self):
            self.telemetry, self.engine = Telemetry(deployment, RayEngine.register, LEVELS), RayEngine(name, application)
            self.robots = RobotSessions(lambda: None, 9)

        async def work(self):
            robot = self.robots.named(name, owner=self)
            marks = {"batch_size": 4, "intent_age_steps": 3, "held": True, "missed": True}
            for _ in range(3):
                self.telemetry.tick(robot.row, latency_s=0.02, ages={"planner": (3, 0.15)}, **marks)
            self.telemetry.call("planner", seconds=0.1, batch_size=2, queued=3)
            self.telemetry.intent("planner", 0.2)
            self.telemetry.call("refiner", seconds=0.01, batch_size=4, queued=0)
            self.telemetry.replanned([Replan(level="planner", value="tokens", share=0.04, difference=0.06)])
            self.telemetry.refused("wrong shape")
            self.telemetry.episode_ended(robot.row, True)
            return await self.say()

        async def say(self):
            """The fleet, as soon as an aggregator has heard of this gateway."""
            fleet = {"history": []}
            while not fleet["history"]:
                await self.engine.report(self.telemetry.snapshot(self.robots.rows(), late))
                fleet = await self.engine.fleet()
            return fleet

    return Measuring.remote()


@pytest.fixture(scope="module")
def metrics_address(ray_cluster):
    import ray

    [node] = ray.nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def samples(address):
    """What Prometheus would read: values by name and deployment's labels."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = [sample for family in families for sample in family.samples if sample.labels.get("deployment") == DEPLOYMENT]
    return {
        (s.name, *(s.labels[key] for key in ("level", "le", "reason", "outcome") if key in s.labels)): s.value for s in found
    }


def current_aggregator():
    """The aggregator that gateways find at present."""
    import ray

    try:
        return ray.get_actor(f"{AGGREGATOR_NAME}_app")
    except ValueError:
        return None


def test_a_fleet_is_the_robots_of_one_application(ray_cluster):
    """Two applications on one cluster have two pages, and nobody reads the other's robots there."""
    import ray

    # What was counted stays with its labels after its process: another test counts its own deployment.
    one, other = (gateway_actor(name, f"{name} of two", "elsewhere") for name in ("one", "other"))
    for gateway, name in ((one, "one"), (other, "other"), (one, "one")):
        fleet = ray.get(gateway.work.remote())
        assert (fleet["gateways"], [row["name"] for row in fleet["robots"]]) == (1, [name])
    for gateway in (one, other):
        ray.kill(gateway)


def test_gateways_share_an_aggregator_and_prometheus_sees_them(metrics_address):
    import ray

    first, second = (gateway_actor(name) for name in ("one", "two"))
    assert ray.get(first.say.remote())["gateways"] == 1
    fleet = ray.get(second.work.remote())
    while fleet["gateways"] < 2:  # on a busy machine the first is by now silent for so long that it counts as gone
        ray.get(first.say.remote())
        fleet = ray.get(second.say.remote())
    assert (fleet["gateways"], [row["name"] for row in fleet["robots"]]) == (2, ["two"])

    aggregator = ray.get_actor(f"{AGGREGATOR_NAME}_app")
    ray.kill(first)  # it had started the aggregator, which ends with it
    while current_aggregator() in (None, aggregator):
        ray.get(second.say.remote())
    fleet = ray.get(second.say.remote())
    assert (fleet["gateways"], [row["name"] for row in fleet["robots"]]) == (1, ["two"])

    expected = {name for metric in ALL_METRICS for name in exported(metric)}
    deadline = time.monotonic() + 60
    found = {}
    while not expected <= {name for name, *_ in found} and time.monotonic() < deadline:
        time.sleep(0.5)
        found = samples(metrics_address)
    assert expected - {name for name, *_ in found} == set()
    assert found["ray_libra_tick_latency_seconds_count",] == 3
    assert found["ray_libra_tick_latency_seconds_bucket", "0.015"] == 0
    assert found["ray_libra_tick_latency_seconds_bucket", "0.02"] == 3
    assert found["ray_libra_call_queue_bucket", "refiner", "0.5"] == 1
    assert found["ray_libra_call_queue_bucket", "planner", "0.5"] == 0
    assert found["ray_libra_intent_age_steps_count", "planner"] == 3
    assert found["ray_libra_intent_latency_seconds_count", "planner"] == 1
    assert found["ray_libra_margin_steps", "planner"] == 10 - 2 * 20, "16 steps late, taken up after 20"

    assert found["ray_libra_replan_share_bucket", "planner", "0.05"] == 1
    assert found["ray_libra_replan_share_bucket", "planner", "0.02"] == 0
    assert found["ray_libra_answered_requests_total",] == 3
    assert found["ray_libra_deadline_misses_total",] == found["ray_libra_held_actions_total",] == 3
    assert found["ray_libra_refused_requests_total", "wrong shape"] == 1
    assert found["ray_libra_episodes_total", "success"] == 1
    ray.kill(second)
