"""The application's arguments: refused clearly before anything starts; and when replicas are wanted."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given, strategies

from libra_ray.config import PolicyConfig
from libra_ray.on_ray.serving import scaling
from libra_ray.serving.settings import ServingSettings

LEVELS = ["director", "planner", "refiner"]
FIRST_EDITION = Path(__file__).parents[1] / "fixtures" / "first_edition" / "registered_model" / "data" / "checkpoint"


def test_defaults_need_a_checkpoint_and_nothing_else():
    settings = ServingSettings.read({"checkpoint": "runs/quickstart/checkpoint"}).with_levels(LEVELS)
    assert settings.host == "127.0.0.1"
    assert list(settings.levels) == LEVELS
    director, planner, refiner = settings.levels.values()
    assert director == planner
    assert (planner.num_cpus, planner.nice, planner.timeout_s, planner.max_batch) == (0.5, 19, 10.0, 64)
    assert (refiner.num_cpus, refiner.nice, refiner.timeout_s, refiner.max_batch) == (1.0, 0, 2.0, 64)
    assert ServingSettings(checkpoint="c").with_levels(["policy"]).levels["policy"] == refiner, "the only level acts"


def test_dotted_names_reach_into_the_parts_and_leave_the_rest():
    given = {"checkpoint": "c", "levels.planner.replicas": "2", "levels": {"planner": {"threads": 3}, "refiner.nice": 5}}
    settings = ServingSettings.read(given | {"rule": "fifo"}).with_levels(LEVELS)
    planner, refiner = settings.levels["planner"], settings.levels["refiner"]
    assert (planner.replicas, planner.threads, refiner.nice) == (2, 3, 5)
    usual = ServingSettings(checkpoint="c").with_levels(LEVELS).levels
    assert planner.nice == usual["planner"].nice
    assert planner.num_cpus == usual["planner"].num_cpus
    assert settings.with_levels(LEVELS) == settings


def test_levels_that_the_policy_has_not_are_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"^levels.planer: no such level; checkpoint c has director, planner, refiner$"):
        ServingSettings.read({"checkpoint": "c", "levels.planer.replicas": 2}).with_levels(LEVELS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": ""}, "checkpoint"),
        ({"chekpoint": "c"}, "did you mean checkpoint"),
        ({"levels.planner.replica": 2}, "did you mean .*replicas"),
        ({"gatway.replicas": 2}, "did you mean gateway"),
        ({"gateway": 3, "gateway.replicas": 1}, "one of both"),
        ({"levels.planner": 3, "levels.planner.replicas": 1}, "one of both"),
        ({"levels": 3}, "valid dictionary"),
        ({"levels.refiner.replicas": 0}, "greater than or equal to 1"),
        ({"levels.refiner.replicas": "many"}, "valid integer"),
        ({"levels.refiner.replicas": 3, "levels.refiner.max_replicas": 2}, "below replicas=3"),
        ({"rule": "sometimes"}, "'fifo', 'overlap' or 'event'"),
        ({"port": 70000}, "65535"),
        ({"host": "0.0.0.0"}, "give a token"),
        ({"max_message_bytes": 2**40}, "less than or equal"),
        *[
            ({name: -0.5}, f"{name}\n.*-0.5 is none; give -1, .* or a number from 0 on")
            for name in ("intent_timeout_s", "window_ms")
        ],
        *[({name: "inf"}, "finite number") for name in ("intent_timeout_s", "first_intent_timeout_s", "gateway.num_cpus")],
        *[({name: "nan"}, name) for name in ("intent_timeout_s", "control_hz", "levels.planner.timeout_s")],
        ({"levels.planner.replicas": 1, "levels": {"planner": {"replicas": 2}}}, "planner.replicas is given twice"),
    ],
)
def test_bad_arguments_say_what_is_valid(changes, words):
    with pytest.raises(ValueError, match=words):
        ServingSettings.model_validate({"checkpoint": "c", **changes})


def test_deployments_of_two_checkpoints_differ_only_by_weights_in_place():
    from libra_ray.on_ray.serving.app import _version

    one, other = ServingSettings(checkpoint="a"), ServingSettings(checkpoint="b", revision="2")
    assert _version(one) == _version(other)
    assert _version(one) != _version(ServingSettings(checkpoint="a", rule="fifo"))
    assert one.user_config() != other.user_config()


@pytest.mark.parametrize("levels", [["policy"], ["planner", "refiner"], LEVELS])
def test_a_deployment_per_level_each_scaled_by_its_own_measure(levels):
    from ray.serve._private.build_app import build_app

    from libra_ray.on_ray.serving.app import build

    given = {"checkpoint": "c"} | {f"levels.{name}.max_replicas": 2 + i for i, name in enumerate(levels)}
    settings = ServingSettings.read(given | {"gateway.max_replicas": 9}).with_levels(levels)
    built = build_app(build(settings), name="app", default_runtime_env={})
    found = {deployment.name: deployment._deployment_config.autoscaling_config for deployment in built.deployments}
    policies = {name: getattr(scaling, config.policy.policy_function.partition(":")[2]) for name, config in found.items()}
    *upper, last = [name.capitalize() for name in levels]
    assert policies == dict.fromkeys(upper, scaling.by_late_intents) | {
        last: scaling.by_missed_deadlines,
        "Gateway": scaling.by_connections,
    }
    assert [found[name].max_replicas for name in (*upper, last)] == [2 + i for i in range(len(levels))]


@pytest.mark.parametrize("levels", [["gateway"], ["plan", "Plan"]])
def test_levels_whose_deployments_would_have_one_name_are_refused(levels):
    from libra_ray.on_ray.serving.app import build

    with pytest.raises(ValueError, match="need deployments of different names"):
        build(ServingSettings(checkpoint="c").with_levels(levels))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"chekpoint": "a"}, "^unknown argument 'chekpoint'; did you mean checkpoint"),
        ({"checkpoint": "a", "levels.planner.replicas": "x"}, "^levels.planner.replicas: .*integer"),
        ({"checkpoint": "a", "planner.replicas": 2}, "^argument 'planner.replicas' .*it is now levels.planner.replicas$"),
        ({"checkpoint": "a", "refiner": {"threads": 2}}, "^argument 'refiner' .*it is now levels.refiner$"),
        ({"checkpoint": "a", "coarse_only": True}, "^argument 'coarse_only' .*it is now variant=coarse_only$"),
        ({"checkpoint": "a", "first_plan_timeout_s": 1}, "it is now first_intent_timeout_s$"),
        ({"checkpoint": "a", "host": "0.0.0.0"}, "^host='0.0.0.0' lets other machines"),
        ({}, "^checkpoint: Field required$"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, says):
    with pytest.raises(ValueError, match=says) as refused:
        ServingSettings.read(arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"committed_steps": 3}, r"committed_steps=3 is more than half of the 5 steps that checkpoint \S+ answers .*at most 2"),
        ({"execute_steps": 6}, r"execute_steps=6 is more than the 5 steps that checkpoint \S+ answers .*; give at most 5"),
        ({"variant": "coarse"}, r"of model.system=libra, which has no variant 'coarse'; it has coarse_only"),
        ({"levels.motor.replicas": 2}, r"levels.motor: no such level; checkpoint \S+ has planner, refiner"),
    ],
)
def test_what_the_checkpoint_does_not_allow_is_refused_before_anything_starts(arguments, says):
    from libra_ray.serving.weights import pinned

    checkpoint = {"checkpoint": str(FIRST_EDITION)}
    assert list(pinned(ServingSettings.read(checkpoint | {"committed_steps": 2, "execute_steps": 5})).levels) == LEVELS[1:]
    with pytest.raises(ValueError, match=says):
        pinned(ServingSettings.read(checkpoint | arguments))


def test_a_checkpoint_is_found_before_anything_starts(tmp_path, monkeypatch):
    from libra_ray.serving.weights import located

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"jobs/pipeline.py makes one"):
        located("runs/nowhere/checkpoint")
    folder = tmp_path / "runs" / "quickstart" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert located("runs/quickstart/checkpoint") == str(folder)
    with pytest.raises(ValueError, match="there are runs/quickstart/checkpoint"):
        located("runs/quickstart")
    assert located("models:/libra@champion") == "models:/libra@champion"


def test_the_file_for_serve_deploy_is_valid():
    from ray.serve.schema import ServeDeploySchema

    tree = yaml.safe_load((Path(__file__).parents[2] / "serve_apps" / "libra.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(tree).applications
    assert ServingSettings.read(application.args).levels["refiner"].max_replicas > 1
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@dataclass
class Context:
    """As long settled as a decision needs, where nothing else is said."""

    current_num_replicas: int
    aggregated_metrics: dict = field(default_factory=dict)
    target_num_replicas: int = 0
    policy_state: dict = field(default_factory=lambda: {"settled_at": 0.0})
    current_time: float = scaling.LOOK_BACK_S

    def __post_init__(self):
        self.target_num_replicas = self.target_num_replicas or self.current_num_replicas


def pressed(replicas, late_share, busy, **more):
    measures = {"late_share": dict.fromkeys(range(replicas), late_share), "busy": dict.fromkeys(range(replicas), busy)}
    return Context(replicas, measures, **more)


@given(strategies.integers(1, 50), strategies.floats(0, 1), strategies.floats(0, 1))
def test_replicas_move_by_one_and_only_where_the_rest_can_carry_it(replicas, late_share, busy):
    for policy in (scaling.by_late_intents, scaling.by_missed_deadlines):
        wanted, _ = policy(pressed(replicas, late_share, busy))
        assert wanted >= 1
        assert abs(wanted - replicas) <= 1
        if wanted < replicas:
            assert replicas * busy < scaling.BUSY * wanted


def test_late_intents_start_planners_and_missed_deadlines_start_refiners():
    assert scaling.by_late_intents(pressed(1, 0.5, 0.9))[0] == 2
    assert scaling.by_missed_deadlines(pressed(1, 0.5, 0.9))[0] == 2
    assert scaling.by_missed_deadlines(pressed(3, 0.0, 0.1))[0] == 2
    assert scaling.by_late_intents(pressed(1, 0.0, 0.0))[0] == 1
    assert scaling.by_late_intents(Context(2))[0] == 1


@given(strategies.integers(1, 9), strategies.integers(1, 9), strategies.floats(0, 1), strategies.floats(0, 1))
def test_nothing_is_decided_while_replicas_start_or_end(running, target, late_share, busy):
    """A start makes the others late, which is no reason for one more, and none to give it up when that is over."""
    for policy in (scaling.by_late_intents, scaling.by_missed_deadlines):
        context = pressed(running, late_share, busy, target_num_replicas=target, policy_state={"settled_at": 0.0})
        wanted, state = policy(context)
        if running != target:
            assert (wanted, state) == (target, {})


@pytest.mark.parametrize("jump_s", [-1e5, -1.0, 1e5])
def test_a_clock_that_is_set_delays_no_decision_for_longer_than_measures_take(jump_s):
    """Serve's time is that of day, which may be set back by an hour; a server under load must not wait for that hour."""
    state, wanted, now = {}, [], 1e6
    for second in range(20):
        now += 1.0 + (jump_s if second == 3 else 0.0)
        replicas, state = scaling.by_late_intents(pressed(1, 0.9, 0.9, policy_state=state, current_time=now))
        wanted.append(replicas)
    assert wanted[0] == 1
    assert 2 in wanted[: 5 + int(scaling.LOOK_BACK_S)]


def test_the_measures_of_a_start_must_be_over_before_the_next_decision():
    state, wanted = {}, []
    for second in range(12):
        number, state = scaling.by_late_intents(pressed(2, 1.0, 1.0, policy_state=state, current_time=100.0 + second))
        wanted.append(number)
    assert wanted == [2] * 6 + [3] * 6


@given(strategies.lists(strategies.integers(0, 500), min_size=1, max_size=8))
def test_gateways_follow_their_connections(connections):
    context = Context(len(connections), {"connections": dict(enumerate(connections))})
    wanted, _ = scaling.by_connections(context)
    assert wanted * scaling.CONNECTIONS >= sum(connections)
    assert (wanted - 1) * scaling.CONNECTIONS < max(1, sum(connections))


@pytest.mark.parametrize(("name", "kind"), get_type_hints(PolicyConfig).items())
def test_a_server_runs_networks_in_every_way_that_evaluation_does(name, kind):
    for choice in get_args(kind):
        settings = ServingSettings.read({"checkpoint": "c", f"policy.{name}": choice})
        assert settings.policy.changes[f"policy.{name}"] == choice
