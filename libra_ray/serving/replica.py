"""Planner and refiner as deployments: batches in, batches out, no robot's state.

While one checkpoint follows another, both are loaded side by side.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch

from libra_ray.common.gc_freeze import settle
from libra_ray.policy import LibraPolicy, load_policy
from libra_ray.serving.batches import Answers, Rows, chunk_answers, plan_answers
from libra_ray.serving.settings import Settings, System
from libra_ray.serving.weights import FailedComputingError, UnknownWeightsError, folder_of, weights_key
from libra_ray.types import STATE_KEY, Json, Observation

KEPT = 2
"""Checkpoints loaded at a time: the one in use, and the one before until no plan of it is left."""
NICEST = 19
"""A thread nicer than that has Linux's idle policy: whoever wakes takes its processor at once, and it counts as free."""
HANGS_S = 60.0
"""A call that computes for so long makes the replica unhealthy, and Serve replaces it."""


class _System:
    """What planner and refiner share: weights, threads that compute, warm-up, health.

    One batch is computed at a time, by one of two threads: priority belongs to a thread, and only the privileged may raise one
    that was lowered. So a batch that can wait goes to the thread that has been lowered for good.

    Args:
        settings: the application's.
        system: this deployment's part of them.
    """

    def __init__(self, settings: Settings, system: System) -> None:
        self._settings, self._system = settings, system
        self._prompt, self._patient = _thread(system.threads, nice=0), _thread(system.threads, nice=system.nice)
        self._one_at_a_time = threading.Lock()
        self._device = "cuda" if system.num_gpus and torch.cuda.is_available() else "cpu"
        self._policies: dict[str, LibraPolicy] = {}
        self._busy_since: float | None = None
        self._busy_s, self._told_at = 0.0, time.monotonic()
        self._pressures: list[float] = []

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Load and warm up the weights that `user_config` names, beside those in use."""
        key = weights_key(user_config)
        if key in self._policies:
            return
        policy = await asyncio.get_running_loop().run_in_executor(None, self._loaded, user_config["checkpoint"])
        for patient in (False, True):
            await self._compute(lambda: self._warm_up(policy), patient=patient)
        self._policies = {**dict(list(self._policies.items())[1 - KEPT :]), key: policy}
        settle()

    async def describe(self, weights: str) -> Json:
        """What the gateway tells robots about a checkpoint.

        Raises:
            UnknownWeightsError: it is not loaded here.
        """
        source = self._policy(weights).source
        config, shape, size = source.config, source.manifest.shape, source.config.sim.image_size
        pictures = {name: {"dtype": "uint8", "shape": [size, size, 3]} for name in source.manifest.image_keys}
        return {
            "observation": {**pictures, STATE_KEY: {"dtype": "float32", "shape": [shape.state_dim]}},
            "action": {"dtype": "float32", "shape": [config.action.horizon, shape.action_dim]},
            "control_hz": float(source.manifest.control_hz),
            "horizon": config.action.horizon,
            "chunks": config.action.chunks,
            "bins": config.action.bins,
            "history": config.data.history,
            "supersample": config.sim.supersample,
            "instructions": list(source.manifest.instructions),
            "checkpoint_digest": source.manifest.digest,
            "normalisation_digest": source.stats.digest(),
        }

    async def refusal(self, weights: str, instruction: str) -> str:
        """Why a checkpoint does not take an instruction, in one line; empty where it does.

        Raises:
            UnknownWeightsError: it is not loaded here.
        """
        policy = self._policy(weights)

        def work() -> str:
            try:
                policy.tokenise(instruction)
            except ValueError as error:
                return str(error)
            return ""

        # Not beside a batch: tokenisers do not serve two threads at a time.
        return await self._compute(work, patient=False)

    def check_health(self) -> None:
        """Asked by Serve now and then; an error has this replica replaced.

        Raises:
            RuntimeError: a call does not come back.
        """
        since = self._busy_since
        if since is not None and time.monotonic() - since > HANGS_S:
            raise RuntimeError(f"a call has computed for more than {HANGS_S:g} s")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve: what `libra_ray.on_ray.serving.scaling` decides by, since the last time.

        `pressure` is the mean that the gateways sent along, `busy` the share of the time that was computed in.
        """
        now = time.monotonic()
        stats = {
            "pressure": sum(self._pressures) / max(1, len(self._pressures)),
            "busy": min(1.0, self._busy_s / max(1e-3, now - self._told_at)),
        }
        self._pressures, self._busy_s, self._told_at = [], 0.0, now
        return stats

    async def _compute[T](self, work: Callable[[], T], *, patient: bool) -> T:
        """Off the event loop, one batch at a time.

        Args:
            work: the batch.
            patient: let others go first, by as much as the setting `nice` says.

        Raises:
            FailedComputingError: `work` failed; the text says how.
        """

        def timed() -> T:
            with self._one_at_a_time:
                self._busy_since = time.monotonic()
                try:
                    return work()
                except Exception as error:
                    # Of an error of torch's the gateway could only learn by importing torch, which takes seconds.
                    raise FailedComputingError(f"{type(error).__name__}: {error}") from error
                finally:
                    self._busy_s += time.monotonic() - self._busy_since
                    self._busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._patient if patient else self._prompt, timed)

    def _policy(self, weights: str) -> LibraPolicy:
        if weights not in self._policies:
            raise UnknownWeightsError(f"{weights!r} is not loaded here; loaded: {', '.join(map(repr, self._policies))}")
        return self._policies[weights]

    def _loaded(self, address: str) -> LibraPolicy:
        folder = folder_of(address, self._settings.tracking_uri)
        return load_policy(folder, self._device, coarse_only=self._settings.coarse_only)

    def _warm_up(self, policy: LibraPolicy) -> None:
        """One robot and a full batch: the first calls of each size are slow."""
        shape, config = policy.source.manifest.shape, policy.source.config
        blank = np.zeros((config.sim.image_size, config.sim.image_size, 3), np.uint8)
        one = Observation(
            images=dict.fromkeys(policy.source.manifest.image_keys, blank),
            state=np.zeros(shape.state_dim, np.float32),
            instruction=policy.source.manifest.instructions[0] if policy.source.manifest.instructions else "",
        )
        for batch in (1, 1, self._system.max_batch):
            plans = policy.plan([one] * batch)
            policy.refine([one] * batch, plans)


