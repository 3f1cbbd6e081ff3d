"""What an evaluation has done so far, on disk: a row per episode and per batch of latencies, and a few rollouts to look at."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from libra_ray.common.files import append_jsonl, read_jsonl
from libra_ray.common.json_text import ABSENT, plain
from libra_ray.common.progress import ProgressBar
from libra_ray.control.disagreement import Replan
from libra_ray.control.lockstep import Latencies, LevelCalls
from libra_ray.evaluation.measures import asynchrony_of, mean_measures
from libra_ray.runs.folder import Clock, RunFolder
from libra_ray.runs.results import EpisodeResult, Evaluation, LevelLatencies, RolloutVideo
from libra_ray.types import Episode

LOG_NAME = "evaluation.jsonl"
ROLLOUTS_FOLDER = "rollouts"
ROLLOUT_FPS = 8.0
"""Pictures are taken at chunk boundaries; shown at a fraction of real time they can be followed."""


@dataclass(frozen=True, kw_only=True, order=True)
class EpisodeJob:
    """One episode to evaluate."""

    controller: str
    task: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class LogRow:
    """A row of the log: an episode, or the calls of one controller's policy.

    Attributes:
        latencies: `<level>_ms` and `<level>_batch` of every level, see `LevelLatencies`.
    """

    episode: EpisodeResult | None = field(default=None, metadata=ABSENT)
    controller: str | None = field(default=None, metadata=ABSENT)
    latencies: Mapping[str, Sequence[float]] | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class PlayedEpisode:
    """A finished episode as it travels between processes: its row, and the pictures of a rollout that may be kept.

    Attributes:
        frames: what the policy saw; none where nobody will look at them.
    """

    job: EpisodeJob
    result: EpisodeResult
    frames: Sequence[NDArray[np.uint8]] = ()

    @classmethod
    def of(
        cls,
        job: EpisodeJob,
        episode: Episode,
        frames: Sequence[NDArray[np.uint8]] = (),
        replans: Sequence[Replan] = (),
    ) -> "PlayedEpisode":
        """The episode of a job, with the pictures that the policy saw, and how far its intents differed from those before."""
        result = EpisodeResult(
            task=job.task,
            instruction=episode.instruction,
            controller=job.controller,
            seed=job.seed,
            success=episode.success,
            steps=len(episode.steps),
            error=episode.error,
            held_actions=sum(s.action.held for s in episode.steps),
            intent_age_steps=[s.action.intent_age_steps for s in episode.steps if s.action.intent_age_steps is not None],
            position_error_mm=episode.position_error_mm,
            parts_done=episode.parts_done,
            asynchrony=asynchrony_of(episode, replans),
            measures=mean_measures([step.action for step in episode.steps]),
        )
        return cls(job=job, result=result, frames=frames if job.controller == "policy" else ())


@dataclass
class ResultBuffer:
    """Collects results until they are taken: what a process far from the log does with them.

    Args:
        videos_per_task: rollouts of a task and outcome whose pictures are kept; those of all others are let go at once.

    Attributes:
        episodes: those that were not taken yet.
    """

    videos_per_task: int
    episodes: list[PlayedEpisode] = field(default_factory=list)
    _calls: dict[str, Latencies] = field(default_factory=dict)
    _seen: Counter[tuple[str, bool]] = field(default_factory=Counter)

    def episode(
        self, job: EpisodeJob, episode: Episode, frames: Sequence[NDArray[np.uint8]] = (), replans: Sequence[Replan] = ()
    ) -> None:
        """Note a finished episode."""
        outcome = job.task, episode.success
        kept = frames if self._seen[outcome] < self.videos_per_task else ()
        self._seen[outcome] += bool(kept)
        self.episodes.append(PlayedEpisode.of(job, episode, kept, replans))

    def latencies(self, controller: str, latencies: Latencies) -> None:
        """Note the wall time of batched calls."""
        known = self._calls.setdefault(controller, {})
        for level, calls in latencies.items():
            together = known.setdefault(level, LevelCalls())
            together.ms.extend(calls.ms)
            together.batch.extend(calls.batch)

    def take(self) -> tuple[list[PlayedEpisode], dict[str, Latencies]]:
        """All that was noted since the last time: episodes, and calls by their controller."""
        taken = self.episodes, self._calls
        self.episodes, self._calls = [], {}
        return taken


@dataclass
class EvaluationLogWriter:
    """Writes an evaluation's results: to the log on disk, the progress bar, the clock."""

    folder: RunFolder
    clock: Clock
    bar: ProgressBar

    def episode(
        self, job: EpisodeJob, episode: Episode, frames: Sequence[NDArray[np.uint8]] = (), replans: Sequence[Replan] = ()
    ) -> None:
        """Note a finished episode; see `write`."""
        self.write([PlayedEpisode.of(job, episode, frames, replans)])

    def write(self, played: Sequence[PlayedEpisode]) -> None:
        """Note finished episodes; only its row, written last and at once, makes one that is not run again."""
        for done in played:
            if done.frames:
                self._rollout(done.job, done.result.success, done.frames)
        append_jsonl(self.folder.path(LOG_NAME), [plain(LogRow(episode=done.result)) for done in played])
        self.bar.to(self.bar.count + len(played))
        self.clock.tick()

    def latencies(self, controller: str, latencies: Latencies) -> None:
        """Note the wall time of batched calls."""
        columns: dict[str, Sequence[float]] = {}
        for level, calls in latencies.items():
            columns |= {f"{level}_ms": calls.ms, f"{level}_batch": calls.batch}
        append_jsonl(self.folder.path(LOG_NAME), [plain(LogRow(controller=controller, latencies=columns))])

    def _rollout(self, job: EpisodeJob, success: bool, frames: Sequence[NDArray[np.uint8]]) -> None:
        """Keep what the policy saw, a few per task and outcome; the name sorts failures first."""
        folder = self.folder.path(ROLLOUTS_FOLDER) / job.task
        folder.mkdir(parents=True, exist_ok=True)
        outcome = "b-success" if success else "a-failure"
        if len(list(folder.glob(f"{outcome}-*.npz"))) < self.folder.config.evaluate.videos_per_task:
            partial = folder / f".{job.seed}.partial"
            with partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, frames=np.stack(frames), fps=ROLLOUT_FPS)
            partial.replace(folder / f"{outcome}-{job.seed}.npz")


