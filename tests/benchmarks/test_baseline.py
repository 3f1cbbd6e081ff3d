"""The plain network that the dual system is measured against: it learns, answers like a policy, and is compared fairly."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.baseline import BaselinePolicy, TimedTrainer, train, windows
from benchmarks.baseline_table import Comparison, beside, markdown
from libra_ray.checkpoint import DatasetSpec
from libra_ray.common.json_text import dump, parse
from libra_ray.config import Config, override, preset
from libra_ray.control.lockstep import Latencies, drive
from libra_ray.control.robot import RobotControl
from libra_ray.data.splits import Split
from libra_ray.data.stream import BatchStream
from libra_ray.data.transforms import compute_stats
from libra_ray.policy import act
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import EpisodeResult, Evaluation
from libra_ray.training.data import TrainingData
from libra_ray.types import IMAGE_KEY, Observation, RobotShape
from tests.data.builders import make_frames, make_recorded
from tests.report import builders

TASKS = ("press the button", "open the drawer")


@pytest.fixture(scope="module")
def config() -> Config:
    return override(preset("debug"), {"data.image_size": 16, "train.batch_size": 16, "train.augment_pixels": 1})


@pytest.fixture(scope="module")
def data(config) -> TrainingData:
    recorded = make_recorded([12, 9, 15, 10], [TASKS[i % 2] for i in range(4)])
    shape = RobotShape(action_dim=recorded.action_dim, state_dim=recorded.state_dim, cameras=1)
    return TrainingData(
        config=config,
        demonstrations=recorded,
        frames=make_frames(recorded, size=16),
        split=Split(train=np.arange(3), holdout=np.array([3])),
        stats=compute_stats(recorded, recorded.rows(np.arange(3))),
        spec=DatasetSpec(shape=shape, image_keys=(IMAGE_KEY,), control_hz=10, instructions=tuple(sorted(TASKS))),
    )


@pytest.fixture
def policy(config, data) -> BaselinePolicy:
    return BaselinePolicy.untrained(config, data.spec, data.stats)


def seconds_per_reading() -> Iterator[float]:
    """A clock that has moved on by one second whenever it is read."""
    return map(float, count())


def fit_of(policy: BaselinePolicy, *, seconds: float, loss: str = "l1") -> TimedTrainer:
    return TimedTrainer(policy.network, policy.config, loss=loss, seconds=seconds, clock=seconds_per_reading().__next__)


def observe(data: TrainingData, row: int, step: int = 0) -> Observation:
    recorded = data.demonstrations
    instruction = recorded.instruction(row)
    return Observation(images={IMAGE_KEY: data.frames[0, row]}, state=recorded.state[row], instruction=instruction, step=step)


def actions(policy: BaselinePolicy, seen: list[Observation]) -> np.ndarray:
    return np.stack([chunk.actions for chunk in act(policy, seen)])


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_the_loss_falls(data, policy, loss):
    trainer = fit_of(policy, seconds=100, loss=loss)
    with BatchStream(windows(data), batch_size=16, seed=0) as batches:
        losses = [row["loss"] for row in trainer.run(batches)]
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_it_imitates_what_it_was_shown(data, policy):
    """The recorded action names its row, so only a network that tells the pictures and steps apart can repeat it."""
    trainer = fit_of(policy, seconds=180)
    with BatchStream(windows(data), batch_size=16, seed=0) as batches:
        list(trainer.run(batches))
    rows = [0, 5, 14, 22]
    answered = actions(policy, [observe(data, row) for row in rows])[:, 0, 0]
    np.testing.assert_allclose(answered, data.demonstrations.action[rows, 0], atol=4)


def test_the_learning_rate_falls_with_the_time_used(data, policy):
    trainer = fit_of(policy, seconds=20)
    with BatchStream(windows(data), batch_size=4, seed=0) as batches:
        rates = [trainer.optimiser.param_groups[0]["lr"] for _ in trainer.run(batches)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1 * rates[0]
    assert trainer.elapsed_s >= 20


def test_a_resumed_training_equals_an_uninterrupted_one(config, data):
    whole, first, second = (BaselinePolicy.untrained(config, data.spec, data.stats) for _ in range(3))
    with BatchStream(windows(data), batch_size=4, seed=0) as batches:
        list(fit_of(whole, seconds=20).run(batches))
    begun, resumed = fit_of(first, seconds=20), fit_of(second, seconds=20)
    with BatchStream(windows(data), batch_size=4, seed=0) as batches:
        list(islice(begun.run(batches), 1))
    resumed.restore(begun.state())
    assert 0 < resumed.step < 20
    with BatchStream(windows(data), batch_size=4, seed=0, start_step=resumed.step) as batches:
        list(resumed.run(batches))
    for ours, theirs in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_finished_training_is_loaded_and_another_one_refused(config, data, tmp_path: Path):
    folder = RunFolder.open(tmp_path / "baseline", config)
    first, trainer = train(folder, data, "l1", 0.2)
    again, loaded = train(folder, data, "l1", 0.2)
    assert loaded.step == trainer.step > 0
    assert folder.done("train")
    seen = [observe(data, row) for row in (1, 8)]
    np.testing.assert_array_equal(actions(first, seen), actions(again, seen))
    with pytest.raises(ValueError, match=r"--loss l1 --seconds 0\.2"):
        train(folder, data, "mse", 0.2)


def test_permuting_the_robots_permutes_the_answers(data, policy):
    seen = [observe(data, row, step) for row, step in ((0, 0), (13, 3), (25, 9), (30, 1))]
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(actions(policy, [seen[i] for i in order]), actions(policy, seen)[order], atol=1e-5)
    alone = np.concatenate([actions(policy, [one]) for one in seen])
    np.testing.assert_allclose(alone, actions(policy, seen), atol=1e-5)


def test_picture_state_and_instruction_all_matter(data, policy):
    seen = observe(data, 3)
    others = [
        Observation(images={IMAGE_KEY: 255 - seen.images[IMAGE_KEY]}, state=seen.state, instruction=seen.instruction),
        Observation(images=seen.images, state=seen.state + 1, instruction=seen.instruction),
        Observation(images=seen.images, state=seen.state, instruction=next(t for t in TASKS if t != seen.instruction)),
    ]
    answers = actions(policy, [seen, *others])
    for other in answers[1:]:
        assert np.abs(other - answers[0]).max() > 1e-3


def test_an_unknown_instruction_is_refused_with_the_known_ones(data, policy):
    stranger = Observation(images={IMAGE_KEY: data.frames[0, 0]}, state=data.demonstrations.state[0], instruction="fly")
    with pytest.raises(ValueError, match=r"fly.*open the drawer, press the button"):
        act(policy, [stranger])


def test_a_controller_gets_a_fresh_chunk_every_h_steps_and_never_holds(config, data, policy):
    robots, step = {0: RobotControl(config.control, policy.levels)}, 0
    latencies: Latencies = {}
    while step < 6 * config.action.horizon:
        ahead = drive(robots, {0: observe(data, step, step)}, policy, latencies)[0]
        assert len(ahead) == config.action.horizon
        assert not any(action.held for action in ahead)
        np.testing.assert_allclose(
            [action.value for action in ahead], actions(policy, [observe(data, step, step)])[0], atol=1e-5
        )
        step += len(ahead)
    assert {level: len(calls.ms) for level, calls in latencies.items()} == {"policy": 6}


def test_two_reports_stand_beside_each_other():
    few = override(preset("quickstart"), {"sim.tasks": "drawer-open-v3", "evaluate.episodes_per_task": 4})

    def report(successes: int, *more: EpisodeResult):
        played = [_played("policy", seed, success=seed < successes) for seed in range(4)]
        return builders.report(few, Evaluation(results=[*played, *more]))

    result = beside(report(4, _played("expert", 0, success=True)), report(3), {"baseline": {"seconds": 1.5, "loss": "l1"}})
    assert [(row.controller, row.success) for row in result.tasks] == [("policy", 1.0), ("baseline", 0.75)]
    assert result.success_mean == {"policy": 1.0, "baseline": 0.75}
    assert parse(Comparison, dump(result), "baseline.json") == result
    table = markdown(result).splitlines()
    assert "| drawer-open-v3 | 1.00 (0.51–1.00) | 0.75 (0.30–0.95) |" in table
    assert table[-1].startswith("| **mean** | 1.00")


def _played(controller: str, seed: int, *, success: bool) -> EpisodeResult:
    return EpisodeResult(task="drawer-open-v3", instruction="", controller=controller, seed=seed, success=success, steps=9)
