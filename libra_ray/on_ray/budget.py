"""Closed-loop success of a budget's candidates, in simulated time, with each level as late as its latency says."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from libra_ray.budget.front import Question
from libra_ray.budget.records import Candidate, ComponentProfile, MeasuredSuccess
from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump
from libra_ray.common.progress import print_status
from libra_ray.config import Config, override
from libra_ray.control.delays import LATENCIES
from libra_ray.evaluation.log import read_evaluation
from libra_ray.manifest import read_config
from libra_ray.on_ray.evaluate import POLICY, check_drives, check_fits, device_of, evaluate
from libra_ray.on_ray.session import check, connected
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.policy import load_policy
from libra_ray.runs.folder import RunFolder
from libra_ray.sim import check_tasks, control_hz
from libra_ray.stats.intervals import wilson
from libra_ray.types import Policy

CELLS = "evaluated"


def check_success(checkpoint: Path, question: Question, episodes: int) -> None:
    """Refuse an evaluation that is known to be impossible, before anything is measured or started.

    Raises:
        ValueError: the checkpoint's robot is not the simulator's, or its tasks are not there.
        RuntimeError: no cluster answers at RAY_ADDRESS.
    """
    if episodes < 1:
        raise ValueError(f"--episodes {episodes} must be at least 1; without it success is not measured")
    config = _config(checkpoint, question, question.control.execute_steps, episodes, device="cpu", trace="")
    check()
    check_tasks(config.sim, ())
    check_fits(config, read_config(checkpoint))
    check_drives(config, checkpoint)


def measured_success(
    root: Path, checkpoint: Path, question: Question, profile: ComponentProfile, found: Sequence[Candidate], episodes: int
) -> list[Candidate]:
    """The candidates with their success; what was evaluated before under the same settings is not done again.

    Args:
        root: the budget's folder.
        checkpoint: whose policy drives.
        question: the rule, and the control rate that steps are counted at.
        profile: says where it computes, and which setting the denoising steps are.
        found: candidates.
        episodes: of each task.
    """
    cells = [(candidate, _opened(root, checkpoint, question, profile, candidate, episodes)) for candidate in found]
    if any(not folder.done("evaluate") for _, folder in cells):
        config = cells[0][1].config
        with ExitStack() as stack:
            stack.enter_context(connected())
            pool = stack.enter_context(SimulatorPool(config.sim, config.data.image_size, config.ray.simulator_actors))
            torch.set_num_threads(profile.threads)
            for number, (candidate, folder) in enumerate(cells, start=1):
                if not folder.done("evaluate"):
                    said = f"{candidate.denoising_steps} denoising and {candidate.execute_steps} executed steps"
                    print_status(f"budget: {number} of {len(cells)}, {said}")
                    _evaluate(folder, profile, candidate, pool)
    return [replace(candidate, success=_success(folder)) for candidate, folder in cells]


def _evaluate(folder: RunFolder, profile: ComponentProfile, candidate: Candidate, pool: SimulatorPool) -> None:
    def load(run: RunFolder, controller: str) -> tuple[Policy, Config]:
        changes = {profile.denoising_setting: candidate.denoising_steps} if profile.denoising_setting else {}
        policy = load_policy(run.checkpoint, device_of(run.config), changes=changes)
        return policy, policy.source.config

    with folder.stage("evaluate") as clock:
        evaluate(folder, clock, load, pool)


def _opened(
    root: Path, checkpoint: Path, question: Question, profile: ComponentProfile, candidate: Candidate, episodes: int
) -> RunFolder:
    """The folder of one candidate, named by all that its success depends on, with the delays as a trace."""
    control = question.control
    late = "-".join(str(steps) for steps in candidate.late_steps.values())
    parts = [
        profile.digest[:12], f"k{candidate.denoising_steps}", f"e{candidate.execute_steps}", f"late{late}", control.rule,
        f"c{control.committed_steps}", f"n{episodes}",
    ]  # fmt: skip
    place = root / CELLS / "_".join(parts)
    place.mkdir(parents=True, exist_ok=True)
    trace = place / "delays.json"
    device = profile.device
    config = _config(checkpoint, question, candidate.execute_steps, episodes, device=device, trace=str(trace.resolve()))
    # In the middle of a step: intents are rounded up, chunks down; in steps of the simulator's rate, whatever the asked one is.
    last = question.levels[-1].name
    middle = {name: steps + 0.5 if name == last else max(0.0, steps - 0.5) for name, steps in candidate.late_steps.items()}
    ms = {name: [steps * 1000 / control_hz(config.sim)] for name, steps in middle.items()}
    write_text(trace, dump({LATENCIES: ms}))
    return RunFolder.open(place, config)


def _config(checkpoint: Path, question: Question, executed: int, episodes: int, *, device: str, trace: str) -> Config:
    """What is evaluated: the tasks and the simulator of the checkpoint's own run."""
    control = replace(question.control, execute_steps=executed)
    changes = {
        "evaluate.checkpoint": str(checkpoint.resolve()),
        "evaluate.controllers": POLICY,
        "evaluate.episodes_per_task": episodes,
        "evaluate.videos_per_task": 0,
        "ray.use_gpu": device.startswith("cuda"),
        "delay.trace": trace,
    }
    return replace(override(read_config(checkpoint), changes), control=control)


def _success(folder: RunFolder) -> MeasuredSuccess:
    results = read_evaluation(folder).results
    successes = sum(result.success for result in results)
    interval = wilson(successes, len(results))
    assert interval is not None
    return MeasuredSuccess(
        successes=successes, episodes=len(results), rate=successes / len(results), low=interval.low, high=interval.high
    )
