"""`jobs/budget.py` as a user runs it, without an engine: to the end, again, interrupted, and given nonsense."""

import importlib
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from libra_ray.budget import answer, stopwatch
from libra_ray.budget.answer import PROFILE
from libra_ray.budget.records import BudgetReport, ComponentProfile, MeasuredSuccess
from libra_ray.common.json_text import read
from libra_ray.common.provenance import describe_hardware
from tests.budget.builders import MODELS, question
from tests.model.builders import save_checkpoint, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "run" / "checkpoint"
    save_checkpoint(folder, tiny_model({"control.rule": "overlap"}))
    return folder


def run(*argv: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["budget.py", *map(str, argv)])
        patch.setattr(stopwatch, "CALLS", 3)
        importlib.import_module("budget").main()


def test_it_measures_once_and_answers_every_budget(checkpoint, tmp_path, capsys):
    out = tmp_path / "budget"
    run(checkpoint, "--ms", 60_000, "--hz", 0.01, "--out", out)
    said, told = capsys.readouterr()
    assert "codec and transport" in told
    report = read(BudgetReport, out / "budget.json")
    assert (report.budget_ms, report.control_hz, report.rule, report.measured) == (60_000, 0.01, "overlap", False)
    assert report.proposal in report.candidates
    assert (report.proposal.denoising_steps, report.proposal.execute_steps) == (6, 5), "all fits: the checkpoint's own"
    assert "proposed: refiner.denoising_steps=6, control.execute_steps=5" in said
    for words in ("vision-language encoder", "planner head", "refiner context", "denoising step (each of 6)"):
        assert words in said
    for words in (
        "success was not measured, --episodes N does",
        "measured between two processes",
        "action.chunks=2; this needs",
    ):
        assert words in said
    assert ET.parse(out / "budget.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in out.iterdir()) == ["budget.json", "budget.svg", PROFILE], "nothing half-written"

    before = (out / PROFILE).read_bytes()
    run(checkpoint, "--ms", 1e-4, "--out", out)
    said, told = capsys.readouterr()
    assert told == "budget: measured already\n"
    assert (out / PROFILE).read_bytes() == before
    assert "nothing fits: the fastest takes" in said
    assert read(BudgetReport, out / "budget.json").proposal is None

    run(checkpoint, "--out", out, "--fresh")
    assert "kept the earlier" in capsys.readouterr().err
    assert (out.with_name("budget.old-1") / PROFILE).read_bytes() == before
    assert (out / PROFILE).read_bytes() != before


def test_success_is_measured_of_all_that_fits(checkpoint, monkeypatch):
    """The most executed steps win here: a setting that looks worse by its settings alone belongs on the measured front."""
    monkeypatch.setattr(answer, "models_of", lambda profile: MODELS)
    profile = ComponentProfile(
        digest="", system="libra", device="cpu", threads=1, jpeg=90, denoising_level="refiner", denoising_steps=6,
        denoising_setting="refiner.denoising_steps", most_steps=100, machine=describe_hardware(), components=[], calls={},
    )  # fmt: skip
    asked = []

    def success(found):
        asked.extend(found)
        rates = [c.execute_steps / 5 for c in found]
        return [
            replace(c, success=MeasuredSuccess(successes=0, episodes=1, rate=rate, low=rate, high=rate))
            for c, rate in zip(found, rates, strict=True)
        ]

    report = answer.answered_budget(checkpoint, question(robots=16, control={"execute_steps": 2}), profile, success)
    assert len(asked) == sum(c.fits for c in report.candidates) > 0
    most = max(c.execute_steps for c in asked)
    best = [c for c in report.candidates if c.front and c.execute_steps == most]
    assert [c.denoising_steps for c in best] == [1]
    assert report.proposal.execute_steps == most


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{tmp}/nowhere"], "is not a checkpoint"),
        (["{checkpoint}", "--ms", "0"], "--ms 0 is no time; give a number above 0"),
        (["{checkpoint}", "--ms", "soon"], "argument --ms: invalid float value: 'soon'"),
        (["{checkpoint}", "--hz", "nan"], "--hz nan is no rate"),
        (["{checkpoint}", "--robots", "0"], "--robots 0 must be at least 1"),
        (["{checkpoint}", "--committed", "4"], "control.committed_steps=4 is more than half of action.horizon=5"),
        (["{checkpoint}", "--committed", "-1"], "control.committed_steps"),
        (["{checkpoint}", "--rule", "never"], "choose from"),
        (["{checkpoint}", "--threads", "0"], "--threads 0 must be at least 1"),
        (["{checkpoint}", "--jpeg", "100"], "--jpeg 100 must be a quality from 1 to 95, or 0"),
        (["{checkpoint}", "--episodes", "0"], "--episodes 0 must be at least 1"),
        (["{checkpoint}", "--episodes", "1"], "checkpoint {checkpoint} is of another robot"),
        (["{checkpoint}", "--out", "{checkpoint}/config.json"], "cannot be made or written"),
        (["{checkpoint}", "--fresh", "--out", "{checkpoint}"], "{checkpoint} holds something else than a budget (config.json"),
        (["{checkpoint}", "--fresh", "--out", "{checkpoint}/.."], "holds something else than a budget (checkpoint"),
        ([], "CHECKPOINT"),
    ],
)
def test_nonsense_is_one_line_before_any_work(checkpoint, tmp_path, capsys, argv, said):
    places = {"tmp": tmp_path, "checkpoint": checkpoint}
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run(*(word.format(**places) for word in argv))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("budget.py: error: ")
    assert said.format(**places) in err
    assert [path for path in sorted(checkpoint.parent.rglob("*")) if path not in before and path.suffix != ".lock"] == []


def test_ctrl_c_is_one_line_and_ends_what_it_began(checkpoint, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "budget.py"), str(checkpoint), "--out", str(tmp_path / "budget")]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stderr.readline() == "budget: codec and transport\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *_, last = err.splitlines()
    assert last == "budget.py: interrupted; run the same command again to continue"
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "budget" / PROFILE).exists()


def test_a_profile_that_is_damaged_is_named(checkpoint, tmp_path, capsys):
    (tmp_path / "budget").mkdir()
    (tmp_path / "budget" / PROFILE).write_text(json.dumps({"digest": 5}))
    with pytest.raises(SystemExit):
        run(checkpoint, "--out", tmp_path / "budget")
    assert f"budget.py: error: {tmp_path}/budget/{PROFILE}: digest" in capsys.readouterr().err
