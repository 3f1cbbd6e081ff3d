"""The settings of the closed loop: when levels are asked, how late they are, what is evaluated. Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """The asynchronous controller."""

    rule: Literal["fifo", "overlap", "event"] = "fifo"
    """`fifo`: a new plan when the old one is used up, as published; `overlap`: the planner runs freely, a new plan replaces
    the rest of the old one at the right step; `event`: so too, but where the plan nears its end or the robot is surprised."""
    execute_steps: int = 0
    """Control steps executed of each chunk before the next one is refined; 0 means all H."""
    committed_steps: int = 0
    """Control steps that the robot goes on with the chunk it has while the next one is computed (real-time chunking): that one
    is asked for so much earlier, and continues those steps where the model knows how to (`refiner.max_committed_steps`). At
    most half of H; 0: the robot waits for its chunk."""
    max_intent_age_steps: int = 0
    """The oldest intent, in control steps, that the last level acts under, also one used up; 0: three times what it covers."""
    hold: Literal["declared", "still", "repeat"] = "declared"
    """Where no intent is young enough: `still` is right where actions are position changes (zeros, the gripper's kept),
    `repeat` where they are positions; `declared`: as the policy's data set says that they are, and still where it does not."""


@dataclass(frozen=True, kw_only=True)
class DelayConfig:
    """Lateness in simulated time, exactly repeatable: drawn from `seed`, the episode, the level and the step alone."""

    intent_steps: int = 0
    """Control steps between the picture of a level above the last and the moment its intent may be used."""
    chunk_steps: int = 0
    """The same of the last level's chunks; the robot meanwhile goes on with the chunk that it has."""
    trace: str = ""
    """Latencies as a served run had them, drawn in place of the two above: the file of `jobs/drive.py --out`."""
    control_hz: float = 0.0
    """The rate at which the trace's milliseconds are counted as control steps; 0 takes that of the evaluated robots."""
    lost_share: float = 0.0
    """Share of the intents that never come; their level is asked again when they should have been there."""
    reordered_share: float = 0.0
    """Share of the intents that come after the one that was asked for next."""
    seed: int = 0
    """Of all draws."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Closed-loop evaluation by a fleet of simulated robots."""

    checkpoint: str = ""
    """An existing checkpoint folder to evaluate; empty means the run's own."""
    episodes_per_task: int = 25
    """Episodes of each task and controller; all controllers meet the same seeds."""
    seed: int = 100_000
    """Seed of the first evaluation episode; never seen in recording."""
    controllers: tuple[str, ...] = ()
    """Who is evaluated: `expert` (the ceiling), `policy`, variants of it (libra's `coarse_only`: its bins' centres), and
    `zero_action` (the floor); empty means all that the system has."""
    robots: int = 0
    """Simulated robots alive at a time, over all simulator actors; 0: for each replica 16 (64 on a GPU), and at least two an
    actor."""
    policy_replicas: int = 0
    """Actors that hold the policy, each with its share of the robots and of the GPUs, or a CPU. 0: the job's own process on a
    machine of at most 4 CPUs without a GPU; else one per 4 CPUs of the cluster, on its machines."""
    gpus_per_replica: float = 0.5
    """GPUs that each of them reserves with `ray.use_gpu`."""
    videos_per_task: int = 2
    """Rollouts of the policy kept as pictures in the report, failures first."""
