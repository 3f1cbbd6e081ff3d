"""Made-up but realistic results for tests of the report."""

from collections.abc import Sequence

import numpy as np

from libra_ray.common.provenance import Hardware
from libra_ray.config import Config, ControlConfig, override, preset
from libra_ray.control.margin import Latency, margins
from libra_ray.report.records import CheckpointFacts, DatasetFacts, Report, WallTime
from libra_ray.report.run_report import build_report
from libra_ray.runs.results import (
    ChunkJerk,
    EpisodeAsynchrony,
    EpisodeReplans,
    EpisodeResult,
    Evaluation,
    GoalReaction,
    LevelLatencies,
    LoggedStep,
    RolloutVideo,
    TrainingLog,
)
from libra_ray.types import Level

CONTROLLERS = ("expert", "policy", "coarse_only", "zero_action")
SUCCESS = {"expert": 1.0, "policy": 0.92, "coarse_only": 0.6, "zero_action": 0.0}
WALL_S = WallTime(record=71.3, train=291.8, evaluate=88.0, total=455.2)
HARDWARE = Hardware(
    cpu="Example CPU @ 2.60GHz", cores=2, memory_gb=23.4, gpu=None, os="Linux", python="3.12", libraries={"numpy": "2.2.6"}
)
DATASET = DatasetFacts(
    episodes=250, frames=21_340, fps=80, state_dim=4, action_dim=4, cameras=["observation.image"], instructions=["reach"]
)
CHECKPOINT = CheckpointFacts(
    path="run/checkpoint", step=2000, digest="9f2c1b7de0a4456182aa0c1c34f0d7b1", manifest={"shape": {"action_dim": 4}}
)
LEVELS = ("planner", "refiner")
COVERED_MS = {"planner": 250.0, "refiner": 12.5}


def evaluation(config: Config, seed: int = 0, error_rate: float = 0.03) -> Evaluation:
    """An evaluation of all tasks, controllers and episodes of `config`."""
    rng = np.random.default_rng(seed)
    results = []
    for task in config.sim.tasks:
        for controller in CONTROLLERS:
            share = SUCCESS[controller] * rng.uniform(0.9, 1.0) if controller != "expert" else 1.0
            seeds = range(config.evaluate.seed, config.evaluate.seed + config.evaluate.episodes_per_task)
            results += [_result(rng, task, controller, episode, share, error_rate) for episode in seeds]
    calls = {"planner": rng.gamma(30, 0.6, 400), "refiner": rng.gamma(40, 0.25, 800)}
    return Evaluation(
        results=results,
        latencies={
            level: LevelLatencies(ms=ms.tolist(), robots=rng.integers(1, 17, len(ms)).tolist()) for level, ms in calls.items()
        },
        env_steps=sum(result.steps for result in results),
        wall_s=WALL_S.evaluate,
    )


def _result(rng: np.random.Generator, task: str, controller: str, seed: int, share: float, error_rate: float) -> EpisodeResult:
    raised = controller == "policy" and rng.random() < error_rate
    success = bool(rng.random() < share) and not raised
    steps = int(rng.integers(50, 120)) if success else 30 if raised else 200
    of_levels = controller in ("policy", "coarse_only")
    ages = [step % 10 + seed % 3 for step in range(steps)] if of_levels else []
    return EpisodeResult(
        task=task,
        instruction=f"Do what {task} asks & be <careful>",
        controller=controller,
        seed=seed,
        success=success,
        steps=steps,
        error="RuntimeError: the simulator diverged at step 30" if raised else None,
        held_actions=int(rng.integers(0, 3)) if ages else 0,
        intent_age_steps=ages,
        asynchrony=_between_levels(rng, steps) if of_levels else None,
    )


