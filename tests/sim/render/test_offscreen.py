"""Renderers share a process without touching one another, backends are found by trying, fewer triangles look the same."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from libra_ray.config import SimConfig
from libra_ray.sim import make_environment
from libra_ray.sim.metaworld import ROBOT_BODY, ROBOT_FACE_SHARE, Metaworld
from libra_ray.sim.render import gl_backend as backend
from libra_ray.sim.render.mesh_decimation import lighter_copy
from libra_ray.sim.render.offscreen import OffscreenRenderer
from libra_ray.types import IMAGE_KEY

TASKS = ("drawer-open-v3", "reach-v3", "plate-slide-v3")
STEPS = 4
HERE = Path(__file__).parent
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the platform renders")


def alone(task):
    """One environment's pictures, with no other alive."""
    environment = make_environment(SimConfig(), task, 64)
    environment.reset(1)
    pictures = [environment.step(environment.expert_action()).observation.images[IMAGE_KEY] for _ in range(STEPS)]
    environment.close()
    return np.stack(pictures)


def together():
    """The same pictures from environments taking turns, while another comes and goes and a large one is drawn."""
    environments = {task: make_environment(SimConfig(), task, 64) for task in TASKS}
    pictures = {task: [] for task in TASKS}
    for environment in environments.values():
        environment.reset(1)
    for step in range(STEPS):
        for task, environment in environments.items():
            pictures[task].append(environment.step(environment.expert_action()).observation.images[IMAGE_KEY])
        if step == 1:
            passing = make_environment(SimConfig(), "push-v3", 32)
            passing.reset(0)
            passing.close()
            environments["reach-v3"].render(256, 320)
    for environment in environments.values():
        environment.close()
    return {task: np.stack(seen) for task, seen in pictures.items()}


def write_alone(task, path):
    np.save(path, alone(task))


def write_both(path):
    np.savez(path, backend=backend.choose_backend(), **{f"alone {t}": alone(t) for t in TASKS}, **together())


def in_own_process(call, **environ):
    """Call a function of this module in a new interpreter."""
    program = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_offscreen as t; t.{call}"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **environ})


def test_environments_in_one_process_render_what_each_renders_alone(tmp_path):
    seen = together()
    for task in TASKS:
        np.testing.assert_array_equal(seen[task], alone(task))
        assert seen[task].std() > 20
    in_own_process(f"write_alone({TASKS[-1]!r}, {str(tmp_path / 'alone.npy')!r})")
    np.testing.assert_array_equal(np.load(tmp_path / "alone.npy"), seen[TASKS[-1]])


@linux_only
@pytest.mark.skipif(not backend._osmesa_works(), reason="OSMesa is not installed")
def test_environments_in_one_process_render_alike_under_osmesa(tmp_path):
    in_own_process(f"write_both({str(tmp_path / 'both.npz')!r})", MUJOCO_GL="osmesa")
    both = np.load(tmp_path / "both.npz")
    assert both["backend"] == "osmesa"
    for task in TASKS:
        np.testing.assert_array_equal(both[task], both[f"alone {task}"])
        assert both[task].std() > 20


def test_the_picture_follows_the_state():
    environment = make_environment(SimConfig(), "reach-v3", 64)
    before = environment.reset(0).images[IMAGE_KEY].astype(int)
    for _ in range(10):
        after = environment.step(np.array([1, 0, 0, 0], np.float32)).observation.images[IMAGE_KEY]
    assert np.abs(after - before).max() > 50


@pytest.fixture(scope="module")
def whole():
    environment = Metaworld(SimConfig(), "plate-slide-v3", 64)
    environment.reset(0, render=False)
    return environment._env


def test_fewer_triangles_look_the_same(whole):
    lighter = lighter_copy(whole.model, ROBOT_BODY, ROBOT_FACE_SHARE)
    pictures = []
    for model in (whole.model, lighter):
        renderer = OffscreenRenderer(model, camera="corner2", height=64, width=64)
        pictures.append(renderer.render(whole.data).astype(int))
        renderer.close()
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 1.7  # measured: 1.3; 1.9 with torn links


