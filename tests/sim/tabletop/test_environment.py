"""The table obeys the laws of every simulator; on it language decides, precision and length are dials."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from libra_ray.config import Config, SimConfig, override
from libra_ray.evaluation.rollout import run
from libra_ray.sim import check_tasks, control_hz, make_environment
from libra_ray.sim.gym_adapter import GymEnvironment
from libra_ray.sim.scripted_controllers import ExpertController
from libra_ray.sim.tabletop.environment import Tabletop
from libra_ray.sim.tabletop.goals import GoalProgress
from libra_ray.sim.tabletop.moves import FAR_M
from libra_ray.sim.tabletop.physics import BLOCK_HALF_M, OPENING_M, PEG_HALF_M
from libra_ray.sim.tabletop.tasks import TOLERANCES_MM, Part, parse_task
from libra_ray.types import IMAGE_KEY, STATE_KEY
from tests.sim.conformance import EnvironmentConformance
from tests.test_imports import loaded_after

SIM = SimConfig(family="tabletop", max_steps=200)
EVERY_TASK = (
    "touch",
    "push",
    "bin",
    "place-20mm",
    "place-1mm",
    "place-0.5mm",
    "putdown-1mm",
    "stack",
    "insert-5mm",
    "insert-1mm",
    "chain4-2mm",
    "contact3",
)
STILL = np.array((0, 0, 0, -1), np.float32)


@pytest.mark.parametrize("task", ["push", "place-1mm", "putdown-1mm", "chain2"], scope="class")
class TestTabletop(EnvironmentConformance):
    @pytest.fixture(scope="class")
    def make(self, task):
        return lambda: make_environment(SIM, task, 64)


@pytest.fixture
def make():
    """Makes tables and puts them away."""
    made = []

    def _make(task: str, **sim) -> Tabletop:
        made.append(Tabletop(SimConfig(family="tabletop", **{"max_steps": 300} | sim), task, 64))
        return made[-1]

    yield _make
    for environment in made:
        environment.close()


def put(environment: Tabletop, name: str, x_m: float, y_m: float, z_m: float) -> None:
    """Set an object down, at rest, far from the hand."""
    data, free = environment._world.data, environment._world.model.body(name)
    at, v = environment._world.model.jnt_qposadr[free.jntadr[0]], free.dofadr[0]
    data.qpos[at : at + 7], data.qvel[v : v + 6] = (x_m, y_m, z_m, 1, 0, 0, 0), 0


def wait(environment: Tabletop, steps: int = 4) -> bool:
    return [environment.step(STILL, render=False).success for _ in range(steps)][-1]


def ask(environment: Tabletop, *parts: Part) -> None:
    """Replace the running episode's instruction."""
    environment.parts = parts
    environment._progress = GoalProgress(environment._world, parts, environment._task.tolerance_mm)


def test_the_first_picture_never_tells_the_task(make):
    """One scene, whatever is asked of it, to the pixel; and many things are asked."""
    environments = {task: make(task) for task in (*EVERY_TASK, "insert-0.5mm", "chain3") if task != "putdown-1mm"}
    pictures = {environment.reset(7).images[IMAGE_KEY].tobytes() for environment in environments.values()}
    assert len(pictures) == 1
    for task in ("touch", "push", "bin", "place-1mm", "stack", "insert-1mm", "chain3"):
        seen = [environments[task].reset(seed, scene_seed=7) for seed in range(30)]
        assert {first.images[IMAGE_KEY].tobytes() for first in seen} == pictures
        assert len({first.instruction for first in seen}) > 1, task


def test_a_block_in_the_hand_tells_itself_but_not_its_goal(make):
    """Scene by scene, the picture depends on the block held and not on the mark that is asked for."""
    environment = make("putdown-1mm")
    pictures, goals = {}, {}
    for seed in range(30):
        first = environment.reset(seed, scene_seed=7)
        (part,) = environment.parts
        assert environment._world.holds(part.item)
        assert not environment._progress.done
        pictures.setdefault(part.item, []).append(first.images[IMAGE_KEY].astype(int))
        goals.setdefault(part.item, set()).add(part.goal)
    assert {item: len(asked) for item, asked in goals.items()} == dict.fromkeys(("block_red", "block_green", "block_blue"), 2)
    for seen in pictures.values():
        # Not quite in the same place in the hand: a few pixels at the block's edges.
        assert all((np.abs(picture - seen[0]).max(axis=-1) > 8).mean() < 0.02 for picture in seen)


