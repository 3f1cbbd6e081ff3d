"""From a checkpoint and a question to the answer, without an engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from libra_ray.budget.front import Question, candidates, least_chunks, proposed, with_front
from libra_ray.budget.latency import models_of
from libra_ray.budget.plot import budget_plot
from libra_ray.budget.profile import measured_profile, still_holds
from libra_ray.budget.records import BudgetReport, Candidate, ComponentProfile
from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, read
from libra_ray.config import override
from libra_ray.manifest import read_config, read_levels, read_manifest
from libra_ray.model.registry import lengthening

PROFILE, REPORT, PLOT = "profile.json", "budget.json", "budget.svg"
"""What a budget's folder holds, beside what was evaluated."""

type Success = Callable[[Sequence[Candidate]], Sequence[Candidate]]
"""Gives candidates their measured success."""


def kept_profile(
    folder: Path, checkpoint: Path, device: str, threads: int, jpeg: int, told: Callable[[str], object]
) -> ComponentProfile:
    """The profile in a budget's folder, measured first where there is none of this checkpoint, these settings, this machine."""
    path, digest = folder / PROFILE, read_manifest(checkpoint).digest
    if path.exists() and still_holds(kept := read(ComponentProfile, path), digest, device, threads, jpeg):
        told("measured already")
        return kept
    profile = measured_profile(checkpoint, device, threads=threads, jpeg=jpeg, told=told)
    write_text(path, dump(profile))
    return profile


def check_place(folder: Path) -> None:
    """Refuse a folder that holds something else than a budget: what is measured again moves all of it aside.

    Raises:
        ValueError: names what it holds.
    """
    if not folder.is_dir() or (folder / PROFILE).exists() or not (held := sorted(path.name for path in folder.iterdir())):
        return
    if not (len(held) == 1 and held[0].startswith(f".{PROFILE}")):
        raise ValueError(f"--out {folder} holds something else than a budget ({', '.join(held[:3])}); give a folder of its own")


def measurable(device: str, threads: int, jpeg: int) -> str:
    """The device to measure on: the one that is wanted, or a GPU where there is one.

    Raises:
        ValueError: there is no such device, or a number is out of its range.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but this machine has no GPU that torch can use; give --device cpu")
    if threads < 1:
        raise ValueError(f"--threads {threads} must be at least 1")
    if not 0 <= jpeg <= 95:
        raise ValueError(f"--jpeg {jpeg} must be a quality from 1 to 95, or 0 for raw pictures")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def question_of(
    checkpoint: Path, *, budget_ms: float | None, control_hz: float | None, robots: int, rule: str, committed: int | None
) -> Question:
    """What is asked, with what the checkpoint says where nothing was given; no weights are loaded.

    Args:
        checkpoint: its folder.
        budget_ms: None is one control step.
        control_hz: None is the rate of the demonstrations.
        robots: to be served.
        rule: of control; empty is the checkpoint's own.
        committed: steps that robots go on meanwhile; None is the checkpoint's own.

    Raises:
        ValueError: the folder is no checkpoint; a number that nothing could meet.
    """
    manifest, config, levels = read_manifest(checkpoint), read_config(checkpoint), read_levels(checkpoint)
    hz, own = manifest.control_hz if control_hz is None else control_hz, config.control
    control = override(
        config,
        {
            "control.rule": rule or own.rule,
            "control.committed_steps": own.committed_steps if committed is None else committed,
            "control.execute_steps": min(own.execute_steps, levels[-1].covers),
        },
    ).control
    return Question(
        budget_ms=(1000 / hz if hz else 0.0) if budget_ms is None else budget_ms,
        control_hz=hz,
        robots=robots,
        control=control,
        levels=levels,
        lengthened_by=lengthening(config, levels),
    )


def answered_budget(
    checkpoint: Path, question: Question, profile: ComponentProfile, success: Success | None = None
) -> BudgetReport:
    """The answer from a profile.

    Args:
        success: evaluates the candidates that fit; None leaves success unmeasured.
    """
    question = replace(
        question,
        denoised=profile.denoising_level,
        trained_steps=profile.denoising_steps,
        most_steps=profile.most_steps,
    )
    models, config = models_of(profile), read_config(checkpoint)
    found = candidates(question, models)
    if success is not None:
        # All of them: that more denoising steps, or fewer executed ones, are better is what is to be found out.
        known = success([candidate for candidate in found if candidate.fits])
        by_setting = {_setting(c): c for c in known}
        found = [by_setting.get(_setting(c), c) for c in found]
    found = with_front(found)
    proposal = proposed(found, question)
    return BudgetReport(
        checkpoint=str(checkpoint),
        budget_ms=question.budget_ms,
        control_hz=question.control_hz,
        robots=question.robots,
        rule=question.control.rule,
        committed_steps=question.control.committed_steps,
        measured=success is not None,
        models=models,
        candidates=found,
        chunks=config.action.chunks if len(question.levels) > 1 else None,
        least_chunks=least_chunks(question, proposal),
        proposal=proposal,
        profile=profile,
    )


def write_budget(folder: Path, report: BudgetReport) -> None:
    """`budget.json` and `budget.svg`."""
    write_text(folder / REPORT, dump(report))
    write_text(folder / PLOT, budget_plot(report))


def _setting(candidate: Candidate) -> tuple[int, int]:
    return candidate.denoising_steps, candidate.execute_steps
