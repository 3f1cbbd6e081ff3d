"""Simulated robots in Ray actors of one CPU each, on all machines, whose deaths cost time but no episode."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray import ObjectRef
from ray.actor import ActorProxy
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from libra_ray.common.disk import NoRoomError
from libra_ray.config import SimConfig
from libra_ray.evaluation.lockstep import Collect
from libra_ray.evaluation.simulators import TRIES, Simulators, StepResult
from libra_ray.on_ray.session import available_cpus, is_private

LOST = (RayActorError, ObjectLostError, OutOfMemoryError)
"""What a call raises whose process, or machine, is gone."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call that is under way: to which process, and whose slots."""

    index: int
    actor: ActorProxy[Simulators]
    slots: Sequence[int]
    answer: ObjectRef[dict[int, StepResult]]


class SimulatorPool:
    """The simulator actors of one stage; as a context manager it ends them with the block.

    Attributes:
        actors: their handles; a process that died has been replaced.

    Raises:
        ValueError: more actors than this machine's own cluster has CPUs: some would never start.
    """

    def __init__(
        self,
        sim: SimConfig,
        image_size: int,
        actors: int = 0,
        cpus_each: float = 1,
        beside: int = 0,
        given: Sequence[ActorProxy[Simulators]] = (),
    ) -> None:
        """Start `actors` processes that reserve `cpus_each`.

        Args:
            image_size: height and width of the pictures, in pixels.
            actors: 0 means one per CPU of the cluster that is not reserved.
            beside: CPUs that others reserve.
            given: processes to drive instead, which another one has started, and ends; one that dies is replaced from here.
        """
        self._sim, self._image_size, self._cpus_each = sim, image_size, cpus_each
        self._calls: list[_Call] = []
        self.actors = list(given) or [self._start(index) for index in range(actors_of(actors, beside))]

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)

    @property
    def processes(self) -> int:
        """How many there are."""
        return len(self.actors)

    @property
    def cpus_each(self) -> float:
        """CPUs that each of them reserves."""
        return self._cpus_each

    def renew(self) -> None:
        """Replace the processes that have died while another one drove them."""
        answers = [actor.__ray_ready__.remote() for actor in self.actors]
        for index, answer in enumerate(answers):
            try:
                ray.get(answer)
            except LOST:
                self._replace(index)

    def work[J, R](
        self, next_job: Callable[[], J | None], call: Callable[[ActorProxy[Simulators], J], ObjectRef[R]]
    ) -> Iterator[tuple[J, R | None]]:
        """Whole episodes, one per actor at a time, each yielded with its answer as soon as that is there.

        An actor has its next job before the answer to its last one is yielded.

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

        def submit() -> None:
            while free and (job := again.pop() if again else next_job()) is not None:
                index = free.pop()
                pending[call(self.actors[index], job)] = (index, job)

        while True:
            submit()
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
            except LOST:
                self._replace(index)
                deaths[job] += 1
                if deaths[job] < TRIES:
                    again.append(job)
                    continue
                answer = None
            submit()
            yield job, answer

    def ask(self, method: str, arguments: Mapping[int, Any], alone: Collection[int] = ()) -> dict[int, StepResult]:
        """`send`, and wait for the answers."""
        return self.send(method, arguments, alone)()

    def send(self, method: str, arguments: Mapping[int, Any], alone: Collection[int] = ()) -> Collect:
        """Call `begin` or `advance` with every slot's argument; slot s lives in actor s modulo their number.

        Where a process dies, the robots of the calls that it had to answer get `StepResult(died=True)`, and a new process
        stands in its place; to it, robots that lived in the old one are lost (`StepResult()`).

        Args:
            method: `begin` or `advance`.
            arguments: by slot.
            alone: slots that get a call of their own, while the process has nothing else to do, so that a death is nobody
                else's; they are called when the answers are asked for.
        """
        together = {slot: argument for slot, argument in arguments.items() if slot not in alone}
        sent = [
            self._call(index, method, mine)
            for index in range(len(self.actors))
            if (mine := {slot: argument for slot, argument in together.items() if slot % len(self.actors) == index})
        ]

        def collect() -> dict[int, StepResult]:
            results: dict[int, StepResult] = {}
            for call in sent:
                results |= self._answer(call)
            # One after the other: a death takes answers with it that were given but not yet delivered.
            for slot in arguments.keys() - together.keys():
                self._settle(slot % len(self.actors))
                results |= self._answer(self._call(slot % len(self.actors), method, {slot: arguments[slot]}))
            return results

        return collect

    def _call(self, index: int, method: str, arguments: Mapping[int, Any]) -> _Call:
        actor = self.actors[index]
        call = _Call(index=index, actor=actor, slots=list(arguments), answer=getattr(actor, method).remote(dict(arguments)))
        self._calls.append(call)
        return call

    def _answer(self, call: _Call) -> dict[int, StepResult]:
        """Wait for a call's answer."""
        try:
            return ray.get(call.answer)
        except LOST:
            # Another call may have met the same death before, and have replaced the process.
            if self.actors[call.index] is call.actor:
                self._replace(call.index)
            return dict.fromkeys(call.slots, StepResult(died=True))
        finally:
            self._calls = [other for other in self._calls if other is not call]

    def _settle(self, index: int) -> None:
        """Wait until a process has nothing to do, and put another one in its place if it died of what it had to do."""
        for call in self._calls:
            if call.index == index and call.actor is self.actors[index]:
                try:
                    ray.get(call.answer)
                except LOST:
                    self._replace(index)
                    return

    def _start(self, index: int) -> ActorProxy[Simulators]:
        # Pools of several processes, as a sweep's trials have them, begin with different GPUs.
        number = os.getpid() + index
        return ray.remote(Simulators).options(num_cpus=self._cpus_each).remote(self._sim, self._image_size, number)

    def _replace(self, index: int) -> None:
        # It may only be out of reach: what is killed cannot go on with an episode that somebody else begins again.
        ray.kill(self.actors[index])
        self.actors[index] = self._start(index)


def actors_of(wanted: int, beside: int = 0) -> int:
    """How many simulator processes there will be.

    Args:
        wanted: the setting; 0 means one per CPU of the cluster that is not reserved, at least one.
        beside: CPUs that others reserve.

    Raises:
        ValueError: more than this machine's own cluster has CPUs.
    """
    cpus = available_cpus()
    if is_private() and wanted + beside > cpus:
        others = f" beside {beside} for evaluate.policy_replicas" if beside else ""
        raise ValueError(
            f"ray.simulator_actors={wanted}, but this machine gives Ray {cpus} CPUs{others}; "
            f"give at most {max(0, cpus - beside)}, or 0"
        )
    return wanted or max(1, cpus - beside)
