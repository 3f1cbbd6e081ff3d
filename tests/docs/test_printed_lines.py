"""Every line that README and docs print runs as printed, from a clone, and leaves what its page promises.

The clone's presets and sweeps are made small; nothing else of it is changed. `make test-docs` runs this; it takes some
minutes, needs the default ports of Ray, Serve and MLflow, and is no part of `make test`. To try some steps again, after
those whose results they need, keep the reader's home: `READER_HOME=/tmp/reader uv run pytest -n0 -m printed tests/docs -k
"step29 or step30"`; its clone is brought to this checkout's last commit.
"""

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.data.builders import make_images
from tests.docs.printed import ROOT
from tests.docs.steps import STEPS, Step
from tests.model import families, hugging_face

pytestmark = [pytest.mark.printed, pytest.mark.timeout(900)]
LIMIT_S = 600
READY_S = 120
SMALL = {
    "data.image_size": 32, "sim.supersample": 1, "sim.max_steps": 100, "record.episodes_per_task": 3, "record.episodes_of": (),
    "planner.width": 32, "planner.depth": 1, "refiner.width": 32, "refiner.depth": 1, "train.steps": 20,
    "train.batch_size": 16, "train.warmup_steps": 2, "train.log_every": 5, "train.checkpoint_every": 10,
    "train.validate_every": 10, "evaluate.episodes_per_task": 1, "evaluate.robots": 2, "evaluate.videos_per_task": 1,
}  # fmt: skip
"""What the clone's presets say instead."""
SMALL_TASKS = {
    "quickstart": ("reach-v3",), "published": ("reach-v3",), "mt10": ("reach-v3",), "tabletop": ("touch",),
    "debug": ("reach-v3",),
}  # fmt: skip
SMALL_SWEEP = "DEBUG_SIZE, SIZE = (2, 1), (2, 1)"


