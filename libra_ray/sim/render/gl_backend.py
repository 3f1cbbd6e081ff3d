"""Which OpenGL renders: found by trying it, never asked of the user. Standard library only."""

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any

INSTALL_HINT = "apt-get install -y libegl1 libgl1 libosmesa6"

_EGL_PLATFORM_DEVICE = 0x313F
_EGL_OPENGL_API = 0x30A2
_EGL_NONE = 0x3038
# Red, green, blue, alpha, depth and stencil bits, off-screen surface, desktop OpenGL: what mujoco.egl asks for.
_EGL_CONFIG = (0x3024, 8, 0x3023, 8, 0x3022, 8, 0x3021, 8, 0x3025, 24, 0x3026, 8, 0x3033, 1, 0x3040, 8, _EGL_NONE)
_EGL_EXTENSIONS = 0x3055
_OF_A_GPU = b"EGL_NV_device_cuda"
_MAX_EGL_DEVICES = 10
"""MuJoCo asks for no more."""
DEVICE, CHOSEN, NUMBER = "MUJOCO_EGL_DEVICE_ID", "LIBRA_RAY_EGL_DEVICE_ID", "LIBRA_RAY_SIMULATOR"
"""Where MuJoCo reads its device; the one that a process of ours chose, which those that it starts may change; their numbers."""
_OSMESA_RGBA = 0x1908


def take_turn(number: int) -> None:
    """Say, before anything is drawn, which of the simulators this process is: where there are several GPUs, they take turns."""
    os.environ[NUMBER] = str(number)


@functools.cache
def choose_backend() -> str:
    """Find the OpenGL backend of this process and tell MuJoCo through `MUJOCO_GL`.

    Linux: `egl` where a context can really be made (GPU, or Mesa in software), else `osmesa`. A working `egl` or `osmesa`
    already named in `MUJOCO_GL` is kept. Elsewhere the platform's own. Takes milliseconds.

    Returns:
        `egl`, `osmesa` or `default`.

    Raises:
        RuntimeError: Linux without a usable library; the message holds the line that installs one.
    """
    # Mesa's software rasteriser starts a thread per core; the cores belong to the other simulators.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if not sys.platform.startswith("linux"):
        os.environ.pop("MUJOCO_GL", None)
        return "default"
    works = {"egl": _egl_works, "osmesa": _osmesa_works}
    named = os.environ.get("MUJOCO_GL", "")
    for backend in sorted(works, key=lambda name: name != named):
        if works[backend]():
            os.environ["MUJOCO_GL"] = backend
            # PyOpenGL reads it once; a value of the other backend would stop MuJoCo's import.
            os.environ["PYOPENGL_PLATFORM"] = backend
            return backend
    device = _named_device()
    hint = f" (of EGL's devices only MUJOCO_EGL_DEVICE_ID={device} was tried; unset it)" if device else ""
    raise RuntimeError(f"neither EGL nor OSMesa can render on this machine{hint}; install them with: {INSTALL_HINT}")


def _egl_works() -> bool:
    """Whether a device makes an OpenGL context; that device, of several GPUs this process's, is named to MuJoCo."""
    egl = _load("libEGL.so.1", "libEGL.so")
    if egl is None:
        return False
    egl.eglGetProcAddress.restype, egl.eglGetProcAddress.argtypes = c_void_p, [c_char_p]
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return False
    query = ctypes.CFUNCTYPE(c_uint, c_int, POINTER(c_void_p), POINTER(c_int))(query_address)
    get_display = ctypes.CFUNCTYPE(c_void_p, c_uint, c_void_p, POINTER(c_int))(display_address)
    devices, count = (c_void_p * _MAX_EGL_DEVICES)(), c_int()
    if not query(_MAX_EGL_DEVICES, devices, byref(count)):
        return False
    named = _named_device()
    gpus = [index for index in range(count.value) if _is_gpu(egl, devices[index])]
    number, visible = int(os.environ.get(NUMBER, "0")), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    for index in [int(named)] if named.isdigit() else in_turn(count.value, gpus, visible, number):
        if index < count.value and _egl_makes_context(egl, get_display(_EGL_PLATFORM_DEVICE, devices[index], None)):
            os.environ[DEVICE] = os.environ[CHOSEN] = str(index)
            return True
    return False


