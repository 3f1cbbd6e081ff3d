"""Measures every component of a checkpoint on this machine: its levels whole and in their stages, at several batch sizes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from libra_ray.budget.records import BATCHES, REST, WHOLE, ComponentProfile, ComponentTime, TimedCall
from libra_ray.budget.stopwatch import timings, watched
from libra_ray.budget.wire import noisy, wire_times
from libra_ray.common.provenance import describe_hardware
from libra_ray.config.overrides import flatten
from libra_ray.control.margin import SPEAKS_FOR, Latency
from libra_ray.model.system import System
from libra_ray.policy import SystemPolicy, load_policy
from libra_ray.types import Intent

type Told = Callable[[str], object]
"""Hears what is measured next."""


def steps_to_measure(trained: int) -> tuple[int, ...]:
    """Denoising steps at which whole levels are measured, for the model to be fitted to: one, the checkpoint's own, twice."""
    return tuple(sorted({1, trained, 2 * max(trained, 2)}))


def setting_of(model: System) -> tuple[str, int]:
    """The setting of a model's denoising steps, and its value; empty and 0 where nothing is denoised."""
    denoised = model.denoised_by()
    return ("", 0) if denoised is None else (denoised.setting, int(flatten(model.config)[denoised.setting]))


def measured_profile(
    checkpoint: Path, device: str, *, threads: int, jpeg: int, batches: Sequence[int] = BATCHES, told: Told = lambda _: None
) -> ComponentProfile:
    """Everything that a budget is reckoned from.

    Args:
        checkpoint: its folder.
        device: torch's name.
        threads: that one call computes with on a CPU.
        jpeg: quality of the pictures that travel; 0 sends them raw.
        batches: robots in one call, ascending.
        told: hears what is measured next.

    Raises:
        ValueError: the folder is no checkpoint.
    """
    with _threads(threads):
        policy = load_policy(checkpoint, device)
        setting, trained = setting_of(policy.model)
        told("codec and transport")
        components = wire_times(policy, batches, jpeg)
        # What was recorded is one piece, and has no stages.
        written = load_policy(checkpoint, device, changes={"policy.compile": "none"}) if policy.engine.records else policy
        components += _components(written, batches, told)
        own = _whole(policy, batches, trained, told)
        calls = {name: list(found) for name, found in own.items()}
        denoised = policy.model.denoised_by()
        for steps in steps_to_measure(trained) if denoised else ():
            if steps != trained:
                policy = load_policy(checkpoint, device, changes={setting: steps})
                level = denoised.level if denoised else ""
                calls[level] += _whole(policy, batches, steps, told, only=level)[level]
    manifest, config = policy.source.manifest, policy.source.config
    return ComponentProfile(
        digest=manifest.digest,
        system=config.model.system,
        device=device,
        threads=threads,
        jpeg=jpeg,
        denoising_level=denoised.level if denoised else "",
        denoising_setting=setting,
        denoising_steps=trained,
        most_steps=denoised.most if denoised else 0,
        machine=describe_hardware(),
        components=components,
        calls=calls,
    )


def still_holds(profile: ComponentProfile, digest: str, device: str, threads: int, jpeg: int) -> bool:
    """Whether a profile is of this checkpoint, these settings and this machine."""
    here = describe_hardware()
    asked = (digest, device, threads, jpeg, here.cpu, here.cores, here.gpu)
    machine = profile.machine
    return asked == (
        profile.digest, profile.device, profile.threads, profile.jpeg, machine.cpu, machine.cores, machine.gpu,
    )  # fmt: skip


def _whole(policy: SystemPolicy, batches: Sequence[int], steps: int, told: Told, only: str = "") -> dict[str, list[TimedCall]]:
    """Every level whole, or one of them."""
    denoised = policy.model.denoised_by()
    found: dict[str, list[TimedCall]] = {}
    for name, calls in _calls(policy, batches):
        if only not in ("", name):
            continue
        own = steps if denoised is not None and denoised.level == name else 0
        told(f"{name} as a whole" + (f", denoising steps: {own}" if own else ""))
        for robots, call in calls.items():
            latency = Latency.of(timings(call))
            row = TimedCall(batch=robots, steps=own, p50_ms=latency.p50_ms, p95_ms=latency.p95_ms)
            found.setdefault(name, []).append(row)
    return found


def _components(policy: SystemPolicy, batches: Sequence[int], told: Told) -> list[ComponentTime]:
    """The stages of every level, and what is left of it."""
    found, settle = list[ComponentTime](), _settle(policy.device)
    for name, calls in _calls(policy, batches):
        told(f"the stages of {name}")
        for robots, call in calls.items():
            with watched(policy.stages(), settle) as seen:
                whole = np.asarray(timings(call))
            # The first call is not counted.
            rows = {stage: np.reshape(ms, (len(whole) + 1, -1))[1:] for stage, ms in seen.items() if ms}
            each = {stage: (ms.sum(axis=1), ms.shape[1]) for stage, ms in rows.items()}
            rest = np.maximum(whole - sum((ms for ms, _ in each.values()), np.zeros(len(whole))), 0)
            for stage, (ms, count) in {**each, REST: (rest, 1), WHOLE: (whole, 1)}.items():
                p50, p95 = map(float, np.percentile(ms, (50, SPEAKS_FOR)))
                found.append(ComponentTime(where=name, name=stage, batch=robots, p50_ms=p50, p95_ms=p95, calls=count))
    return found


def _calls(policy: SystemPolicy, batches: Sequence[int]) -> Iterator[tuple[str, dict[int, Callable[[], object]]]]:
    """Of every level a call for each batch size, with the intents of the level that it reads."""
    seen, intents = noisy(policy.blank()), dict[str | None, Intent | None]({None: None})
    for level in policy.levels:
        [answer] = policy.infer(level.name, [seen], [intents[level.reads]])
        intents[level.name] = answer if isinstance(answer, Intent) else None
        above = intents[level.reads]
        yield level.name, {n: partial(policy.infer, level.name, [seen] * n, [above] * n) for n in batches}


def _settle(device: torch.device | str) -> Callable[[], object]:
    """Waits until a GPU has done what was asked of it."""
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
