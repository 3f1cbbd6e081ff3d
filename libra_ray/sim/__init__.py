"""Simulated robots: nothing here loads torch or Ray, so that a simulator worker starts fast and stays small."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from libra_ray.config import SimConfig
from libra_ray.sim.backend import choose_backend
from libra_ray.types import Environment

__all__ = ["check_tasks", "choose_backend", "control_hz", "instruction_of", "make_environment"]


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Where a family of robots lives; loaded when it is used, because one family's libraries are no use to another.

    Attributes:
        module: that defines it.
        environment: its class, made from `(SimConfig, task)`, with an attribute `control_hz`.
        check: its function that refuses an unknown task name.
        instruction: its function of a task name and a seed: what that episode asks for.
    """

    module: str
    environment: str
    check: str
    instruction: str = "instruction_of"

    def load(self, name: str) -> Any:
        # MuJoCo reads the backend when it is imported.
        choose_backend()
        return getattr(importlib.import_module(self.module), name)


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "metaworld": _Family(module="libra_ray.sim.metaworld", environment="Metaworld", check="task_name"),
        "tabletop": _Family(module="libra_ray.sim.tabletop", environment="Tabletop", check="parse_task"),
    }
)


def make_environment(sim: SimConfig, task: str) -> Environment:
    """A simulated robot with one task.

    Args:
        sim: family, picture size and episode length; `sim.tasks` is not read.
        task: one of the family's, e.g. `drawer-open-v3` (Meta-World) or `place-1mm` (tabletop).

    Raises:
        ValueError: the family has no such task; the message names those it has, or the nearest of them.
        RuntimeError: the machine has no library to render with; the message says how to install one.
    """
    family = _FAMILIES[sim.family]
    return family.load(family.environment)(sim, task)


def check_tasks(sim: SimConfig, others: Iterable[str] = ()) -> None:
    """Refuse task names that the family does not have, before anything is started.

    Args:
        sim: family and tasks.
        others: more names.

    Raises:
        ValueError: names tasks that the family has.
    """
    family = _FAMILIES[sim.family]
    check = family.load(family.check)
    for task in (*sim.tasks, *others):
        check(task)


def instruction_of(sim: SimConfig, task: str, seed: int) -> str:
    """What the episode of a task that a seed determines asks for, without a simulator.

    Raises:
        ValueError: the family has no such task.
    """
    family = _FAMILIES[sim.family]
    asked: str = family.load(family.instruction)(task, seed)
    return asked


def control_hz(sim: SimConfig) -> int:
    """Control steps per simulated second of the family's robots."""
    family = _FAMILIES[sim.family]
    return family.load(family.environment).control_hz
