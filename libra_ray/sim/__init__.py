"""Simulated robots: nothing here loads torch or Ray, so that a simulator worker starts fast and stays small."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from libra_ray.config import SimConfig
from libra_ray.extras import needs
from libra_ray.sim.render.gl_backend import choose_backend, take_turn
from libra_ray.spec import RobotSpec, differences
from libra_ray.types import Environment

__all__ = [
    "check_robot",
    "check_tasks",
    "choose_backend",
    "control_hz",
    "instructions",
    "make_environment",
    "robot_spec",
    "take_turn",
]


CANNOT_DRIVE = "it can be trained on (jobs/train.py) and served, but not evaluated in this simulator"


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Where a family of robots lives; loaded when it is used, because one family's libraries are no use to another.

    Attributes:
        module: that defines it; its function `robot_spec` says what a `SimConfig`'s robot is, `episode_instruction` what a
            task asks for in the episode of a seed.
        environment: its class, made from `(SimConfig, task, image_size)`, with an attribute `control_hz`.
        check: its function that refuses an unknown task name.
        check_moves: its function that refuses a task whose goal cannot be moved; empty where none can.
    """

    module: str
    environment: str
    check: str
    check_moves: str = ""

    def load(self, name: str) -> Any:
        needs("mujoco", extra="sim")
        # MuJoCo reads the backend when it is imported.
        choose_backend()
        return getattr(importlib.import_module(self.module), name)


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "metaworld": _Family(module="libra_ray.sim.metaworld", environment="Metaworld", check="task_name"),
        "tabletop": _Family(
            module="libra_ray.sim.tabletop.environment",
            environment="Tabletop",
            check="parse_task",
            check_moves="check_goal_moves",
        ),
    }
)


def make_environment(sim: SimConfig, task: str, image_size: int) -> Environment:
    """A simulated robot with one task.

    Args:
        sim: family and episode length; `sim.tasks` is not read.
        task: one of the family's, e.g. `drawer-open-v3` (Meta-World) or `place-1mm` (tabletop).
        image_size: height and width of its cameras' pictures, in pixels.

    Raises:
        ValueError: the family has no such task; the message names those it has, or the nearest of them.
        RuntimeError: the machine has no library to render with; the message says how to install one.
    """
    family = _FAMILIES[sim.family]
    return family.load(family.environment)(sim, task, image_size)


def check_tasks(sim: SimConfig, others: Iterable[str] = ()) -> None:
    """Refuse task names that the family does not have, before anything is started.

    Args:
        sim: family and tasks, and whether their goals are moved.
        others: more names.

    Raises:
        ValueError: names tasks that the family has, or those whose goal can be moved.
    """
    family = _FAMILIES[sim.family]
    check = family.load(family.check)
    for task in (*sim.tasks, *others):
        check(task)
    if sim.goal_moves_at and family.check_moves:
        check_moves = family.load(family.check_moves)
        for task in sim.tasks:
            check_moves(task)


def control_hz(sim: SimConfig) -> int:
    """Control steps per simulated second of the family's robots."""
    family = _FAMILIES[sim.family]
    return family.load(family.environment).control_hz


def robot_spec(sim: SimConfig) -> RobotSpec:
    """The family's robot with the cameras that `sim` asks for; no simulator is started."""
    spec: RobotSpec = _FAMILIES[sim.family].load("robot_spec")(sim)
    return spec


def instructions(sim: SimConfig, seeds: Iterable[int]) -> tuple[str, ...]:
    """The different instructions of the episodes of these seeds, of all of `sim.tasks`, sorted; no simulator is started.

    Raises:
        ValueError: the family has no such task.
    """
    instruction = _FAMILIES[sim.family].load("episode_instruction")
    return tuple(sorted({instruction(task, seed) for seed in seeds for task in sim.tasks}))


def check_robot(sim: SimConfig, robot: RobotSpec, whose: str, remedy: str = CANNOT_DRIVE, *, any_rate: bool = False) -> None:
    """Refuse a data set or policy of another robot than the simulated one, which it could not drive.

    Cameras that the simulator has and the policy does not need do no harm.

    Args:
        sim: the simulated robot's family and cameras.
        robot: the other one.
        whose: the other one's data set, checkpoint or server, as the message names it.
        remedy: what can be done instead.
        any_rate: at whatever rate the other one is controlled.

    Raises:
        ValueError: names everything in which they differ, with both values.
    """
    ours = robot_spec(sim)
    pairs: dict[str, tuple[object, object]] = {
        "action dimensions": (robot.action_dim, ours.action_dim),
        "state dimensions": (robot.state_dim, ours.state_dim),
        **differences(robot, ours),
    }
    if not any_rate:
        pairs["control rate in Hz"] = (f"{robot.control_hz:g}", f"{ours.control_hz:g}")
    differing = [f"{name} {theirs} (simulator: {own})" for name, (theirs, own) in pairs.items() if theirs != own]
    if not set(robot.cameras) <= set(ours.cameras):
        differing.append(f"cameras {', '.join(robot.cameras)} (simulator: {', '.join(ours.cameras)})")
    if differing:
        raise ValueError(
            f"{whose} is of another robot than the one of sim.family={sim.family}: {'; '.join(differing)}; {remedy}"
        )
