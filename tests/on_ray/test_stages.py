"""What is known to be wrong is refused at the border: no cluster is started, nothing is written."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arguments import Arguments

from libra_ray import checkpoint
from libra_ray.control.delays import LATENCIES
from libra_ray.data.dataset import write_dataset
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import stages
from libra_ray.on_ray.run_data import FACT, ROBOT, began_with, open_to_train
from libra_ray.on_ray.run_policy import keep_subject
from libra_ray.report.publish import dataset_facts
from libra_ray.runs.folder import RunFolder, StageTime
from libra_ray.sim import robot_spec
from libra_ray.spec import UNDECLARED
from libra_ray.training.data import shape_of
from libra_ray.types import IMAGE_KEY, RobotShape
from tests.data.builders import make_episode
from tests.model import families
from tests.model.builders import tiny_model
from tests.on_ray.doubles import debug_config
from tests.on_ray.trained import METAWORLD_HZ, trained

ALL = ("record", "train", "evaluate")


def demonstrate(root: Path, episodes: int = 3, *, fps: int = METAWORLD_HZ, **robot: object) -> Path:
    """A data set of Meta-World's robot, or of one that differs as the keywords say; it replaces what is there."""
    shutil.rmtree(root, ignore_errors=True)
    return write_dataset([make_episode(seed=n, length=8 + n, **robot) for n in range(episodes)], root, fps=fps)


def test_the_model_that_is_asked_at_the_border_is_of_the_shape_that_is_trained(make_run, tmp_path, monkeypatch):
    folder, asked = make_run(data__root=str(demonstrate(tmp_path / "d"))), []
    monkeypatch.setattr(stages, "make_model", lambda _, shape, **__: asked.append(shape) or tiny_model({}, shape))
    stages.check(folder, "train")
    assert asked == [open_to_train(folder).spec.shape]
    assert asked[0].subgoals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__accumulate": 7}, r"train\.batch_size=16 is not a multiple of ray\.train_workers=1 times train\.accumulate=7"),
        ({"ray__train_workers": 3}, r"train\.batch_size=16 is not a multiple of ray\.train_workers=3"),
        (
            {"ray__train_cpus_per_worker": 1000},
            r"training wants 1000 CPUs, .* gives Ray \d+; lower ray\.train_workers",
        ),
        ({"train__graph": "step"}, r"train\.graph=step needs one worker on a CUDA device; give auto or none"),
        (
            {"ray__parallel": "fsdp", "train__balance": "gradient", "refiner__vision": "shared"},
            r"train\.balance=gradient cannot measure losses that share weights \(plan and diff\) with ray\.parallel=fsdp; give",
        ),
        ({"record__video_codec": "h265"}, r"record\.video_codec=h265: LeRobot cannot encode so here .*give h264"),
    ],
)
def test_what_would_end_training_or_recording_ends_a_pipeline_before_anything_is_recorded(make_run, changes, words, capsys):
    folder = make_run(**changes)
    arguments = Arguments(run_dir=folder.root, fresh=False, stage="pipeline")
    with pytest.raises(SystemExit), arguments.refusing():
        stages.check(folder, *ALL)
    assert re.search(words, capsys.readouterr().err)


def test_a_policy_of_which_not_all_levels_learn_is_trained_but_not_evaluated(make_run, tmp_path):
    data = str(demonstrate(tmp_path / "d"))
    stages.check(make_run("alone", data__root=data, train__levels="refiner"), "train")
    with pytest.raises(ValueError, match=r"train\.levels=refiner: .*cannot be evaluated; .*jobs/join\.py"):
        stages.check(make_run("both", data__root=data, train__levels="refiner"), "train", "evaluate")


