"""Recording demonstrations: a fleet of experts fills the spool with encoded episodes, which are put together meanwhile."""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition

import ray
from ray.actor import ActorProxy

from libra_ray.common.files import write_text
from libra_ray.common.progress import ProgressBar
from libra_ray.config import RecordConfig
from libra_ray.data.dataset import Recording, write_recordings
from libra_ray.data.spool import load_recording
from libra_ray.data.video import EncoderSettings, check_encodes, encoder_config
from libra_ray.evaluation.simulators import DIED, Attempt, Simulators
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.runs.folder import Clock, RunFolder
from libra_ray.sim import control_hz, robot_spec

WAKE_S = 0.2
"""Between two looks at how far the writer is."""


@dataclass(frozen=True, kw_only=True)
class RecordingJob:
    """One attempt."""

    task: str
    seed: int


@dataclass
class TaskTally:
    """The attempts at one task: which seeds succeeded, which failed, which are under way.

    `max_steps` is what an attempt is allowed (`sim.max_steps`), `too_slow` how many failed because they needed more.

    Seeds are tried in order and a failed one is replaced by the next, so the recorded set does not depend on timing, on the
    number of actors or on interruptions.
    """

    task: str
    spool: Path
    record: RecordConfig
    max_steps: int
    succeeded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    under_way: set[int] = field(default_factory=set)
    too_slow: int = 0
    error: str | None = None

    def __post_init__(self) -> None:
        """Read what an earlier start left."""
        folder = self.spool / self.task
        folder.mkdir(parents=True, exist_ok=True)
        self.succeeded = {int(path.stem) for path in folder.glob("[0-9]*.npz")}
        for path in folder.glob("[0-9]*.json"):
            self._count_failure(int(path.stem), json.loads(path.read_text(encoding="utf-8"))["error"])

    @property
    def wanted(self) -> int:
        """Episodes that shall succeed."""
        return self.record.episodes(self.task)

    @property
    def complete(self) -> bool:
        """Whether enough episodes succeeded."""
        return len(self.succeeded) >= self.wanted

    @property
    def settled(self) -> list[int]:
        """The seeds that will be in the data set whatever comes: those that succeeded, up to the first one still open."""
        seeds: list[int] = []
        seed = self.record.seed
        while len(seeds) < self.wanted and (seed in self.succeeded or seed in self.failed):
            seeds += [seed] * (seed in self.succeeded)
            seed += 1
        return seeds

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
            raise RuntimeError(self._given_up())
        tried = self.succeeded | self.failed | self.under_way
        return next(s for s in range(self.record.seed, self.record.seed + len(tried) + 1) if s not in tried)

    def note(self, done: Attempt) -> None:
        """Count a finished attempt; a failure leaves a mark, so that it is not tried again."""
        self.under_way.discard(done.seed)
        if done.success:
            self.succeeded.add(done.seed)
        else:
            self._count_failure(done.seed, done.error)
            mark = {"task": done.task, "seed": done.seed, "steps": done.steps, "error": done.error}
            write_text(self.path(done.seed).with_suffix(".json"), json.dumps(mark))

    def _count_failure(self, seed: int, error: str | None) -> None:
        self.failed.add(seed)
        # What ends without an error and without success has come to its last control step.
        self.too_slow += error is None
        self.error = error or self.error

    def _given_up(self) -> str:
        tried = f"{len(self.failed)} of {len(self.failed) + len(self.succeeded)} attempts at {self.task}"
        slow = f", {self.too_slow} of them at the end of sim.max_steps={self.max_steps}" if self.too_slow else ""
        last = f" (the last error: {self.error})" if self.error else ""
        longer = "raise sim.max_steps, " if self.too_slow else ""
        return (
            f"the expert failed {tried}{slow}{last}; "
            f"{longer}lower record.noise_std or raise record.max_attempts, and start over with --fresh"
        )


