"""Which trial comes next, without a cluster: seeds, replay after a crash, the budget in hours, what Optuna learns."""

import errno
import json
import shutil
import time
from pathlib import Path

import pytest
import sweep as job
from arguments import parse

from libra_ray.config import override, preset
from libra_ray.data.dataset import write_dataset
from libra_ray.on_ray.sweep import runner, trial
from libra_ray.on_ray.sweep.importance import parameter_importance
from libra_ray.on_ray.sweep.searcher import TrialSearcher, make_source
from libra_ray.on_ray.sweep.sweep_folder import SweepFolder, TrialFolder, TrialSpec
from libra_ray.on_ray.sweep.trial import bind, rung_step, train_until
from libra_ray.runs.folder import Clock, RunFolder
from libra_ray.runs.trials import Settings, TrialResult, configurations
from tests.data.builders import make_episode
from tests.on_ray.doubles import debug_config
from tests.spaces import load_space

TASK = "reach-v3"
FIRST_EDITION = Path(__file__).parents[1] / "fixtures" / "first_edition" / "sweep"
DATA_OF_FIRST_EDITION = "/runs/debug-joint/data/22adc311b5ec/dataset"


@pytest.fixture
def open_sweep(tmp_path):
    """A sweep's folder; opened again it is continued."""

    def make(space="granularity", *, data="", **settings) -> SweepFolder:
        config = debug_config(data__root=str(data))
        defaults = {"search": "grid", "scheduler": "fifo", "trials": 3, "seeds": 2}
        resume = (tmp_path / "sweep" / "plan.json").exists()
        chosen = Settings(**(defaults | settings))
        return SweepFolder.open(tmp_path / "sweep", config, load_space(space, config), chosen, resume=resume)

    return make


def test_a_sweep_from_before_a_setting_existed_goes_on(open_sweep):
    path = open_sweep().run.root / "plan.json"
    plan = json.loads(path.read_text())
    assert plan.pop("record.episodes_of") == []
    path.write_text(json.dumps(plan))
    open_sweep()
    path.write_text(json.dumps({**plan, "record.episodes_of": ["reach-v3=9"]}))
    with pytest.raises(ValueError, match=r"another record\.episodes_of"):
        open_sweep()


def test_a_sweep_of_the_first_edition_goes_on(tmp_path):
    """Its plan and its orders are in that edition's words and defaults."""
    shutil.copytree(FIRST_EDITION, root := tmp_path / "debug-joint")
    config = override(preset("debug"), {"train.steps": 18, "train.validate_every": 4})
    settings = Settings(search="optuna", scheduler="asha", trials=3, seeds=1)
    space = load_space("joint", config)
    sweep = SweepFolder.open(root, config, space, settings, resume=True)
    assert [result.status for result in sweep.results()] == ["finished"] * 3
    for spec in sweep.specs():
        own = {"data.root": DATA_OF_FIRST_EDITION, "evaluate.controllers": "policy", "evaluate.videos_per_task": 0}
        asked = TrialFolder(root=root / "trials" / spec.name).spec().config_with(simulator_actors=2)
        assert asked == override(config, {**spec.values, **own, "ray.simulator_actors": 2})
    Tune(sweep).play()
    assert len(sweep.specs()) == 3, "all were finished"
    for name, value in {"model.system": "monolithic", "delay.intent_steps": 2, "train.start_parts": "planner"}.items():
        with pytest.raises(ValueError, match=rf"another {name} \("):
            SweepFolder.open(root, override(config, {name: value}), space, settings, resume=True)


def test_all_trials_have_the_data_that_the_first_one_had(open_sweep, tmp_path):
    """Changed between two starts of a sweep, or while it runs, they are refused, by the job as by a trial."""
    root = write_dataset([make_episode(seed=n) for n in range(2)], tmp_path / "d", fps=80)
    sweep = open_sweep(data=root)
    runner._record(sweep)
    begun = sweep.write(TrialSpec(number=0, seed=0, values={"action.bins": 6}))
    config = begun.spec().config_with()
    open_sweep(data=root)
    shutil.rmtree(root)
    write_dataset([make_episode(seed=n) for n in range(3)], root, fps=80)
    with pytest.raises(ValueError, match=r"it has 3 episodes \(then 2\)"):
        open_sweep(data=root)
    folder = RunFolder.open(begun.root, config)
    bind(folder, begun.spec())
    with pytest.raises(ValueError, match=r"it has 3 episodes \(then 2\)"):
        train_until(folder, 2, Clock(folder, "train", 0, 0))


