"""Recording demonstrations: a fleet of experts fills the spool, one writer turns it into a data set."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.actor import ActorProxy

from libra_ray.common.files import write_text
from libra_ray.common.progress import ProgressBar
from libra_ray.config import RecordConfig
from libra_ray.data.dataset import load_lerobot, write_dataset
from libra_ray.data.spool import load_episode
from libra_ray.evaluation.simulators import DIED, Attempt, Simulators
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.runs.folder import Clock, RunFolder
from libra_ray.sim import control_hz
from libra_ray.types import Episode


@dataclass(frozen=True, kw_only=True)
class RecordingJob:
    """One attempt."""

    task: str
    seed: int


@dataclass
class TaskTally:
    """The attempts at one task: which seeds succeeded, which failed, which are under way.

    Seeds are tried in order and a failed one is replaced by the next, so the recorded set does not depend on timing, on the
    number of actors or on interruptions.
    """

    task: str
    spool: Path
    record: RecordConfig
    succeeded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    under_way: set[int] = field(default_factory=set)
    error: str | None = None

    def __post_init__(self) -> None:
        """Read what an earlier start left."""
        folder = self.spool / self.task
        folder.mkdir(parents=True, exist_ok=True)
        self.succeeded = {int(path.stem) for path in folder.glob("[0-9]*.npz")}
        self.failed = {int(path.stem) for path in folder.glob("[0-9]*.json")}

    @property
    def wanted(self) -> int:
        """Episodes that shall succeed."""
        return self.record.episodes(self.task)

    @property
    def complete(self) -> bool:
        """Whether enough episodes succeeded."""
        return len(self.succeeded) >= self.wanted

    def path(self, seed: int) -> Path:
        """The spool file of a seed."""
        return self.spool / self.task / f"{seed}.npz"

    def next_seed(self) -> int | None:
        """The next seed to try; None while enough are done or under way.

        Raises:
            RuntimeError: too many attempts failed.
        """
        if len(self.succeeded) + len(self.under_way) >= self.wanted:
            return None
        if len(self.failed) >= self.wanted * (self.record.max_attempts - 1) + self.record.max_attempts:
            raise RuntimeError(
                f"the expert failed {len(self.failed)} of {len(self.failed) + len(self.succeeded)} attempts at {self.task}"
                f"{f' (the last error: {self.error})' if self.error else ''}; "
                "lower record.noise_std or raise record.max_attempts, and start over with --fresh"
            )
        tried = self.succeeded | self.failed | self.under_way
        return next(s for s in range(self.record.seed, self.record.seed + len(tried) + 1) if s not in tried)

    def note(self, done: Attempt) -> None:
        """Count a finished attempt; a failure leaves a mark, so that it is not tried again."""
        self.under_way.discard(done.seed)
        if done.success:
            self.succeeded.add(done.seed)
        else:
            self.failed.add(done.seed)
            self.error = done.error or self.error
            mark = {"task": done.task, "seed": done.seed, "steps": done.steps, "error": done.error}
            write_text(self.path(done.seed).with_suffix(".json"), json.dumps(mark))


def record(folder: RunFolder, clock: Clock) -> None:
    """Record the run's demonstrations into its data set; what an earlier start recorded is kept.

    Raises:
        RuntimeError: too many attempts at a task failed.
    """
    if not folder.path("dataset").exists():
        tallies = [TaskTally(task, folder.path("spool"), folder.config.record) for task in folder.config.sim.tasks]
        lerobot = load_lerobot()
        _fill_spool(folder, tallies, clock)
        lerobot.join()
        _write(folder, tallies, clock)
    shutil.rmtree(folder.path("spool"), ignore_errors=True)


def _fill_spool(folder: RunFolder, tallies: list[TaskTally], clock: Clock) -> None:
    config, by_task = folder.config, {tally.task: tally for tally in tallies}

    def submit(actor: ActorProxy[Simulators], job: RecordingJob) -> ray.ObjectRef[Attempt]:
        return actor.demonstrate.remote(job.task, job.seed, config.record, by_task[job.task].path(job.seed))

    with ProgressBar("record", total=sum(t.wanted for t in tallies), unit="episodes") as bar:
        bar.to(sum(len(t.succeeded) for t in tallies))
        if all(t.complete for t in tallies):
            return
        with SimulatorPool(config.sim, config.ray.simulator_actors) as pool:
            for job, done in pool.work(lambda: _next_job(tallies), submit):
                lost = Attempt(task=job.task, seed=job.seed, success=False, steps=0, error=DIED)
                by_task[job.task].note(done or lost)
                bar.to(sum(len(t.succeeded) for t in tallies))
                clock.tick()


def _next_job(tallies: list[TaskTally]) -> RecordingJob | None:
    """The next seed to try, task by task; None while none is wanted (until an attempt comes back as a failure)."""
    for tally in tallies:
        if (seed := tally.next_seed()) is not None:
            tally.under_way.add(seed)
            return RecordingJob(task=tally.task, seed=seed)
    return None


def _write(folder: RunFolder, tallies: list[TaskTally], clock: Clock) -> None:
    config = folder.config

    def episodes(bar: ProgressBar) -> Iterator[Episode]:
        for tally in tallies:
            for seed in sorted(tally.succeeded)[: tally.wanted]:
                yield load_episode(tally.path(seed))
                bar.to(bar.count + 1)
                clock.tick()

    # Around the writer, not in the generator: one that is interrupted half-way would show its last state whenever it is freed.
    with ProgressBar("write data set", total=sum(t.wanted for t in tallies), unit="episodes") as bar:
        write_dataset(episodes(bar), folder.path("dataset"), fps=control_hz(config.sim), video_codec=config.record.video_codec)
