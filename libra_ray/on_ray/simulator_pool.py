"""Simulated robots in Ray actors of one CPU each, whose deaths cost time but no episode."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Self

import ray
from ray import ObjectRef
from ray.actor import ActorProxy
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from libra_ray.common.disk import NoRoomError
from libra_ray.config import SimConfig
from libra_ray.evaluation.simulators import TRIES, Simulators, StepResult
from libra_ray.on_ray.session import available_cpus, is_private

_LOST = (RayActorError, ObjectLostError, OutOfMemoryError)


class SimulatorPool:
    """The simulator actors of one stage; as a context manager it ends them with the block.

    Attributes:
        actors: their handles; a process that died has been replaced.

    Raises:
        ValueError: more actors than this machine's own cluster has CPUs: some would never start.
    """

    def __init__(self, sim: SimConfig, actors: int = 0, cpus_each: float = 1) -> None:
        """Start `actors` processes that reserve `cpus_each`; 0 actors means one per CPU of the cluster."""
        cpus = available_cpus()
        if is_private() and actors > cpus:
            raise ValueError(
                f"ray.simulator_actors={actors}, but this machine gives Ray {cpus} CPUs; give at most {cpus}, or 0"
            )
        self._sim, self._cpus_each = sim, cpus_each
        self.actors = [self._start() for _ in range(actors or cpus)]

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)

    def work[J, R](
        self, next_job: Callable[[], J | None], call: Callable[[ActorProxy[Simulators], J], ObjectRef[R]]
    ) -> Iterator[tuple[J, R | None]]:
        """Whole episodes, one per actor at a time, each yielded with its answer as soon as that is there.

        Args:
            next_job: asked whenever an actor is free; None means none for now (it is asked again after the next answer).
            call: submits a job to an actor.

        Yields:
            The job and its answer; None where the process died in each of `TRIES` attempts.

        Raises:
            NoRoomError: an actor could not write for lack of room on disk: no other attempt would find more.
        """
        again: list[J] = []
        deaths: Counter[J] = Counter()
        pending: dict[ObjectRef[R], tuple[int, J]] = {}
        free = set(range(len(self.actors)))
        while True:
            while free and (job := again.pop() if again else next_job()) is not None:
                index = free.pop()
                pending[call(self.actors[index], job)] = (index, job)
            if not pending:
                return
            [ready], _ = ray.wait(list(pending), num_returns=1)
            index, job = pending.pop(ready)
            free.add(index)
            try:
                answer: R | None = ray.get(ready)
            except RayTaskError as error:
                if isinstance(error.cause, NoRoomError):
                    raise NoRoomError(str(error.cause)) from None
                raise
            except _LOST:
                self._replace(index)
                deaths[job] += 1
                if deaths[job] < TRIES:
                    again.append(job)
                    continue
                answer = None
            yield job, answer

    def ask(self, method: str, arguments: Mapping[int, Any], alone: Collection[int] = ()) -> dict[int, StepResult]:
        """Call `begin` or `advance` with every slot's argument; slot s lives in actor s modulo their number.

        Where a process dies, the robots of the call it died in answer `StepResult(died=True)`, and a new process stands in its
        place; to it, robots that lived in the old one are lost (`StepResult()`).

        Args:
            method: `begin` or `advance`.
            arguments: by slot.
            alone: slots that get a call of their own, so that a death is nobody else's.
        """
        # One after the other: a death takes answers with it that were given but not yet delivered.
        rounds = [{slot: argument for slot, argument in arguments.items() if slot not in alone}]
        rounds += [{slot: argument} for slot, argument in arguments.items() if slot in alone]
        results: dict[int, StepResult] = {}
        for part in rounds:
            results |= self._call_actors(method, part)
        return results

    def _call_actors(self, method: str, arguments: Mapping[int, Any]) -> dict[int, StepResult]:
        """One call per process with all its slots."""
        calls: dict[int, tuple[ObjectRef[dict[int, StepResult]], list[int]]] = {}
        for index, actor in enumerate(self.actors):
            if mine := [slot for slot in arguments if slot % len(self.actors) == index]:
                calls[index] = getattr(actor, method).remote({slot: arguments[slot] for slot in mine}), mine
        results: dict[int, StepResult] = {}
        for index, (ref, mine) in calls.items():
            try:
                results |= ray.get(ref)
            except _LOST:
                results |= dict.fromkeys(mine, StepResult(died=True))
                self._replace(index)
        return results

    def _start(self) -> ActorProxy[Simulators]:
        return ray.remote(Simulators).options(num_cpus=self._cpus_each).remote(self._sim)

    def _replace(self, index: int) -> None:
        # It may only be out of reach: what is killed cannot go on with an episode that somebody else begins again.
        ray.kill(self.actors[index])
        self.actors[index] = self._start()
