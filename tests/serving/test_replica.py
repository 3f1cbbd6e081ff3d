"""A level as a process computes, without Ray around it; and whole systems behind a gateway in this process."""

import asyncio
import dataclasses
import json
import os
import shutil
import threading

import numpy as np
import pytest

from libra_ray.client.protocol import Handshake, Reply, pack, request, unpack
from libra_ray.control.margin import Latency
from libra_ray.inference import engine as engines
from libra_ray.inference.recording import CallAgain
from libra_ray.policy import load_policy
from libra_ray.serving.batches import InferenceBatch, InferenceRequest
from libra_ray.serving.gateway import GatewayCore
from libra_ray.serving.replica import LevelReplica, described
from libra_ray.serving.requests import BadRequestError
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import UnknownWeightsError, pinned, weights_key
from libra_ray.spec import VectorSpec
from libra_ray.types import ActionChunk, Intent
from tests.model import families, vision_models
from tests.model.builders import INSTRUCTIONS, SHAPE, make_observation, save_checkpoint, tiny_model
from tests.serving.bench import StubEngine
from tests.serving.stubs import LEVELS, LocalHandle, observe


class Noting:
    """A policy that notes the priority of the thread it is asked in."""

    levels = LEVELS

    def __init__(self):
        self.priorities = []

    def infer(self, level, observations, above):
        self.priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        if level == "planner":
            return [Intent(level=level, values={"tokens": np.zeros((10, 5), int)}, first_step=0, covers=10)]
        return [ActionChunk(actions=np.zeros((5, 5), np.float32), first_step=0, intent_first_step=0)]


def replicas(**given):
    settings = ServingSettings.read({"checkpoint": "c"} | given).with_levels(["planner", "refiner"])
    return LevelReplica(settings, "planner"), LevelReplica(settings, "refiner")


async def asked(replica, **options):
    policy, key = Noting(), weights_key(replica._settings.user_config())
    replica._policies[key] = policy, Latency(p50_ms=1, p95_ms=1)
    request = InferenceRequest(number=0, observation=observe(0))
    await replica.infer(InferenceBatch(weights=key, requests=[request], **options))
    return policy


def test_the_handshake_says_what_the_checkpoints_numbers_mean(tmp_path):
    arm = VectorSpec(names=("x", "y", "z", "grip"), ranges=((-1, 1),) * 4, gripper=3, delta=True, rotation="none")
    shape = dataclasses.replace(SHAPE, action=arm, state=VectorSpec(delta=False))
    save_checkpoint(tmp_path / "c", tiny_model(shape=shape))
    policy = load_policy(tmp_path / "c")
    shake = Handshake(**described(policy), execute_steps=1, rule="overlap", max_message_bytes=1)
    assert Handshake.read(unpack(pack(shake.message()))).robot == policy.source.manifest.robot
    assert shake.robot.action == arm


@pytest.mark.parametrize(("given", "behind"), [({}, 19), ({"levels.planner.nice": 7}, 7)])
def test_only_intents_that_can_wait_go_behind_and_what_is_urgent_does_not(given, behind):
    async def work():
        here = os.getpriority(os.PRIO_PROCESS, 0)
        planner, refiner = replicas(**given)
        for _ in range(2):
            assert (await asked(planner)).priorities[-1] == min(19, here + behind)
            assert (await asked(planner, urgent=True)).priorities[-1] == here
            assert (await asked(refiner)).priorities[-1] == here
        assert os.getpriority(os.PRIO_PROCESS, 0) == here

    asyncio.run(work())


def test_a_replica_says_how_late_and_how_busy_it_was_since_it_was_last_asked():
    async def work():
        planner, _ = replicas()
        for share in (0.0, 0.5, 1.0):
            await asked(planner, late_share=share)
        stats = planner.record_autoscaling_stats()
        assert stats["late_share"] == 0.5
        assert 0 < stats["busy"] <= 1
        assert planner.record_autoscaling_stats()["late_share"] == 0

    asyncio.run(work())