class Reader:
    """Somebody who has cloned the repository and pastes lines into a terminal."""

    def __init__(self, home: Path) -> None:
        self.home, self.clone, self.open = home, home / "libra_ray", []
        self.exported: Mapping[str, str] = {}
        # What a reader puts where a page says `your own`.
        self.own = {"/data/mine": home / "data", "/models/mine": home / "model", "/shared/runs": home / "shared"}

    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "PYTEST", "UV_RUN", "VIRTUAL_ENV"))
        }
        return kept | {"HOME": str(self.home), "UV_CACHE_DIR": self._cache, "LOGNAME": "reader"} | self.exported

    @property
    def _cache(self) -> str:
        return subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()

    def make_small_clone(self) -> None:
        if not self.clone.exists():
            subprocess.run(["git", "clone", "--quiet", ROOT, self.clone], check=True)
        for to_last_commit in (["fetch", "--quiet", "origin", "HEAD"], ["reset", "--quiet", "--hard", "FETCH_HEAD"]):
            subprocess.run(["git", *to_last_commit], cwd=self.clone, check=True)
        presets = next((self.clone / "libra_ray").rglob("presets.py"))
        small = {name: {**SMALL, "sim.tasks": tasks} for name, tasks in SMALL_TASKS.items()}
        presets.write_text(
            f"{presets.read_text()}\nfor _name, _changes in {small!r}.items():\n    PRESETS[_name].update(_changes)\n"
        )
        sweep = self.clone / "jobs" / "sweep.py"
        changed, found = re.subn(r"^DEBUG_SIZE, SIZE = .*$", SMALL_SWEEP, sweep.read_text(), flags=re.MULTILINE)
        assert found == 1
        sweep.write_text(changed)

    def typed(self, line: str, smaller: Mapping[str, str]) -> str:
        """The line with what a reader fills in."""
        for shown, put in {**{k: str(v) for k, v in self.own.items()}, **smaller}.items():
            line = line.replace(shown, put)
        return line

    def types(self, line: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run a line to its end."""
        return subprocess.run(
            ["bash", "-c", line], cwd=self.clone, env=self.environment(), capture_output=True, text=True, timeout=limit_s,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def leaves_running(self, line: str, address: str) -> str:
        """Run a line that serves until it is ended; what it answers at `address`."""
        log = (self.home / f"server-{len(self.open)}.log").open("w+")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=self.clone, env=self.environment(), stdout=log, stderr=log, process_group=0,
            preexec_fn=_hears_ctrl_c,
        )  # fmt: skip
        self.open.append(process)
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(address, timeout=2) as answer:
                    return answer.read().decode()
            except OSError:
                time.sleep(0.2)
        log.seek(0)
        raise AssertionError(f"nothing at {address}: {log.read()[-2000:]}")

    def closes_servers(self) -> None:
        """End what serves, as by Ctrl-C."""
        for process in self.open:
            os.killpg(process.pid, signal.SIGINT)
        for process in self.open:
            process.wait(60)
        self.open.clear()

    def leaves(self) -> None:
        """End the servers, and whatever a Ray head of this reader has started."""
        try:
            self.closes_servers()
        finally:
            mine = [p for p in psutil.process_iter() if _home_of(p) == str(self.home) and p.pid != os.getpid()]
            for process in mine:
                with suppress(psutil.Error):
                    process.terminate()
            for process in psutil.wait_procs(mine, timeout=20)[1]:
                with suppress(psutil.Error):
                    process.kill()


def _hears_ctrl_c() -> None:
    """As in a terminal: what is started in the background of a script would ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _home_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("HOME", "")
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    kept = os.environ.get("READER_HOME")
    reader = Reader(Path(kept).absolute() if kept else tmp_path_factory.mktemp("reader"))
    reader.make_small_clone()
    if not (reader.home / "data").exists():
        furnish(reader)
    yield reader
    reader.leaves()
    if not kept:
        shutil.rmtree(reader.clone / ".venv", ignore_errors=True)


def furnish(reader: Reader) -> None:
    """What a reader has besides the clone: a system, a picture, data sets and models of their own."""
    home = reader.home
    toy = (ROOT / "tests" / "systems" / "toy_system.py").read_text(encoding="utf-8")
    (reader.clone / "my_systems.py").write_text(f"{toy}\n\nMine = Toy\n", encoding="utf-8")
    picture = np.full((32, 32, 3), 7, np.uint8)
    make_images(home / "data", {"observation.image": picture}, lengths=(12, 12, 12))
    make_images(
        home / "two_cameras", {f"observation.images.{n}": picture for n in ("front", "wrist", "top")}, lengths=(12, 12, 12)
    )
    make_images(home / "renamed", {"image": picture}, lengths=(12, 12, 12), state="state", action="actions")
    families.write(home / "model", families.FAMILIES["llava"]())
    hugging_face.write_siglip(home / "encoder")
    Image.fromarray(picture).save(reader.clone / "picture.png")


def exported(steps: Sequence[Step]) -> dict[str, str]:
    """What their lines have put into the reader's shell."""
    exports = [step.line.removeprefix("export ") for step in steps if step.line.startswith("export ")]
    return dict(line.split("=", 1) for line in exports)


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[f"step{n}: {step.line[:100]}" for n, step in enumerate(STEPS)])
def test_a_printed_line_does_what_its_page_says(number: int, reader: Reader) -> None:
    step, reader.exported = STEPS[number], exported(STEPS[:number])
    for name in step.forgets:
        shutil.rmtree(reader.clone / name, ignore_errors=True)
    line = reader.typed(step.line, step.smaller)
    if line.startswith("export "):
        return
    if step.serves:
        assert reader.leaves_running(line, step.serves)
        return
    done = reader.types(line)
    deadline = time.monotonic() + READY_S
    while step.waits and done.returncode and time.monotonic() < deadline:
        done = reader.types(line)
    assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert re.search(step.says, done.stdout, re.MULTILINE), done.stdout[-2000:]
    for name in step.leaves:
        path = reader.home / name[2:] if name.startswith("~/") else reader.clone / name
        assert path.exists(), f"{line} left no {name}"
    if step.closes:
        reader.closes_servers()