def test_what_is_in_the_hand_was_grasped_off_its_middle(make):
    """So the state alone does not tell where the block is."""
    environment = make("putdown-1mm")
    offsets = []
    for seed in range(20):
        environment.reset(seed, render=False)
        world = environment._world
        offsets.append((world.position(environment.parts[0].item) - world.hand) * 1000)
    assert np.abs(offsets).max() < 5
    assert np.std(offsets, axis=0)[1] > 1


def test_scene_and_instruction_are_independent(make):
    """Over many scenes every colour is asked for about as often, wherever it lies."""
    environment = make("touch")
    lefts, asked = [], []
    for seed in range(300):
        environment.reset(seed, render=False)
        positions = {name: environment._world.position(name)[0] for name in ("block_red", "block_green", "block_blue")}
        lefts.append(min(positions, key=positions.get))
        asked.append(environment.parts[0].item)
    for name in set(lefts):
        share = np.mean([a == name for left, a in zip(lefts, asked, strict=True) if left == name])
        assert 0.2 < share < 0.47


@pytest.mark.parametrize("task", ["touch", "push", "bin", "place-20mm", "stack", "insert-5mm"])
def test_doing_something_else_is_no_success(task, make):
    """The expert, told one thing, is measured by another instruction of the same scene."""
    environment = make(task, max_steps=80)
    environment.reset(0, render=False)
    told = environment.parts
    others = {}
    for seed in range(40):
        environment.reset(seed, render=False, scene_seed=0)
        others[environment.parts] = seed
    del others[told]
    for seed in others.values():
        environment.reset(seed, render=False, scene_seed=0)
        judge = environment._progress
        ask(environment, *told)
        while not environment._progress.done:
            environment.step(environment.expert_action(), render=False)
            judge.update()
            assert not judge.done


def test_touching_everything_is_no_answer(make):
    """A wrong block first spoils the touch, and the right one afterwards does not mend it."""
    environment = make("touch")
    environment.reset(0, render=False)
    (part,) = environment.parts
    wrong = next(name for name in ("block_red", "block_green") if name != part.item)
    for asked, expected in (([part], True), ([Part(kind="touch", item=wrong), part], False)):
        environment.reset(0, render=False)
        judge = environment._progress
        ask(environment, *asked)
        while not environment._progress.done:
            environment.step(environment.expert_action(), render=False)
            judge.update()
        assert judge.done is expected


@pytest.mark.parametrize("kind", ["place", "insert"])
@pytest.mark.parametrize("mm", TOLERANCES_MM)
def test_the_tolerance_is_the_largest_error_of_a_success(kind, mm, make):
    mouth_mm = 5
    for share in (0.8, 1.5):
        if kind == "insert" and share * mm > mouth_mm:
            continue  # the peg would stand on the socket's frame
        environment = make(f"{kind}-{mm:g}mm")
        environment.reset(1, render=False)
        (part,) = environment.parts
        if kind == "insert":
            # Physics without the ledge, which alone would refuse the peg.
            environment._world.model.geom_contype[environment._world.model.geom_group == 3] = 0
        x, y, _ = environment._world.position(part.goal)
        put(environment, part.item, x + share * mm / 1000, y, BLOCK_HALF_M if kind == "place" else PEG_HALF_M[1])
        assert wait(environment) is (share < 1)
        assert environment.position_error_mm == pytest.approx(share * mm, rel=0.1, abs=0.03)


def test_the_tolerance_of_an_insertion_is_a_real_clearance(make):
    """The same drop, 3 mm aside: into the wide hole, onto the ledge of the narrow one."""
    for task, enters in (("insert-5mm", True), ("insert-1mm", False)):
        environment = make(task)
        environment.reset(1, render=False)
        x, y, _ = environment._world.position(environment.parts[0].goal)
        put(environment, "peg", x + 0.003, y, PEG_HALF_M[1] + 0.006)
        assert wait(environment, 10) is enters
        inside = environment._world.upright("peg") and environment._world.position("peg")[2] < PEG_HALF_M[1] + 0.002
        assert inside == enters