class Local:
    """Every level of a checkpoint in this process, behind a gateway."""

    def __init__(self, checkpoint, **given):
        self.settings = pinned(ServingSettings.read({"checkpoint": str(checkpoint)} | given))
        self.levels = {name: LevelReplica(self.settings, name) for name in self.settings.levels}
        self.core = GatewayCore(self.settings, {name: LocalHandle(level) for name, level in self.levels.items()}, StubEngine())

    async def start(self):
        for level in self.levels.values():
            await level.reconfigure(self.settings.user_config())
        self.core.weight_switch.switch_to(self.settings.user_config())
        await self.core.weight_switch.loaded.wait()
        return self

    async def ask(self, number, step=0, **extra):
        seen = dataclasses.replace(make_observation(number), step=step)
        return Reply.read(await self.core.answer(request(seen, robot=f"robot {number}", **extra), "nameless"))


def offline(policy, number, step, first_steps):
    """The chunk of levels that were each asked at their own step."""
    intents = {None: None}
    for level in policy.levels[:-1]:
        seen = dataclasses.replace(make_observation(number), step=first_steps[level.name])
        [intents[level.name]] = policy.infer(level.name, [seen], [intents[level.reads]])
    seen = dataclasses.replace(make_observation(number), step=step)
    last = policy.levels[-1]
    [chunk] = policy.infer(last.name, [seen], [intents[last.reads]])
    return chunk.actions


SERVED = {
    "libra": {},
    "monolithic": {"evaluate.controllers": "policy"},
    "coarse_to_fine": {},
    "anchor_refine": {"anchor_refine.backbone": "diffusion", "anchor_refine.levels": "two"},
    "experts": {},
    "hierarchy": {},
    "tests.serving.three_levels:ThreeLevels": {},
}


