"""A run's folder: continued only under the same settings, and whole whenever a process dies."""

import errno
import json
import os
from pathlib import Path

import pytest

from libra_ray.common.files import append_jsonl, read_jsonl, repair_jsonl, write_text
from libra_ray.config import Config, override, preset
from libra_ray.config.overrides import flatten
from libra_ray.runs import folder as run_folder
from libra_ray.runs.folder import STAGE_KEYS, RunFolder, StageTime, locked

CONFIG = preset("debug")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Now:
        seconds = 100.0

    monkeypatch.setattr(run_folder.time, "monotonic", lambda: Now.seconds)
    return Now


def begin(root, *stages):
    folder = RunFolder.open(root / "run", CONFIG)
    for stage in stages:
        with folder.stage(stage):
            pass
    return folder


def test_the_same_settings_continue(tmp_path):
    begin(tmp_path, "record").note("mlflow_run_id", "abc")
    again = RunFolder.open(tmp_path / "run", CONFIG)
    assert again.done("record")
    assert not again.begun("train")
    assert again.fact("mlflow_run_id", str) == "abc"
    assert again.fact("nothing", str) is None


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("record", "record.noise_std", 0.1),
        ("record", "data.image_size", 64),
        ("record", "data.root", "/elsewhere"),
        ("train", "train.lr", 0.1),
        ("train", "refiner.depth", 3),
        ("train", "planner.backbone", "other"),
        ("train", "action.bins", 7),
        ("train", "data.history", 2),
        ("train", "data.image_size", 64),
        ("evaluate", "control.rule", "overlap"),
        ("evaluate", "delay.intent_steps", 3),
        ("evaluate", "evaluate.seed", 777_777),
        ("evaluate", "sim.max_steps", 50),
        ("evaluate", "data.image_size", 64),
    ],
)
def test_other_settings_of_a_begun_stage_are_refused_by_name(tmp_path, stage, key, value):
    begin(tmp_path, stage)
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match=f"'{stage}': {key} \\(.* -> {value}\\)") as refusal:
        RunFolder.open(tmp_path / "run", override(CONFIG, {key: value}))
    assert "--fresh" in str(refusal.value)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_run_that_earlier_settings_began_is_continued(tmp_path):
    """Its pictures' size stood with the simulator's settings."""
    begin(tmp_path, "record", "train", "evaluate")
    file = tmp_path / "run" / "config.json"
    tree = json.loads(file.read_text())
    tree["sim"]["image_size"] = tree["data"].pop("image_size")
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"data.image_size \(32 -> 64\)"):
        RunFolder.open(tmp_path / "run", override(CONFIG, {"data.image_size": 64}))
    assert RunFolder.open(tmp_path / "run", CONFIG).done("evaluate")