def test_a_run_takes_the_statistics_of_another_that_has_begun_and_stays_with_them(make_run, tmp_path):
    first = make_run("first", data__root=str(demonstrate(tmp_path / "d")))
    second = make_run("second", data__root=str(demonstrate(tmp_path / "e", episodes=5)), train__stats_from=str(first.root))
    with pytest.raises(ValueError, match=r"first has no stats\.json; give a checkpoint, or a run whose training has begun"):
        stages.check(second, "train")
    begun = open_to_train(first)
    stages.check(second, "train")
    assert open_to_train(second).stats.to_json() == begun.stats.to_json()
    assert "of its actions' entries lie outside" in " ".join(open_to_train(second).remarks())
    for damaged in (b"", b"{", b"\xff\xfe", b"null", b'{"state": 1, "action": {}}', b'{"state": {}, "action": {}}'):
        first.path("stats.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^train\.stats_from=\S+: its stats\.json holds no statistics"):
            stages.check(second, "train")
    first.path("stats.json").write_text(open_to_train(make_run("third", data__root=str(tmp_path / "e"))).stats.to_json())
    with pytest.raises(ValueError, match=r"began with other normalisation statistics than train\.stats_from gives now"):
        open_to_train(second)


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_done(make_run, monkeypatch, stage):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"ray.use_gpu=true, but this machine has no GPU .*--ray.use_gpu false"):
        stages.check(make_run(ray__use_gpu=True), "record", stage)


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_graphs_without_a_gpu_are_refused_before_anything_is_done(make_run, stage):
    with pytest.raises(ValueError, match=r"policy.compile=graphs needs a GPU; give --ray.use_gpu true"):
        stages.check(make_run(policy__compile="graphs"), "record", stage)


def test_on_a_cluster_without_a_gpu_here_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config = debug_config(ray__use_gpu=True)
    evaluation.check_gpu(config)
    assert evaluation.device_of(config) == "cpu"
    assert "no GPU that torch can use" in capsys.readouterr().err
    assert evaluation.device_of(debug_config()) == "cpu"
    assert capsys.readouterr().err == ""


def test_a_trace_that_holds_no_latencies_is_refused_before_anything_is_done(make_run, tmp_path, monkeypatch):
    """And a relative one is the driver's: trials have other working folders."""
    monkeypatch.chdir(tmp_path)
    late = {"delay__trace": "drive.json"}
    demonstrated, own = str(demonstrate(tmp_path / "d")), str(trained(tmp_path / "c"))
    for folder, chosen in (
        (make_run("whole", data__root=demonstrated, **late), ("train", "evaluate")),
        (make_run("own", evaluate__checkpoint=own, **late), ("evaluate",)),
    ):
        assert folder.config.delay.trace == str(tmp_path / "drive.json")
        with pytest.raises(ValueError, match=r"drive.json holds no latencies .* give a file that jobs/drive.py --out wrote"):
            stages.check(folder, *chosen)
    (tmp_path / "drive.json").write_text('{"level_latencies_ms": {"planner": [100.0], "refiner": [1.0]}}')
    stages.check(folder, "evaluate")


def test_settings_without_effect_are_said_before_anything_is_done(make_run, capsys):
    given = {"model__system": "regression", "refiner__width": 64, "delay__intent_steps": 2, "delay__chunk_steps": 1}
    stages.check(make_run(**given), *ALL)
    said = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert said == [
        "train: no effect with model.system=regression: refiner.width=64",
        "evaluate: no effect on a policy with these levels, under these delays: delay.intent_steps=2",
    ]
    stages.check(make_run("used", **{**given, "model__system": "libra"}), *ALL)
    assert "no effect" not in capsys.readouterr().err


def test_a_setting_without_the_other_that_it_needs_is_said_with_its_stage(make_run, tmp_path, capsys):
    alone = {"train__start_parts": "planner", "delay__seed": 5, "record__noise_std": 0.3, "record__noise_share": 0.0}
    stages.check(make_run(**alone), *ALL)
    assert capsys.readouterr().err.splitlines() == [
        "record: no effect without record.noise_share above 0: record.noise_std=0.3",
        "train: no effect without train.start_from: train.start_parts=planner",
        "evaluate: no effect without delay.trace, delay.lost_share or delay.reordered_share: delay.seed=5",
    ]
    source = str(trained(tmp_path / "source"))
    met = {"train__start_from": source, "delay__lost_share": 0.5, "record__noise_share": 0.5}
    stages.check(make_run("met", **alone | met), *ALL)
    assert "no effect" not in capsys.readouterr().err


