"""Closed-loop evaluation: a fleet of simulated robots, the policy batched across them, in lockstep time."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from libra_ray import checkpoint
from libra_ray.common.files import repair_jsonl
from libra_ray.common.progress import ProgressBar, print_status
from libra_ray.config import Config, inference_settings
from libra_ray.config.overrides import flatten
from libra_ray.control.delays import Delays, open_delays
from libra_ray.control.margin import Latency, Margin, injected_steps, margins
from libra_ray.evaluation.lockstep import Lockstep
from libra_ray.evaluation.log import LOG_NAME, EpisodeJob, EvaluationLogWriter, PlayedEpisode, read_evaluation
from libra_ray.evaluation.simulators import died
from libra_ray.model.parts.backbone import make_backbone
from libra_ray.model.registry import lengthening, system_class
from libra_ray.on_ray.policy_replica import Driver, ReplicaReport, threads_of
from libra_ray.on_ray.replicas import ReplicaPlan, ReplicaPool
from libra_ray.on_ray.session import available_cpus, available_gpus, is_private, present_cpus
from libra_ray.on_ray.simulator_pool import SimulatorPool, actors_of
from libra_ray.policy import SystemPolicy, load_policy
from libra_ray.runs.folder import Clock, RunFolder
from libra_ray.runs.results import Evaluation
from libra_ray.sim import check_robot, control_hz, instructions
from libra_ray.spec import UNDECLARED
from libra_ray.training.data import distinct_tokens
from libra_ray.types import Level, Policy

EXPERT, POLICY, ZERO_ACTION = "expert", "policy", "zero_action"
SCRIPTED = (EXPERT, ZERO_ACTION)

type Load = Callable[[RunFolder, str], tuple[Policy, Config]]
"""A run and a controller's name to the policy behind it, and the configuration that was trained under."""


def load_trained(folder: RunFolder, controller: str) -> tuple[Policy, Config]:
    """The run's checkpoint as `policy`, or as one of its system's variants.

    Raises:
        ValueError: it cannot be read, is of another robot, or cannot read an instruction of the run's tasks.
    """
    variant, how = "" if controller == POLICY else controller, inference_settings(folder.config)
    policy = load_policy(folder.checkpoint, device_of(folder.config), variant=variant, changes=how)
    check_robot(folder.config.sim, policy.source.manifest.robot, f"checkpoint {folder.checkpoint}")
    distinct_tokens(policy.source.model.tokenise, evaluated_instructions(folder.config))
    return policy, policy.source.config


def evaluate(folder: RunFolder, clock: Clock, load: Load = load_trained, pool: SimulatorPool | None = None) -> None:
    """Run every episode that has no row yet in the run's evaluation log.

    The run's own checkpoint is evaluated by replicas where the settings say so; what is brought stays in this process.

    Args:
        load: where policies come from; a benchmark brings its own.
        pool: simulators that are there already, and stay; who brings them has also set the threads of inference.

    Raises:
        ValueError: the checkpoint cannot be read, or does not fit the run; the cluster of this machine is too small for it.
        RuntimeError: policy replicas died too often.
    """
    config = folder.config
    repair_jsonl(folder.path(LOG_NAME))
    done = {EpisodeJob(controller=r.controller, task=r.task, seed=r.seed) for r in read_evaluation(folder).results}
    named = config.evaluate.controllers or controllers_of(config, checkpoint.read_config(folder.checkpoint))
    jobs = all_jobs(config, named)
    todo = [job for job in jobs if job not in done]
    if not todo:
        return
    driven = list(dict.fromkeys(job.controller for job in todo if job.controller not in SCRIPTED))
    brought = pool is not None or load is not load_trained
    plan = ReplicaPlan(count=0) if brought or not driven else ReplicaPlan.of(config, present_cpus(), available_gpus())
    open_driver = partial(driver_of, folder, load)
    simulators = partial(SimulatorPool, config.sim, config.data.image_size, config.ray.simulator_actors)
    with (
        ProgressBar("evaluate", total=len(jobs), unit="episodes") as bar,
        ReplicaPool(config, plan, open_driver, bar.say) as replicas,
        nullcontext(pool) if pool else simulators(beside=plan.cpus) as robots,
    ):
        bar.to(len(done))
        writer = EvaluationLogWriter(folder, clock, bar)
        for controller in driven[:1]:
            replicas.prepare(controller)
        _play_scripted(robots, [job for job in todo if job.controller in SCRIPTED], writer)
        for controller in driven:
            mine = [job for job in todo if job.controller == controller]
            if plan.count:
                replicas.play(controller, mine, robots, partial(_take, writer))
                continue
            driver = open_driver(controller)
            if pool is None:
                torch.set_num_threads(threads_of(driver.policy, min(available_cpus(), os.cpu_count() or 1)))
            Lockstep(config, driver.trained, robots, driver.policy, writer, driver.delays, driver.action).play(mine)