def _thread(threads: int, *, nice: int) -> ThreadPoolExecutor:
    """A thread to compute in. Its priority and OpenMP's number of threads belong to the thread that sets them."""

    def begin() -> None:
        os.nice(min(nice, NICEST))
        if nice > NICEST and hasattr(os, "SCHED_IDLE"):
            # A sandbox may forbid it: then the nicest has to do.
            with suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        torch.set_num_threads(threads)

    return ThreadPoolExecutor(1, initializer=begin)


class Planner(_System):
    """Semantic Planner: observations in, plans out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.planner)

    async def plan(self, rows: Rows, pressure: float = 0.0, *, hurry: bool = False) -> Answers:
        """Plan tokens for every row.

        Args:
            rows: of one batch.
            pressure: how far the intents of the gateway's robots are past their usual age, from 0 to 1 (used up).
            hurry: some of them have no time to spare: others on the same processors need not be let go first.

        Raises:
            UnknownWeightsError: the rows' weights are not loaded here.
        """
        self._pressures.append(pressure)
        policy = self._policy(rows.weights)

        def work() -> Answers:
            began = time.perf_counter()
            return plan_answers(rows, policy.plan(rows.observations()), time.perf_counter() - began)

        return await self._compute(work, patient=not hurry)


class Refiner(_System):
    """Action Refiner: observations and plans in, chunks out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.refiner)

    async def refine(self, rows: Rows, pressure: float = 0.0) -> Answers:
        """Actions for every row.

        Args:
            pressure: share of the gateway's recent answers that came after their deadline.

        Raises:
            UnknownWeightsError: the rows' weights are not loaded here.
        """
        self._pressures.append(pressure)
        policy = self._policy(rows.weights)

        def work() -> Answers:
            began = time.perf_counter()
            return chunk_answers(rows, policy.refine(rows.observations(), rows.plans()), time.perf_counter() - began)

        return await self._compute(work, patient=True)
