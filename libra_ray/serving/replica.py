"""A level of a policy as a deployment: batches in, batches out, no robot's state.

While one checkpoint follows another, both are loaded side by side. Where batches are recorded for a GPU, the third takes
the place of the first, weight by weight: what was recorded goes on, and is not recorded again while robots wait.
"""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from libra_ray.common.gc_freeze import freeze_startup_objects
from libra_ray.control.margin import Latency
from libra_ray.serving.batches import InferenceBatch, InferenceResult
from libra_ray.serving.low_priority import ComputeThreads
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weight_switch import LATENCY, LENGTHENED_BY
from libra_ray.serving.weights import UnknownWeightsError, folder_of, weights_key
from libra_ray.types import STATE_KEY, Json

if TYPE_CHECKING:
    from libra_ray.policy import Checkpoint, SystemPolicy

KEPT = 2
"""Checkpoints loaded at a time: the one in use, and the one before until no intent of it is left; or the one to come. Where one
follows another before any gateway has switched to it, the one that is still in use stays."""
TIMED_CALLS = 3
"""In warming up, of one robot alone."""
HANGS_S = 60.0
"""A call that computes for so long makes the replica unhealthy, and Serve replaces it."""


class LevelReplica:
    """One replica of a level, by its name: weights, warm-up, inference, health."""

    def __init__(self, settings: ServingSettings, level: str) -> None:
        self._settings, self._level, self._own = settings, level, settings.levels[level]
        self._compute = ComputeThreads(self._own.threads, self._own.nice)
        self._policies: dict[str, tuple[SystemPolicy, Latency]] = {}
        self._asked_at: dict[str, float] = {}
        self._late_shares: list[float] = []
        self._told_busy_s, self._told_at = 0.0, time.monotonic()
        self._warming_up = False

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Load and warm up the weights that `user_config` names, beside those in use.

        Raises:
            ValueError: they are not those of a policy of this application's levels.
        """
        key = weights_key(user_config)
        if key in self._policies:
            return
        loop = asyncio.get_running_loop()
        source = await loop.run_in_executor(None, self._loaded, user_config["checkpoint"])
        self._warming_up = True
        try:
            policy = await self._compute.run(lambda: self._recycled(source), low_priority=False)
            if policy is None:
                policy = await loop.run_in_executor(None, self._made, source)
            for low_priority in (True, False):
                alone = await self._warm_up(policy, low_priority=low_priority)
        finally:
            self._warming_up = False
        left = sorted(self._policies, key=self._last_asked)[1 - KEPT :]
        self._policies = {**{name: self._policies[name] for name in left}, key: (policy, alone)}
        self._asked_at = {name: at for name, at in self._asked_at.items() if name in self._policies}
        freeze_startup_objects()

    async def describe(self, weights: str) -> Json:
        """What the gateway tells robots about a checkpoint, and what it needs itself: `LENGTHENED_BY`, `LATENCY`.

        Raises:
            UnknownWeightsError: it is not loaded here.
        """
        policy, alone = self._held(weights)
        return {**described(policy), LENGTHENED_BY: policy.lengthened_by, LATENCY: alone}

    async def infer(self, batch: InferenceBatch) -> InferenceResult:
        """The level's answers to every row.

        Raises:
            UnknownWeightsError: the batch's weights are not loaded here.
        """
        self._late_shares.append(batch.late_share)

        def work() -> InferenceResult:
            # Only here, for until now its weights might have become others.
            policy, _ = self._held(batch.weights)
            self._asked_at[batch.weights] = time.monotonic()
            began, rows = time.perf_counter(), batch.requests
            answers = policy.infer(self._level, [row.observation for row in rows], [row.above for row in rows])
            return InferenceResult(numbers=[row.number for row in rows], answers=answers, seconds=time.perf_counter() - began)

        return await self._compute.run(work, low_priority=not batch.urgent)

    async def refusal(self, weights: str, instruction: str) -> str:
        """Why a checkpoint does not take an instruction, in one line; empty where it does.

        Raises:
            UnknownWeightsError: it is not loaded here.
        """
        policy, _ = self._held(weights)

        def work() -> str:
            try:
                policy.tokenise(instruction)
            except ValueError as error:
                return str(error)
            return ""

        # Not beside a batch: tokenisers do not serve two threads at a time.
        return await self._compute.run(work, low_priority=False)

    def check_health(self) -> None:
        """Asked by Serve now and then; an error has this replica replaced.

        Raises:
            RuntimeError: a call does not come back.
        """
        since = self._compute.busy_since
        if since is not None and time.monotonic() - since > HANGS_S and not self._warming_up:
            raise RuntimeError(f"a call has computed for more than {HANGS_S:g} s")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve: what `libra_ray.on_ray.serving.scaling` decides by, since the last time.

        `late_share` is the mean that the gateways sent along, `busy` the share of the time that was computed in.
        """
        now, busy_s = time.monotonic(), self._compute.busy_s
        stats = {
            "late_share": sum(self._late_shares) / max(1, len(self._late_shares)),
            "busy": min(1.0, (busy_s - self._told_busy_s) / max(1e-3, now - self._told_at)),
        }
        self._late_shares, self._told_busy_s, self._told_at = [], busy_s, now
        return stats

    def _held(self, weights: str) -> "tuple[SystemPolicy, Latency]":
        """The policy of those weights, and its level's latency with one robot."""
        if weights not in self._policies:
            raise UnknownWeightsError(f"{weights!r} is not loaded here; loaded: {', '.join(map(repr, self._policies))}")
        return self._policies[weights]

    def _last_asked(self, weights: str) -> float:
        """When robots were last answered by them."""
        return self._asked_at.get(weights, float("-inf"))

    def _loaded(self, address: str) -> "Checkpoint":
        # Here, so that the driver, which names this class to Serve, need not wait for torch.
        from libra_ray.policy import load_source

        settings = self._settings
        folder = folder_of(address, settings.tracking_uri)
        source = load_source(folder, variant=settings.variant, changes=settings.policy.changes)
        names, served = [level.name for level in source.model.levels], [*settings.levels]
        if names != served:
            raise ValueError(f"{address} has the levels {', '.join(names)}; this application serves {', '.join(served)}")
        return source

    def _made(self, source: "Checkpoint") -> "SystemPolicy":
        import torch

        from libra_ray.policy import SystemPolicy

        device = "cuda" if self._own.num_gpus and torch.cuda.is_available() else "cpu"
        return SystemPolicy(source, device, self._settings.variant)

    def _recycled(self, source: "Checkpoint") -> "SystemPolicy | None":
        """The policy that nobody will need, with other weights; None where it is needed, or of another kind."""
        if len(self._policies) < KEPT:
            return None
        oldest = min(self._policies, key=self._last_asked)
        policy, _ = self._policies[oldest]
        if not policy.engine.records or not policy.take(source):
            return None
        del self._policies[oldest]
        return policy

    async def _warm_up(self, policy: "SystemPolicy", *, low_priority: bool) -> Latency:
        """Every size of batch once, and one robot, whose latency this is: the first calls of each size are slow.

        One size after another, so that batches of the weights in use can come between.
        """
        one, ms = policy.blank(), []
        for size in reversed(policy.batches(self._own.max_batch)):
            await self._compute.run(partial(policy.warm_up, [size], [self._level]), low_priority=low_priority)

        def timed() -> None:
            began = time.perf_counter()
            policy.infer(self._level, [one], [None])
            ms.append(1000 * (time.perf_counter() - began))

        for _ in range(TIMED_CALLS):
            await self._compute.run(timed, low_priority=low_priority)
        return Latency.of(ms)


def described(policy: "SystemPolicy") -> Json:
    """What a policy says of itself in a `Handshake`."""
    source, horizon = policy.source, policy.levels[-1].covers
    config, shape, size = source.config, source.manifest.shape, source.config.data.image_size
    pictures = {name: {"dtype": "uint8", "shape": [size, size, 3]} for name in source.manifest.image_keys}
    return {
        "observation": {**pictures, STATE_KEY: {"dtype": "float32", "shape": [shape.state_dim], "spec": shape.state.tree()}},
        "action": {"dtype": "float32", "shape": [horizon, shape.action_dim], "spec": shape.action.tree()},
        "control_hz": float(source.manifest.control_hz),
        "horizon": horizon,
        "levels": policy.levels,
        "history": config.data.history,
        "supersample": config.sim.supersample,
        "instructions": source.manifest.instructions,
        "checkpoint_digest": source.manifest.digest,
        "normalisation_digest": source.stats.digest(),
    }
