"""GPU, rendering and video, each tried in a process of its own: a broken driver may end the process that asks it."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from libra_ray import config as configuration
from libra_ray.common.provenance import describe_hardware
from libra_ray.doctor import aside
from libra_ray.doctor.finding import Finding
from libra_ray.sim.render.gl_backend import INSTALL_HINT

FLATTEST = 5.0
"""Standard deviation of pixels below which a picture shows nothing."""
WORST_DIFFERENCE = 12.0
"""Mean difference of pixels, of 255, that a lossy video may have."""


def gpu(use_gpu: bool, limit_s: float = 120) -> str | Finding:
    """The GPU, its driver, and whether torch computes on it."""
    return judge_gpu(aside.call(try_gpu, limit_s=limit_s), driver=describe_hardware().gpu, use_gpu=use_gpu)


def judge_gpu(tried: dict[str, Any], *, driver: str | None, use_gpu: bool) -> str | Finding:
    """The finding.

    Args:
        tried: as `try_gpu` returns it.
        driver: the GPUs that the driver names, None where there is no driver.
        use_gpu: whether the jobs are asked to use one.
    """
    if not tried["error"]:
        return f"{', '.join(tried['names'])}; torch for CUDA {tried['cuda']}"
    if not driver and not use_gpu:
        return "no GPU, the CPU is used"
    if not driver and os.environ.get("RAY_ADDRESS"):
        return "none here; ray.use_gpu is true, so the cluster at RAY_ADDRESS must have some"
    if not driver:
        return Finding.blocker("ray.use_gpu is true, but there is no GPU here", "--ray.use_gpu false")
    bad = Finding.blocker if use_gpu else Finding.warning
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return bad(f"{driver} is hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES")
    if not tried["cuda"]:
        return bad(f"{driver}, but this torch was built without CUDA", "uv sync --locked")
    fix = f"install an NVIDIA driver for CUDA {tried['cuda']} or newer; until then --ray.use_gpu false"
    return bad(f"{driver}, but torch cannot use it: {tried['error']}", fix)


def try_gpu() -> dict[str, Any]:
    """A small sum on every GPU: their `names`, the `cuda` that torch was built for, and the `error`, if any."""
    import torch

    names, error = [], ""
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            names.append(torch.cuda.get_device_name(index))
            torch.ones(8, 8, device=f"cuda:{index}").matmul(torch.ones(8, 8, device=f"cuda:{index}")).sum().item()
    except (RuntimeError, AssertionError) as mistake:
        error = str(mistake).split("\n")[0]
    return {"names": names, "cuda": torch.version.cuda, "error": error or ("" if names else "no device")}


def rendering(limit_s: float = 120) -> str | Finding:
    """A picture of a known scene."""
    named = os.environ.get("MUJOCO_GL", "")
    try:
        backend = aside.call(try_rendering, limit_s=limit_s)
    except aside.AsideError as error:
        refused = Finding.refused(error, INSTALL_HINT)
        if not named:
            return refused
        return Finding.blocker(f"{refused.found} (MUJOCO_GL={named})", f"{refused.fix}; unset MUJOCO_GL MUJOCO_EGL_DEVICE_ID")
    ignored = f"; MUJOCO_GL={named} cannot be used here and is not" if named not in ("", backend) else ""
    return f"{backend} draws what is there{ignored}"


def try_rendering() -> str:
    """The backend that drew the known scene rightly."""
    from libra_ray.sim import choose_backend

    backend = choose_backend()
    from libra_ray.sim.render.known_scene import check_renderer

    check_renderer()
    return backend


def try_simulator(config_json: str) -> str:
    """What the camera of one robot of the first task sees, in words.

    Raises:
        ValueError: there is no such task.
        RuntimeError: nothing is seen.
    """
    from libra_ray.sim import make_environment

    config = configuration.from_json(config_json)
    sim = config.sim
    environment = make_environment(sim, sim.tasks[0], config.data.image_size)
    pictures = environment.reset(0).images
    flat = [name for name, picture in pictures.items() if picture.std() < FLATTEST]
    if flat:
        raise RuntimeError(f"{sim.tasks[0]}: {', '.join(flat)} shows nothing; {INSTALL_HINT}")
    shown = ", ".join(f"{name} {'x'.join(map(str, picture.shape))}" for name, picture in pictures.items())
    return f"{sim.family} {sim.tasks[0]}, {shown}"


def try_video(codec: str) -> str:
    """How a small video, written and read as recordings are, came back, in words.

    Raises:
        ValueError: there is no such codec.
        RuntimeError: it came back otherwise.
    """
    from libra_ray.data.video import EncoderSettings, VideoWriter, decode, encoder_config

    steps = np.linspace(0, 255, 64)
    ramp = np.stack(np.broadcast_arrays(steps[:, None], steps[None, :], 128.0), axis=-1)
    pictures = np.stack([np.roll(ramp, 4 * t, axis=1) for t in range(12)]).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = VideoWriter(path, fps=10, encoder=EncoderSettings.of(encoder_config(codec)), height=64, width=64)
        writer.write(pictures)
        writer.close()
        back = [frame.rgb for frame in decode(path)]
    if len(back) != len(pictures):
        raise RuntimeError(f"{len(pictures)} pictures were written as {codec}, {len(back)} came back")
    difference = float(np.abs(np.stack(back).astype(int) - pictures).mean())
    if difference > WORST_DIFFERENCE:
        raise RuntimeError(f"pictures written as {codec} come back {difference:.0f} of 255 away from themselves")
    return f"{codec}, {len(back)} pictures written and read"