def test_settings_of_networks_have_no_effect_on_a_checkpoint_and_that_is_said(make_run, tmp_path, capsys):
    other = str(trained(tmp_path / "other"))
    stages.check(make_run(evaluate__checkpoint=other, refiner__denoising_steps=3), "evaluate")
    said = capsys.readouterr().err.splitlines()
    assert said == [f"evaluate: no effect beside what {other} has of its own: refiner.denoising_steps=3"]
    stages.check(make_run("same", evaluate__checkpoint=other), "evaluate")
    assert capsys.readouterr().err == ""


def test_an_evaluation_is_not_continued_under_another_delay(make_run):
    with make_run().stage("evaluate"):
        pass
    with pytest.raises(ValueError, match=r"delay\.intent_steps"):
        make_run(delay__intent_steps=3)


def written(root: Path) -> set[Path]:
    return set(root.rglob("*"))


class TestAnotherRobot:
    @pytest.mark.parametrize(
        ("robot", "words"),
        [
            ({"action_dim": 14}, r"action dimensions 14 \(simulator: 4\); it can be trained on"),
            ({"state_dim": 14}, r"state dimensions 14 \(simulator: 4\)"),
            ({"fps": 50}, r"control rate in Hz 50 \(simulator: 80\)"),
            ({"cameras": ("observation.images.high",)}, r"cameras observation.images.high \(simulator: observation.image\)"),
            ({"cameras": (IMAGE_KEY, "observation.images.wrist")}, r"cameras observation.image, observation.images.wrist"),
        ],
    )
    def test_a_data_set_of_it_is_trained_on_but_not_to_be_evaluated(self, make_run, tmp_path, robot, words):
        folder = make_run(data__root=str(demonstrate(tmp_path / "d", **robot)))
        before = written(tmp_path)
        stages.check(folder, "train")
        with pytest.raises(ValueError, match=rf"data set \S*/d is of another robot than .*sim.family=metaworld: {words}"):
            stages.check(folder, *ALL)
        assert written(tmp_path) == before

    @pytest.mark.parametrize(
        ("robot", "words"),
        [
            ({"shape": RobotShape(action_dim=7, state_dim=4, cameras=1)}, r"action dimensions 7 \(simulator: 4\)"),
            ({"control_hz": 29.97}, r"Hz 29.97 \(simulator: 80\)"),
        ],
    )
    def test_a_checkpoint_of_it_is_not_evaluated(self, make_run, tmp_path, robot, words):
        folder = make_run(evaluate__checkpoint=str(trained(tmp_path / "c", **robot)))
        with pytest.raises(ValueError, match=rf"checkpoint \S*/c is of another robot .*{words}"):
            stages.check(folder, "evaluate")
        with pytest.raises(ValueError, match="another robot"):
            evaluation.load_trained(folder, "policy")
        stages.check(make_run("same", evaluate__checkpoint=str(trained(tmp_path / "own"))), "evaluate")

    def test_its_weights_are_no_start_for_this_one(self, make_run, tmp_path):
        other = trained(tmp_path / "c", RobotShape(action_dim=7, state_dim=4, cameras=1))
        tuned = {"data__root": str(demonstrate(tmp_path / "d")), "train__start_from": str(other)}
        with pytest.raises(ValueError, match=r"another robot: action_dim 7 \(here 4\).*give --train.start_parts"):
            stages.check(make_run(**tuned), "train")
        stages.check(make_run("part", **tuned, train__start_parts="planner.backbone"), "train")

    def test_actions_beyond_the_simulators_are_said(self, make_run, tmp_path, capsys):
        episode = make_episode()
        episode.steps[3].action.label[1] = -7
        root = write_dataset([episode], tmp_path / "d", fps=METAWORLD_HZ)
        stages.check(make_run(data__root=str(root)), *ALL)
        assert "in [-1, 1] and cuts others; the data set goes beyond: action[1] up to 7" in capsys.readouterr().err

    @pytest.mark.parametrize(("family", "wrist"), [("metaworld", False), ("tabletop", False), ("tabletop", True)])
    def test_what_a_simulator_declares_is_what_it_is(self, family, wrist):
        from libra_ray.sim import control_hz, instructions, make_environment

        task = {"metaworld": "reach-v3", "tabletop": "chain2"}[family]
        sim = debug_config(sim__family=family, sim__wrist_camera=wrist, sim__tasks=task).sim
        environment, spec = make_environment(sim, task, 64), robot_spec(sim)
        assert (spec.action_dim, spec.state_dim) == (environment.action_dim, environment.state_dim)
        assert (spec.control_hz, spec.cameras) == (environment.control_hz, tuple(environment.image_shapes))
        assert spec.control_hz == control_hz(sim)
        assert {environment.reset(seed, render=False).instruction for seed in range(5)} == set(instructions(sim, range(5)))
        environment.close()


