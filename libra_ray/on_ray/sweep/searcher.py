"""Which trial comes next: from a list (grid, random) or from Optuna, over seeds, within a budget, replayed after a crash."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from libra_ray.on_ray.sweep.space import MODES, Values
from libra_ray.on_ray.sweep.sweep_folder import SweepFolder, TrialFolder, TrialProcess, TrialSpec
from libra_ray.on_ray.sweep.trial import NO_ROOM
from libra_ray.runs.trials import Objective, TrialResult, mean


class TrialSource(Protocol):
    """Where trials come from; the same ones come first when a sweep is continued."""

    def next(self) -> TrialSpec | None:
        """The next trial; None after the last."""

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """How a trial ended."""


class ListedTrials:
    """Points known beforehand, all of them with one seed before any with the next, so that a part is useful."""

    def __init__(self, points: list[Values], seeds: list[int]) -> None:
        self._specs: Iterator[TrialSpec] = iter(
            [TrialSpec(number=n, seed=seed, values=point) for seed in seeds for n, point in enumerate(points)]
        )

    def next(self) -> TrialSpec | None:
        """The next point."""
        return next(self._specs, None)

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """A list does not learn."""


class OptunaTrials:
    """Points by Optuna, each with every seed; Optuna hears of the mean over the seeds once all have ended."""

    def __init__(
        self, space: dict[str, Any], objectives: tuple[Objective, ...], *, points: int, seeds: list[int], known: list[Values]
    ) -> None:
        """`known`: points that were tried before the sweep was interrupted, in their order; they come first again."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        several = len(objectives) > 1
        self._search = OptunaSearch(
            OptunaSearch.convert_search_space(space),
            metric=list(objectives) if several else objectives[0],
            mode=[MODES[name] for name in objectives] if several else MODES[objectives[0]],
            points_to_evaluate=known,
            seed=seeds[0],
        )
        self._objectives, self._points, self._seeds = objectives, points, seeds
        self._queue: deque[TrialSpec] = deque()
        self._asked = 0
        self._ended: dict[int, list[TrialResult]] = {}

    def next(self) -> TrialSpec | None:
        """The next seed of the present point, or the first one of a new point."""
        if not self._queue:
            if self._asked == self._points:
                return None
            point = self._search.suggest(str(self._asked))
            assert point is not None, "only a limiter makes it wait"
            self._queue.extend(TrialSpec(number=self._asked, seed=seed, values=point) for seed in self._seeds)
            self._asked += 1
        return self._queue.popleft()

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """Optuna hears the mean over the seeds that did not fail, or that all did."""
        ended = self._ended.setdefault(spec.number, [])
        ended.append(result)
        if len(ended) < len(self._seeds):
            return
        sound = [r for r in ended if r.status != "failed"]
        values = {name: mean([_objective(r, name) for r in sound]) for name in self._objectives} if sound else {}
        failed = not values or None in values.values()
        self._search.on_trial_complete(str(spec.number), result=None if failed else values, error=failed)


def _objective(result: TrialResult, name: Objective) -> float | None:
    if name == "latency_ms":
        return result.latency_ms
    # One that the scheduler stopped is as good as it was then.
    return result.success_of() if result.status == "finished" else result.rungs[-1].success if result.rungs else None


def make_source(sweep: SweepFolder) -> TrialSource:
    """The source that a sweep's settings ask for."""
    settings, space, config = sweep.settings, sweep.space, sweep.run.config
    seeds = [config.train.seed + i for i in range(settings.seeds)]
    if settings.search == "optuna":
        known = {spec.number: spec.values for spec in sweep.specs()}
        points = [known[number] for number in sorted(known)]
        return OptunaTrials(dict(space.domains), space.objectives, points=settings.trials, seeds=seeds, known=points)
    listed = space.grid() if settings.search == "grid" else space.draws(settings.trials, config.train.seed)
    return ListedTrials(listed[: settings.trials], seeds)


class TrialSearcher(Searcher):
    """Hands trials to Ray Tune and records how they end.

    Args:
        threads: of every trial's process; `simulator_actors` likewise.

    A full disk ends the sweep: `no_room` is then the line that says so, and trials without a result go on when it is resumed.
    After `deadline` (in `time.monotonic()` seconds) only trials that have ended before are handed out again, for the scheduler
    to hear of them: they replay what they reported and do no work.
    """

    def __init__(
        self,
        sweep: SweepFolder,
        source: TrialSource,
        *,
        threads: int,
        simulator_actors: int,
        deadline: float | None,
        ended: Callable[[TrialFolder, TrialResult], None],
    ) -> None:
        super().__init__(metric="success", mode="max")
        self._sweep, self._source = sweep, source
        self._threads, self._simulator_actors = threads, simulator_actors
        self._deadline, self._ended = deadline, ended
        self._live: dict[str, tuple[TrialSpec, TrialFolder]] = {}
        self.no_room = ""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's folder."""
        while not self.no_room and (spec := self._source.next()) is not None:
            over = self._deadline is not None and time.monotonic() >= self._deadline
            known = TrialFolder(root=self._sweep.run.path("trials") / spec.name)
            if over and known.result() is None:
                continue
            trial = self._sweep.write(spec)
            self._live[trial_id] = (spec, trial)
            return asdict(TrialProcess(trial=str(trial.root), threads=self._threads, simulator_actors=self._simulator_actors))
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial ended by itself, was stopped by the scheduler, or its process died too often; or the disk is full."""
        spec, trial = self._live.pop(trial_id)
        self.no_room = self.no_room or (result or {}).get(NO_ROOM, "")
        ended = trial.result()
        if ended is None and self.no_room:
            return
        if ended is None:
            ended = interrupted(spec, trial, error=error)
            trial.end(ended)
        self._source.tell(spec, ended)
        self._ended(trial, ended)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' folders are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


def interrupted(spec: TrialSpec, trial: TrialFolder, *, error: bool) -> TrialResult:
    """The result of a trial that could not write its own."""
    reached = trial.rungs()
    return TrialResult(
        number=spec.number,
        seed=spec.seed,
        values=spec.values,
        status="failed" if error else "stopped",
        rungs=reached,
        error="the trial's process died" if error else None,
        latency_ms=reached[-1].latency_ms if reached else None,
    )
