"""The goal is moved in mid-episode: what is moved, and where to. Between two pictures, as if somebody had done it."""

import numpy as np
from numpy.typing import NDArray

from libra_ray.sim.tabletop.physics import MARKS, OBJECTS, SOCKETS, SPACING_M, World, random_spots
from libra_ray.sim.tabletop.tasks import Part, can_be_pushed, parse_task

MOVABLE_KINDS = ("touch", "push", "place", "stack", "insert")
"""Bins fill the table's edge and are called left and right: they have no other place."""
FAR_M = 0.05
"""From where a thing was to where it is put, and from there to the hand, at least."""
_SPOTS = 1000
_MOVE_STREAM = 0x6D6F7665
"""Keeps the move independent of all else that is drawn from the same seed."""


def check_goal_moves(name: str) -> None:
    """Refuse a task whose goal has no other place.

    Raises:
        ValueError: names the tasks that have.
    """
    task = parse_task(name)
    if not set(task.kinds) <= set(MOVABLE_KINDS):
        raise ValueError(
            f"sim.goal_moves_at needs tasks whose goal can be moved, and {name} has bins; valid are touch, push, place, "
            "putdown, stack, insert and contact"
        )


def spots_of(seed: int) -> NDArray[np.float64]:
    """Where the goal of the seed's episode may be put `(n, 2)`, in metres; the first one that is free is taken."""
    return random_spots(np.random.default_rng([seed, _MOVE_STREAM]), _SPOTS)


def move_goal(world: World, part: Part, spots: NDArray[np.float64]) -> str | None:
    """Put what the part is about elsewhere: the object of `touch` and `push`, else the mark, block or socket that one goes to.

    Sockets change places with each other; all other things go to the first free spot.

    Returns:
        What was moved; None where no spot is free.
    """
    thing = part.goal if part.goal in (*MARKS, *OBJECTS, *SOCKETS) else part.item
    if thing in SOCKETS:
        (other,) = set(SOCKETS) - {thing}
        here, there = world.position(thing)[:2].copy(), world.position(other)[:2].copy()
        world.move(thing, there)
        world.move(other, here)
        return thing
    free = next((spot for spot in spots if _is_free(world, part, thing, spot)), None)
    if free is None:
        return None
    world.move(thing, free)
    return thing


def _is_free(world: World, part: Part, thing: str, spot: NDArray[np.float64]) -> bool:
    positions = {name: world.position(name)[:2] for name in (*OBJECTS, *MARKS)}
    apart = {name: float(np.linalg.norm(spot - position)) for name, position in positions.items()}
    if apart.pop(thing) < FAR_M or np.linalg.norm(spot - world.hand[:2]) < FAR_M or min(apart.values()) < SPACING_M:
        return False
    return part.kind != "push" or can_be_pushed(part.item, part.goal, {**positions, thing: spot})