class TestOtherMeanings:
    """The same dimensions, rate and cameras, but other numbers: no shape tells."""

    OTHERWISE = (
        ({"names": ("y", "x", "z", "gripper")}, r"action names y, x, z, gripper \(simulator: x, y, z, gripper\)"),
        ({"delta": False}, r"action values absolute \(simulator: delta\)"),
        ({"gripper": 0}, r"action gripper x \(simulator: gripper\)"),
        ({"ranges": ((-2, 2),) * 4}, r"action ranges \[-2, 2\] each \(simulator: \[-1, 1\] each\)"),
        ({"rotation": "euler"}, r"action rotation euler \(simulator: none\)"),
    )

    @staticmethod
    def of(config, **changes) -> RobotShape:
        """What Meta-World's robot declares, changed."""
        shape = shape_of(robot_spec(config.sim))
        return replace(shape, action=replace(shape.action, **changes))

    @pytest.mark.parametrize(("change", "words"), OTHERWISE)
    def test_data_of_them_are_trained_on_but_not_to_be_evaluated(self, make_run, tmp_path, change, words):
        root = tmp_path / "d"
        write_dataset([make_episode()], root, fps=METAWORLD_HZ, declared=self.of(debug_config(), **change))
        folder = make_run(data__root=str(root))
        stages.check(folder, "train")
        with pytest.raises(
            ValueError, match=rf"data set \S*/d is of another robot .*{words}; it can .*say with data.action_names"
        ):
            stages.check(folder, *ALL)

    def test_what_the_data_say_wrongly_the_settings_say(self, make_run, tmp_path):
        root = tmp_path / "d"
        write_dataset([make_episode()], root, fps=METAWORLD_HZ, declared=self.of(debug_config(), delta=False, gripper=0))
        stages.check(make_run(data__root=str(root), data__action_is="delta", data__gripper="last"), *ALL)

    def test_settings_that_contradict_the_robot_to_be_recorded_are_refused(self, make_run):
        stages.check(make_run(data__gripper="3"), *ALL)
        with pytest.raises(
            ValueError, match=r"the data set to be recorded is of .*gripper y \(simulator: gripper\); leave out"
        ):
            stages.check(make_run("other", data__gripper="1"), *ALL)
        with pytest.raises(ValueError, match=r"data.gripper=7: an action of the data set to be recorded has 4 dimensions"):
            stages.check(make_run("none", data__gripper="7"), "record", "train")

    @pytest.mark.parametrize(("change", "words"), OTHERWISE)
    def test_a_checkpoint_of_them_is_not_evaluated(self, make_run, tmp_path, change, words):
        folder = make_run(evaluate__checkpoint=str(trained(tmp_path / "c", self.of(debug_config(), **change))))
        for refuse in (lambda: stages.check(folder, "evaluate"), lambda: evaluation.load_trained(folder, "policy")):
            with pytest.raises(ValueError, match=rf"checkpoint \S*/c is of another robot .*{words}"):
                refuse()

    def test_a_checkpoint_of_the_same_is_and_its_actions_are_held_as_they_are(self, make_run, tmp_path):
        shape = self.of(debug_config())
        folder = make_run(evaluate__checkpoint=str(trained(tmp_path / "c", shape)))
        stages.check(folder, "evaluate")
        driver = evaluation.driver_of(folder, evaluation.load_trained, "policy")
        assert driver.action == shape.action != UNDECLARED

    def test_they_are_no_start_as_a_whole_and_said_of_a_part(self, make_run, tmp_path, capsys):
        root, other = tmp_path / "d", trained(tmp_path / "c", self.of(debug_config(), delta=False))
        write_dataset([make_episode()], root, fps=METAWORLD_HZ, declared=self.of(debug_config()))
        tuned = {"data__root": str(root), "train__start_from": str(other)}
        said = r"numbers mean something else: action values absolute \(here delta\)"
        for parts in ("", "planner,refiner"):
            with pytest.raises(ValueError, match=rf"train.start_from=\S*/c .*{said}; give a checkpoint of this robot"):
                stages.check(make_run(f"whole-{parts}", **tuned, train__start_parts=parts), "train")
        stages.check(make_run("part", **tuned, train__start_parts="planner.backbone"), "train")
        assert re.search(rf"{said}; only planner.backbone of it is taken", capsys.readouterr().err)
        same = str(trained(tmp_path / "same", self.of(debug_config())))
        stages.check(make_run("same", **tuned | {"train__start_from": same}), "train")
        stages.check(make_run("silent", **tuned | {"train__start_from": str(trained(tmp_path / "silent"))}), "train")

    def test_training_is_not_resumed_under_them(self, make_run, tmp_path):
        root = tmp_path / "d"
        write_dataset([make_episode()], root, fps=METAWORLD_HZ, declared=self.of(debug_config()))
        folder = make_run(data__root=str(root))
        with folder.stage("train"):
            open_to_train(folder)
        stages.check(folder, "train")
        info = root / "meta" / "info.json"
        before, silent = info.read_text(), json.loads(info.read_text())
        del silent["features"]["action"]["libra_ray"]["gripper"]
        for text, words in (
            (before.replace('"delta": true', '"delta": false'), r"action values absolute \(then delta\)"),
            (json.dumps(silent), r"action gripper not declared \(then gripper\)"),
        ):
            info.write_text(text)
            for refuse in (lambda: stages.check(folder, "train"), lambda: open_to_train(folder)):
                with pytest.raises(ValueError, match=rf"says otherwise what its numbers mean .*{words}; restore its meta/info"):
                    refuse()
        info.write_text(before)
        stages.check(folder, "train")

    def test_a_run_of_a_version_that_did_not_say_goes_on(self, make_run, tmp_path):
        folder = make_run(data__root=str(demonstrate(tmp_path / "d")))
        with folder.stage("train"):
            open_to_train(folder)
        folder.note(ROBOT, None)
        stages.check(folder, "train")


