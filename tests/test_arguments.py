"""The command line: complete help, one source of names, mistakes that are one helpful line."""

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import budget
import drive
import join
import pytest
from arguments import Arguments, parse, set_aside

from libra_ray.config import PRESETS, Config, override, preset, to_json
from libra_ray.config.docstrings import docstrings
from libra_ray.config.overrides import flatten, leaf_types
from libra_ray.config.paths import PLACES

JOBS = Path(__file__).parents[1] / "jobs"


def _parse(*argv: str) -> Arguments:
    return parse(argv, "Do it.", stage="train")


def _mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        _parse(*argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, "one line"
    assert err.startswith("train.py: error: ")
    return err


def test_without_arguments_it_is_the_quickstart():
    arguments = _parse()
    assert arguments.config == preset("quickstart")
    assert arguments.run_dir == Path("runs/quickstart")
    assert not arguments.fresh


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_by_position(name):
    assert _parse(name).config == preset(name)
    assert _parse("--runs", "/shared", name).run_dir == Path("/shared") / name


def test_every_setting_of_the_configuration_is_an_option():
    wanted = {name: value for name, value in flatten(preset("debug")).items() if name != "preset"}
    wanted |= {
        "planner.see_state": False,
        "refiner.vision": "shared",
        "train.lr": 2e-4,
        "evaluate.controllers": ("expert", "policy"),
    }
    argv = [f"--{name}=" + (",".join(value) if isinstance(value, tuple) else str(value)) for name, value in wanted.items()]
    assert _parse("quickstart", *argv).config == override(preset("quickstart"), wanted)


@pytest.mark.parametrize("argv", [["--train.steps", "7"], ["--train.steps=7"], ["--train.steps=3", "--train.steps=7"]])
def test_an_override_changes_that_value_only(argv):
    assert _parse("debug", *argv).config == override(preset("debug"), {"train.steps": 7})


def test_negative_numbers_are_values():
    assert _parse("--ray.max_failures", "-1").config.ray.max_failures == -1


def test_a_file_is_applied_before_the_command_line(tmp_path):
    file = tmp_path / "best.yaml"
    file.write_text("train.lr: 3e-4\ntrain:\n  steps: 9\n  batch_size: 8\nsim.tasks: [reach-v3, push-v3]\n")
    config = _parse("debug", "--config", str(file), "--train.steps=7").config
    expected = {"train.lr": 3e-4, "train.steps": 7, "train.batch_size": 8, "sim.tasks": ("reach-v3", "push-v3")}
    assert config == override(preset("debug"), expected)


def test_the_home_folder_is_meant_wherever_a_place_is_typed(tmp_path, monkeypatch, capsys):
    """Shells leave `~` where it is in `--runs=~/runs`; nobody means a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("train.steps: 9")
    given = _parse("--runs=~/runs", "--config=~/mine.yaml", "--data.root=~/d")
    assert (given.run_dir.parent, given.config.train.steps) == (tmp_path / "runs", 9)
    assert given.config.data.root == str(tmp_path / "d")
    asked = budget.parser().parse_args(["~/c", "--out=~/b"])
    assert (asked.checkpoint, asked.out) == (tmp_path / "c", tmp_path / "b")
    driven = drive.parser().parse_args(["ws://h:1", "--stub=~/d", "--out=~/o"])
    assert (driven.stub, driven.out) == (str(tmp_path / "d"), tmp_path / "o")
    assert drive.parser().parse_args(["ws://h:1"]).stub == ""
    assert join.folders(["planner=~/p"]) == {"planner": tmp_path / "p"}
    assert "~nobody.here/runs" in _mistake(capsys, "--runs=~nobody.here/runs")


def test_a_runs_stored_configuration_can_be_run_again(tmp_path):
    config = override(preset("debug"), {"refiner.depth": 2})
    (tmp_path / "config.json").write_text(to_json(config))
    assert _parse("--config", str(tmp_path / "config.json")).config == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.stepz", "5"], ["train.stepz", "train.steps"]),
        (["--steps=5"], ["train.steps"]),
        (["--train.step=5"], ["train.steps"]),  # no abbreviations
        (["--frsh"], ["--fresh"]),
        (["--preset", "debug"], ["`train.py quickstart`"]),
        (["debgu"], ["debgu", "debug", "mt10", "quickstart"]),
        (["--train.steps", "many"], ["train.steps", "many", "int"]),
        (["--train.steps"], ["--train.steps"]),
        (["--refiner.vision=eyes"], ["own", "shared"]),
        (["--train.steps=0"], ["train.steps", "at least 1"]),
        (["debug", "extra"], ["extra"]),
        (["--name=../elsewhere"], ["--name"]),
        (["--config=/does/not/exist.yaml"], ["/does/not/exist.yaml", "No such file"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_valid(argv, words, capsys):
    message = _mistake(capsys, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text",
    [
        "train.stepz: 1",
        "- a list",
        "{",
        "train: {steps: x}",
        "1: 2",
        "train: {1: 2}",
        "train.steps: .inf",
        "sim.tasks:",
        "sim: {tasks: 5}",
        "preset: [debug]",
        "tracking: {registered_model: team/libra}",
        "# caf\xe9",
    ],
)
def test_a_mistake_in_a_file_is_one_line_too(text, tmp_path, capsys):
    (tmp_path / "best.yaml").write_text(text, encoding="latin-1")
    _mistake(capsys, f"--config={tmp_path / 'best.yaml'}")


def _help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        _parse(*argv, "--help")
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_every_setting_with_its_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = _help(capsys)
    names = [name for name in leaf_types(Config) if "." in name]
    assert [name for name in names if f"--{name} " not in text] == []
    documented = docstrings(Config)
    assert documented["data.image_size"].startswith("Height and width of the pictures as models read them")
    assert [name for name, said in documented.items() if said not in text] == []
    assert "{own,shared}" in text


def test_help_shows_the_chosen_presets_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert f"(default: {preset('debug').train.steps})" in _help(capsys, "debug").partition("--train.steps")[2][:120]
    assert f"(default: {preset('mt10').train.steps})" in _help(capsys, "mt10").partition("--train.steps")[2][:120]


def test_fresh_keeps_the_earlier_run(tmp_path):
    for number in (1, 2):
        arguments = _parse("debug", "--runs", str(tmp_path), "--fresh")
        folder = arguments.prepare()
        assert list(folder.iterdir()) == []
        (folder / "report.json").write_text(str(number))
    assert (tmp_path / "debug.old-1" / "report.json").read_text() == "1"
    assert (tmp_path / "debug" / "report.json").read_text() == "2"


def test_fresh_may_be_about_one_product_only(tmp_path):
    arguments = _parse("debug", "--runs", str(tmp_path), "--fresh")
    (arguments.run_dir / "dataset").mkdir(parents=True)
    (arguments.run_dir / "checkpoints").mkdir()
    arguments.prepare("checkpoints")
    assert sorted(path.name for path in arguments.run_dir.iterdir()) == ["checkpoints.old-1", "dataset"]


@pytest.mark.parametrize("name", PLACES)
def test_fresh_moves_nothing_that_the_job_is_to_read(name, tmp_path, capsys):
    place = tmp_path / "debug" / "checkpoint"
    place.mkdir(parents=True)
    arguments = _parse("debug", "--runs", str(tmp_path), "--fresh", f"--{name}", str(place))
    for products in ((), ("ray", "checkpoint")):
        with pytest.raises(SystemExit):
            arguments.prepare(*products)
        assert f"{name}={place} lies in what --fresh puts aside; give another --name" in capsys.readouterr().err
    assert place.is_dir()
    arguments.prepare("dataset")


def test_without_fresh_nothing_moves(tmp_path):
    arguments = _parse("debug", "--runs", str(tmp_path))
    (arguments.prepare() / "report.json").write_text("kept")
    assert (arguments.prepare() / "report.json").read_text() == "kept"
    assert set_aside(tmp_path / "nothing") is None


def test_a_job_can_refuse_like_the_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        _parse("debug").refuse(ValueError("other settings"))
    assert end.value.code == 2
    assert capsys.readouterr().err == "train.py: error: other settings\n"


def test_help_loads_no_engine():
    program = (
        "import sys; from arguments import parse\n"
        "try: parse(['--help'], 'x', stage='train')\n"
        "except SystemExit: print([m for m in ('ray', 'torch', 'numpy', 'mlflow', 'lerobot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=JOBS, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


SCRIPTS = sorted(path.name for path in JOBS.glob("*.py") if path.name not in ("arguments.py", "drive.py", "budget.py"))
"""Those with a run's settings; the command lines of the fleet and of a checkpoint's budget have their own tests."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_job_reads_its_command_line_before_anything_else(script, tmp_path):
    """From any working folder, as `uv run` and `ray job submit` start it."""
    command = [sys.executable, str(JOBS / script), "--train.stepz=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "train.steps" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_a_job_in_one_line_whoever_noticed_it(tmp_path, capsys):
    """The store's own error, on the same disk, included."""
    arguments = parse(["debug", f"--runs={tmp_path}"], "", stage="train")
    for error in (OSError(28, "No space left on device"), sqlite3.OperationalError("database or disk is full")):
        with pytest.raises(SystemExit) as ended, arguments.refusing():
            raise error
        assert ended.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"train.py: error: no space left on the disk of {tmp_path}/debug, ")
        assert str(error) in line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_what_this_user_may_not_read_or_write_ends_a_job_in_one_line(number, tmp_path, capsys):
    arguments = parse(["debug", f"--runs={tmp_path}"], "", stage="train")
    with pytest.raises(SystemExit) as ended, arguments.refusing():
        raise OSError(number, os.strerror(number), str(tmp_path / "info.json"))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: error: {tmp_path}/info.json cannot be read or written ({os.strerror(number)}); give")
    with pytest.raises(OSError, match="of nothing"), arguments.refusing():
        raise OSError(number, "of nothing on this disk")
