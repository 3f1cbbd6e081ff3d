"""Recording: which seeds end in the data set, whatever fails, dies or is interrupted."""

import gc
import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from libra_ray.common.disk import NoRoomError
from libra_ray.config import RecordConfig
from libra_ray.data.dataset import DatasetWriter, open_dataset, write_dataset
from libra_ray.data.spool import load_episode, save_episode
from libra_ray.evaluation.simulators import Attempt, Simulators
from libra_ray.on_ray import record as recording
from libra_ray.on_ray import stages
from libra_ray.on_ray.record import TaskTally
from libra_ray.sim import control_hz, robot_spec
from tests.data.builders import make_episode
from tests.on_ray.doubles import dying

WANTED, STEPS = 6, 30


def _config(**changes):
    return RecordConfig(**{"episodes_per_task": WANTED, "seed": 100, **changes})


def _attempt(seed, success):
    return Attempt(task="stub", seed=seed, success=success, steps=3, error=None)


def _record(spool, fails, rng, actors, starts=1):
    """Fill a spool by attempts that end in any order; at a new start all that was under way is lost."""
    for start in range(starts):
        tally, last = TaskTally("stub", spool, _config(), STEPS), start == starts - 1
        budget = None if last else rng.randrange(8)
        while not tally.complete and budget != 0:
            while len(tally.under_way) < actors and (seed := tally.next_seed()) is not None:
                tally.under_way.add(seed)
            seed = rng.choice(sorted(tally.under_way))
            if seed not in fails:
                tally.path(seed).touch()
            tally.note(_attempt(seed, seed not in fails))
            budget = None if budget is None else budget - 1
    return sorted(tally.succeeded)


@pytest.mark.parametrize("case", range(20))
def test_the_recorded_seeds_depend_on_nothing_but_which_fail(case, tmp_path):
    rng = random.Random(case)
    fails = set(rng.sample(range(100, 112), rng.randrange(5)))
    expected = [seed for seed in range(100, 130) if seed not in fails][:WANTED]
    for actors, starts in ((1, 1), (4, 1), (2, 3), (16, 4)):
        assert _record(tmp_path / f"{actors}-{starts}", fails, rng, actors, starts) == expected


@pytest.mark.parametrize("case", range(20))
def test_episodes_are_written_in_order_while_others_are_recorded(case, tmp_path, monkeypatch):
    """The same ones whatever order they end in; what is final is taken at once, and nothing else before."""
    rng = random.Random(case)
    monkeypatch.setattr(recording, "load_recording", lambda path: ((path.parent.name, int(path.stem)), {}))
    fails = set(rng.sample(range(100, 112), rng.randrange(5)))
    tallies = [TaskTally(task, tmp_path, _config(), STEPS) for task in ("first", "second")]
    expected = [(t.task, seed) for t in tallies for seed in [s for s in range(100, 130) if s not in fails][:WANTED]]
    shelf, ended = recording.Shelf(tallies), {t.task: set() for t in tallies}
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(lambda: [_taken(episode, fails, ended) for episode, _ in shelf.recordings()])
        while not all(tally.complete for tally in tallies):
            while sum(len(t.under_way) for t in tallies) < 5 and recording._next_job(tallies):
                pass
            tally, seed = rng.choice([(t, seed) for t in tallies for seed in sorted(t.under_way)])
            ended[tally.task].add(seed)
            shelf.note(tally, Attempt(task=tally.task, seed=seed, success=seed not in fails, steps=3, error=None))
        assert taken.result() == expected


def _taken(episode, fails, ended):
    task, seed = episode
    assert set(range(100, seed + 1)) <= ended[task], "a seed before it is still open"
    return episode


def test_an_end_before_the_last_episode_ends_the_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "load_recording", lambda path: (int(path.stem), {}))
    shelf = recording.Shelf([TaskTally("stub", tmp_path, _config(), STEPS)])
    for seed in (100, 102):
        shelf.note(shelf.tallies[0], _attempt(seed, success=True))
    episodes = shelf.recordings()
    assert next(episodes) == (100, {})
    shelf.close()
    with pytest.raises(InterruptedError, match="recording stub has ended before its last episode"):
        next(episodes)