class TestDataThatChanged:
    @pytest.fixture
    def begun(self, make_run, tmp_path) -> RunFolder:
        """A run whose training was interrupted."""
        folder = make_run(data__root=str(demonstrate(tmp_path / "d")))
        with folder.stage("train"):
            open_to_train(folder)
        return folder

    def test_the_same_data_go_on(self, begun):
        stages.check(begun, *ALL)
        assert open_to_train(begun).fingerprint == began_with(begun)

    @pytest.mark.parametrize("done", [False, True])
    def test_other_data_are_refused_whether_training_ended_or_not(self, begun, done):
        if done:
            begun.note("train", {"done": True, "wall_s": 1.0})
        demonstrate(begun.dataset, 5)
        for refuse in (lambda: stages.check(begun, "train"), lambda: stages.check(begun, *ALL), lambda: open_to_train(begun)):
            with pytest.raises(ValueError, match=r"it has 5 episodes \(then 3\), 50 frames \(then 27\); give --fresh"):
                refuse()

    def test_fresh_begins_with_the_other_data(self, begun):
        demonstrate(begun.dataset, 5)
        stages.check(begun, "train", fresh=True)
        again = RunFolder.open(begun.root, begun.config, forget=("train", "evaluate"))
        assert again.fact(FACT, Fingerprint) is None
        assert open_to_train(again).fingerprint.episodes == began_with(again).episodes == 5

    def test_a_run_of_a_version_that_did_not_say_goes_on(self, begun):
        begun.note(FACT, None)
        demonstrate(begun.dataset, 5)
        stages.check(begun, "train")
        assert open_to_train(begun).fingerprint == began_with(begun)

    def test_the_report_says_that_the_policy_is_of_other_data(self, begun):
        data, model = open_to_train(begun), tiny_model(shape=RobotShape(action_dim=4, state_dim=4, cameras=1))
        checkpoint.save(begun.checkpoint, model, model.state_dict(), data.stats, data.spec, step=4)
        assert dataset_facts(begun).checkpoint_trained_on_another is None
        demonstrate(begun.dataset, 5)
        stages.check(begun, "evaluate")
        facts = dataset_facts(begun)
        assert (facts.episodes, facts.checkpoint_trained_on_another.episodes) == (5, 3)