def test_what_is_still_held_is_not_placed(make):
    environment = make("place-1mm")
    environment.reset(0, render=False)
    done_while_touching = 0
    while not environment._progress.done:
        environment.step(environment.expert_action(), render=False)
        touching = environment.parts[0].item in environment._world.touching()
        done_while_touching += environment._progress.done and touching
    assert not done_while_touching
    assert environment._world.opening_01 * OPENING_M > BLOCK_HALF_M


def test_the_parts_of_a_chain_count_in_their_order(make):
    environment = make("chain2")
    first, second = (Part(kind="place", item=f"block_{c}", goal=f"mark_{m}") for c, m in (("red", "white"), ("blue", "yellow")))

    def fulfil(part: Part) -> bool:
        put(environment, part.item, *environment._world.position(part.goal)[:2], BLOCK_HALF_M)
        return wait(environment)

    environment.reset(0, render=False)
    ask(environment, first, second)
    assert not fulfil(first)
    assert environment.parts_done == 1
    assert fulfil(second)

    environment.reset(0, render=False)
    ask(environment, first, second)
    fulfil(second)
    assert environment.parts_done == 0
    assert not fulfil(first), "the second part was true before its turn"
    assert environment.parts_done == 1
    put(environment, second.item, 0.0, -0.2, BLOCK_HALF_M)
    assert not wait(environment)
    assert fulfil(second)


CHAINED = {
    **{f"chain{parts}": ("touch", "push", "bin", "place", "insert") for parts in (1, 2, 3, 4)},
    **{f"contact{parts}": ("touch", "push") for parts in (1, 2, 3)},
}


@pytest.mark.parametrize("task", CHAINED)
def test_a_chain_names_its_parts_and_uses_nothing_twice(task, make):
    environment, parts, kinds = make(task), int(task[-1]), set[str]()
    for seed in range(30):
        instruction = environment.reset(seed, render=False).instruction
        assert instruction == ", then ".join(part.text() for part in environment.parts)
        used = [name for part in environment.parts for name in (part.item, part.goal) if "_" in name or name == "peg"]
        assert len(environment.parts) == parts
        assert len(set(used)) == len(used)
        kinds |= {part.kind for part in environment.parts}
    assert kinds == set(CHAINED[task])


@pytest.mark.parametrize("task", EVERY_TASK)
def test_the_expert_succeeds_and_its_reward_adds_up_to_one(task, make):
    environment = make(task)
    for seed in range(100, 103):
        episode = run(environment, ExpertController(), seed)
        assert episode.success, (seed, episode.instruction)
        assert sum(step.reward for step in episode.steps) == pytest.approx(1)
        assert environment.parts_done == len(environment.parts)
        if environment.position_error_mm is not None and environment.parts[-1].kind != "stack":
            assert environment.position_error_mm <= environment._task.tolerance_mm


@pytest.mark.parametrize("task", ["push", "place-1mm", "stack", "chain2"])
def test_the_expert_recovers_from_disturbances(task, make):
    environment = make(task)
    disturbed = ExpertController(noise_std=0.25, noise_share=1)
    assert sum(run(environment, disturbed, seed).success for seed in range(4)) >= 3


@pytest.mark.parametrize(
    "task",
    [
        "",
        "grasp",
        "place-3mm",
        "place-1",
        "place-mm",
        "touch-1mm",
        "stack-5mm",
        "chain",
        "chain0",
        "chain5",
        "contact",
        "contact4",
        "contact2-5mm",
        "place2",
        "putdown-3mm",
        "Touch",
    ],
)
def test_unknown_tasks_are_refused_with_the_valid_forms(task):
    with pytest.raises(ValueError, match=r"touch, push, bin, place, putdown, stack, insert.*place-1mm"):
        make_environment(SIM, task, 64)
    with pytest.raises(ValueError, match="chain1 to chain4, contact1 to contact3"):
        check_tasks(SimConfig(family="tabletop", tasks=("touch", task)))


def test_known_tasks_are_accepted():
    check_tasks(SimConfig(family="tabletop", tasks=EVERY_TASK))
    assert parse_task("insert-0.5mm").tolerance_mm == 0.5
    assert parse_task("place").tolerance_mm == 20
    assert control_hz(SIM) == 20