def driver_of(folder: RunFolder, load: Load, controller: str) -> Driver:
    """A policy that drives the run's robots as one of its controllers.

    Raises:
        ValueError: the checkpoint cannot be read, or does not fit the run.
    """
    policy, trained = load(folder, controller)
    check_fits(folder.config, trained)
    action = policy.source.manifest.shape.action if isinstance(policy, SystemPolicy) else UNDECLARED
    return Driver(policy=policy, trained=trained, delays=delays_of(folder.config, policy.levels), action=action)


def check_resources(config: Config) -> None:
    """Refuse replicas and simulators that a cluster of this machine's own would not have the CPUs or GPUs for.

    Raises:
        ValueError: says what there is.
    """
    if is_private():
        actors_of(config.ray.simulator_actors)
        ReplicaPlan.of(config, present_cpus(), available_gpus())


def margins_of(folder: RunFolder, evaluation: Evaluation) -> list[Margin]:
    """How well each level keeps up: by the evaluation's own calls, each for several robots, and the injected delay."""
    manifest, config = checkpoint.read_manifest(folder.checkpoint), folder.config
    levels = checkpoint.read_levels(folder.checkpoint)
    late = injected_steps(open_delays(config.delay, levels, manifest.control_hz), levels)
    latencies = {
        name: Latency.of(calls.ms, sum(calls.robots) / len(calls.ms), late[name])
        for name, calls in evaluation.latencies.items()
        if len(calls.ms) and name in late
    }
    lengthened_by = lengthening(checkpoint.read_config(folder.checkpoint), levels)
    return margins(levels, latencies, manifest.control_hz, config.control, lengthened_by)


def delays_of(config: Config, levels: Sequence[Level]) -> Delays:
    """How late a policy's answers are.

    Raises:
        ValueError: `delay.trace` is no trace of a policy with these levels.
    """
    return open_delays(config.delay, levels, control_hz(config.sim))


def controllers_of(config: Config, trained: Config) -> tuple[str, ...]:
    """Who is evaluated: those named, or all that the system of `trained` has.

    Raises:
        ValueError: it has none of a given name.
    """
    everyone = (EXPERT, POLICY, *system_class(trained.model.system).variants_of(trained), ZERO_ACTION)
    named = tuple(dict.fromkeys(config.evaluate.controllers)) or everyone
    if unknown := [name for name in named if name not in everyone]:
        raise ValueError(
            f"evaluate.controllers names {', '.join(unknown)}; of model.system={trained.model.system} there are "
            f"{', '.join(everyone)}"
        )
    return named


def all_jobs(config: Config, controllers: Sequence[str]) -> list[EpisodeJob]:
    """Every controller's episodes; all controllers meet the same seeds."""
    seeds = range(config.evaluate.seed, config.evaluate.seed + config.evaluate.episodes_per_task)
    return [
        EpisodeJob(controller=c, task=t, seed=s) for c in dict.fromkeys(controllers) for s in seeds for t in config.sim.tasks
    ]