def read_evaluation(folder: RunFolder) -> Evaluation:
    """Everything evaluated so far; latencies are those of `policy`, or of its first variant where that was not evaluated.

    Raises:
        ValueError: a row of the log is none; names the file, the line and the field.
    """
    rows = read_jsonl(folder.path(LOG_NAME), LogRow)
    results = [row.episode for row in rows if row.episode is not None]
    timed = [row for row in rows if row.latencies is not None]
    names = [row.controller for row in timed]
    spoken_of = "policy" if "policy" in names else next(iter(names), None)
    columns: dict[str, list[float]] = {}
    for row in timed:
        for name, values in (row.latencies or {}).items():
            if row.controller == spoken_of:
                columns.setdefault(name, []).extend(values)
    levels = [name.removesuffix("_ms") for name in columns if name.endswith("_ms")]
    return Evaluation(
        results=results,
        latencies={
            level: LevelLatencies(ms=columns[f"{level}_ms"], robots=[int(n) for n in columns.get(f"{level}_batch", ())])
            for level in levels
        },
        env_steps=sum(result.steps for result in results),
        wall_s=folder.wall_s("evaluate"),
    )


def read_rollouts(folder: RunFolder) -> list[RolloutVideo]:
    """The kept rollouts of the policy: at most `evaluate.videos_per_task` per task, failures first."""
    chosen: list[RolloutVideo] = []
    for task in folder.config.sim.tasks:
        paths = sorted((folder.path(ROLLOUTS_FOLDER) / task).glob("[ab]-*.npz"), key=lambda path: path.name)
        for path in paths[: folder.config.evaluate.videos_per_task]:
            with np.load(path, allow_pickle=False) as file:
                chosen.append(
                    RolloutVideo(
                        task=task,
                        controller="policy",
                        seed=int(path.stem.split("-")[-1]),
                        success=path.name.startswith("b-success"),
                        frames=list(file["frames"]),
                        fps=float(file["fps"]),
                    )
                )
    return chosen
