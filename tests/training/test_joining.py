"""Levels trained one by one and joined are what they are when trained together, where they share no weights."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import join as join_job
import pytest
import torch

from libra_ray import checkpoint
from libra_ray.report import publish
from libra_ray.training.data import stats_of
from libra_ray.training.fit import Trainer
from libra_ray.training.joining import join
from libra_ray.training.saving import BackgroundSaver
from tests.model.builders import make_stats, tiny_config
from tests.training.builders import training_data

CPU = torch.device("cpu")
FORMS = {
    "libra": {},
    "hierarchy": {"model.system": "hierarchy"},
    "hierarchy_two_levels": {"model.system": "hierarchy", "hierarchy.levels": "two"},
    "toy": {"model.system": "toy_system:Toy"},
}
TOGETHER = {
    "train.curriculum": "teacher",
    # It is the norm of all gradients that is clipped.
    "train.grad_clip": 1e9,
    "train.augment_pixels": 2,
    "refiner.condition_dropout": 0.5,
    "train.validate_every": 2,
}


def trained(folder, changes, levels=(), stats=None, **of):
    """Four steps, exported to `folder`; the trainer, and its rows."""
    config = tiny_config({**TOGETHER, **changes, "train.levels": tuple(levels)})
    data = training_data(config, **of)
    data = data if stats is None else replace(data, stats=stats)
    torch.manual_seed(0)
    model = data.make_model()
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(model, device=CPU)
    with data.stream(model, rank=0, world=1, start_step=0) as batches, BackgroundSaver(trainer, data) as saver:
        rows = [progress.metrics for progress in trainer.run(batches, data.validator(CPU))]
        saver.begin(folder.with_name(f"{folder.name}-to-resume"))
    checkpoint.export(folder.with_name(f"{folder.name}-to-resume"), folder)
    return trainer, rows, begun


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_joined_levels_are_those_of_one_run(form, tmp_path):
    together, _, _ = trained(tmp_path / "together", form)
    names = [level.name for level in together.model.levels]
    for name in names:
        trainer, rows, begun = trained(tmp_path / name, form, [name])
        own = set(trainer.model.taught_by()[name])
        learned = {id(weight) for term in own for weight in together.model.reached()[term]}
        parameters = dict(together.model.named_parameters())
        moments = trainer.state()["optimiser"]["exp_avg"]
        assert set(moments) == {key for key, weight in trainer.model.named_parameters() if weight.requires_grad}
        assert set(moments) == {key for key, weight in parameters.items() if id(weight) in learned}
        for key, value in trainer.weights().items():
            assert key in trainer.state()["average"] or torch.equal(value, begun[key]), f"{key} stays as it began"
        for row in rows:
            assert {key for key in row if key.startswith("loss_")} == {f"loss_{term}" for term in own}
        assert {key for key in rows[-1] if key.startswith("val_loss_")} == {f"val_loss_{term}" for term in own}
        with pytest.raises(ValueError, match=rf"only {name} was trained \(train\.levels\); join it with the other levels"):
            checkpoint.load(tmp_path / name)
    manifest = join({name: tmp_path / name for name in names}, tmp_path / "joined")
    weights = "weights.safetensors"
    assert (tmp_path / "joined" / weights).read_bytes() == (tmp_path / "together" / weights).read_bytes()
    assert [(origin.level, origin.step) for origin in manifest.joined] == [(name, 4) for name in names]
    assert manifest.joined[0].digest == checkpoint.read_manifest(tmp_path / names[0]).digest
    assert checkpoint.load(tmp_path / "joined").config.train.levels == ()


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("levels")
    for name in ("planner", "refiner"):
        trained(folder / name, {}, [name])
    return {name: folder / name for name in ("planner", "refiner")}


def other_stats():
    return make_stats(training_data(tiny_config()).spec.shape)


@pytest.mark.parametrize(
    ("changes", "stats", "words"),
    [
        ({"action.bins": 7}, None, r"they differ in action\.bins \(\d+ and 7\)"),
        ({"action.horizon": 4}, None, r"they differ in action\.horizon .*levels"),
        ({"model.system": "hierarchy"}, None, "has no level refiner; its levels are strategic, tactical, motor"),
        ({}, other_stats, r"statistics differ.*--train\.stats_from \S+/planner"),
    ],
)
def test_what_does_not_fit_is_refused(levels, changes, stats, words, tmp_path):
    chosen = [] if changes.get("model.system") else ["refiner"]
    trained(tmp_path / "other", changes, chosen, stats and stats())
    with pytest.raises(ValueError, match=words) as refused:
        join({**levels, "refiner": tmp_path / "other"}, tmp_path / "joined")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "joined").exists()


OTHERS = ("close the drawer", "push the block")


def test_levels_learn_from_data_of_other_instructions(levels, tmp_path):
    trained(tmp_path / "other", {}, ["refiner"], instructions=OTHERS)
    told = join({**levels, "refiner": tmp_path / "other"}, tmp_path / "joined")
    everything = {"press the button", "open the drawer", *OTHERS}
    assert set(told.instructions) == set(told.shape.subgoals) == everything
    checkpoint.load(tmp_path / "joined")


def test_levels_that_speak_of_sub_goals_mean_the_same_by_them(tmp_path):
    trained(tmp_path / "one", FORMS["hierarchy"], ["strategic", "motor"], instructions=OTHERS)
    trained(tmp_path / "other", FORMS["hierarchy"], ["tactical"])
    given = {"strategic": tmp_path / "one", "tactical": tmp_path / "other", "motor": tmp_path / "one"}
    with pytest.raises(ValueError, match=r"they differ in shape .*close the drawer.*press the button"):
        join(given, tmp_path / "mixed")


def test_other_tokenisers_are_refused(levels, tmp_path):
    checkpoint.export(levels["refiner"], tmp_path / "other")
    (tmp_path / "other" / "processor").mkdir(exist_ok=True)
    (tmp_path / "other" / "processor" / "vocab.json").write_text("{}")
    checkpoint.seal(tmp_path / "other")
    with pytest.raises(ValueError, match="their tokenisers or architectures differ"):
        join({**levels, "refiner": tmp_path / "other"}, tmp_path / "joined")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"planner": "planner"}, "no checkpoint is given for the level refiner; the policy's levels are planner, refiner"),
        ({"planner": "planner", "refiner": "planner"}, "was trained without refiner; its train.levels is planner"),
        ({"planner": "planner", "refiner": "nowhere"}, "nowhere is not a checkpoint"),
    ],
)
def test_every_level_needs_a_checkpoint_that_learned_it(levels, given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        join({level: levels["planner"].with_name(name) for level, name in given.items()}, tmp_path / "joined")


@pytest.mark.parametrize(
    ("changes", "levels", "words"),
    [
        ({"refiner.vision": "shared", "refiner.max_staleness": 0}, "refiner", r"the same weights \(planner\.backbone\)"),
        ({"model.system": "anchor_refine", "anchor_refine.levels": "two"}, "residual", "of this policy anchor can"),
        ({}, "eyes", "no level 'eyes'; its levels are planner, refiner"),
    ],
)
def test_levels_that_cannot_learn_alone_are_refused(changes, levels, words):
    with pytest.raises(ValueError, match=words):
        training_data(tiny_config({**changes, "train.levels": levels})).make_model()


@pytest.mark.parametrize("level", ["planner", "refiner"])
def test_a_level_alone_reads_the_truth_and_watches_nothing(level):
    """What would end it, or stand in its place, is not there."""
    config = tiny_config({"train.levels": level, "train.curriculum": "threshold", "train.tau": 0.0})
    schedule = training_data(config).make_model().schedule()
    for step in range(config.train.steps):
        assert (schedule.phase, schedule.watches) == ("ground_truth", False)
        schedule.advance(step + 1, {})


def test_what_reads_the_planners_own_tokens_cannot_learn_alone():
    together = {"train.curriculum": "planner"}
    with pytest.raises(
        ValueError, match=r"refiner cannot be trained alone.*train\.curriculum=planner.*give teacher"
    ) as refused:
        training_data(tiny_config({**together, "train.levels": "refiner"})).make_model()
    assert "\n" not in str(refused.value)
    assert training_data(tiny_config({**together, "train.levels": "planner"})).make_model().learned == {"plan"}


@pytest.mark.parametrize("curriculum", ["threshold", "teacher", "planner"])
def test_all_levels_are_no_choice(curriculum):
    changes = {"train.levels": "planner,refiner", "train.curriculum": curriculum}
    model = training_data(tiny_config(changes)).make_model()
    assert model.learned is None
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_anchor_learns_alone_in_all_steps():
    config = tiny_config({"model.system": "anchor_refine", "anchor_refine.levels": "two", "train.levels": "anchor"})
    schedule = training_data(config).make_model().schedule()
    for step in range(config.train.steps):
        assert schedule.learns("anchor")
        schedule.advance(step + 1, {})


def test_statistics_are_anothers_where_they_fit(levels, tmp_path):
    shape = training_data(tiny_config()).spec.shape
    assert stats_of(levels["planner"], shape).to_json() == training_data(tiny_config()).stats.to_json()
    with pytest.raises(ValueError, match="action dimensions, the data have 9"):
        stats_of(levels["planner"], replace(shape, action_dim=9))
    with pytest.raises(ValueError, match=r"train\.stats_from=\S+ has no stats\.json; give a checkpoint, or a run"):
        stats_of(tmp_path, shape)


def test_manifests_of_versions_without_joining_are_read(levels, tmp_path):
    checkpoint.export(levels["planner"], tmp_path / "old")
    path = tmp_path / "old" / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["joined"]
    path.write_text(json.dumps(tree))
    assert checkpoint.read_manifest(tmp_path / "old").joined == ()


class StubTracker:
    """Keeps what is told of a run."""

    def __init__(self):
        self.tags, self.registered = {}, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def log_step_metrics(self, rows):
        assert list(rows) == []

    def set_tags(self, tags):
        self.tags |= tags

    def register_model(self, folder, signature, *, digest):
        self.registered.append(digest)


def run_job(monkeypatch, tmp_path, *options):
    """`jobs/join.py` in this process; its tracker."""
    tracker = StubTracker()
    monkeypatch.setattr(publish, "tracked", lambda _: tracker)
    monkeypatch.setattr(sys, "argv", ["join.py", f"--runs={tmp_path}", "--tracking.required=false", *options])
    join_job.main()
    return tracker


def test_the_job_registers_what_it_joins_and_says_where_it_comes_from(levels, tmp_path, monkeypatch, capsys):
    given = [f"{level}={folder}" for level, folder in levels.items()]
    tracker = run_job(monkeypatch, tmp_path, "--name=whole", "--levels", *given)
    assert capsys.readouterr().out == f"checkpoint: {tmp_path}/whole/checkpoint\n"
    assert tracker.registered == [checkpoint.load(tmp_path / "whole" / "checkpoint").manifest.digest]
    for level, folder in levels.items():
        assert tracker.tags[f"joined.{level}"].startswith(f"{folder} (step 4, digest {checkpoint.digest(folder)[:12]}")
    written = (tmp_path / "whole" / "checkpoint" / "manifest.json").stat().st_mtime_ns
    assert run_job(monkeypatch, tmp_path, "--name=whole", "--levels", *given).registered == tracker.registered, (
        "what is missing"
    )
    assert (tmp_path / "whole" / "checkpoint" / "manifest.json").stat().st_mtime_ns == written


def test_what_is_joined_takes_no_other_checkpoints_place(levels, tmp_path, monkeypatch, capsys):
    own = tmp_path / "run"
    checkpoint.export(levels["planner"], own / "checkpoint")
    given = [f"planner={own / 'checkpoint'}", f"refiner={levels['refiner']}"]
    for options, words in ([], "has another checkpoint already"), (["--fresh"], "planner=.* lies in what --fresh puts aside"):
        with pytest.raises(SystemExit):
            run_job(monkeypatch, tmp_path, "--name=run", "--levels", *given, *options)
        assert re.search(words, capsys.readouterr().err)
    (own / "stages.json").write_text('{"train": {"done": true, "wall_s": 1.0}}')
    with pytest.raises(SystemExit):
        run_job(monkeypatch, tmp_path, "--name=run", "--fresh", "--levels", *given)
    assert "is the run of a training; give another --name" in capsys.readouterr().err
    assert checkpoint.read_manifest(own / "checkpoint").digest == checkpoint.read_manifest(levels["planner"]).digest


@pytest.mark.parametrize("given", [[], ["planner"], ["planner=a", "planner=b"], ["=a"]])
def test_levels_are_given_once_with_their_checkpoint(given, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_job(monkeypatch, tmp_path, *(["--levels", *given] if given else []))
    assert "--levels takes LEVEL=CHECKPOINT once for every level" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