def check_fits(config: Config, trained: Config) -> None:
    """Refuse a checkpoint that does not fit the run.

    It may be trained on other pictures than the fleet will make, for shorter chunks than it executes or commits to, or be of a
    system without a variant that is to be evaluated.

    Raises:
        ValueError: names both values, or the controllers that are left.
    """
    now, then = flatten(config), flatten(trained)
    for name in ("sim.family", "data.image_size", "sim.supersample", "sim.wrist_camera"):
        ours, theirs = now[name], then[name]
        if ours != theirs:
            value = str(theirs).lower() if isinstance(theirs, bool) else theirs
            raise ValueError(f"{name}={ours}, but the checkpoint was trained with {theirs}; give --{name} {value}")
    executed, committed, horizon = config.control.execute_steps, config.control.committed_steps, trained.action.horizon
    if executed > horizon:
        raise ValueError(f"control.execute_steps={executed} exceeds the checkpoint's horizon of {horizon}")
    if 2 * committed > horizon:
        raise ValueError(
            f"control.committed_steps={committed} is more than half of the checkpoint's horizon of {horizon}; "
            f"give at most {horizon // 2}"
        )
    controllers_of(config, trained)


def check_drives(config: Config, folder: Path) -> None:
    """Refuse a checkpoint of another robot, or one that cannot read what the run's tasks will ask for; no weights are loaded.

    Raises:
        ValueError: names what differs, or how much too long an instruction is.
    """
    manifest, trained = checkpoint.read_manifest(folder), checkpoint.read_config(folder)
    check_robot(config.sim, manifest.robot, f"checkpoint {folder}")
    with torch.device("meta"):
        pictures = manifest.shape.cameras * trained.data.history
        backbone = make_backbone(trained.planner, trained.data.image_size, pictures, folder)
    distinct_tokens(backbone.tokenise, evaluated_instructions(config))


def evaluated_instructions(config: Config) -> tuple[str, ...]:
    """The instructions that the evaluated robots will get."""
    return instructions(config.sim, range(config.evaluate.seed, config.evaluate.seed + config.evaluate.episodes_per_task))


def device_of(config: Config) -> str:
    """Where this process computes: on a GPU where that is asked for and there is one; that there is none is said."""
    if not config.ray.use_gpu:
        return "cpu"
    if not torch.cuda.is_available():
        print_status("ray.use_gpu=true, but the machine of this process has no GPU that torch can use: it computes on the CPU")
        return "cpu"
    return "cuda"


def check_gpu(config: Config) -> None:
    """Refuse a GPU that is not there, and what needs one without; which ones a cluster at RAY_ADDRESS has, its machines know.

    Raises:
        ValueError: there is none, or none is asked for.
    """
    if config.policy.compile == "graphs" and not config.ray.use_gpu:
        raise ValueError("policy.compile=graphs needs a GPU; give --ray.use_gpu true, or --policy.compile auto")
    if config.ray.use_gpu and is_private() and not torch.cuda.is_available():
        raise ValueError("ray.use_gpu=true, but this machine has no GPU that torch can use; give --ray.use_gpu false")


def _play_scripted(pool: SimulatorPool, jobs: list[EpisodeJob], writer: EvaluationLogWriter) -> None:
    """Expert and floor: whole episodes in the actors, without pictures."""
    queue = iter(jobs)
    for job, played in pool.work(lambda: next(queue, None), lambda actor, job: actor.play.remote(job)):
        writer.write([played or PlayedEpisode.of(job, died(job.task, job.seed))])


def _take(writer: EvaluationLogWriter, report: ReplicaReport) -> None:
    """Note what a replica reports."""
    writer.write(report.episodes)
    for controller, latencies in report.calls.items():
        writer.latencies(controller, latencies)
