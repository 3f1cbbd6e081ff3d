"""What the numbers of a robot's actions and states mean: declared by a simulator, a data set and a checkpoint, and compared.

Standard library only: the light client has it too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self, cast, get_args

Rotation = Literal["none", "euler", "axis_angle", "quaternion", "rot6d"]
"""How a rotation among the numbers is written; `none`: there is none among them."""
ROTATIONS: tuple[Rotation, ...] = get_args(Rotation)
NO_GRIPPER = -1


@dataclass(frozen=True, kw_only=True)
class VectorSpec:
    """What the numbers of an action or a state mean. A fact that is not declared fits every other.

    Attributes:
        names: of the dimensions, in their order; empty: not declared.
        ranges: of each dimension the smallest and the largest value, in the robot's own units, or None where it has no limits;
            empty: not declared.
        gripper: which dimension is the gripper's, from 0; `NO_GRIPPER`: none is; None: not declared.
        delta: whether the other dimensions are changes of what they name, and not its values; None: not declared.
        rotation: None: not declared.
    """

    names: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float] | None, ...] = ()
    gripper: int | None = None
    delta: bool | None = None
    rotation: Rotation | None = None

    @classmethod
    def read(cls, tree: Mapping[str, Any] | None, dims: int) -> Self:
        """The record of a `tree`; of None, one that declares nothing.

        Args:
            dims: how many numbers there are.

        Raises:
            ValueError: it is no such record, or one of other dimensions.
        """
        if tree is None:
            return cls()
        try:
            names, ranges = tuple(tree.get("names", ())), tuple(tree.get("ranges", ()))
            gripper, delta, rotation = (tree.get(name) for name in ("gripper", "delta", "rotation"))
            pairs = tuple(None if pair is None else (float(pair[0]), float(pair[1])) for pair in ranges)
        except (AttributeError, TypeError, ValueError, LookupError):
            raise ValueError(f"{str(tree)[:80]} is no declaration of {dims} numbers; {_VALID}") from None
        fits = (
            len(names) in (0, dims) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names),
            len(pairs) in (0, dims) and all(pair is None or pair[0] <= pair[1] for pair in pairs),
            gripper is None or (type(gripper) is int and NO_GRIPPER <= gripper < dims),
            delta is None or isinstance(delta, bool),
            rotation is None or rotation in ROTATIONS,
        )
        for name, fit in zip(("names", "ranges", "gripper", "delta", "rotation"), fits, strict=True):
            if not fit:
                raise ValueError(f"{name} {str(tree.get(name))[:80]} is no declaration of {dims} numbers; {_VALID}")
        return cls(names=names, ranges=pairs, gripper=gripper, delta=delta, rotation=cast("Rotation | None", rotation))

    def tree(self) -> dict[str, Any]:
        """What is declared, as JSON has it."""
        said = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        return cast("dict[str, Any]", json.loads(json.dumps(said)))

    def facts(self) -> dict[str, tuple[Any, str]]:
        """Every fact by its name: what to compare, None where nothing is declared, and the same in words."""
        gripper = "none" if self.gripper == NO_GRIPPER else self.dimension(self.gripper or 0)
        facts = {
            "names": (self.names or None, ", ".join(self.names)),
            "ranges": (self.ranges or None, _words(self.ranges)),
            "gripper": (self.gripper, gripper),
            "values": (self.delta, "delta" if self.delta else "absolute"),
            "rotation": (self.rotation, str(self.rotation)),
        }
        return {name: (fact, "not declared" if fact is None else words) for name, (fact, words) in facts.items()}

    def dimension(self, place: int) -> str:
        """A dimension's name, or its number where it has none."""
        return self.names[place] if self.names else str(place)


_VALID = (
    "valid are names, different and one each; ranges, each [low, high] or null; gripper, a dimension from 0 or -1 for none; "
    f"delta, true or false; rotation, one of {', '.join(ROTATIONS)}"
)
UNDECLARED = VectorSpec()


class Declares(Protocol):
    """Whoever says what its actions and states are."""

    @property
    def action(self) -> VectorSpec:
        """Of an action."""

    @property
    def state(self) -> VectorSpec:
        """Of a state."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What an action and a state mean, apart from whose they are."""

    action: VectorSpec = UNDECLARED
    state: VectorSpec = UNDECLARED


NOTHING = Declaration()
"""Nothing is declared."""


@dataclass(frozen=True, kw_only=True)
class RobotSpec:
    """What a simulator, a data set and a checkpoint each say of their robot, to be compared before anything long begins.

    Attributes:
        action_dim: D; `state_dim`: S.
        cameras: feature names of the colour cameras.
        control_hz: control steps per second.
        action: what the D numbers mean; `state` likewise.
    """

    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]
    control_hz: float
    action: VectorSpec = UNDECLARED
    state: VectorSpec = UNDECLARED

    @classmethod
    def read(cls, action: Mapping[str, Any], state: Mapping[str, Any], cameras: tuple[str, ...], control_hz: float) -> Self:
        """Of a server's descriptions of action and state: the last of each `shape` is the dimensions, `spec` what they mean.

        Raises:
            ValueError: a `spec` that none can be.
        """
        dims = {"action": int(action["shape"][-1]), "state": int(state["shape"][-1])}
        return cls(
            action_dim=dims["action"],
            state_dim=dims["state"],
            cameras=cameras,
            control_hz=control_hz,
            action=VectorSpec.read(action.get("spec"), dims["action"]),
            state=VectorSpec.read(state.get("spec"), dims["state"]),
        )


def differences(one: Declares, other: Declares, *, undeclared: bool = False) -> dict[str, tuple[str, str]]:
    """Facts of action and state that two declare otherwise: which -> what each says.

    Args:
        undeclared: whether it is a difference, too, that only one of them declares a fact.
    """
    found = {}
    for kind, own, others in (("action", one.action, other.action), ("state", one.state, other.state)):
        theirs = others.facts()
        for name, (fact, words) in own.facts().items():
            also, said = theirs[name]
            if fact != also and (undeclared or None not in (fact, also)):
                found[f"{kind} {name}"] = (words, said)
    return found


def _words(ranges: tuple[tuple[float, float] | None, ...]) -> str:
    each = ["unlimited" if pair is None else f"[{pair[0]:g}, {pair[1]:g}]" for pair in ranges]
    return f"{each[0]} each" if len(set(each)) == 1 else ", ".join(each)