class Shelf:
    """The recorded episodes in the order of the data set: one thread puts them there, another takes those that are final."""

    def __init__(self, tallies: Sequence[TaskTally]) -> None:
        """Nothing was taken yet."""
        self.tallies = tallies
        self.taken = 0
        self._changed = Condition()
        self._closed = False

    def note(self, tally: TaskTally, done: Attempt) -> None:
        """Count a finished attempt."""
        with self._changed:
            tally.note(done)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def recordings(self) -> Iterator[Recording]:
        """Every episode of the data set, as soon as it is known to be the next one.

        Raises:
            InterruptedError: recording has ended before its last episode.
        """
        for tally in self.tallies:
            for place in range(tally.wanted):
                with self._changed:
                    while not self._closed and len(tally.settled) <= place:
                        self._changed.wait()
                    settled = tally.settled
                if self._closed:
                    raise InterruptedError(f"recording {tally.task} has ended before its last episode")
                yield load_recording(tally.path(settled[place]))
                self.taken += 1


def record(folder: RunFolder, clock: Clock) -> None:
    """Record the run's demonstrations into its data set; what an earlier start recorded is kept.

    Raises:
        RuntimeError: too many attempts at a task failed.
        ValueError: there is no such codec.
    """
    if not folder.path("dataset").exists():
        config = folder.config
        shelf = Shelf([TaskTally(task, folder.path("spool"), config.record, config.sim.max_steps) for task in config.sim.tasks])
        with ThreadPoolExecutor(1) as thread:
            try:
                written = _fill_spool(folder, shelf, clock, thread)
                with ProgressBar("write data set", total=sum(t.wanted for t in shelf.tallies), unit="episodes") as bar:
                    _watch(written, shelf, bar, clock)
            finally:
                shelf.close()
    shutil.rmtree(folder.path("spool"), ignore_errors=True)


def check_codec(record: RecordConfig, size: int) -> None:
    """Refuse an encoder that does not work here.

    The usual one does, and is not tried: LeRobot loads for seconds.

    Args:
        size: of the pictures, in pixels a side.

    Raises:
        ValueError: names it, and where there is none of that name, those there are.
    """
    if record.video_codec != RecordConfig().video_codec:
        check_encodes(record.video_codec, size)


def _fill_spool(folder: RunFolder, shelf: Shelf, clock: Clock, thread: ThreadPoolExecutor) -> Future[Path]:
    """Record what is missing, while the thread writes what is there."""
    config, by_task = folder.config, {tally.task: tally for tally in shelf.tallies}

    def write() -> Path:
        return write_recordings(
            shelf.recordings(),
            folder.path("dataset"),
            fps=control_hz(config.sim),
            video_codec=config.record.video_codec,
            declared=robot_spec(config.sim),
        )

    with ProgressBar("record", total=sum(t.wanted for t in shelf.tallies), unit="episodes") as bar:
        bar.to(sum(len(t.succeeded) for t in shelf.tallies))
        if all(t.complete for t in shelf.tallies):
            return thread.submit(write)
        with SimulatorPool(config.sim, config.data.image_size, config.ray.simulator_actors) as pool:
            # Both load LeRobot, one after the other, while the simulators start.
            encoder = EncoderSettings.of(encoder_config(config.record.video_codec))
            written = thread.submit(write)

            def submit(actor: ActorProxy[Simulators], job: RecordingJob) -> ray.ObjectRef[Attempt]:
                return actor.demonstrate.remote(job.task, job.seed, config.record, by_task[job.task].path(job.seed), encoder)

            for job, done in pool.work(lambda: _next_job(shelf.tallies), submit):
                lost = Attempt(task=job.task, seed=job.seed, success=False, steps=0, error=DIED)
                shelf.note(by_task[job.task], done or lost)
                bar.to(sum(len(t.succeeded) for t in shelf.tallies))
                clock.tick()
                if written.done():
                    # Not so before the last episode, unless it failed.
                    written.result()
    return written


def _next_job(tallies: Sequence[TaskTally]) -> RecordingJob | None:
    """The next seed to try, task by task; None while none is wanted (until an attempt comes back as a failure)."""
    for tally in tallies:
        if (seed := tally.next_seed()) is not None:
            tally.under_way.add(seed)
            return RecordingJob(task=tally.task, seed=seed)
    return None


def _watch(written: Future[Path], shelf: Shelf, bar: ProgressBar, clock: Clock) -> None:
    """Wait for the writer, and show how far it is."""
    try:
        while wait([written], timeout=WAKE_S).not_done:
            bar.to(shelf.taken)
            clock.tick()
        written.result()
    finally:
        bar.to(shelf.taken)
