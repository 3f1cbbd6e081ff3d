"""A scene whose picture is known: what a renderer draws is compared with it."""

import mujoco
import numpy as np
from numpy.typing import NDArray

from libra_ray.sim.render.gl_backend import INSTALL_HINT
from libra_ray.sim.render.offscreen import OffscreenRenderer

COLOURS = {
    "upper left": (255, 0, 0),
    "upper right": (0, 255, 0),
    "lower left": (0, 0, 255),
    "lower right": (255, 255, 255),
}
"""Corner of the picture to what fills it, RGB."""
TOLERANCE = 40
SIZES = (64, 48)

_SCENE = """
<mujoco>
  <visual><headlight ambient="0 0 0" diffuse="0 0 0" specular="0 0 0"/></visual>
  <asset>
    <material name="red" rgba="1 0 0 1" emission="1"/><material name="green" rgba="0 1 0 1" emission="1"/>
    <material name="blue" rgba="0 0 1 1" emission="1"/><material name="white" rgba="1 1 1 1" emission="1"/>
  </asset>
  <worldbody>
    <camera name="above" pos="0 0 2" fovy="45"/>
    <geom type="box" size="1 1 .1" pos="-1 1 0" material="red"/><geom type="box" size="1 1 .1" pos="1 1 0" material="green"/>
    <geom type="box" size="1 1 .1" pos="-1 -1 0" material="blue"/><geom type="box" size="1 1 .1" pos="1 -1 0" material="white"/>
  </worldbody>
</mujoco>
"""


def check_renderer() -> None:
    """Draw the scene with two renderers that take turns, as two robots in one process do.

    Raises:
        RuntimeError: there is no OpenGL, or it draws something else; says what.
    """
    model = mujoco.MjModel.from_xml_string(_SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderers = [OffscreenRenderer(model, camera="above", height=size, width=size) for size in SIZES]
    for _ in range(2):
        for renderer in renderers:
            if wrong := fault(renderer.render(data)):
                raise RuntimeError(f"OpenGL draws wrong pictures: {wrong}; try the other library: {INSTALL_HINT}")


def fault(picture: NDArray[np.uint8]) -> str:
    """How a picture `(height, width, 3)` of the scene differs from what must be seen; empty where it does not."""
    if picture.max() < TOLERANCE:
        return "all is black"
    middle_row, middle_column = picture.shape[0] // 2, picture.shape[1] // 2
    for corner, colour in COLOURS.items():
        rows = slice(2, middle_row - 2) if corner.startswith("upper") else slice(middle_row + 2, -2)
        columns = slice(2, middle_column - 2) if corner.endswith("left") else slice(middle_column + 2, -2)
        off = np.abs(picture[rows, columns].astype(int) - colour).max(axis=-1) > TOLERANCE
        if off.any():
            seen = picture[rows, columns].reshape(-1, 3)[off.ravel()].mean(axis=0).astype(int)
            return f"the {corner} must be {colour}, but {off.mean():.0%} of it is about {tuple(map(int, seen))}"
    return ""
