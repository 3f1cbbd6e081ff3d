"""A model is asked once before anything is recorded, written or started."""

import shutil

import pytest
import torch
from toy_system import Toy

from libra_ray.data.dataset import write_dataset
from libra_ray.model.dry_run import dry_run
from libra_ray.model.libra import Libra, RobotShape
from libra_ray.on_ray import stages
from libra_ray.on_ray.sweep import runner
from libra_ray.runs.folder import RunFolder
from tests.data.builders import make_episode
from tests.model import families, vision_models
from tests.on_ray.doubles import debug_config
from tests.on_ray.trained import trained
from tests.spaces import load_space

ALL = ("record", "train", "evaluate")
SHAPE = RobotShape(action_dim=4, state_dim=4, cameras=1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return families.write(tmp_path_factory.mktemp("hub") / "llava", families.FAMILIES["llava"]())


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    return vision_models.mae(tmp_path_factory.mktemp("hub") / "mae")


@pytest.fixture(scope="module")
def terse(llava, tmp_path_factory):
    """A checkpoint that takes instructions of one token."""
    folder = tmp_path_factory.mktemp("terse") / "checkpoint"
    return trained(folder, planner__backbone=str(llava), planner__max_text_tokens=1)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A data set of two tasks."""
    episodes = [make_episode(seed=seed, instruction=("open", "press the button down")[seed % 2]) for seed in range(4)]
    return write_dataset(episodes, tmp_path_factory.mktemp("data") / "demos", fps=20, robot_type="sawyer")


def checked(tmp_path, *jobs, **changes):
    stages.check(RunFolder(tmp_path / "run", debug_config(**changes)), *jobs)
    assert not (tmp_path / "run").exists()


def test_what_is_built_in_passes(tmp_path):
    checked(tmp_path, *ALL)
    checked(tmp_path, *ALL, model__system="monolithic", evaluate__controllers="policy", data__history=2)


def test_a_model_that_must_not_train_is_refused_before_recording(tmp_path, mae):
    with pytest.raises(ValueError, match=r"refiner\.encoder=.*drawn at random"):
        checked(tmp_path, *ALL, refiner__encoder=str(mae))


def test_an_encoder_that_nobody_looks_through_is_not_loaded(tmp_path, mae):
    checked(tmp_path, *ALL, refiner__encoder=str(mae), refiner__vision="shared")


def test_tasks_whose_words_do_not_fit_are_refused_before_recording(tmp_path, llava):
    sound = {"planner__backbone": str(llava), "planner__max_text_tokens": 64}
    checked(tmp_path, *ALL, **sound)
    with pytest.raises(ValueError, match=r"too long; raise planner\.max_text_tokens=1"):
        checked(tmp_path, *ALL, **sound | {"planner__max_text_tokens": 1})


def test_the_words_of_recorded_tasks_are_looked_at_too(tmp_path, llava, demos):
    short = {"planner__backbone": str(llava), "planner__max_text_tokens": 1}
    with pytest.raises(ValueError, match="too long"):
        checked(tmp_path, "train", **short, data__root=str(demos))


def test_tasks_whose_words_a_checkpoint_does_not_take_are_refused_before_evaluation(tmp_path, terse):
    with pytest.raises(ValueError, match=r"too long; raise planner\.max_text_tokens=1"):
        checked(tmp_path, "evaluate", evaluate__checkpoint=str(terse))
    checked(tmp_path, "evaluate", evaluate__checkpoint=str(terse), evaluate__controllers="expert,zero_action")


def test_a_run_that_is_trained_loads_no_model_again(make_run, llava, tmp_path, demos):
    source = shutil.copytree(llava, tmp_path / "source")
    folder = make_run(planner__backbone=str(source), data__root=str(demos))
    shutil.rmtree(source)
    with pytest.raises(ValueError, match=r"planner\.backbone"):
        stages.check(folder, "train")
    with folder.stage("train"):
        pass
    stages.check(folder, "train")


def test_more_than_the_memory_takes_is_one_line():
    config = debug_config(planner__width=2**30, planner__heads=4)
    with pytest.raises(ValueError, match=r"cannot be made here \(.*memory") as refusal:
        dry_run(lambda: Libra(config, SHAPE))
    assert "\n" not in str(refusal.value)


def test_whatever_a_model_raises_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise ValueError("shapes\ndiffer")

    monkeypatch.setattr(Libra, "infer", fail)
    with pytest.raises(ValueError, match=r"here \(ValueError: shapes differ\)"):
        dry_run(lambda: Libra(debug_config(), SHAPE))


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            {"goal": {"average": torch.zeros(1, 4)}},
            r"level goal answers \{'average': \(4,\)\}, and promises \{'mean': \(4,\)\}",
        ),
        ({"path": {"pace": torch.zeros(1, 5, 4)}}, r"level path answers .*\(5, 4\).* promises .*\(10, 4\)"),
        ({"motor": {"actions": torch.zeros(1, 9, 4)}}, r"level motor answers .*\(9, 4\).* promises .*\(5, 4\)"),
        (
            {"motor": {"actions": torch.zeros(1, 5, 4), "sure": torch.zeros(1, 2)}},
            r"level motor answers .*'sure': \(2,\).* promises .*'sure': \(\)",
        ),
        ({"motor": torch.zeros(1, 5, 4)}, "model.system='toy_system:Toy'.* does not answer"),
    ],
)
def test_a_system_that_answers_something_else_than_it_promises_is_refused(monkeypatch, tmp_path, answers, words):
    whole = Toy.infer
    monkeypatch.setattr(
        Toy, "infer", lambda self, level, *rest: answers.get(level) if level in answers else whole(self, level, *rest)
    )
    with pytest.raises(ValueError, match=words):
        checked(tmp_path, *ALL, model__system="toy_system:Toy", planner__max_text_tokens=200)


def test_every_system_of_a_sweep_is_made_before_it_begins(tmp_path):
    space, config = tmp_path / "space.py", debug_config()
    space.write_text("from ray import tune\nSPACE = {'model.system': tune.choice(['libra', 'nowhere:Mine'])}")
    with pytest.raises(ValueError, match=r"model.system='nowhere:Mine' cannot be loaded .*nowhere"):
        runner.check(tmp_path / "sweep", config, "fifo", load_space(str(space), config))
    assert not (tmp_path / "sweep").exists()


def test_every_model_of_a_sweep_is_asked_before_it_begins(tmp_path, mae):
    """A choice of encoders, one of which cannot be trained: not a failed trial in the night, but one line now."""
    space = tmp_path / "space.py"

    def check(*encoders):
        space.write_text(f"from ray import tune\nSPACE = {{'refiner.encoder': tune.choice({list(map(str, encoders))})}}")
        config = debug_config()
        runner.check(tmp_path / "sweep", config, "fifo", load_space(str(space), config))

    check("conv")
    with pytest.raises(ValueError, match="drawn at random"):
        check("conv", mae)
    assert not (tmp_path / "sweep").exists()
