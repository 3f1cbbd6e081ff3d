"""What counts as done at the table, and how far off it is."""

from collections.abc import Sequence

import numpy as np

from libra_ray.sim.tabletop.physics import BLOCK_HALF_M, OBJECTS, PEG_HALF_M, World
from libra_ray.sim.tabletop.tasks import DIRECTIONS, PUSH_M, Part

PUSH_STRAY_M = 0.015
"""How far a push may stray sideways."""
STACK_TOLERANCE_M = 0.01
_BIN_HALF_M = 0.03
_RESTING_M = 0.002
_STILL_M_S = 0.01
_ERROR_KINDS = ("place", "stack", "insert")


class GoalProgress:
    """How much of an instruction has been done: its parts in their order, each once it comes true *in its turn*.

    A part that is true already when its turn comes must first cease to be true. A touch is spoiled for good by touching
    another object first, so that sweeping over all of them is no answer to being asked for one.

    Args:
        world: the table, just reset.
        parts: the instruction.
        tolerance_mm: largest position error of a success, for `place` and `insert`.

    Attributes:
        parts_done: sub-goals done so far.
    """

    def __init__(self, world: World, parts: Sequence[Part], tolerance_mm: float) -> None:
        self._world, self.parts, self._tolerance_m = world, tuple(parts), tolerance_mm / 1000
        self.parts_done = 0
        self._begin()

    @property
    def current(self) -> Part:
        """The part whose turn it is; the last one when all are done."""
        return self.parts[min(self.parts_done, len(self.parts) - 1)]

    @property
    def done(self) -> bool:
        """Whether every part has been done."""
        return self.parts_done == len(self.parts)

    @property
    def error_mm(self) -> float | None:
        """Distance on the table between the current part's object and its goal; None for touch, push and bin."""
        return _distance_m(self._world, self.current) * 1000 if self.current.kind in _ERROR_KINDS else None

    def moved(self, name: str) -> None:
        """Somebody else has put a thing elsewhere: how far it is pushed counts from there."""
        self.start[name] = self._world.position(name).copy()

    def update(self) -> None:
        """Look at the table after a control step."""
        if self.done:
            return
        true = self._true()
        if true and self._armed:
            self.parts_done += 1
            self._begin()
        self._armed |= not true

    def _begin(self) -> None:
        self.start = {name: self._world.position(name).copy() for name in OBJECTS}
        self._still_touched = set(self._world.touching())
        self._spoiled = False
        self._armed = self.done or not self._true()

    def _true(self) -> bool:
        world, part = self._world, self.current
        touched = set(world.touching())
        match part.kind:
            case "touch":
                self._spoiled |= bool(touched - self._still_touched - {part.item})
                self._still_touched &= touched
                return part.item in touched and not self._spoiled
            case "push":
                moved = (world.position(part.item) - self.start[part.item])[:2]
                along = float(moved @ DIRECTIONS[part.goal])
                stray = float(np.linalg.norm(moved - along * DIRECTIONS[part.goal]))
                return along >= PUSH_M and stray <= PUSH_STRAY_M and self._stands_at(0.0, BLOCK_HALF_M)
        if part.item in touched or world.speed(part.item) > _STILL_M_S:
            return False
        match part.kind:
            case "bin":
                off = np.abs(world.position(part.item) - world.position(part.goal))
                return bool(off[:2].max() <= _BIN_HALF_M) and off[2] < 2 * BLOCK_HALF_M
            case "place":
                return _distance_m(world, part) <= self._tolerance_m and self._stands_at(0.0, BLOCK_HALF_M)
            case "stack":
                top = float(world.position(part.goal)[2]) + BLOCK_HALF_M
                return _distance_m(world, part) <= STACK_TOLERANCE_M and self._stands_at(top, BLOCK_HALF_M)
            case _:
                inside = self._stands_at(0.0, PEG_HALF_M[1]) and world.upright(part.item)
                return inside and _distance_m(world, part) <= self._tolerance_m

    def _stands_at(self, base_m: float, half_height_m: float) -> bool:
        return bool(abs(self._world.position(self.current.item)[2] - half_height_m - base_m) < _RESTING_M)


def _distance_m(world: World, part: Part) -> float:
    return float(np.linalg.norm((world.position(part.item) - world.position(part.goal))[:2]))
