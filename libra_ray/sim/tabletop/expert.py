"""The table's scripted expert: what to do follows from the state alone, so that it goes on from wherever it was pushed."""

import numpy as np
from numpy.typing import NDArray

from libra_ray.sim.tabletop.goals import GoalProgress
from libra_ray.sim.tabletop.physics import BLOCK_HALF_M, PEG, PEG_HALF_M, STEP_M, World
from libra_ray.sim.tabletop.tasks import DIRECTIONS, Part

OPEN, CLOSE = -1.0, 1.0
_GAIN = 0.6
"""Share of the remaining way that one control step covers: the hand lags half a step behind, 1 would overshoot."""
_FINGERTIP_M = 0.008
"""How far the fingers reach below the point that grasps."""
_TRAVEL_M = 0.05
"""Height above the tallest things that stand on the table, for whatever hangs lowest."""
_CLEAR_M = 0.05
"""Height of the hand from which its fingers are above everything that stands alone."""
_CONE = 3.0
"""Steepness of the cone above a goal: the way down opens as the way across closes."""
_GRASP_M = 0.004
"""How far off its middle a thing may be grasped: the open fingers leave twice that, and what is carried is watched itself."""
_PEG_GRASP_M = 0.010
"""Where the peg is grasped, above its centre."""
_DROP_M = 0.032
"""Height of a block's centre above a bin at its release."""
_NOWHERE_ELSE = np.zeros(3)


def expert_action(
    world: World,
    progress: GoalProgress,
    tolerance_mm: float,
    *,
    grasp_off_m: NDArray[np.float64] = _NOWHERE_ELSE,
    release_off_m: NDArray[np.float64] = _NOWHERE_ELSE,
) -> NDArray[np.float32]:
    """The action `(4,)` in [-1, 1] that works on the current part.

    A thing counts as held only while both fingers rest against it: whoever has closed on nothing, or lost it, grasps again.

    Args:
        world: the table.
        progress: whose turn it is.
        tolerance_mm: how exactly things are put down.
        grasp_off_m: how far from its place an expert who is mistaken takes the thing to be that it goes to grasp, `(3,)`.
        release_off_m: the same of the place that it carries it to.
    """
    part = progress.current
    if part.kind == "touch":
        above = world.position(part.item) + np.array((0, 0, BLOCK_HALF_M + _FINGERTIP_M - 0.004))
        return _action(_approach(world.hand, above, _TRAVEL_M + _FINGERTIP_M, 0.008), _grip_underway(world, above, CLOSE))
    if part.kind == "push":
        return _push(world, part)
    if world.holds(part.item):
        return _carry(world, part, tolerance_mm / 1000, release_off_m)
    return _grasp(world, part, grasp_off_m)


def _push(world: World, part: Part) -> NDArray[np.float32]:
    way = np.array([*DIRECTIONS[part.goal], 0])
    block, hand = world.position(part.item), world.hand
    gap = BLOCK_HALF_M + 0.0075
    along = float((hand - block) @ way)
    aside = (hand - block - along * way) * (1, 1, 0)
    if hand[2] < 0.02 and np.linalg.norm(aside) < 0.006 and along < 0.004 - gap:
        return _action(_GAIN * (0.015 * way - aside + (0, 0, BLOCK_HALF_M - hand[2])), CLOSE)
    behind = block * (1, 1, 0) - way * (gap + 0.008) + (0, 0, BLOCK_HALF_M)
    return _action(_approach(hand, behind, _TRAVEL_M + _FINGERTIP_M, 0.005), _grip_underway(world, behind, CLOSE))


def _grasp(world: World, part: Part, off_m: NDArray[np.float64]) -> NDArray[np.float32]:
    offset = _PEG_GRASP_M if part.item == PEG else 0.0
    goal = world.position(part.item) + np.array((0, 0, offset)) + off_m
    off = np.abs(goal - world.hand)
    if off[:2].max() < _GRASP_M + 0.001 and off[2] < 0.003:
        return _action(np.zeros(3), CLOSE)
    return _action(_approach(world.hand, goal, _TRAVEL_M + _FINGERTIP_M, _GRASP_M), _grip_underway(world, goal, OPEN))


def _carry(world: World, part: Part, tolerance_m: float, off_m: NDArray[np.float64]) -> NDArray[np.float32]:
    item, goal = world.position(part.item), world.position(part.goal).copy()
    half = PEG_HALF_M[1] if part.item == PEG else BLOCK_HALF_M
    fine, loose = 0.3 * tolerance_m, 0.7 * tolerance_m
    match part.kind:
        case "bin":
            fine, loose, goal[2] = 0.008, 0.012, _DROP_M
        case "stack":
            fine, loose = 0.001, 0.004
            goal[2] += 2 * BLOCK_HALF_M
        case _:
            fine, goal[2] = float(np.clip(fine, 0.00015, 0.006)), half
    goal += off_m
    off = float(np.linalg.norm((goal - item)[:2]))
    landed = item[2] - goal[2] < 0.001
    if landed and off <= (loose if world.told_to_open else fine):
        return _action(np.zeros(3), OPEN)
    # A little below its place, so that it rests on the ground before the fingers open.
    return _action(_approach(item, goal - (0, 0, 0.0005), _TRAVEL_M + half, fine), CLOSE)


def _grip_underway(world: World, goal: NDArray, wanted: float) -> float:
    """Low and away from its goal the gripper stays as it is: it would push aside, or grasp, what it has just left."""
    leaving = world.hand[2] < _CLEAR_M and np.linalg.norm((goal - world.hand)[:2]) > 0.01
    return (OPEN if world.told_to_open else CLOSE) if leaving else wanted


def _approach(tip: NDArray, goal: NDArray, travel_m: float, fine_m: float) -> NDArray:
    """The way `(3,)`, in metres, of one control step of `tip` towards `goal`: up, across and down through a cone.

    Args:
        tip: what is to arrive, `(3,)`: the hand, or what it holds.
        goal: where, `(3,)`.
        travel_m: height of `tip` at which the table can be crossed.
        fine_m: distance across within which the way down is free.
    """
    across = (goal - tip)[:2]
    distance = float(np.linalg.norm(across))
    height = min(max(travel_m, goal[2]), goal[2] + _CONE * max(0.0, distance - fine_m))
    below = height - tip[2]
    # Too low to cross: rise first.
    free = float(np.clip((0.02 - below) / 0.01, 0, 1)) if distance > 0.006 else 1.0
    return _GAIN * np.array([*(across * free), below])


def _action(way_m: NDArray, grip: float) -> NDArray[np.float32]:
    """The way across is shortened as a whole: clipped alone, each axis would bend it."""
    scaled = np.asarray(way_m) / STEP_M
    scaled[:2] /= max(1.0, float(np.abs(scaled[:2]).max()))
    return np.clip([*scaled, grip], -1, 1).astype(np.float32)
