"""The table's physics: one scene with a Cartesian gripper, always with the same things on it, placed at random."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

BLOCKS = ("block_red", "block_green", "block_blue")
PEG = "peg"
OBJECTS = (*BLOCKS, PEG)
MARKS = ("mark_yellow", "mark_white")
SOCKETS = ("socket_green", "socket_purple")
BINS = ("bin_left", "bin_right")

CONTROL_HZ = 20
STEP_M = 0.02
"""Hand displacement per control step that an action of 1 asks for, in metres."""
OPENING_M = 0.02
"""Travel of one finger, in metres; the gripper is fully open at twice that between the fingertips."""
BLOCK_HALF_M = 0.012
PEG_HALF_M = (0.007, 0.022)
"""Half the width and half the height of the peg, in metres."""
MOUTH_CLEARANCE_M = 0.005
"""What a socket's visible mouth leaves on each side of the peg, in metres."""

_LEASH_M = 0.012
"""How far the set point may run ahead of a blocked hand: bounds the force it presses with."""
SPACING_M = 0.048
"""Between centres, so that the open fingers fit around every object."""
_NEAR_ZONE_M = ((-0.125, 0.125), (-0.11, 0.02))
_ROW_M, _JITTER_M = 0.088, 0.006
"""Where bins and sockets stand, and how far off that they may."""
_LEDGE_HALF_HEIGHT_M = 0.0025
_GRASPED_OFF_M = (0.0, 0.004, 0.002)
"""How far off its middle an object that an episode begins with may be grasped, each way."""
_SETTLE_S = 0.4


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an episode starts: the hand `(3,)` and everything else `(2,)` on the table, in metres."""

    hand: NDArray[np.float64]
    positions: Mapping[str, NDArray[np.float64]]


def draw_placement(rng: np.random.Generator) -> Placement:
    """A random scene: blocks, peg and marks apart from one another in front, bins and sockets in a row behind them."""
    names = (*OBJECTS, *MARKS)
    spots: list[NDArray[np.float64]] = []
    while len(spots) < len(names):
        spots = []
        for _ in range(100):
            (spot,) = random_spots(rng, 1)
            if all(np.linalg.norm(spot - other) >= SPACING_M for other in spots):
                spots.append(spot)
            if len(spots) == len(names):
                break
    positions = dict(zip(names, spots, strict=True))
    rows = {"bin_left": -0.118, "bin_right": 0.118} | dict(zip(rng.permutation(SOCKETS), (-0.036, 0.036), strict=True))
    positions |= {str(name): np.array((x, _ROW_M)) + rng.uniform(-_JITTER_M, _JITTER_M, 2) for name, x in rows.items()}
    return Placement(hand=rng.uniform((-0.06, -0.06, 0.09), (0.06, 0.02, 0.13)), positions=positions)


def random_spots(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Points `(count, 2)` on the table in front of bins and sockets, in metres."""
    (left, right), (near, far) = _NEAR_ZONE_M
    return rng.uniform((left, near), (right, far), (count, 2))