@pytest.fixture(scope="module", params=SERVED.items(), ids=list(SERVED))
def system(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("system") / "checkpoint"
    name, changes = request.param
    save_checkpoint(folder, tiny_model({"model.system": name, "control.rule": "fifo", **changes}))
    return folder


def test_robots_are_told_how_well_every_level_keeps_up_before_any_was_served(system):
    async def work():
        served = await Local(system).start()
        told = Handshake.read(unpack(pack(served.core.greeting().message())))
        assert list(told.margin_steps) == list(served.levels)
        alone = {name: level._held(served.core.weight_switch.weights)[1] for name, level in served.levels.items()}
        assert served.core.weight_switch.latencies == alone
        assert all(0 < latency.p50_ms <= latency.p95_ms for latency in alone.values())

    asyncio.run(work())


def test_any_system_is_served_as_it_answers_offline(system):
    """One level, two or three: every chunk is what the policy itself says of the same intents, each of its own age."""
    policy = load_policy(system)

    async def work():
        served = await Local(system, rule="fifo", **{f"levels.{level.name}.timeout_s": 60 for level in policy.levels}).start()
        assert list(served.levels) == [level.name for level in policy.levels]
        handshake = Handshake.read(unpack(pack(served.core.handshake.message())))
        assert handshake.levels == policy.levels
        assert handshake.horizon == policy.levels[-1].covers

        async def robot(number):
            for step in range(0, 6 * handshake.horizon, handshake.horizon):
                reply = await served.ask(number, step)
                assert not reply.held
                # By this rule an intent is used up before the next one is made.
                first = {level.name: step - step % level.covers for level in policy.levels}
                np.testing.assert_allclose(reply.actions, offline(policy, number, step, first), atol=1e-4)
                reads = policy.levels[-1].reads
                assert reply.intent_first_step == (None if reads is None else first[reads])
                control = served.core.robots.named(f"robot {number}").control
                assert {name: control.current(name, step).first_step for name in first if name != policy.levels[-1].name} == {
                    level.name: first[level.name] for level in policy.levels[:-1]
                }

        await asyncio.gather(*[robot(number) for number in range(3)])

    asyncio.run(asyncio.wait_for(work(), 60))


def test_what_intents_say_to_people_is_in_the_replies_and_on_the_page(tmp_path):
    """Of any level: it is what the policy itself says of the intent in use, for as long as that is."""
    names = ("lift", "push", "touch")
    model = tiny_model({"model.system": "hierarchy"}, dataclasses.replace(SHAPE, subgoals=names))
    # So that words differ between robots.
    model.strategic.to_logits.weight.data.mul_(20)
    save_checkpoint(tmp_path / "checkpoint", model)
    policy = load_policy(tmp_path / "checkpoint")

    async def work():
        served = await Local(
            tmp_path / "checkpoint", rule="fifo", **{f"levels.{n.name}.timeout_s": 60 for n in policy.levels}
        ).start()
        replies = {number: [await served.ask(number, step) for step in (0, 5)] for number in range(4)}
        rows = {row.name: row.to_json() for row in served.core.snapshot().robots}
        for number, told in replies.items():
            [intent] = policy.infer(policy.levels[0].name, [dataclasses.replace(make_observation(number), step=0)], [None])
            assert [reply.metadata for reply in told] == [dict(intent.metadata)] * 2
            assert rows[f"robot {number}"]["metadata"] == intent.metadata
        assert len({str(told[0].metadata) for told in replies.values()}) > 1
        fleet = json.loads(json.dumps(served.core.snapshot().to_json(), allow_nan=False))
        assert {row["name"]: row["metadata"] for row in fleet["robots"]} == {
            f"robot {number}": told[0].metadata for number, told in replies.items()
        }

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_checkpoint_of_other_levels_is_refused_by_a_running_replica(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model())
    settings = ServingSettings(checkpoint="c").with_levels(["policy"])
    with pytest.raises(ValueError, match="has the levels planner, refiner; this application serves policy"):
        asyncio.run(LevelReplica(settings, "policy").reconfigure({"checkpoint": str(tmp_path / "checkpoint")}))


def test_a_variant_that_the_system_has_not_is_refused_where_it_is_typed(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model())
    given = {"checkpoint": str(tmp_path / "checkpoint")}
    with pytest.raises(ValueError, match=r"model.system=libra, which has no variant 'fast'; it has coarse_only"):
        pinned(ServingSettings.read(given | {"variant": "fast"}))
    with pytest.raises(ValueError, match=r"levels.policy: no such level; checkpoint .* has planner, refiner"):
        pinned(ServingSettings.read(given | {"levels.policy.replicas": 2}))
    assert list(pinned(ServingSettings.read(given | {"variant": "coarse_only"})).levels) == ["planner", "refiner"]


@pytest.fixture(scope="module")
def pretrained_checkpoint(tmp_path_factory):
    """With both parts from outside, whose folders are there no more."""
    folder = tmp_path_factory.mktemp("served")
    hub = families.write(folder / "language", families.FAMILIES["llava"]()), vision_models.dinov2(folder / "eyes")
    changes = {"planner.backbone": str(hub[0]), "refiner.encoder": str(hub[1]), "planner.max_text_tokens": 6}
    save_checkpoint(folder / "checkpoint", tiny_model(changes))
    for source in hub:
        shutil.rmtree(source)
    return folder / "checkpoint"


@pytest.mark.parametrize(("text", "reason"), [("open the door " * 9, "too long"), ("open the <image> door", "'<image>' in it")])
def test_a_pretrained_policy_is_served_from_its_checkpoint_and_refuses_words_of_one_robot(pretrained_checkpoint, text, reason):
    """Robots whose requests come in together: one line for the one, fresh actions for the others, and for it the next time."""

    async def work():
        settings = {f"levels.{name}.timeout_s": 60 for name in ("planner", "refiner")}
        core = (await Local(pretrained_checkpoint, window_ms=50, **settings, **{"levels.refiner.max_batch": 4}).start()).core

        def ask(number, words):
            seen = dataclasses.replace(make_observation(number), instruction=words, step=0)
            return core.answer(request(seen, robot=f"robot {number}", reset=True), "nameless")

        words = [INSTRUCTIONS[0], text, INSTRUCTIONS[1], "press the button"]
        outcomes = await asyncio.gather(*[ask(n, said) for n, said in enumerate(words)], return_exceptions=True)
        refusal = outcomes.pop(1)
        assert isinstance(refusal, BadRequestError)
        assert reason in str(refusal)
        assert "\n" not in str(refusal)
        for outcome in (*outcomes, await ask(1, INSTRUCTIONS[0])):
            reply = Reply.read(outcome)
            assert np.isfinite(reply.actions).all()
            assert not reply.held

    asyncio.run(asyncio.wait_for(work(), 60))


def test_the_third_weights_take_the_place_of_the_first_and_what_was_recorded_goes_on(tmp_path, monkeypatch):
    """No intent of the first weights is left then: those of the second are still read by them."""
    recorded = []

    class Counting(CallAgain):
        def record(self, call):
            recorded.append(call)
            return super().record(call)

    monkeypatch.setattr(engines, "_recorder", lambda device, how: Counting(device))
    for seed in range(3):
        save_checkpoint(tmp_path / str(seed), tiny_model({"train.seed": seed}))
    settings = pinned(ServingSettings.read({"checkpoint": str(tmp_path / "0"), "levels.planner.max_batch": 3}))
    configs = [{"checkpoint": str(tmp_path / str(seed)), "revision": ""} for seed in range(3)]
    keys = [weights_key(config) for config in configs]

    async def work():
        replica = LevelReplica(settings, "planner")

        async def tokens(key):
            request = InferenceRequest(number=0, observation=make_observation(0))
            result = await replica.infer(InferenceBatch(weights=key, requests=[request]))
            return result.answers[0].values["tokens"]

        await replica.reconfigure(configs[0])
        await replica.reconfigure(configs[1])
        first, second = await tokens(keys[0]), await tokens(keys[1])
        assert len(recorded) == 2 * 3, "1, 2 and 4 robots, of two policies"
        await replica.reconfigure(configs[2])
        assert len(recorded) == 2 * 3
        np.testing.assert_array_equal(await tokens(keys[1]), second)
        [expected] = load_policy(tmp_path / "2").infer("planner", [make_observation(0)], [None])
        np.testing.assert_array_equal(await tokens(keys[2]), expected.values["tokens"])
        assert not np.array_equal(first, expected.values["tokens"])
        with pytest.raises(UnknownWeightsError):
            await tokens(keys[0])

    asyncio.run(work())


def test_weights_that_robots_are_answered_by_stay_where_two_others_follow_at_once(tmp_path):
    """The second ones come and go before any gateway has switched to them; then the first are still in use."""
    for seed in range(3):
        save_checkpoint(tmp_path / str(seed), tiny_model({"train.seed": seed}))
    settings = pinned(ServingSettings.read({"checkpoint": str(tmp_path / "0")}))
    configs = [{"checkpoint": str(tmp_path / str(seed)), "revision": ""} for seed in range(3)]
    keys = [weights_key(config) for config in configs]

    async def work():
        replica = LevelReplica(settings, "planner")

        def asked(key):
            request = InferenceRequest(number=0, observation=make_observation(0))
            return replica.infer(InferenceBatch(weights=key, requests=[request]))

        await replica.reconfigure(configs[0])
        await asked(keys[0])
        for config in configs[1:]:
            await replica.reconfigure(config)
            await replica.describe(weights_key(config))
        await asked(keys[0])
        with pytest.raises(UnknownWeightsError):
            await asked(keys[1])
        await asked(keys[2])
        await replica.reconfigure(configs[1])
        await asked(keys[2])
        with pytest.raises(UnknownWeightsError):
            await asked(keys[0])

    asyncio.run(work())