class Tune:
    """Asks for trials and ends them as Ray Tune would; a trial succeeds the more often the nearer N is to 10."""

    def __init__(self, sweep: SweepFolder, deadline=None):
        self.ended = []
        self.searcher = TrialSearcher(
            sweep,
            make_source(sweep),
            threads=1,
            simulator_actors=1,
            deadline=deadline,
            ended=lambda _, result: self.ended.append(result),
        )
        self.count = 0

    def ask(self) -> str | None:
        self.count += 1
        config = self.searcher.suggest(str(self.count))
        return None if config == "FINISHED" else str(self.count)

    def end(self, trial_id: str, *, error=False):
        spec, trial = self.searcher._live[trial_id]
        if trial.result() is None and not error:
            trial.end(_result(spec))
        self.searcher.on_trial_complete(trial_id, error=error)

    def play(self, at_most=1000):
        while at_most and (trial_id := self.ask()):
            self.end(trial_id)
            at_most -= 1


def _result(spec: TrialSpec) -> TrialResult:
    successes = 20 - abs(int(spec.values["action.bins"]) - 10) // 5 - spec.seed
    values = spec.values
    return TrialResult(
        number=spec.number,
        seed=spec.seed,
        values=values,
        status="finished",
        episodes={"policy": {TASK: [k < successes for k in range(20)]}},
        latency_ms=10.0 / values.get("action.horizon", 5),
    )


def _names(sweep: SweepFolder) -> list[str]:
    return [spec.name for spec in sweep.specs()]


def test_a_list_runs_every_point_with_one_seed_before_the_next_seed(open_sweep):
    tune = Tune(sweep := open_sweep())
    tune.play()
    assert [(r.number, r.seed) for r in tune.ended] == [(n, seed) for seed in (0, 1) for n in range(3)]
    assert _names(sweep) == [f"{n:04d}-seed{seed}" for n in range(3) for seed in (0, 1)]


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_after_a_crash_the_same_trials_come_again_and_then_the_rest(search, open_sweep):
    first = Tune(sweep := open_sweep(search=search, trials=4))
    first.play(at_most=3)
    first.ask(), first.ask()  # under way when the driver dies
    before = {spec.name: spec.values for spec in sweep.specs()}
    assert len(before) == 5
    again = Tune(open_sweep(search=search, trials=4))
    again.play()
    after = {spec.name: spec.values for spec in open_sweep(search=search, trials=4).specs()}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(again.ended) == 8
    assert len(sweep.results()) == 8


def test_after_the_budget_only_what_has_ended_is_heard_of_again(open_sweep):
    first = Tune(open_sweep())
    first.play(at_most=2)
    first.ask()  # under way when the driver dies
    late = Tune(sweep := open_sweep(), deadline=time.monotonic())
    late.play()
    assert [(r.number, r.seed) for r in late.ended] == [(0, 0), (1, 0)]
    assert len(sweep.results()) == 2


def test_optuna_finds_the_better_half_of_the_space(open_sweep):
    tune = Tune(sweep := open_sweep(search="optuna", trials=30))
    tune.play()
    found = configurations(sweep.results())
    assert [len(c.trials) for c in found] == [2] * 30
    near = [abs(int(c.values["action.bins"]) - 10) < 10 for c in found]
    assert sum(near[15:]) > sum(near[:15]), "it learns from what it was told"


def test_optuna_takes_two_objectives_and_failures(open_sweep):
    tune = Tune(sweep := open_sweep(space="joint", search="optuna", trials=12, seeds=1))
    for _ in range(4):
        tune.end(tune.ask(), error=True)
    tune.play()
    results = sweep.results()
    assert [r.status for r in results].count("failed") == 4
    assert all("died" in r.error for r in results if r.status == "failed")
    shares = parameter_importance(sweep.space, configurations(results))
    assert shares["latency_ms"]["action.horizon"] == max(shares["latency_ms"].values()), "which alone decides it"
    assert sum(shares["success"].values()) == pytest.approx(1)


def raise_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def run_trial(monkeypatch):
    """Runs the trial in a folder, its work being what is given; returns the last report."""

    def run(folder, work):
        reports = []
        monkeypatch.setattr(trial, "_work", work)
        monkeypatch.setattr(trial.tune, "report", reports.append)
        trial.run_trial({"trial": str(folder.root), "threads": 1, "simulator_actors": 1})
        return reports[-1]

    return run