def faces_of(model, mesh):
    first = model.mesh_faceadr[mesh]
    return model.mesh_face[first : first + model.mesh_facenum[mesh]]


def test_only_the_robots_meshes_get_lighter_and_only_in_the_copy(whole):
    before = {name: getattr(whole.model, name).copy() for name in ("mesh_vert", "mesh_normal", "mesh_face", "mesh_facenum")}
    lighter = lighter_copy(whole.model, ROBOT_BODY, ROBOT_FACE_SHARE)
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(whole.model, name), values)
    robot = {whole.model.mesh(name).id for name in ("base", "eGripperBase", "l0", "l1", "l2", "l3", "l4", "l5", "l6")}
    for mesh in range(whole.model.nmesh):
        ours, theirs = faces_of(lighter, mesh), faces_of(whole.model, mesh)
        if mesh in robot:
            assert len(ours) < 0.2 * len(theirs)
            assert ours.max() < lighter.mesh_vertnum[mesh]
        elif whole.model.mesh(mesh).name in {"goal_rim", "goal_net", "puck", "tabletop"}:
            np.testing.assert_array_equal(ours, theirs)


def test_supersampling_averages_blocks(whole):
    drawn = {}
    for size, factor in ((64, 1), (32, 2)):
        renderer = OffscreenRenderer(whole.model, camera="corner2", height=size, width=size, supersample=factor)
        drawn[factor] = renderer.render(whole.data).astype(float)
        renderer.close()
    means = drawn[1].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(drawn[2], means, atol=0.5)


@pytest.mark.parametrize("family_task", [("metaworld", "reach-v3"), ("tabletop", "touch")])
def test_the_configuration_decides_about_supersampling(family_task):
    family, task = family_task
    plain, averaged = (
        make_environment(SimConfig(family=family, supersample=factor), task, 32).reset(0).images[IMAGE_KEY] for factor in (1, 2)
    )
    assert plain.shape == averaged.shape == (32, 32, 3)
    assert 0 < np.abs(plain.astype(int) - averaged).mean() < 12


def test_a_picture_is_the_callers_own(whole):
    renderer = OffscreenRenderer(whole.model, camera="corner2", height=8, width=8)
    first = renderer.render(whole.data)
    first[:] = 0
    assert renderer.render(whole.data).any()
    assert not first.any()
    renderer.close()


def test_a_closed_renderer_says_so(whole):
    renderer = OffscreenRenderer(whole.model, camera="corner2", height=8, width=8)
    renderer.close()
    renderer.close()
    with pytest.raises(RuntimeError, match="closed"):
        renderer.render(whole.data)


def test_a_missing_camera_is_named(whole):
    with pytest.raises(ValueError, match="corner2"):
        OffscreenRenderer(whole.model, camera="corner9", height=8, width=8)


@pytest.fixture
def fresh_choice(monkeypatch):
    """`choose_backend` in a process that has chosen nothing yet."""
    monkeypatch.setattr(os, "environ", {})
    return backend.choose_backend.__wrapped__


@pytest.mark.parametrize(
    ("visible", "order"),
    [
        ("", [[0, 2, 3], [2, 3, 0], [3, 0, 2], [0, 2, 3]]),
        ("2", [[3]] * 4),
        ("2, 0", [[3, 0], [0, 3], [3, 0], [0, 3]]),
        ("7", [[0, 2, 3], [2, 3, 0], [3, 0, 2], [0, 2, 3]]),
        ("GPU-9c2f", [[0, 2, 3], [2, 3, 0], [3, 0, 2], [0, 2, 3]]),
        ("-1", [[0, 2, 3], [2, 3, 0], [3, 0, 2], [0, 2, 3]]),
    ],
)
def test_processes_take_turns_on_the_gpus_that_they_may_use(visible, order):
    """Three GPUs, the first, third and fourth of EGL's five devices; then what else there is, and what is hidden last."""
    for number, turn in enumerate(order):
        hidden = [index for index in (0, 2, 3) if index not in turn]
        assert backend.in_turn(5, (0, 2, 3), visible, number) == [*turn, 1, 4, *hidden]
    assert backend.in_turn(2, (), visible, 1) == [0, 1], "without a GPU all begin alike"