def _between_levels(rng: np.random.Generator, steps: int) -> EpisodeAsynchrony:
    shares = rng.choice((0.0, 0.05, 0.2), steps // 5)
    return EpisodeAsynchrony(
        replans=[
            EpisodeReplans(level="planner", value="tokens", shares=shares.tolist(), differences=(1.4 * shares).tolist()),
            EpisodeReplans(level="planner", value="pace", differences=shares.tolist()),
        ],
        jerk=ChunkJerk(boundary=0.12 * rng.uniform(0.9, 1.1), within=0.08),
        reaction=GoalReaction(moved_at=20, chunk_steps=int(rng.integers(1, 6)), intent_steps=int(rng.integers(5, 12))),
    )


def training_log(steps: int = 2000, every: int = 20, switch: int = 700) -> TrainingLog:
    """Falling losses with a switch from ground truth to planner tokens at `switch`."""
    rng = np.random.default_rng(1)
    rows = []
    for step in range(every, steps + 1, every):
        noise = rng.normal(1, 0.06)
        plan = (0.7 + 1.6 * np.exp(-step / 400)) * noise
        diff = (0.12 + 0.8 * np.exp(-step / 250)) * noise + 0.05 * (step >= switch)
        row = {"step": step, "loss": plan + diff, "loss_plan": plan, "loss_diff": diff}
        row |= {"phase_ground_truth": float(step < switch), "phase_sampled": float(step >= switch)}
        row |= {"grad_norm_planner": 0.9 * noise, "grad_norm_refiner": 0.2 * noise + np.exp(-step / 200)}
        row |= {
            "samples_per_s": 480 * noise,
            "data_wait_share": 0.012 * noise,
            "plan_accuracy": 0.8 - 0.6 * np.exp(-step / 500),
        }
        if step % (every * 20) == 0:
            row |= {f"val_{key}": 1.05 * row[key] for key in ("loss_plan", "loss_diff", "plan_accuracy")}
        rows.append({key: float(value) for key, value in row.items()})
    return log_of(*rows)


def log_of(*rows: dict[str, float]) -> TrainingLog:
    """A log of rows as their file has them."""
    return TrainingLog.from_rows(
        LoggedStep(step=int(row["step"]), metrics={name: value for name, value in row.items() if name != "step"})
        for row in rows
    )


def rollouts(tasks: Sequence[str], size: int = 96, frames: int = 60) -> list[RolloutVideo]:
    """One success, and for every second task one failure: a disc that moves over a shaded table."""
    rng = np.random.default_rng(2)
    kept = []
    for number, task in enumerate(tasks):
        for success in (True, False)[: 1 + number % 2]:
            colour = rng.integers(60, 255, 3)
            pictures = [_picture(size, frame / frames, colour) for frame in range(frames)]
            kept.append(RolloutVideo(task=task, controller="policy", seed=100_000 + number, success=success, frames=pictures))
    return kept


def _picture(size: int, progress: float, colour: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    picture = np.stack([150 + 60 * y, 130 + 50 * x, 110 + 30 * y], axis=-1)
    disc = (x - 0.15 - 0.7 * progress) ** 2 + (y - 0.5 - 0.2 * np.sin(6 * progress)) ** 2 < 0.012
    picture[disc] = colour
    return picture.astype(np.uint8)


MARGINS = margins(
    (Level(name="planner", covers=20), Level(name="refiner", covers=5, reads="planner")),
    {
        "planner": Latency(p50_ms=150.0, p95_ms=180.0, robots=15.5, injected_steps=2),
        "refiner": Latency(p50_ms=8.0, p95_ms=11.0),
    },
    80,
    ControlConfig(rule="overlap"),
    {"planner": ("action.chunks", 5)},
)


def report(config: Config | None = None, measured: Evaluation | None = None, log: TrainingLog | None = None) -> Report:
    """A whole report."""
    config = config or preset("quickstart")
    return build_report(
        config=config,
        evaluation=measured or evaluation(config),
        training_log=log or training_log(),
        wall_s=WALL_S,
        levels=LEVELS,
        dataset=DATASET,
        checkpoint=CHECKPOINT,
        mlflow_run_id="3f6b8f0f4a8b4d7c9a0e6d0b6a1f9e11",
        hardware=HARDWARE,
        margins=MARGINS,
        covered_ms=COVERED_MS,
    )


def small_config() -> Config:
    """Two tasks, four episodes each."""
    return override(preset("quickstart"), {"sim.tasks": "reach-v3,drawer-open-v3", "evaluate.episodes_per_task": 4})
