"""What can be asked for at the table: task names, instructions drawn from a seed, and their words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from libra_ray.sim.tabletop.physics import BINS, BLOCKS, MARKS, OBJECTS, PEG, SOCKETS, Placement

TOLERANCES_MM = (20.0, 5.0, 2.0, 1.0, 0.5)
KINDS = ("touch", "push", "bin", "place", "stack", "insert")
PUT_DOWN = "putdown"
"""A `place` that begins with its block in the hand: precision without the grasp."""
PRECISE_KINDS = ("place", "insert", PUT_DOWN)
CHAINS: Mapping[str, tuple[tuple[str, ...], int]] = MappingProxyType(
    {"chain": (("touch", "push", "bin", "place", "insert"), 4), "contact": (("touch", "push"), len(BLOCKS))}
)
"""Name -> the kinds of its parts, and how many there may be. `contact` needs no grasp; it has as many parts as blocks."""
VALID_TASKS = (
    "touch, push, bin, place, putdown, stack, insert, chain1 to chain4, contact1 to contact3; place, putdown, insert and chain "
    f"take a tolerance of {', '.join(f'{mm:g}' for mm in TOLERANCES_MM)} mm, e.g. place-1mm or chain3-5mm"
)
DIRECTIONS: Mapping[str, NDArray[np.float64]] = MappingProxyType(
    {
        "left": np.array((-1.0, 0.0)),
        "right": np.array((1.0, 0.0)),
        "away": np.array((0.0, 1.0)),
        "closer": np.array((0.0, -1.0)),
    }
)
PUSH_M = 0.03
"""How far a push must move its block."""
_PUSH_ROOM_M = 0.042
_HAND_ROOM_M = 0.03
_FIXTURES_FROM_M = 0.035
"""Beyond this the hand would meet a bin."""
_PUSH_ZONE_M = ((-0.13, 0.13), (-0.115, 0.025))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A parsed task name.

    Attributes:
        name: as it was written.
        kinds: what the instruction may ask for.
        parts: sub-goals in the instruction.
        tolerance_mm: largest position error of a success, for `place` and `insert`.
        in_hand: whether the episode begins with the first part's object in the hand.
    """

    name: str
    kinds: tuple[str, ...]
    parts: int
    tolerance_mm: float
    in_hand: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """One sub-goal.

    Attributes:
        kind: one of `KINDS`.
        item: the object to be moved or touched.
        goal: the fixture or object it goes to, or the direction of a push; empty for a touch.
    """

    kind: str
    item: str
    goal: str = ""

    def text(self) -> str:
        """In words, e.g. `put the red block into the left bin`."""
        item, goal = _words(self.item), _words(self.goal)
        return {
            "touch": f"touch the {item}",
            "push": f"push the {item} {'to the ' * (self.goal in ('left', 'right'))}{goal}",
            "bin": f"put the {item} into the {goal}",
            "place": f"place the {item} on the {goal}",
            "stack": f"stack the {item} on the {goal}",
            "insert": f"insert the {item} into the {goal}",
        }[self.kind]


def parse_task(name: str) -> Task:
    """The task of a name such as `touch`, `place-1mm` or `chain3-5mm`; without a tolerance the widest one holds.

    Raises:
        ValueError: there is no such task; the message says which there are.
    """
    tolerances = {f"{mm:g}": mm for mm in TOLERANCES_MM}
    match = re.fullmatch(r"([a-z]+)([1-9]?)(?:-([\d.]+)mm)?", name)
    kind, length, tolerance = match.groups() if match else ("", "", None)
    chained, longest = CHAINS.get(kind, ((), 0))
    chain = length.isdigit() and int(length) <= longest
    known = chain or (kind in (*KINDS, PUT_DOWN) and not length)
    allowed = {None, *tolerances} if {kind, *chained} & set(PRECISE_KINDS) else {None}
    if not known or tolerance not in allowed:
        raise ValueError(f"unknown tabletop task {name!r}; there are {VALID_TASKS}")
    return Task(
        name=name,
        kinds=chained or ("place" if kind == PUT_DOWN else kind,),
        parts=int(length or 1),
        tolerance_mm=tolerances[tolerance] if tolerance else TOLERANCES_MM[0],
        in_hand=kind == PUT_DOWN,
    )


def draw_parts(task: Task, placement: Placement, rng: np.random.Generator) -> tuple[Part, ...]:
    """An instruction for this scene: first what kind of thing, then which of all that are possible.

    In a chain no object and no goal occurs twice, so that no part undoes another.
    """
    positions, used = dict(placement.positions), set[str]()
    parts: list[Part] = []
    while len(parts) < task.parts:
        options = {kind: [p for p in _options(kind, positions) if not used & {p.item, p.goal}] for kind in task.kinds}
        kinds = [kind for kind in task.kinds if options[kind]]
        choices = options[kinds[rng.integers(len(kinds))]]
        part = choices[rng.integers(len(choices))]
        parts.append(part)
        used |= {part.item, part.goal} - set(DIRECTIONS) - {""}
        positions[part.item] = _moved(part, positions)
    return tuple(parts)


def instruction(parts: Sequence[Part]) -> str:
    """The parts in words, in their order."""
    return ", then ".join(part.text() for part in parts)


def any_push(placement: Placement) -> bool:
    """Whether the scene leaves a choice of pushes, for more than one block."""
    return len({part.item for part in _options("push", placement.positions)}) > 1


def _options(kind: str, positions: Mapping[str, NDArray[np.float64]]) -> list[Part]:
    match kind:
        case "touch":
            return [Part(kind=kind, item=block) for block in BLOCKS]
        case "push":
            pairs = [(block, way) for block in BLOCKS for way in DIRECTIONS if can_be_pushed(block, way, positions)]
        case "bin":
            pairs = [(block, goal) for block in BLOCKS for goal in BINS]
        case "place":
            pairs = [(block, goal) for block in BLOCKS for goal in MARKS]
        case "stack":
            pairs = [(block, goal) for block in BLOCKS for goal in BLOCKS if block != goal]
        case _:
            pairs = [(PEG, goal) for goal in SOCKETS]
    return [Part(kind=kind, item=item, goal=goal) for item, goal in pairs]


def can_be_pushed(block: str, direction: str, positions: Mapping[str, NDArray[np.float64]]) -> bool:
    """Whether the way, and the place behind the block where the hand starts, are free and within reach."""
    unit, start = DIRECTIONS[direction], positions[block][:2]
    end, behind = start + unit * (PUSH_M + 0.004), start - unit * 0.03
    zone = np.array(_PUSH_ZONE_M)
    if (end < zone[:, 0]).any() or (end > zone[:, 1]).any() or behind[1] > _FIXTURES_FROM_M:
        return False
    others = [positions[name][:2] for name in (*OBJECTS, *MARKS) if name != block]
    way = [start + (end - start) * share for share in (0.5, 1.0)]
    clear = all(np.linalg.norm(other - spot) >= _PUSH_ROOM_M for other in others for spot in way)
    return clear and all(np.linalg.norm(other - behind) >= _HAND_ROOM_M for other in others)


def _moved(part: Part, positions: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    if part.kind == "push":
        return positions[part.item] + DIRECTIONS[part.goal] * PUSH_M
    return positions[part.goal] if part.goal else positions[part.item]


def _words(name: str) -> str:
    return " ".join(reversed(name.split("_")))