class TestInstructionsThatAreTooLong:
    SAID = r"tokens \(bytes\) too long; raise planner.max_text_tokens=20 to at least"

    def test_of_a_data_set(self, make_run, tmp_path):
        root = demonstrate(tmp_path / "d", instruction="put the red block into the left bin")
        short = {"data__root": str(root), "planner__max_text_tokens": 20}
        with pytest.raises(ValueError, match=rf"15 {self.SAID} 35"):
            stages.check(make_run(**short), "train")
        stages.check(make_run("enough", data__root=str(root), planner__max_text_tokens=35), "train")

    def test_of_tasks_that_will_be_recorded(self, make_run):
        with pytest.raises(ValueError, match=self.SAID):
            stages.check(make_run(sim__tasks="bin-picking-v3", planner__max_text_tokens=20), *ALL)

    def test_of_tasks_that_a_trained_policy_is_to_do(self, make_run, tmp_path):
        path = trained(tmp_path / "c", planner__max_text_tokens=20)
        folder = make_run(sim__tasks="bin-picking-v3", evaluate__checkpoint=str(path))
        with pytest.raises(ValueError, match=self.SAID):
            stages.check(folder, "evaluate")
        with pytest.raises(ValueError, match=self.SAID):
            evaluation.load_trained(folder, "policy")

    @pytest.mark.parametrize("family", ["llava", "internvl"])
    def test_by_a_pretrained_backbone_without_its_weights(self, make_run, tmp_path, family):
        source = {"planner__backbone": str(families.write(tmp_path / "model", families.FAMILIES[family]()))}
        for most in (3, 9):
            trained(tmp_path / str(most), **source, planner__max_text_tokens=most)
        evaluated = {most: make_run(f"r{most}", evaluate__checkpoint=str(tmp_path / str(most))) for most in (3, 9)}
        shutil.rmtree(tmp_path / "model")
        stages.check(evaluated[9], "evaluate")
        with pytest.raises(ValueError, match=r"too long; raise planner.max_text_tokens=3"):
            stages.check(evaluated[3], "evaluate")

    def test_of_tasks_beside_the_data_sets_own(self, make_run, tmp_path):
        root = demonstrate(tmp_path / "d", instruction="")
        folder = make_run(data__root=str(root), sim__tasks="bin-picking-v3", planner__max_text_tokens=20)
        stages.check(folder, "train")
        with pytest.raises(ValueError, match=self.SAID):
            stages.check(folder, *ALL)


