"""The live page in a real browser: it shows what `fleet.json` says, believes no robot's name, and notices a dead server."""

import html
import json
import re
import shutil
import subprocess

import pytest

from libra_ray.serving.page.live_page import fleet_page
from tests.serving.fleet_builders import UNPROTECTED, busy_fleet, page_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine; install it with: apt-get install chromium"
)

EVIL = (
    "<script>parent.hacked = 1</script>",
    "<img src=x onerror='parent.hacked = 1'>",
    "</li></ol><h1>gone</h1>",
    '" onmouseover="parent.hacked = 1',
    "&lt;b&gt; ${parent.hacked = 1}",
)
WIDTHS = {"wide": 1280, "narrow": 400, "three": 400, "empty": 400, "gone": 1280, "evil": 400, "never": 400, UNPROTECTED: 400}
WIDTHS |= {"one level": 400, "four levels": 1280}

# Each page in a frame of its own width; the frame's owner looks in, which the page's own policy would not let a script do.
PROBE = """
<body><script>
window.injected = [];
const look = (name, frame) => {
  const page = frame.contentDocument, seen = frame.contentWindow;
  const texts = selector => [...page.querySelectorAll(selector)].map(element => element.textContent);
  const injected = page.createElement("script");
  injected.textContent = `parent.injected.push("${name}")`;
  page.body.append(injected);
  const boxes = [...page.querySelectorAll(".card, figure, .legend, .pair, #state, h2, h3")];
  return {
    figures: Object.fromEntries([...page.querySelectorAll("#headlines .card")].map(card => [card.id,
      {value: card.children[1].textContent, note: card.children[2].textContent, alarm: card.classList.contains("alarm")}])),
    robots: [...page.querySelectorAll("#robots > li")].map(tile => ({
      name: tile.querySelector(".name").textContent, values: [...tile.querySelectorAll("b")].map(b => b.textContent),
      told: tile.querySelector(".told").textContent, state: tile.className,
      bar: Number(tile.querySelector("rect").getAttribute("width"))})),
    curves: Object.fromEntries([...page.querySelectorAll("#curves figure")].map(figure => [figure.id,
      [...figure.querySelectorAll("path")].map(path => path.getAttribute("d"))])),
    levels: [...page.querySelectorAll("#levels .card")].map(card => [card.querySelector("h3").textContent,
      [...card.querySelectorAll("b")].map(b => b.textContent)]), refused: texts("#refused")[0],
    late: texts("#late")[0], marked: texts("#levels .late h3"),
    notice: page.querySelector("#notice").hidden ? null : texts("#notice")[0], state: texts("#state")[0],
    nobody: !page.querySelector("#nobody").hidden, opacity: seen.getComputedStyle(page.querySelector("#content")).opacity,
    shown: seen.getComputedStyle(page.querySelector("#content")).visibility,
    foreign: texts("#robots script, #robots img, #robots h1, #robots *[onmouseover]").length,
    page_width: page.documentElement.scrollWidth, window_width: seen.innerWidth,
    spilled: boxes.filter(box => box.scrollWidth > box.clientWidth + 1 && box.clientWidth).map(box => box.textContent),
    requests: seen.performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
  };
};
const frames = Object.entries(WIDTHS).map(([name, width]) => {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.src = `/${encodeURIComponent(name)}/`;
  document.body.append(frame);
  return [name, frame];
});
setTimeout(() => {
  const found = Object.fromEntries(frames.map(([name, frame]) => [name, look(name, frame)]));
  setTimeout(() => {
    const pre = document.createElement("pre");
    pre.id = "found";
    pre.textContent = JSON.stringify({...found, hacked: window.hacked ?? null, injected});
    document.body.append(pre);
  }, 50);
}, 7000);
</script></body>
"""


@pytest.fixture(scope="module")
def fleets():
    """What the servers of the pages say."""
    evil = busy_fleet(len(EVIL), seconds=9).fleet()
    for robot, name in zip(evil["robots"], EVIL, strict=True):
        robot["name"], robot["metadata"] = name, {name: [name, name]}
    evil["refused"] = {"<img src=x onerror='parent.hacked = 1'>": 3}
    busy, three = busy_fleet(64).fleet(), busy_fleet(3).fleet()
    three["robots"][0]["holding"] = True
    three["robots"][1]["metadata"] = {"subgoals": ["touch the red block", "push the blue block to the left"], "sure": 0.5}
    return {
        "wide": [busy],
        "narrow": [busy],
        "three": [three],
        "empty": [busy_fleet(0).fleet()],
        "gone": [three, None],
        "evil": [evil],
        "never": [None],
        UNPROTECTED: [evil],
        "one level": [busy_fleet(3, levels=("policy",)).fleet()],
        "four levels": [busy_fleet(3, levels=("director", "planner", "sketcher", "refiner")).fleet()],
    }


