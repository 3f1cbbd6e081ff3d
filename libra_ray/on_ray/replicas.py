"""Policy replicas: actors that hold the policy, on GPUs or CPUs of the cluster's machines, each with robots of its own.

A replica talks to its simulators itself; the process of the job only hands out episodes and takes their results.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import ray
from ray import ObjectRefGenerator
from ray.actor import ActorProxy
from ray.exceptions import RayTaskError

from libra_ray.config import Config
from libra_ray.evaluation.lockstep import FEWEST_ROBOTS
from libra_ray.evaluation.log import EpisodeJob
from libra_ray.on_ray.policy_replica import OpenDriver, PolicyReplica, ReplicaReport
from libra_ray.on_ray.session import is_private
from libra_ray.on_ray.simulator_pool import LOST, SimulatorPool

SMALL_MACHINE = 4
"""CPUs up to which a process of its own for the policy costs more than it saves."""
CPUS_PER_REPLICA = 4
"""One of four thinks for the robots of the three others: small policies on a CPU take a third of what simulation takes."""
ROBOTS_PER_GPU = 64
"""Alive at a time for each replica on a GPU, which answers many as fast as one, where the settings leave it open."""
MOST_DEATHS = 3
"""Replicas that are replaced in one evaluation."""
PATIENCE_S = 30.0
"""Replicas that are not there after so long wait for a machine."""


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """How many replicas there are, none where the policy stays in the job's own process, and what each of them reserves.

    Attributes:
        threads: that each may compute with.
    """

    count: int
    cpus_each: int = 0
    gpus_each: float = 0.0
    threads: int = 1

    @property
    def cpus(self) -> int:
        """What all of them reserve."""
        return self.count * self.cpus_each

    @classmethod
    def of(cls, config: Config, cpus: int, gpus: float) -> Self:
        """The replicas of a configuration on a cluster of so many CPUs and GPUs, none where its machines are yet to come.

        Raises:
            ValueError: this machine's own cluster is too small for them and their simulators.
        """
        wanted, share, actors = config.evaluate.policy_replicas, config.evaluate.gpus_per_replica, config.ray.simulator_actors
        own = is_private()
        enough = max(1, math.ceil(max(cpus, actors) / CPUS_PER_REPLICA))
        if config.ray.use_gpu:
            enough = max(1, min(int(gpus / share), enough))
        elif own and cpus <= SMALL_MACHINE:
            enough = 0
        # Each has a batch's worth of episodes, and a simulator.
        batches = math.ceil(len(config.sim.tasks) * config.evaluate.episodes_per_task / FEWEST_ROBOTS)
        count = wanted or min(enough, batches, actors or enough)
        # Those that nobody asked for take no CPU away from simulators that somebody did.
        simulators = actors or max(1, cpus - count)
        crowded = not wanted and simulators <= cpus < simulators + count
        cpus_each = 0 if config.ray.use_gpu or crowded else 1
        gpus_each = share if config.ray.use_gpu else 0.0
        if own and count * gpus_each > gpus:
            raise ValueError(
                f"evaluate.policy_replicas={count} with evaluate.gpus_per_replica={share:g} want {count * share:g} GPUs, this "
                f"machine gives Ray {gpus:g}; lower one of them"
            )
        if own and count and (needed := count * cpus_each + (actors or count)) > cpus:
            raise ValueError(
                f"evaluate.policy_replicas={count} and their simulators (ray.simulator_actors={actors or count}) want "
                f"{needed} CPUs, this machine gives Ray {cpus}; lower one of them"
            )
        if 0 < actors < count:
            raise ValueError(
                f"evaluate.policy_replicas={count} exceeds ray.simulator_actors={actors}, but each needs a simulator of its "
                "own; lower the one or raise the other"
            )
        return cls(count=count, cpus_each=cpus_each, gpus_each=gpus_each, threads=max(1, cpus // max(1, count)))


@dataclass
class _Share:
    """What one replica has to do, and with which simulators."""

    jobs: list[EpisodeJob]
    simulators: list[int]


@dataclass
class ReplicaPool:
    """The replicas of one evaluation; as a context manager it ends them with the block.

    Args:
        config: the run's.
        say: takes a line for whoever watches.

    Attributes:
        deaths: replicas that had to be replaced.
    """

    config: Config
    plan: ReplicaPlan
    open_driver: OpenDriver
    say: Callable[[str], None]
    deaths: int = 0
    actors: list[ActorProxy[PolicyReplica]] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Start the processes."""
        self.actors = [self._start() for _ in range(self.plan.count)]
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)

    def prepare(self, controller: str) -> None:
        """Have a policy loaded beside what the caller goes on with; an error shows when it plays."""
        for actor in self.actors:
            actor.load.remote(controller)

    def play(
        self, controller: str, jobs: Sequence[EpisodeJob], pool: SimulatorPool, take: Callable[[ReplicaReport], None]
    ) -> None:
        """Run episodes of one controller, shared among the replicas, on the pool's simulators.

        A replica that dies is replaced, and its episodes without a result are played again, each from its beginning.

        Raises:
            ValueError: the checkpoint cannot be read, or does not fit the run.
            RuntimeError: replicas died too often.
        """
        shares = self._shares(jobs, pool)
        streams = {self._play(controller, index, share, pool): index for index, share in enumerate(shares) if share.jobs}
        while streams:
            [stream], _ = ray.wait(list(streams), num_returns=1)
            index = streams.pop(stream)
            try:
                report: ReplicaReport = ray.get(next(stream))
            except StopIteration:
                continue
            except LOST as error:
                self._replace(index, shares[index], error)
                if shares[index].jobs:
                    streams[self._play(controller, index, shares[index], pool)] = index
                continue
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            streams[stream] = index
            take(report)
            done = {played.job for played in report.episodes}
            shares[index].jobs = [job for job in shares[index].jobs if job not in done]
        pool.renew()

    def _play(self, controller: str, index: int, share: _Share, pool: SimulatorPool) -> ObjectRefGenerator:
        actors = [pool.actors[simulator] for simulator in share.simulators]
        stream: Any = self.actors[index].play.remote(controller, share.jobs, actors, pool.cpus_each)
        return stream

    def _shares(self, jobs: Sequence[EpisodeJob], pool: SimulatorPool) -> list[_Share]:
        """The same number of episodes and simulators for each, those on its own machine first."""
        replicas = self._placed(self.actors, "policy replicas")
        simulators = self._placed(pool.actors, "simulators")
        count = len(replicas)
        shares = [_Share(jobs=[], simulators=[]) for _ in replicas]
        for place, index in enumerate(replicas):
            begin, end = (len(simulators) * edge // count for edge in (place, place + 1))
            shares[index] = _Share(jobs=list(jobs[place::count]), simulators=simulators[begin:end])
        return shares

    def _placed(self, actors: Sequence[ActorProxy[Any]], what: str) -> list[int]:
        """The places of actors, those on one machine side by side; says so where there are no machines for them yet."""
        ready = [actor.__ray_ready__.remote() for actor in actors]
        _, missing = ray.wait(ready, num_returns=len(ready), timeout=PATIENCE_S)
        if missing:
            self.say(f"evaluate: {len(missing)} of {len(ready)} {what} wait for a machine of the cluster to start on")
        return by_node(nodes_of(actors))

    def _replace(self, index: int, share: _Share, error: Exception) -> None:
        """Another process in the place of one that died.

        Raises:
            RuntimeError: too many have died.
        """
        self.deaths += 1
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if self.deaths > MOST_DEATHS:
            raise RuntimeError(
                f"{self.deaths} policy replicas died (the last: {last}); what was evaluated is kept and the same command goes "
                "on; where memory was short, lower evaluate.policy_replicas or evaluate.robots"
            ) from error
        self.say(
            f"evaluate: policy replica {index + 1} died; another one plays its {len(share.jobs)} episodes without a result"
        )
        ray.kill(self.actors[index])
        self.actors[index] = self._start()

    def _start(self) -> ActorProxy[PolicyReplica]:
        plan, evaluated = self.plan, self.config.evaluate
        each = math.ceil(evaluated.robots / plan.count) or (ROBOTS_PER_GPU if plan.gpus_each else 0)
        config = replace(self.config, evaluate=replace(evaluated, robots=each))
        options: dict[str, Any] = {"num_cpus": plan.cpus_each, "num_gpus": plan.gpus_each, "scheduling_strategy": "SPREAD"}
        return ray.remote(PolicyReplica).options(**options).remote(config, self.open_driver, plan.threads)


def nodes_of(actors: Sequence[ActorProxy[Any]]) -> list[str]:
    """The machine of every actor, when all have started; empty of one that has died."""
    answers = [actor.__ray_call__.remote(_node) for actor in actors]
    found: list[str] = []
    for answer in answers:
        try:
            found.append(ray.get(answer))
        except LOST:
            found.append("")
    return found


def by_node(nodes: Sequence[str]) -> list[int]:
    """The places of `nodes`, those of one machine side by side."""
    return sorted(range(len(nodes)), key=lambda place: nodes[place])


def _node(_: object) -> str:
    return str(ray.get_runtime_context().get_node_id())
