"""GPU, rendering, simulator and video: each red with its fix where something broken is planted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from libra_ray.config import override, preset, to_json
from libra_ray.data import video
from libra_ray.doctor import aside, hardware
from libra_ray.doctor.finding import Check, outcome
from libra_ray.sim.render import known_scene
from tests.on_ray.doubles import StubEnvironment

FINE = {"names": ["NVIDIA H100"], "cuda": "13.0", "error": ""}
OLD = {"names": [], "cuda": "13.0", "error": "The NVIDIA driver on your system is too old (found version 11040)."}
NONE = {"names": [], "cuda": "13.0", "error": "Found no NVIDIA driver on your system."}


def looked(check, *arguments, **settings):
    [finding] = outcome(Check(look=lambda: check(*arguments, **settings), fix="mend it"))
    return finding


@pytest.mark.parametrize(
    ("tried", "driver", "use_gpu", "level", "found", "fix"),
    [
        (FINE, "NVIDIA H100", True, "ok", "NVIDIA H100; torch for CUDA 13.0", ""),
        (NONE, None, False, "ok", "no GPU, the CPU is used", ""),
        (NONE, None, True, "blocker", "there is no GPU here", "--ray.use_gpu false"),
        (OLD, "NVIDIA H100", False, "warning", "driver on your system is too old", "driver for CUDA 13.0 or newer"),
        (OLD, "NVIDIA H100", True, "blocker", "driver on your system is too old", "driver for CUDA 13.0 or newer"),
        (OLD | {"cuda": None}, "NVIDIA H100", True, "blocker", "built without CUDA", "uv sync --locked"),
    ],
)
def test_gpus(monkeypatch, tried, driver, use_gpu, level, found, fix):
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    finding = looked(hardware.judge_gpu, tried, driver=driver, use_gpu=use_gpu)
    assert (finding.level, found in finding.found, fix in finding.fix) == (level, True, True)


def test_a_gpu_is_tried_by_computing_on_it(monkeypatch):
    def too_old():
        raise RuntimeError(f"{OLD['error']}\nhow to mend it, on many lines")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert hardware.try_gpu()["error"] == OLD["error"]
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert hardware.try_gpu()["error"] == "no device"
    # One that has a name, and cannot add.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    tried = hardware.try_gpu() if not torch.cuda.is_available() else OLD
    assert tried["error"]
    assert looked(hardware.judge_gpu, tried, driver="NVIDIA H100", use_gpu=True).level == "blocker"


def test_a_hidden_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = looked(hardware.judge_gpu, NONE, driver="NVIDIA H100", use_gpu=True)
    assert (finding.level, finding.fix) == ("blocker", "unset CUDA_VISIBLE_DEVICES")


def test_the_cluster_may_have_the_gpus(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert looked(hardware.judge_gpu, NONE, driver=None, use_gpu=True).level == "ok"


def scene(size=32):
    half = size // 2
    picture = np.zeros((size, size, 3), np.uint8)
    for corner, colour in known_scene.COLOURS.items():
        rows = slice(None, half) if corner.startswith("upper") else slice(half, None)
        columns = slice(None, half) if corner.endswith("left") else slice(half, None)
        picture[rows, columns] = colour
    return picture


def test_only_the_right_picture_is_right():
    right = scene()
    assert known_scene.fault(right) == ""
    noise = np.random.default_rng(0).integers(0, 255, right.shape).astype(np.uint8)
    torn = right.copy()
    torn[20:24] = 0
    wrong = {
        "black": 0 * right,
        "white": 0 * right + 255,
        "noise": noise,
        "upside down": right[::-1],
        "mirrored": right[:, ::-1],
    }
    for name, picture in (wrong | {"blue for red": right[..., ::-1], "torn": torn}).items():
        assert known_scene.fault(picture), name
    assert known_scene.fault(0 * right) == "all is black"
    assert "upper left must be (255, 0, 0)" in known_scene.fault(right[::-1])


def test_a_backend_that_draws_something_else_is_refused(monkeypatch):
    class Upside:
        def __init__(self, *_, height, width, **__):
            assert height == width
            self.picture = scene(height)[::-1]

        def render(self, _):
            return self.picture

    monkeypatch.setattr("libra_ray.sim.choose_backend", lambda: "egl")
    monkeypatch.setattr(known_scene, "OffscreenRenderer", Upside)
    finding = looked(hardware.try_rendering)
    assert finding.level == "blocker"
    assert "OpenGL draws wrong pictures: the upper left must be (255, 0, 0)" in finding.found
    assert finding.fix.startswith("try the other library")


def test_without_opengl(monkeypatch, tmp_path):
    for name in ("libEGL.so.1", "libEGL.so", "libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        (tmp_path / name).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    finding = looked(hardware.rendering)
    assert finding.level == "blocker"
    assert finding.found == "neither EGL nor OSMesa can render on this machine (MUJOCO_GL=egl)"
    assert "apt-get install -y libegl1" in finding.fix
    assert "unset MUJOCO_GL" in finding.fix


def test_a_backend_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    finding = looked(hardware.rendering)
    assert finding.level == "ok"
    assert "MUJOCO_GL=glfw cannot be used here" in finding.found


@pytest.mark.parametrize("said", ["it was ended by SIGSEGV", "no answer within 1 s"])
def test_a_driver_that_crashes_or_hangs(monkeypatch, said):
    def call(*_, **__):
        raise aside.AsideError(said)

    monkeypatch.setattr(aside, "call", call)
    for finding in (looked(hardware.rendering), looked(hardware.gpu, False)):
        assert finding.level == "blocker"
        assert said in finding.found
        assert finding.fix


def test_a_task_that_is_not_there():
    settings = override(preset("debug"), {"sim.tasks": "reech-v3"})
    finding = looked(hardware.try_simulator, to_json(settings))
    assert finding.level == "blocker"
    assert "reach-v3" in finding.found + finding.fix


def test_a_robot_whose_camera_sees_nothing(monkeypatch):
    settings = preset("debug")
    monkeypatch.setattr("libra_ray.sim.make_environment", lambda sim, task, image_size: StubEnvironment(task))
    finding = looked(hardware.try_simulator, to_json(settings))
    assert (finding.level, finding.found) == ("blocker", "reach-v3: observation.image shows nothing")
    assert "libegl1" in finding.fix


def encoder(codec="h264"):
    """LeRobot's settings, without importing LeRobot."""
    return SimpleNamespace(
        vcodec=codec, pix_fmt="yuv444p", get_codec_options=lambda *_, **__: {"qp": "8", "preset": "ultrafast"}
    )


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda frames: frames, ""),
        (lambda frames: frames[:-1], "12 pictures were written as h264, 11 came back"),
        (lambda frames: frames[::-1], "of 255 away from themselves"),
        (lambda frames: [video.DecodedFrame(time=0, rgb=0 * frame.rgb) for frame in frames], "away from themselves"),
    ],
    ids=["fine", "lost", "disordered", "black"],
)
def test_videos(monkeypatch, plant, words):
    decode = video.decode
    monkeypatch.setattr(video, "encoder_config", encoder)
    monkeypatch.setattr(video, "decode", lambda path: plant(list(decode(path))))
    if words:
        with pytest.raises(RuntimeError, match=words):
            hardware.try_video("h264")
    else:
        assert hardware.try_video("h264") == "h264, 12 pictures written and read"