class World:
    """The simulated table: what it is made of, how it moves, and what is true of it at this moment (privileged).

    Args:
        clearance_m: what the sockets' holes leave on each side of the peg, in metres, up to `MOUTH_CLEARANCE_M`.

    Attributes:
        model: MuJoCo's model.
        data: MuJoCo's state.
    """

    def __init__(self, clearance_m: float = MOUTH_CLEARANCE_M) -> None:
        self.model = _model(clearance_m)
        self.data = mujoco.MjData(self.model)
        self._substeps = round(1 / (CONTROL_HZ * self.model.opt.timestep))
        self._body = {name: self.model.body(name).id for name in (*OBJECTS, *MARKS, *SOCKETS, *BINS)}
        self._name = {body: name for name, body in self._body.items() if name in OBJECTS}
        self._fingers = {self.model.body(name).id for name in ("hand", "finger_left", "finger_right")}
        joints = [self.model.joint(name) for name in ("x", "y", "z", "left", "right")]
        self._q = np.array([joint.qposadr[0] for joint in joints])
        self._v = np.array([joint.dofadr[0] for joint in joints])
        self._free = {name: self.model.body_jntadr[self._body[name]] for name in OBJECTS}

    def reset(self, placement: Placement) -> None:
        """Put everything in its place, at rest, the gripper open."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self._q] = (*placement.hand, OPENING_M, OPENING_M)
        self.data.act[:] = placement.hand
        self.data.ctrl[3:] = OPENING_M
        for name, spot in placement.positions.items():
            body = self._body[name]
            if name in self._free:
                at = self.model.jnt_qposadr[self._free[name]]
                self.data.qpos[at : at + 2] = spot
            else:
                self.data.mocap_pos[self.model.body_mocapid[body], :2] = spot
        mujoco.mj_forward(self.model, self.data)

    def move(self, name: str, spot: NDArray[np.float64]) -> None:
        """Put a thing elsewhere on the table `(2,)`, at rest and as it stood at first."""
        body = self._body[name]
        if name in self._free:
            at, v = self.model.jnt_qposadr[self._free[name]], self.model.jnt_dofadr[self._free[name]]
            self.data.qpos[at : at + 7] = (*spot, *self.model.qpos0[at + 2 : at + 7])
            self.data.qvel[v : v + 6] = 0
        else:
            self.data.mocap_pos[self.model.body_mocapid[body], :2] = spot
        mujoco.mj_forward(self.model, self.data)

    def take(self, item: str, rng: np.random.Generator) -> None:
        """Put a block into the closed gripper, not quite in its middle, and let both come to rest."""
        at = self.model.jnt_qposadr[self._free[item]]
        self.data.qpos[at : at + 3] = self.hand + rng.uniform(-1, 1, 3) * _GRASPED_OFF_M
        self.data.qpos[self._q[3:]] = BLOCK_HALF_M
        self.data.ctrl[3:] = 0
        mujoco.mj_step(self.model, self.data, nstep=round(_SETTLE_S / self.model.opt.timestep))
        mujoco.mj_forward(self.model, self.data)

    def advance(self, action: NDArray[np.float32]) -> None:
        """One control step under an action `(4,)` in [-1, 1]."""
        hand = self.hand
        self.data.act[:] = np.clip(self.data.act, hand - _LEASH_M, hand + _LEASH_M)
        self.data.ctrl[:3] = action[:3] * STEP_M * CONTROL_HZ
        self.data.ctrl[3:] = OPENING_M * (1 - action[3]) / 2
        mujoco.mj_step(self.model, self.data, nstep=self._substeps)
        # Poses and contacts of the state reached, not of the one before it.
        mujoco.mj_forward(self.model, self.data)

    @property
    def hand(self) -> NDArray[np.float64]:
        """The point between the fingertips `(3,)`, in metres."""
        return self.data.qpos[self._q[:3]]

    @property
    def opening_01(self) -> float:
        """Between the fingertips: 0 closed, 1 open."""
        return float(self.data.qpos[self._q[3:]].mean() / OPENING_M)

    @property
    def told_to_open(self) -> bool:
        """Whether the last action opened the gripper."""
        return bool(self.data.ctrl[3] > OPENING_M / 2)

    def position(self, name: str) -> NDArray[np.float64]:
        """Centre of an object, or of a fixture's base, `(3,)` in metres."""
        return self.data.xpos[self._body[name]]

    def speed(self, name: str) -> float:
        """Of an object's centre, in metres a second."""
        at = self.model.jnt_dofadr[self._free[name]]
        return float(np.linalg.norm(self.data.qvel[at : at + 3]))

    def upright(self, name: str) -> bool:
        """Whether an object stands within 10 degrees as it stood at first."""
        return bool(self.data.xmat[self._body[name], 8] > np.cos(np.radians(10)))

    def touching(self) -> dict[str, int]:
        """Objects in contact with the hand, and how many of its parts (two fingers, palm) each of them touches."""
        pairs = {tuple(pair) for pair in self.model.geom_bodyid[self.data.contact.geom].tolist()}
        touched = [self._name.get(a) or self._name.get(b) for a, b in pairs if a in self._fingers or b in self._fingers]
        return {name: touched.count(name) for name in OBJECTS if name in touched}

    def holds(self, name: str) -> bool:
        """Whether both fingers rest against an object and have stopped closing."""
        return self.touching().get(name, 0) >= 2 and bool(np.abs(self.data.qvel[self._v[3:]]).max() < 0.01)


def _model(clearance_m: float) -> mujoco.MjModel:
    """The scene with its sockets' hidden ledges grown to the clearance."""
    assert 0 < clearance_m <= MOUTH_CLEARANCE_M
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("tabletop.xml")))
    mouth, hole = PEG_HALF_M[0] + MOUTH_CLEARANCE_M, PEG_HALF_M[0] + clearance_m
    middle, half = (mouth + hole) / 2, (mouth - hole) / 2
    beside, across = (half, mouth), (hole, half)
    ledges = [((middle, 0), beside), ((-middle, 0), beside), ((0, middle), across), ((0, -middle), across)]
    for socket in SOCKETS:
        for i, (centre, size) in enumerate(ledges):
            ledge = spec.geom(f"{socket}_ledge_{i}")
            if half <= 0:
                spec.delete(ledge)
                continue
            ledge.pos, ledge.size = (*centre, _LEDGE_HALF_HEIGHT_M), (*size, _LEDGE_HALF_HEIGHT_M)
    return spec.compile()