class FourDevices:
    """EGL as a machine of two GPUs has it, between Mesa's devices: what is asked of it, answered by plain functions."""

    EXTENSIONS = (b"EGL_EXT_device_drm", b"EGL_EXT_device_base EGL_NV_device_cuda", b"EGL_NV_device_cuda", b"EGL_MESA_device")

    def __init__(self):
        kinds = {
            b"eglQueryDevicesEXT": (ctypes.c_uint, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)),
            b"eglGetPlatformDisplayEXT": (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)),
            b"eglQueryDeviceStringEXT": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
        }
        made = {b"eglQueryDevicesEXT": self.query, b"eglGetPlatformDisplayEXT": self.display}
        self.words = [ctypes.create_string_buffer(text) for text in self.EXTENSIONS]
        made[b"eglQueryDeviceStringEXT"] = lambda device, what: ctypes.addressof(self.words[device - 1])
        self.kept = {name: ctypes.CFUNCTYPE(*kind)(made[name]) for name, kind in kinds.items()}
        self.eglGetProcAddress = lambda name: ctypes.cast(self.kept[name], ctypes.c_void_p).value

    def query(self, most, devices, count):
        for index in range(4):
            devices[index] = index + 1
        count[0] = 4
        return 1

    def display(self, platform, device, attributes):
        return device


@linux_only
def test_each_simulator_names_its_own_gpu_to_mujoco_unless_the_user_did(fresh_choice, monkeypatch):
    """Also where the process that started it had chosen one for itself, and has left that in the environment."""
    monkeypatch.setattr(backend, "_load", lambda *names: FourDevices())
    monkeypatch.setattr(backend, "_egl_makes_context", lambda egl, display: True)
    chosen = []
    for number in range(4):
        backend.take_turn(number)
        assert fresh_choice() == "egl"
        chosen.append(os.environ["MUJOCO_EGL_DEVICE_ID"])
    assert chosen == ["1", "2", "1", "2"]
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    fresh_choice()
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "2"
    os.environ["MUJOCO_EGL_DEVICE_ID"] = "0"
    fresh_choice()
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "0"


@linux_only
def test_without_egl_there_is_osmesa(fresh_choice, monkeypatch):
    monkeypatch.setattr(backend, "_egl_works", lambda: False)
    monkeypatch.setattr(backend, "_osmesa_works", lambda: True)
    assert fresh_choice() == "osmesa"
    assert (os.environ["MUJOCO_GL"], os.environ["PYOPENGL_PLATFORM"], os.environ["LP_NUM_THREADS"]) == ("osmesa", "osmesa", "1")


@linux_only
def test_a_named_backend_that_does_not_work_is_replaced(fresh_choice, monkeypatch):
    monkeypatch.setattr(backend, "_osmesa_works", lambda: False)
    monkeypatch.setattr(backend, "_egl_works", lambda: True)
    for named in ("osmesa", "glfw", "nonsense"):
        os.environ["MUJOCO_GL"] = named
        assert fresh_choice() == "egl"


@linux_only
def test_an_egl_without_contexts_is_not_chosen(fresh_choice, monkeypatch):
    monkeypatch.setattr(backend, "_egl_makes_context", lambda egl, display: False)
    monkeypatch.setattr(backend, "_osmesa_works", lambda: True)
    assert fresh_choice() == "osmesa"


@linux_only
def test_without_libraries_the_message_installs_them(fresh_choice, monkeypatch):
    monkeypatch.setattr(backend, "_load", lambda *names: None)
    with pytest.raises(RuntimeError, match="apt-get install -y libegl1 libgl1 libosmesa6"):
        fresh_choice()