def test_a_full_disk_ends_the_sweep_and_is_no_trials_failure(open_sweep, run_trial):
    """It would come again with every trial; none is written off, and all of them are there to be continued."""
    tune = Tune(sweep := open_sweep())
    first, other = tune.ask(), tune.ask()
    folder = tune.searcher._live[first][1]
    report = run_trial(folder, raise_full)
    assert folder.result() is None
    tune.searcher.on_trial_complete(first, report)
    assert tune.searcher.no_room.startswith(f"no space left on the disk of {folder.root}")
    assert runner.OutOfRoom(tune.searcher).stop_all()
    assert tune.ask() is None
    tune.searcher.on_trial_complete(other)
    assert (tune.ended, sweep.results()) == ([], [])
    again = Tune(open_sweep())
    again.play()
    assert len(again.ended) == 6


def test_other_failures_of_a_trial_are_its_own(open_sweep, run_trial):
    tune = Tune(open_sweep())
    folder = tune.searcher._live[number := tune.ask()][1]
    tune.searcher.on_trial_complete(number, run_trial(folder, lambda *_: 1 / 0))
    assert folder.result().status == "failed"
    assert not runner.OutOfRoom(tune.searcher).stop_all()
    assert tune.ask()


def test_one_that_the_scheduler_stopped_is_that(open_sweep):
    tune = Tune(sweep := open_sweep())
    trial_id = tune.ask()
    tune.searcher.on_trial_complete(trial_id, result={"success": 0.1})
    assert [r.status for r in sweep.results()] == ["stopped"]


def test_trials_share_a_recording_and_differ_in_their_seed(open_sweep):
    Tune(sweep := open_sweep()).play()
    specs = [trial.spec() for trial in (sweep.write(spec) for spec in sweep.specs())]
    assert len({spec.config["data"]["root"] for spec in specs}) == 1
    assert {spec.config["train"]["seed"] for spec in specs} == {0, 1}
    assert {tuple(spec.config["evaluate"]["controllers"]) for spec in specs} == {("policy",)}


@pytest.mark.parametrize("steps", [1, 17, 20, 4000])
def test_rungs_are_steps_of_the_log(steps):
    config = override(debug_config(), {"train.steps": steps, "train.log_every": 7})
    reached = [rung_step(config, budget) for budget in (1, 3, 9)]
    assert reached == sorted(reached)
    assert reached[-1] == steps
    assert all(step % 7 == 0 or step == steps for step in reached)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["granularity", "--scheduler=pbt"], "change nothing"),
        (["granularity", "--scheduler=hyperband"], "asha, fifo"),
        (["granularity", "--resume"], "no sweep to continue"),
        (["granularity", "--trials=-1"], "--trials -1 is too small"),
        (["granularty"], "anchor_refine, balance, coarse_to_fine, encoder, experts, granularity, hierarchy, joint"),
        (["balance", "--search=grid"], "train.lambda_plan"),
        (["granularity", "--sim.tasks=reach"], "reach-v3"),
        (["granularity", "--trails=3"], "did you mean --trials"),
        ([], "which SPACE"),
    ],
)
def test_nonsense_is_refused_before_any_work(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sweep.py", "debug", "--runs", str(tmp_path), *argv])
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("the cluster was started"))
    with pytest.raises(SystemExit) as end:
        job.main()
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.rglob("*.json"))


def test_resources_of_a_trial(monkeypatch):
    def cluster(cpus, gpus=0):
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})

    def share(concurrent=0, **changes):
        found = runner.trial_resources(debug_config(**changes), concurrent)
        return found.concurrent, found.cpus, found.gpus

    cluster(2)
    assert share() == (2, 1, 0)
    assert share(1) == (1, 1, 0)
    assert share(ray__train_cpus_per_worker=2) == (1, 2, 0)
    with pytest.raises(ValueError, match="want 3 CPUs"):
        share(3)
    with pytest.raises(ValueError, match="no GPU"):
        share(ray__use_gpu=True)
    with pytest.raises(ValueError, match="want 3 CPUs"):
        share(ray__train_workers=2)
    cluster(16, gpus=2)
    assert share(ray__use_gpu=True) == (2, 8, 1)
    assert share(8, ray__use_gpu=True) == (8, 2, 0.25)
    assert share(ray__train_workers=3) == (4, 1, 0)


def test_the_default_name_says_preset_and_space():
    given = parse(["debug", "some/where/mine.py"], "", stage="sweep", more=job.OPTIONS, default_name=job.default_name)
    assert given.name == "debug-mine"
