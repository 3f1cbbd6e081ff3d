"""The page in a real browser: everything on it loads, nothing is asked of the network, no text lies on another."""

import html
import json
import re
import shutil
import subprocess

import av
import numpy as np
import pytest

from libra_ray.config import preset
from libra_ray.report.page import VIDEO_BUDGET_BYTES, duration, encode_mp4, render_page
from libra_ray.report.run_report import write_report
from libra_ray.runs.results import RolloutVideo, TrainingLog
from tests.report import builders

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine; install it with: apt-get install chromium"
)

PROBE = """
<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message || event.target.tagName)), true);
addEventListener("load", () => {
  const overlaps = [];
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
    const boxes = texts.map(text => text.getBoundingClientRect());
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      const texts_meet = wide > 1 && high > 0.25 * Math.min(a.height, b.height);
      if (texts_meet) overlaps.push(texts[i].textContent + " / " + texts[j].textContent);
    }
  }
  const found = {
    problems, overlaps,
    videos: [...document.querySelectorAll("video")].map(video => ({
      ready: video.readyState, width: video.videoWidth, duration: video.duration, error: video.error && video.error.message,
      label: video.closest("figure").querySelector(".badge").textContent,
      border: getComputedStyle(video.closest("figure")).borderTopColor,
    })),
    plots: [...document.querySelectorAll("svg")].map(svg => svg.getAttribute("aria-label")),
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    page_width: document.documentElement.scrollWidth, window_width: innerWidth,
  };
  const script = document.createElement("pre");
  script.id = "found";
  script.textContent = JSON.stringify(found);
  document.body.append(script);
});
</script>
"""


def browse(folder, page_text, *, width):
    """What the probe finds on the page, opened in a window of `width` pixels."""
    path = folder / "probed.html"
    path.write_text(page_text.replace("<head>", "<head>" + PROBE, 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *flags, f"--window-size={width},1400", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a whole report with ten tasks, the most there are."""
    folder = tmp_path_factory.mktemp("report")
    config = preset("mt10")
    rollouts = builders.rollouts(config.sim.tasks, frames=20)
    write_report(folder, builders.report(config), rollouts, builders.training_log(steps=8000))
    return folder


@needs_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_everything_loads_and_nothing_overlaps(written, width):
    found = browse(written, (written / "report.html").read_text(), width=width)
    assert found["problems"] == []
    assert found["requests"] == []
    assert found["overlaps"] == []
    assert found["page_width"] <= found["window_width"]
    assert len(found["plots"]) == 9
    assert len(found["videos"]) == 15
    for video in found["videos"]:
        assert video["error"] is None
        assert video["ready"] >= 2
        assert video["width"] == 96
        assert video["duration"] == pytest.approx((20 + 16) / 20, abs=0.1)


@needs_browser
def test_failures_come_first_and_look_different(written):
    videos = browse(written, (written / "report.html").read_text(), width=1280)["videos"]
    labels = [video["label"] for video in videos]
    assert labels == ["failure"] * 5 + ["success"] * 10
    assert {video["border"] for video in videos[:5]}.isdisjoint(video["border"] for video in videos[5:])


@needs_browser
def test_the_probe_can_fail(tmp_path):
    video = '<figure><span class="badge"></span><video src="data:video/mp4;base64,AAAA"></video></figure>'
    texts = '<svg><text y="20">one</text><text y="20" x="3">two</text></svg>'
    found = browse(tmp_path, f"<html><head></head><body>{video}{texts}<script>missing()</script></body></html>", width=800)
    assert any("missing" in problem for problem in found["problems"])
    assert found["overlaps"] == ["two / one"]
    assert found["videos"][0]["ready"] == 0


def test_the_page_is_self_contained_and_small(written):
    page = (written / "report.html").read_text()
    assert len(page) < 6_000_000
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert links
    assert all(link.startswith(("data:", "#")) for pair in links for link in pair if link)
    assert "<script" not in page


def test_margins_are_shown_and_marked_where_a_level_is_too_late(written):
    page = (written / "report.html").read_text()
    for margin in builders.MARGINS:
        row = page.split(f'<tr><th scope="row">{margin.level}', 2)[1].split("</tr>")[0]
        assert f"{margin.margin_steps} of {margin.covers} steps" in row
        assert ('class="wrong"' in row) == (margin.margin_steps < 0)
        assert margin.remedy in row
    assert "15.5 robots a call" in page


def test_words_from_outside_are_escaped(written):
    page = (written / "report.html").read_text()
    assert "&amp; be &lt;careful&gt;" in page
    assert "<careful>" not in page


def test_phases_are_named_and_their_beginnings_marked():
    log = builders.training_log(switch=700)
    page = render_page(builders.report(log=log), [], log)
    assert "Phases: ground truth from step 20, sampled from step 700." in page
    assert "sampled from 700" in page
    never = builders.training_log(switch=99_999)
    page = render_page(builders.report(log=never), [], never)
    assert "Phases: ground truth from step 20." in page
    assert "from 20" not in page, "the beginning of all is no change"


def test_a_plot_without_data_is_left_out():
    page = render_page(builders.report(log=TrainingLog()), [], TrainingLog())
    assert "Nothing was logged" in page
    assert "No pictures were kept" in page


def test_rollouts_beyond_the_budget_are_counted():
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (240, 240, 3), dtype=np.uint8) for _ in range(20)]
    rollouts = [RolloutVideo(task="reach-v3", controller="policy", seed=seed, success=True, frames=frames) for seed in range(8)]
    assert len(encode_mp4(rollouts[0])) * len(rollouts) > VIDEO_BUDGET_BYTES
    page = render_page(builders.report(), rollouts, TrainingLog())
    shown = page.count("<video")
    assert 0 < shown < 8
    assert f"{8 - shown} more did not fit" in page
    assert len(page) < 6_000_000


def test_a_video_shows_the_frames(tmp_path):
    """Odd sizes too; colours survive the codec up to a few grey levels."""
    path = tmp_path / "rollout.mp4"
    frames = [np.full((65, 97, 3), (40 * i, 200 - 40 * i, 90), dtype=np.uint8) for i in range(5)]
    path.write_bytes(encode_mp4(RolloutVideo(task="t", controller="policy", seed=0, success=True, frames=frames, fps=10)))
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 5 + 8
    assert decoded[0].shape == (64, 96, 3)
    for shown, frame in zip(decoded, frames, strict=False):
        assert np.abs(shown.astype(int) - frame[:64, :96].astype(int)).mean() < 8


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (47.6, 59.7, 432, 3900)] == ["48 s", "1 min 00 s", "7 min 12 s", "1 h 05 min"]