class TestMeasuredLatencies:
    """A trace is opened before anything is recorded or trained, for the levels of the policy that will be evaluated."""

    def test_one_that_is_none_is_refused(self, make_run, tmp_path):
        folder = make_run(delay__trace=str(tmp_path / "drive.json"))
        with pytest.raises(ValueError, match=r"delay.trace=\S*/drive.json holds no latencies .*jobs/drive.py --out"):
            stages.check(folder, *ALL)
        stages.check(make_run("alone", delay__trace=str(tmp_path / "drive.json")), "record")
        scripted = {"delay__trace": str(tmp_path), "evaluate__controllers": "expert,zero_action"}
        stages.check(make_run("scripted", **scripted), *ALL)

    def test_the_levels_are_those_of_what_is_evaluated(self, make_run, tmp_path):
        trace = tmp_path / "drive.json"
        trace.write_text(json.dumps({LATENCIES: {"policy": [1.0]}}))
        stages.check(make_run(delay__trace=str(trace), model__system="monolithic"), *ALL)
        given = {"evaluate__checkpoint": str(trained(tmp_path / "c")), "delay__trace": str(trace)}
        for name, system, which in (("own", "libra", ("evaluate",)), ("both", "monolithic", ALL)):
            with pytest.raises(ValueError, match=r"no latencies of level planner, but of policy; .*are planner, refiner"):
                stages.check(make_run(name, model__system=system, **given), *which)

    def test_an_evaluation_that_is_over_needs_none(self, make_run, tmp_path):
        folder = make_run(evaluate__checkpoint=str(trained(tmp_path / "c")), delay__trace=str(tmp_path / "gone.json"))
        with folder.stage("evaluate"):
            pass
        stages.check(folder, "evaluate")
        with pytest.raises(ValueError, match=r"gone\.json"):
            stages.check(folder, "evaluate", fresh=True)


class TestWhatIsEvaluated:
    """Two policies' episodes never meet in one report, and a report never speaks of another policy than was evaluated."""

    @pytest.fixture
    def begun(self, make_run, tmp_path) -> RunFolder:
        (tmp_path / "drive.json").write_text(json.dumps({LATENCIES: {"planner": [100.0], "refiner": [1.0]}}))
        given = {"evaluate__checkpoint": str(trained(tmp_path / "c")), "delay__trace": str(tmp_path / "drive.json")}
        folder = make_run(**given)
        with folder.stage("evaluate"):
            keep_subject(folder)
        return folder

    @pytest.mark.parametrize("done", [False, True], ids=["interrupted", "over"])
    @pytest.mark.parametrize("changed", ["c", "drive.json"])
    def test_it_is_the_same_at_every_start(self, begun, tmp_path, monkeypatch, done, changed):
        begun.note("evaluate", StageTime(done=done, wall_s=1.0))
        stages.check(begun, "evaluate")
        if changed == "c":
            trained(tmp_path / "c", train__seed=1)
        else:
            (tmp_path / "drive.json").write_text(json.dumps({LATENCIES: {"planner": [900.0], "refiner": [1.0]}}))
        monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("another policy is evaluated"))
        for refuse in (lambda: stages.check(begun, "evaluate"), lambda: stages.evaluate(begun)):
            with pytest.raises(ValueError, match=rf"{changed} is another one than the evaluation of run began with; restore"):
                refuse()
        stages.check(begun, "evaluate", fresh=True)

    def test_the_stage_itself_binds_the_run(self, make_run, tmp_path, monkeypatch):
        folder = make_run(evaluate__checkpoint=str(trained(tmp_path / "c")))
        monkeypatch.setattr(evaluation, "evaluate", lambda *_: None)
        stages.evaluate(folder)
        trained(tmp_path / "c", train__seed=1)
        with pytest.raises(ValueError, match="is another one than"):
            stages.evaluate(folder)
        stages.evaluate(RunFolder.open(folder.root, folder.config, forget=("evaluate",)))

    def test_one_that_is_over_goes_on_without_the_trace_it_had(self, begun, tmp_path):
        begun.note("evaluate", StageTime(done=True, wall_s=1.0))
        (tmp_path / "drive.json").unlink()
        stages.check(begun, "evaluate")