def in_turn(count: int, gpus: Sequence[int], visible: str, number: int) -> list[int]:
    """The order in which a process tries EGL's devices: its turn among the GPUs that it may use, then whatever else there is.

    Args:
        count: of all devices.
        gpus: those that are NVIDIA's, in EGL's order, by which `visible` counts them.
        visible: CUDA_VISIBLE_DEVICES. Where it names none by its number, it says nothing of drawing: Ray hides all GPUs in this
            way from processes that have reserved none.
        number: of the process.
    """
    named = [int(word) for word in visible.replace(" ", "").split(",") if word.isdigit()]
    allowed = [gpus[n] for n in dict.fromkeys(named) if n < len(gpus)] or list(gpus)
    first = number % len(allowed) if allowed else 0
    turn = [*allowed[first:], *allowed[:first]]
    others = [index for index in range(count) if index not in gpus]
    return [*turn, *others, *(index for index in gpus if index not in allowed)]


def _named_device() -> str:
    """The device that the user wants; empty where none is named but by a process of ours, for itself."""
    named = os.environ.get(DEVICE, "")
    return "" if named == os.environ.get(CHOSEN) else named


def _is_gpu(egl: Any, device: int | None) -> bool:
    """Whether one of EGL's devices is a GPU of NVIDIA's, and not software that draws, or the same GPU by another driver."""
    address = egl.eglGetProcAddress(b"eglQueryDeviceStringEXT")
    if not address:
        return False
    words = ctypes.CFUNCTYPE(c_char_p, c_void_p, c_int)(address)(device, _EGL_EXTENSIONS)
    return _OF_A_GPU in (words or b"").split()


def _egl_makes_context(egl: Any, display: int | None) -> bool:
    egl.eglInitialize.argtypes = [c_void_p, c_void_p, c_void_p]
    egl.eglChooseConfig.argtypes = [c_void_p, POINTER(c_int), POINTER(c_void_p), c_int, POINTER(c_int)]
    egl.eglCreateContext.restype, egl.eglCreateContext.argtypes = c_void_p, [c_void_p, c_void_p, c_void_p, POINTER(c_int)]
    egl.eglMakeCurrent.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p]
    egl.eglDestroyContext.argtypes = [c_void_p, c_void_p]
    if not display or not egl.eglInitialize(display, None, None):
        return False
    wanted, config, found = (c_int * len(_EGL_CONFIG))(*_EGL_CONFIG), c_void_p(), c_int()
    if not egl.eglChooseConfig(display, wanted, byref(config), 1, byref(found)) or not found.value:
        return False
    egl.eglBindAPI(_EGL_OPENGL_API)
    context = egl.eglCreateContext(display, config, None, None)
    if not context:
        return False
    current = bool(egl.eglMakeCurrent(display, None, None, context))
    egl.eglMakeCurrent(display, None, None, None)
    egl.eglDestroyContext(display, context)
    return current


def _osmesa_works() -> bool:
    osmesa = _load("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")
    if osmesa is None:
        return False
    osmesa.OSMesaCreateContextExt.restype = c_void_p
    osmesa.OSMesaCreateContextExt.argtypes = [c_uint, c_int, c_int, c_int, c_void_p]
    osmesa.OSMesaDestroyContext.argtypes = [c_void_p]
    context = osmesa.OSMesaCreateContextExt(_OSMESA_RGBA, 24, 8, 0, None)
    if not context:
        return False
    osmesa.OSMesaDestroyContext(context)
    return True


def _load(*names: str) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