def test_a_failed_seed_is_not_tried_again_after_a_restart(tmp_path):
    TaskTally("stub", tmp_path, _config(), STEPS).note(_attempt(100, success=False))
    assert json.loads((tmp_path / "stub" / "100.json").read_text())["seed"] == 100
    again = TaskTally("stub", tmp_path, _config(), STEPS)
    assert again.failed == {100}
    assert again.next_seed() == 101


def test_too_many_failures_end_the_recording(tmp_path):
    tally = TaskTally("stub", tmp_path, _config(episodes_per_task=2, max_attempts=2), STEPS)
    for seed in range(100, 104):
        assert tally.next_seed() == seed
        tally.note(Attempt(task="stub", seed=seed, success=False, steps=0, error="OSError: no arm"))
    with pytest.raises(RuntimeError, match=r"at stub \(the last error: OSError: no arm\); lower record.noise_std.*--fresh"):
        tally.next_seed()


def test_an_expert_that_needs_more_steps_than_it_has_is_told_apart_from_one_that_breaks(tmp_path):
    """Also by the next start, from the marks of the one before."""
    config = _config(episodes_per_task=2, max_attempts=2)
    for seed in range(100, 104):
        error = None if seed % 2 else "OSError: no arm"
        TaskTally("stub", tmp_path, config, STEPS).note(
            Attempt(task="stub", seed=seed, success=False, steps=STEPS, error=error)
        )
    with pytest.raises(RuntimeError) as given_up:
        TaskTally("stub", tmp_path, config, STEPS).next_seed()
    assert str(given_up.value) == (
        "the expert failed 4 of 4 attempts at stub, 2 of them at the end of sim.max_steps=30 (the last error: OSError: no arm)"
        "; raise sim.max_steps, lower record.noise_std or raise record.max_attempts, and start over with --fresh"
    )


def test_a_task_is_complete_at_its_own_number(tmp_path):
    tally = TaskTally("stub", tmp_path, _config(episodes_of=("stub=2",)), STEPS)
    for seed in (100, 101):
        assert not tally.complete
        assert tally.next_seed() == seed
        tally.note(_attempt(seed, success=True))
    assert tally.complete
    assert tally.next_seed() is None


def test_a_number_for_a_task_that_does_not_exist_is_refused_before_anything_is_recorded(make_run):
    with pytest.raises(ValueError, match="reech-v3"):
        stages.check(make_run(record__episodes_of="reech-v3=5"), "record")
    stages.check(make_run(record__episodes_of="push-v3=5"), "record")


def test_a_fleet_records_what_was_wanted(recorded_run):
    dataset = open_dataset(recorded_run.path("dataset"))
    wanted = recorded_run.config.record.episodes_per_task
    assert len(set(dataset.seeds)) == len(dataset.lengths) == wanted
    assert not recorded_run.path("spool").exists()
    assert recorded_run.done("record")


def test_a_fleet_writes_what_one_process_would(recorded_run, tmp_path):
    """Two simulators that encode beside a writer, and one after the other: the same files, byte for byte."""
    config, episodes = recorded_run.config, []
    simulators = Simulators(config.sim, config.data.image_size)
    for seed in range(config.record.episodes_per_task):
        assert simulators.demonstrate("reach-v3", seed, config.record, tmp_path / f"{seed}.npz").success
        episodes.append(load_episode(tmp_path / f"{seed}.npz"))
    alone = write_dataset(episodes, tmp_path / "dataset", fps=control_hz(config.sim), declared=robot_spec(config.sim))
    fleet = recorded_run.path("dataset")
    names = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(fleet) for path in fleet.rglob("*") if path.is_file())
    assert [name for name in names if (alone / name).read_bytes() != (fleet / name).read_bytes()] == []