def test_a_second_camera_looks_from_the_wrist(make):
    environment = make("place", wrist_camera=True)
    first = environment.reset(0)
    assert list(first.images) == list(environment.image_shapes) == [IMAGE_KEY, "observation.images.wrist"]
    np.testing.assert_array_equal(first.images[IMAGE_KEY], make("place").reset(0).images[IMAGE_KEY])
    after = environment.step(np.array((1, 0, 0, -1), np.float32)).observation
    changed = {key: np.mean(np.any(after.images[key] != first.images[key], axis=-1)) for key in first.images}
    assert changed["observation.images.wrist"] > changed[IMAGE_KEY] > 0
    with pytest.raises(ValueError, match="tabletop"):
        override(Config(), {"sim.wrist_camera": True})


def test_actions_move_the_hand_by_two_centimetres(make):
    environment = make("touch")
    for axis in range(3):
        environment.reset(0, render=False)
        before = environment._observation(render=False).state
        action = STILL.copy()
        action[axis] = 0.5
        for _ in range(2):
            environment.step(action, render=False)
        wait(environment)
        moved = environment._observation(render=False).state - before
        assert moved[axis] == pytest.approx(0.02, abs=2e-4)
        assert np.abs(np.delete(moved[:3], axis)).max() < 2e-4


MOVES = {"touch": 4, "push": 9, "place-5mm": 20, "putdown-5mm": 5, "stack": 22, "insert-1mm": 20}
"""Task -> a step at which its expert is well under way."""


def thing_of(part: Part) -> str:
    """What is moved: the mark, block or socket that something goes to, else what is touched or pushed."""
    return part.goal if "_" in part.goal else part.item


@pytest.mark.parametrize(("task", "at"), MOVES.items())
def test_the_expert_follows_a_goal_that_is_moved(task, at, make):
    """What it is asked for stays, the place is another, and only there it succeeds: the ceiling stays a ceiling."""
    environment, moved = make(task, goal_moves_at=at), 0
    for seed in range(5):
        environment.reset(seed, render=False)
        thing = thing_of(environment.parts[0])
        before = environment._world.position(thing).copy()
        while environment._steps < at and not environment._progress.done:
            assert environment.goal_moved_at is None
            before = environment._world.position(thing).copy()
            environment.step(environment.expert_action(), render=False)
        if environment._progress.done:
            assert environment.goal_moved_at is None, "there is nothing left to do"
            continue
        moved += 1
        assert environment.goal_moved_at == at
        assert np.linalg.norm((environment._world.position(thing) - before)[:2]) > 0.9 * FAR_M
        while not environment._progress.done:
            environment.step(environment.expert_action(), render=False)
        if environment.position_error_mm is not None and task != "stack":
            assert environment.position_error_mm <= environment._task.tolerance_mm
    assert moved >= 3


def test_the_picture_after_the_move_is_the_first_that_shows_it(make):
    still, moving = make("place", max_steps=30), make("place", max_steps=30, goal_moves_at=6)
    pairs = [(environment.reset(3), environment) for environment in (still, moving)]
    assert pairs[0][0].images[IMAGE_KEY].tobytes() == pairs[1][0].images[IMAGE_KEY].tobytes()
    for step in range(1, 8):
        seen = [environment.step(STILL).observation for environment in (still, moving)]
        same = seen[0].images[IMAGE_KEY].tobytes() == seen[1].images[IMAGE_KEY].tobytes()
        assert same is (step < 6)
        np.testing.assert_array_equal(seen[0].state, seen[1].state)
    assert moving.reset(3).images[IMAGE_KEY].tobytes() == pairs[0][0].images[IMAGE_KEY].tobytes()
    assert moving.goal_moved_at is None


@pytest.mark.parametrize("task", MOVES)
def test_the_seed_says_where_the_goal_is_moved_to(task, make):
    """Not who acts: the same place whether nobody moves or the hand does; and another one of another seed."""
    places = {}
    for seed in (0, 1):
        for action in (STILL, np.array((0.2, 0.1, 0, -1), np.float32)):
            environment = make(task, goal_moves_at=2)
            environment.reset(seed, render=False)
            for _ in range(2):
                environment.step(action, render=False)
            spot = environment._world.position(thing_of(environment.parts[0]))[:2]
            places.setdefault(seed, []).append(tuple(np.round(spot, 6)))
    assert places[0][0] == places[0][1]
    assert places[1][0] == places[1][1]
    assert places[0][0] != places[1][0]