@pytest.fixture(scope="module")
def seen(fleets, tmp_path_factory):
    """What a browser shows of each page after seven seconds (of its own clock, which runs ahead of ours)."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=9000"]
    flags.append(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    with page_server(fleets, PROBE.replace("WIDTHS", json.dumps(WIDTHS))) as address:
        command = [CHROMIUM, *flags, "--window-size=1400,900", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))


def first_number(text):
    return float(re.search(r"-?[\d,]*\.?\d+", text)[0].replace(",", ""))


def close(value):
    """As shown: with two to three digits."""
    return pytest.approx(value, rel=0.01, abs=0.006)


@pytest.mark.parametrize("page", ["wide", "narrow", "three"])
def test_the_key_figures_are_those_of_the_json(seen, fleets, page):
    fleet = fleets[page][0]
    figures = {name: figure["value"] for name, figure in seen[page]["figures"].items()}
    assert first_number(figures["figure-robots"]) == fleet["robots_connected"]
    assert first_number(figures["figure-success"]) == close(100 * fleet["episodes"]["success_rate"])
    assert first_number(figures["figure-requests"]) == close(fleet["requests_per_s"])
    assert first_number(figures["figure-latency"]) == close(fleet["latency_ms"]["p50"])
    assert first_number(figures["figure-missed"]) == close(100 * fleet["missed"]["share"])
    assert first_number(figures["figure-held"]) == close(100 * fleet["held"]["share"])
    assert f"p99 {fleet['latency_ms']['p99']:.1f}" in seen[page]["figures"]["figure-latency"]["note"]
    assert seen[page]["figures"]["figure-missed"]["alarm"] == (fleet["missed"]["share"] >= 0.01)


def test_a_robot_says_what_its_levels_say_to_people(seen):
    told = [robot["told"] for robot in seen["three"]["robots"]]
    assert told == ["", "subgoals: touch the red block, push the blue block to the left; sure: 0.5", ""]
    assert [robot["told"] for robot in seen["evil"]["robots"]] == [f"{name}: {name}, {name}" for name in EVIL]


def numbers(text):
    return [float(found.replace(",", "")) for found in re.findall(r"-?[\d,]+\.?\d*", text)]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("wide", ["planner", "refiner"]),
        ("one level", ["policy"]),
        ("four levels", ["director", "planner", "sketcher", "refiner"]),
    ],
)
def test_every_level_has_its_tile_with_the_numbers_of_the_json(seen, fleets, page, names):
    assert [name for name, _ in seen[page]["levels"]] == names
    for level, (_, (call, batch, waiting, ready, spare, age, share, difference)) in zip(
        fleets[page][0]["levels"], seen[page]["levels"], strict=True
    ):
        latency = level["intent_ready_ms"]
        assert numbers(ready) == [close(latency[mark]) for mark in ("p50", "p95", "p99") if latency["count"]]
        margin = level["margin"]
        assert numbers(spare) == ([margin["steps"], margin["covers"]] if margin else [])
        assert numbers(call) == [close(level["call_ms"][mark]) for mark in ("p50", "p95", "p99")]
        assert numbers(batch) == [close(level["batch_size"]["mean"])]
        assert numbers(waiting) == [close(level["queue"]["mean"])]
        ages = [level["intent_age_steps"][mark] for mark in ("p50", "p95", "p99")] if level["name"] != names[-1] else []
        assert numbers(age) == [close(value) for value in ages]
        above = level["name"] != names[-1]
        shares = [100 * level["replan_share"][mark] for mark in ("mean", "p95")] if above else []
        assert numbers(share.replace(", p95", "")) == [close(value) for value in shares]
        assert numbers(difference) == [close(level["replan_difference"][mark]) for mark in ("p50", "p95", "p99") if above]
    drawn = {curve: len(lines) for curve, lines in seen[page]["curves"].items()}
    assert drawn == {"curve-latency": 2, "curve-requests": 1, "curve-calls": len(names)} | (
        {"curve-age": len(names) - 1} if len(names) > 1 else {}
    )
    assert all(path.startswith("M") for lines in seen[page]["curves"].values() for path in lines)


@pytest.mark.parametrize("page", ["wide", "one level", "four levels", "empty"])
def test_levels_that_are_too_late_are_told_with_what_would_do(seen, fleets, page):
    late = [level for level in fleets[page][0]["levels"] if level["margin"] and level["margin"]["steps"] < 0]
    assert bool(late) == (page in ("wide", "four levels"))
    assert seen[page]["late"] == " ".join(f"Too late: {level['margin']['text']}." for level in late)
    assert seen[page]["marked"] == [level["name"] for level in late]


def test_refusals_are_told(seen):
    assert seen["wide"]["refused"] == "Refused requests since the start: wrong shape 2, not a number 1"


def test_every_robot_has_its_tile(seen, fleets):
    robots = fleets["wide"][0]["robots"]
    tiles = seen["wide"]["robots"]
    assert [tile["name"] for tile in tiles] == [robot["name"] for robot in robots]
    assert [tile["name"] for tile in tiles[:12]] == [f"robot-{i}" for i in range(12)]
    for tile, robot in zip(tiles, robots, strict=True):
        assert tile["state"] == ("" if robot["connected"] else "away")
        assert tile["bar"] == close(100 * robot["success_rate"])
        assert tile["values"][2] == f"{robot['successes']} of {robot['judged']}"
        assert first_number(tile["values"][1]) == robot["intent_age_steps"]
        assert first_number(tile["values"][0]) == (
            close(robot["latency_ms"]) if robot["connected"] else round(robot["silent_s"])
        )
    assert [tile["state"] for tile in tiles].count("away") == 1
    assert seen["three"]["robots"][0]["state"] == "holding"


def test_the_curves_end_at_the_present_values(seen, fleets):
    history = fleets["wide"][0]["history"]
    median, tail = seen["wide"]["curves"]["curve-latency"]
    top = 100.0  # of the drawing, where y grows downwards
    heights = [top - float(path.split()[-1]) for path in (median, tail)]
    ratio = history[-1]["latency_p99_ms"] / history[-1]["latency_p50_ms"]
    assert heights[1] / heights[0] == pytest.approx(ratio, rel=0.01)
    assert median.count("L") == sum(point["latency_p50_ms"] is not None for point in history) - 1


def test_an_empty_fleet_says_so(seen):
    empty = seen["empty"]
    assert empty["nobody"]
    assert empty["robots"] == []
    assert empty["figures"]["figure-latency"]["value"] == "–"
    assert empty["notice"] is None


@pytest.mark.parametrize("page", ["wide", "narrow", "three", "empty", "one level", "four levels"])
def test_nothing_spills_and_nobody_else_is_asked(seen, page):
    assert seen[page]["page_width"] <= seen[page]["window_width"] == WIDTHS[page]
    assert seen[page]["spilled"] == []
    assert {name.rsplit("/", 1)[1] for name in seen[page]["requests"]} == {"fleet.json"}
    assert len(seen[page]["requests"]) >= 3


def test_a_dead_server_is_noticed(seen, fleets):
    gone = seen["gone"]
    assert "No answer from the server since" in gone["notice"]
    assert gone["state"] == "no connection"
    assert float(gone["opacity"]) < 1
    assert len(gone["robots"]) == len(fleets["three"][0]["robots"])
    assert seen["three"]["notice"] is None
    assert seen["three"]["state"].startswith("live")


def test_a_server_that_never_answers_is_noticed(seen):
    assert "No answer from the server." in seen["never"]["notice"]
    assert seen["never"]["shown"] == "hidden"


def test_a_robot_cannot_run_a_script_by_its_name(seen):
    """Not even on a page without its policy, which would stop it too."""
    for page in ("evil", UNPROTECTED):
        assert [tile["name"] for tile in seen[page]["robots"]] == list(EVIL)
        assert seen[page]["refused"] == "Refused requests since the start: <img src=x onerror='parent.hacked = 1'> 3"
        assert seen[page]["foreign"] == 0
    assert seen["hacked"] is None


def test_the_policy_lets_no_other_script_run(seen):
    """Even one that somehow got into the page: the probe put one into each, and only the unprotected page ran it."""
    assert seen["injected"] == [UNPROTECTED]


def test_the_page_is_self_contained():
    page = fleet_page()
    assert len(page) < 40_000
    assert not re.findall(r'(?:src|href)="(?!data:|fleet\.json)|@import|url\(|%[A-Z]+%', page)