def test_a_writer_that_fails_ends_the_recording(ray_cluster, make_run, monkeypatch):
    def fails(self, episode, clips):
        raise NoRoomError("no space left on the disk of somewhere")

    folder = make_run(record__episodes_per_task=400, ray__simulator_actors=1)
    monkeypatch.setattr(DatasetWriter, "add", fails)
    with pytest.raises(NoRoomError), folder.stage("record") as clock:
        recording.record(folder, clock)
    assert len(list(folder.path("spool").rglob("*.npz"))) < 400, "what was recorded stays, and no more comes"


def test_a_codec_that_there_is_not_is_refused_before_anything_is_recorded(make_run):
    with pytest.raises(ValueError, match=r"betamax.*h264"):
        stages.check(make_run(record__video_codec="betamax"), "record")


def test_the_recording_is_a_dataset_that_lerobot_reads(recorded_run, monkeypatch):
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/dataset", root=recorded_run.path("dataset"))
    size = recorded_run.config.data.image_size
    assert dataset.num_episodes == recorded_run.config.record.episodes_per_task
    assert tuple(dataset[0]["observation.image"].shape) == (3, size, size)


def test_the_recording_declares_what_the_simulator_does(recorded_run):
    robot = open_dataset(recorded_run.path("dataset")).robot
    assert robot == robot_spec(recorded_run.config.sim)
    assert robot.action.names == ("x", "y", "z", "gripper")


def test_a_second_start_adds_only_what_is_missing(ray_cluster, make_run, monkeypatch):
    """Seed 1 was recorded before, seed 2 has failed before; now 0 and 3 are recorded, and 0 kills its process once."""
    folder = make_run(record__episodes_per_task=3, ray__simulator_actors=1)
    config, spool = folder.config, folder.path("spool")
    tally = TaskTally("reach-v3", spool, config.record, config.sim.max_steps)
    tally.note(Simulators(config.sim, config.data.image_size).demonstrate("reach-v3", 1, config.record, tally.path(1)))
    tally.note(_attempt(2, success=False))
    kept = {path: path.stat().st_mtime_ns for path in (spool / "reach-v3").iterdir()}
    assert len(kept) == 2
    monkeypatch.setattr(recording.shutil, "rmtree", lambda path, **_: None)
    monkeypatch.setattr("libra_ray.on_ray.simulator_pool.Simulators", dying("demonstrate", folder.path("died")))
    with folder.stage("record") as clock:
        recording.record(folder, clock)
    assert folder.path("died").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted(path.name for path in (spool / "reach-v3").iterdir()) == ["0.npz", "1.npz", "2.json", "3.npz"]
    dataset = open_dataset(folder.path("dataset"))
    assert dataset.seeds.tolist() == [0, 1, 3]
    spooled = load_episode(spool / "reach-v3" / "1.npz")
    rows = dataset.rows(np.array([1]))
    np.testing.assert_array_equal(dataset.action[rows], [step.action.label for step in spooled.steps])


def test_nothing_is_said_after_an_interrupted_writing_has_ended(make_run, monkeypatch, capsys):
    folder, add = make_run(record__episodes_per_task=3), DatasetWriter.add
    for seed in range(3):
        (folder.path("spool") / "reach-v3").mkdir(parents=True, exist_ok=True)
        save_episode(folder.path("spool") / "reach-v3" / f"{seed}.npz", make_episode(seed=seed))

    def interrupted(writer, episode, clips):
        if writer.episodes == 1:
            raise KeyboardInterrupt
        add(writer, episode, clips)

    monkeypatch.setattr(DatasetWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt) as ended, folder.stage("record") as clock:
        recording.record(folder, clock)
    assert "write data set: 1/3 episodes" in capsys.readouterr().err
    del ended
    gc.collect()
    assert capsys.readouterr().err == ""


def test_a_finished_data_set_is_not_recorded_again(make_run, monkeypatch):
    """Killed between the last write and the note that the stage is done, perhaps while the spool was being removed."""
    folder = make_run()
    folder.path("dataset").mkdir()
    (folder.path("spool") / "reach-v3").mkdir(parents=True)
    with folder.stage("record") as clock:
        recording.record(folder, clock)
    assert not folder.path("spool").exists()