def test_in_one_scene_every_seed_has_a_place_of_its_own(make):
    environment, places = make("touch", goal_moves_at=1), {}
    for seed in range(12):
        environment.reset(seed, render=False, scene_seed=7)
        environment.step(STILL, render=False)
        thing = environment.parts[0].item
        places.setdefault(thing, []).append(tuple(environment._world.position(thing)[:2]))
    assert all(len(set(spots)) == len(spots) for spots in places.values())


def test_what_is_done_is_not_undone(make):
    steps = len(run(make("touch"), ExpertController(), 0).steps)
    environment = make("touch", goal_moves_at=steps)
    episode = run(environment, ExpertController(), 0, settle_steps=3)
    assert episode.success
    assert (len(episode.steps), episode.goal_moved_at) == (steps + 3, None)
    assert run(make("touch", goal_moves_at=steps - 1), ExpertController(), 0).goal_moved_at == steps - 1


def test_success_means_the_moved_goal(make):
    environment = make("place-5mm", goal_moves_at=3)
    for at_new_place in (False, True):
        environment.reset(0, render=False)
        (part,) = environment.parts
        old = environment._world.position(part.goal).copy()
        wait(environment)
        there = environment._world.position(part.goal) if at_new_place else old
        put(environment, part.item, *there[:2], BLOCK_HALF_M)
        assert wait(environment) is at_new_place


def test_a_push_counts_from_where_the_block_was_put(make):
    """The move itself is no push, however far it goes the right way."""
    environment = make("push", goal_moves_at=2)
    for seed in range(30):
        environment.reset(seed, render=False)
        assert not wait(environment, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sim.goal_moves_at": 5}, r"sim.goal_moves_at=5 needs sim.family=tabletop"),
        ({"sim.family": "tabletop", "sim.tasks": "touch", "sim.goal_moves_at": -1}, "at least 0"),
        (
            {"sim.family": "tabletop", "sim.tasks": "touch", "sim.max_steps": 40, "sim.goal_moves_at": 40},
            r"sim.goal_moves_at=40 must be below sim.max_steps=40",
        ),
    ],
)
def test_a_move_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        override(Config(), changes)


@pytest.mark.parametrize("task", ["bin", "chain1", "chain3-5mm"])
def test_goals_without_another_place_are_refused(task):
    sim = SimConfig(family="tabletop", tasks=("touch", task), goal_moves_at=5)
    for refuse in (lambda: check_tasks(sim), lambda: make_environment(sim, task, 64)):
        with pytest.raises(
            ValueError, match=f"{task} has bins; valid are touch, push, place, putdown, stack, insert and contact"
        ):
            refuse()
    check_tasks(SimConfig(family="tabletop", tasks=tuple(MOVES), goal_moves_at=5))


def test_gymnasium_accepts_the_environment(make):
    wrapped = GymEnvironment(make("place-5mm", max_steps=60))
    assert isinstance(wrapped, gymnasium.Env)
    check_env(wrapped, skip_render_check=True)
    first, info = wrapped.reset(seed=3)
    assert first["instruction"] == wrapped.environment.instruction
    assert info["parts_done"] == 0
    again, _ = wrapped.reset(seed=4, options={"scene_seed": 3})
    np.testing.assert_array_equal(first[IMAGE_KEY], again[IMAGE_KEY])
    terminated = truncated = False
    while not (terminated or truncated):
        seen, _, terminated, truncated, info = wrapped.step(wrapped.environment.expert_action())
    assert terminated
    assert not truncated
    assert info["success"]
    assert info["position_error_mm"] <= 5
    assert seen[STATE_KEY].shape == (4,)


def test_a_worker_of_this_family_loads_no_other_simulator():
    loaded = loaded_after(
        "from libra_ray.config import SimConfig",
        "from libra_ray.sim import make_environment",
        "make_environment(SimConfig(family='tabletop'), 'touch', 64).reset(0)",
    )
    assert "mujoco" in loaded
    assert not loaded & {"torch", "ray", "lerobot", "metaworld", "gymnasium"}
