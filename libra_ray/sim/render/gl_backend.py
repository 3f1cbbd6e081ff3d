"""Which OpenGL renders: found by trying it, never asked of the user. Standard library only."""

import ctypes
import functools
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any

INSTALL_HINT = "apt-get install -y libegl1 libgl1 libosmesa6"

_EGL_PLATFORM_DEVICE = 0x313F
_EGL_OPENGL_API = 0x30A2
_EGL_NONE = 0x3038
# Red, green, blue, alpha, depth and stencil bits, off-screen surface, desktop OpenGL: what mujoco.egl asks for.
_EGL_CONFIG = (0x3024, 8, 0x3023, 8, 0x3022, 8, 0x3021, 8, 0x3025, 24, 0x3026, 8, 0x3033, 1, 0x3040, 8, _EGL_NONE)
_MAX_EGL_DEVICES = 16
_OSMESA_RGBA = 0x1908


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
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    hint = f" (of EGL's devices only MUJOCO_EGL_DEVICE_ID={device} was tried; unset it)" if device else ""
    raise RuntimeError(f"neither EGL nor OSMesa can render on this machine{hint}; install them with: {INSTALL_HINT}")


def _egl_works() -> bool:
    """Whether a device makes an OpenGL context; that device is named in `MUJOCO_EGL_DEVICE_ID`."""
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
    named = os.environ.get("MUJOCO_EGL_DEVICE_ID", "")
    candidates = [int(named)] if named.isdigit() else range(count.value)
    for index in candidates:
        if index < count.value and _egl_makes_context(egl, get_display(_EGL_PLATFORM_DEVICE, devices[index], None)):
            os.environ["MUJOCO_EGL_DEVICE_ID"] = str(index)
            return True
    return False


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
