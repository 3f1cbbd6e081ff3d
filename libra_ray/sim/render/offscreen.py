"""Off-screen pictures of a MuJoCo scene, made for many small ones on one core."""

import atexit
import copy
import importlib
import threading
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from libra_ray.sim.render.gl_backend import choose_backend

MAX_GEOMS = 1000
_COSTLY_EFFECTS = (
    mujoco.mjtRndFlag.mjRND_SHADOW,
    mujoco.mjtRndFlag.mjRND_REFLECTION,
    mujoco.mjtRndFlag.mjRND_SKYBOX,
    mujoco.mjtRndFlag.mjRND_HAZE,
)
_GL_SIZE = 64
_thread = threading.local()


class OffscreenRenderer:
    """One camera's pictures at one size; several may live in one process and take turns.

    All renderers of a thread share one OpenGL context, so that a further one starts without compiling shaders again and frees
    its buffers where they live. (`mujoco.Renderer` frees them in whichever context is current: under OSMesa that destroys
    the textures of another live renderer without an error.) A renderer belongs to the thread that made it.

    Args:
        model: what is drawn. Its poses come from the `data` given to `render`, so it may be a lighter copy of the physics'
            model (`meshes.lighter_copy`).
        camera: name of a fixed camera.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        supersample: pixels drawn per pixel and axis, averaged: small things no longer flicker between one pixel and none.
            Cheaper in software than OpenGL's own multisampling.

    Raises:
        ValueError: the size is not positive, or the model has no such camera.
        RuntimeError: there is no OpenGL to render with.
    """

    def __init__(self, model: mujoco.MjModel, *, camera: str, height: int, width: int, supersample: int = 1) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"a picture of {height} x {width} pixels cannot be rendered; both must be at least 1")
        names = [model.camera(i).name for i in range(model.ncam)]
        if camera not in names:
            raise ValueError(f"the model has no camera {camera!r}; it has {', '.join(names)}")
        self._supersample = supersample
        height, width = supersample * height, supersample * width
        self._model = _sized_copy(model, height, width)
        self._camera = mujoco.MjvCamera()
        self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, names.index(camera)
        self._option, self._rectangle = mujoco.MjvOption(), mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(self._model, maxgeom=MAX_GEOMS)
        for effect in _COSTLY_EFFECTS:
            self._scene.flags[effect] = 0
        self._pixels = np.empty((height, width, 3), np.uint8)
        self._gl: Any = _thread_gl_context()
        self._gl.make_current()
        self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        # Runs before the context's own handler, which was registered earlier.
        atexit.register(self.close)

    def render(self, data: mujoco.MjData) -> NDArray[np.uint8]:
        """The picture `(height, width, 3)` uint8, RGB, of the present state, the camera's upper edge first.

        Raises:
            RuntimeError: the renderer is closed.
        """
        if self._gl is None:
            raise RuntimeError("this renderer is closed; make a new one")
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        self._gl.make_current()
        # Binds this renderer's own buffer; another renderer's may be bound.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
        return _averaged(self._pixels[::-1], self._supersample)

    def close(self) -> None:
        """Free the buffers; closing twice is fine."""
        if self._gl is None:
            return
        atexit.unregister(self.close)
        self._gl.make_current()
        self._context.free()
        self._gl = None


def _averaged(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """A copy, `factor` times smaller in both directions; each pixel is the rounded mean of its block."""
    if factor == 1:
        return pixels.copy()
    height, width, _ = pixels.shape
    blocks = pixels.reshape(height // factor, factor, width // factor, factor, 3)
    total = blocks.sum(axis=(1, 3), dtype=np.uint16)
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def _sized_copy(model: mujoco.MjModel, height: int, width: int) -> mujoco.MjModel:
    """A copy with buffers of the picture's size: no multisampling, no shadow map (64 MiB by default)."""
    sized = copy.copy(model)
    sized.vis.quality.offsamples, sized.vis.quality.shadowsize = 0, 0
    sized.vis.global_.offheight, sized.vis.global_.offwidth = height, width
    return sized


def _thread_gl_context() -> Any:
    """This thread's OpenGL context, of the chosen backend whatever `MUJOCO_GL` said when MuJoCo was imported."""
    if not hasattr(_thread, "gl"):
        backend = choose_backend()
        module = mujoco if backend == "default" else importlib.import_module(f"mujoco.{backend}")
        # MuJoCo draws into buffers of its own; the context's size does not matter.
        _thread.gl = module.GLContext(_GL_SIZE, _GL_SIZE)
        atexit.register(_thread.gl.free)
    return _thread.gl