def test_a_stage_that_was_only_begun_counts(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    with pytest.raises(KeyboardInterrupt), folder.stage("train"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"train\.lr"):
        RunFolder.open(tmp_path / "run", override(CONFIG, {"train.lr": 0.1}))


@pytest.mark.parametrize(
    "changes", [{"evaluate.robots": 4, "control.rule": "overlap"}, {"train.lr": 0.1}, {"ray.max_failures": 9}]
)
def test_settings_of_stages_to_come_may_change(tmp_path, changes):
    begin(tmp_path, "record")
    changed = override(CONFIG, changes)
    assert RunFolder.open(tmp_path / "run", changed).config == changed
    assert RunFolder.open(tmp_path / "run", changed).done("record")


def test_every_setting_is_one_of_a_stage_or_changes_no_result():
    begun = tuple(beginning for keys in STAGE_KEYS.values() for beginning in keys)
    free = {name for name in flatten(CONFIG) if not name.startswith((*begun, "ray.", "tracking."))}
    assert free == {"preset", "evaluate.robots", "evaluate.policy_replicas", "evaluate.gpus_per_replica"}


def test_resources_may_change_at_any_time(tmp_path):
    begin(tmp_path, "record", "train", "evaluate")
    RunFolder.open(tmp_path / "run", override(CONFIG, {"ray.simulator_actors": 3, "evaluate.robots": 9}))


def test_a_stage_is_done_when_it_ends_well(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    with folder.stage("record"):
        assert folder.begun("record")
        assert not folder.done("record")
    assert folder.done("record")
    assert not folder.begun("train")


def interrupt(folder, stage, clock, seconds, error=KeyboardInterrupt):
    """Spend `seconds` in a stage and leave it by an exception."""

    def work():
        with folder.stage(stage):
            clock.seconds += seconds
            raise error

    with pytest.raises(error):
        work()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_a_stage_undone(tmp_path, clock, error):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    interrupt(folder, "record", clock, 5, error)
    assert folder.fact("record", StageTime) == StageTime(done=False, wall_s=5.0)


def test_wall_time_adds_up_over_interruptions(tmp_path, clock):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    for seconds in (3, 4):
        interrupt(folder, "train", clock, seconds)
        clock.seconds += 1000
    again = RunFolder.open(tmp_path / "run", CONFIG)
    with again.stage("train"):
        clock.seconds += 5
    assert again.wall_s("train") == 12
    assert again.wall_s("record") == 0


def test_a_stage_may_be_timed_from_before_it_began(tmp_path, clock):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    with folder.stage("record", since=clock.seconds - 20):
        clock.seconds += 1
    assert folder.wall_s("record") == 21


def test_a_forgotten_stage_was_never_begun(tmp_path):
    begin(tmp_path, "record", "train", "total")
    changed = override(CONFIG, {"train.lr": 0.1})
    folder = RunFolder.open(tmp_path / "run", changed, forget=("train", "evaluate"))
    assert [folder.begun(stage) for stage in ("record", "train", "total")] == [True, False, False]
    assert RunFolder.open(tmp_path / "run", changed).config == changed


def test_a_killed_process_loses_only_the_last_seconds(tmp_path, clock):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    with folder.stage("train") as timer:
        for _ in range(10):
            clock.seconds += 1
            timer.tick()
        killed = RunFolder.open(tmp_path / "run", CONFIG)
        assert killed.begun("train")
        assert not killed.done("train")
        assert 8 <= killed.wall_s("train") <= 10


def test_the_runs_own_products_are_used_unless_others_are_named(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    assert folder.dataset == folder.root / "dataset"
    assert folder.checkpoint == folder.root / "checkpoint"
    other = override(CONFIG, {"data.root": str(tmp_path / "d"), "evaluate.checkpoint": str(tmp_path / "c")})
    folder = RunFolder.open(tmp_path / "other", other)
    assert (folder.dataset, folder.checkpoint) == (tmp_path / "d", tmp_path / "c")


def test_a_torn_last_row_is_neither_read_nor_continued(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path, dict) == []
    repair_jsonl(path)
    assert not path.exists()
    append_jsonl(path, [{"step": 1}, {"step": 2}])
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 3, "loss')
    assert read_jsonl(path, dict) == [{"step": 1}, {"step": 2}]
    repair_jsonl(path)
    assert path.read_bytes() == whole
    append_jsonl(path, [{"step": 3}])
    assert [row["step"] for row in read_jsonl(path, dict)] == [1, 2, 3]
    repair_jsonl(path)
    assert [row["step"] for row in read_jsonl(path, dict)] == [1, 2, 3]


def test_a_file_of_one_torn_row_is_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1')
    assert read_jsonl(path, dict) == []
    repair_jsonl(path)
    assert path.read_bytes() == b""


def test_rows_that_are_no_json_are_not_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"step": 1}])
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(path, [{"step": 2}, {"loss": float("nan")}])
    assert read_jsonl(path, dict) == [{"step": 1}]


def test_a_write_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "stages.json"
    write_text(path, json.dumps({"old": True}))

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert json.loads(path.read_text()) == {"old": True}


def test_shared_frames_may_be_named_from_here(tmp_path, monkeypatch):
    """A link to a relative name would lead nowhere from inside the run's folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frames").mkdir()
    folder = RunFolder.open(Path("run"), preset("debug"))
    folder.share_frames(Path("frames"))
    assert folder.path("frames").resolve() == tmp_path.resolve() / "frames"
    assert folder.path("frames").is_dir()


def test_what_ended_a_stage_is_told_even_where_its_time_cannot_be_written(tmp_path, monkeypatch):
    folder = RunFolder.open(tmp_path / "run", CONFIG)

    def full(path, text):
        raise OSError(28, "No space left on device")

    def fail():
        monkeypatch.setattr(run_folder, "write_text", full)
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"), folder.stage("train"):
        fail()


@pytest.mark.parametrize("name", ["file", "file/run", "file/more/run"])
def test_a_folder_that_cannot_be_is_refused_in_words(name, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"run's folder .*file.*give another --runs or --name"), locked(tmp_path / name):
        pass


def test_a_run_in_a_folder_that_is_there_to_be_read_is_refused(tmp_path, monkeypatch):
    """As of a disk that is mounted so, which no permission tells."""

    def denied(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr("libra_ray.runs.folder.tempfile.TemporaryFile", denied)
    with (
        pytest.raises(ValueError, match=r"run cannot be made or written \(Read-only file system\); give another --runs"),
        locked(tmp_path / "run"),
    ):
        pass


def test_locking_makes_no_folder_that_starting_over_would_keep(tmp_path):
    with locked(tmp_path / "runs" / "run"):
        assert not (tmp_path / "runs" / "run").exists()


def test_every_section_of_the_configuration_belongs_to_a_stage_or_to_none_on_purpose():
    """A setting that no stage depends on could change between two starts of a run without a word, as where it runs may."""
    sections = {name.partition(".")[0] for name in flatten(Config())}
    known = {key.partition(".")[0] for keys in STAGE_KEYS.values() for key in keys}
    assert sections - known == {"preset", "ray", "tracking"}
