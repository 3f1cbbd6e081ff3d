"""The application: a deployment per level and the gateway, each with its own replicas, resources and autoscaling."""

import asyncio
import hashlib
import os
import socket
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema, ServeInstanceDetails

from libra_ray.on_ray import ray_private, session
from libra_ray.on_ray.serving.engine import RayEngine
from libra_ray.on_ray.serving.scaling import LOOK_BACK_S, METRICS_S
from libra_ray.serving.gateway import GatewayCore
from libra_ray.serving.listener import Listener
from libra_ray.serving.local_calls import LocalCalls
from libra_ray.serving.settings import Replicas, ServingSettings
from libra_ray.serving.web import Web
from libra_ray.serving.weights import pinned
from libra_ray.types import Json

APP_NAME = "default"
"""What `serve run` calls an application that was given no name."""
GATEWAY = "Gateway"
"""The gateways' deployment; the others are named after their levels."""
REPLICA = "libra_ray.on_ray.serving.level.ServedLevel"
"""What serves a level; named, and imported by the replicas alone: whoever builds the application needs no torch."""
LEAVE_S = 3.0
ENVIRONMENT = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(METRICS_S)}
"""Of replicas that scale by themselves: Serve's own interval is ten seconds, in which a fleet can grow from nothing."""
CALLS_AT_ONCE = 4
"""Batches that a replica takes in: one computes, the others wait or answer `describe`."""


class GatewayBase:
    """The gateway's sockets around its core, made of the levels' handles, slow to fast; `Gateway` is the same as an ingress."""

    _way = staticmethod(lambda handle: LocalCalls(ray_private.direct(handle), ray_private.sockets_folder()))
    """Of calls to the levels."""

    async def __init__(self, settings: ServingSettings, *handles: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        alone = max(settings.gateway.replicas, settings.gateway.max_replicas) == 1
        # Of this cluster and no other: its sockets' folder is named by its start.
        application = f"{ray_private.sockets_folder()}:{serve.get_replica_context().app_name}"
        owner = hashlib.sha256(application.encode()).hexdigest()[:16]
        engine = RayEngine(f"{socket.gethostname()}-{os.getpid()}", owner, alone=alone)
        self._core = GatewayCore(settings, dict(zip(settings.levels, map(self._way, handles), strict=True)), engine)
        self._web = Web(self._core)
        self._listener: Listener | None = None
        if settings.port:
            self._listener = Listener(
                self._web, host=settings.host, port=settings.port, max_message_bytes=settings.max_message_bytes, owner=owner
            )
            self._opening = asyncio.get_running_loop().create_task(self._open(self._listener))
        self._heartbeat = asyncio.get_running_loop().create_task(self._core.heartbeat())

    async def _open(self, listener: Listener) -> None:
        """Share the port only now: a robot sent here earlier would be refused, and wait, while other gateways are free."""
        await self._core.weight_switch.loaded.wait()
        listener.open()

    def __serve_build_asgi_app__(self) -> Web:
        """For Serve's proxy."""
        return self._web

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Switch to other weights."""
        self._core.weight_switch.switch_to(user_config)

    async def act(self, request: Json, robot: str = "handle") -> Json:
        """The answer to one request without a socket, for simulators in the cluster: maps as in `libra_ray.client.protocol`.

        Raises:
            ValueError: the request is wrong; the text says what would have been valid.
        """
        return await self._core.answer(request, robot)

    def settings(self) -> ServingSettings:
        """What the application was asked to be."""
        return self._core.settings

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.by_connections`."""
        return {"connections": float(len(self._core.connections))}

    async def __del__(self) -> None:
        """Drain: take no more robots, send those that are here to another gateway, each after its answer under way."""
        if not hasattr(self, "_heartbeat"):
            return
        self._core.draining = True
        self._heartbeat.cancel()
        if self._listener is not None:
            self._opening.cancel()
            self._listener.refuse_new()
        self._core.send_away()
        await self._web.gone(LEAVE_S)
        if self._listener is not None:
            await self._listener.close()


Gateway = serve.ingress()(GatewayBase)
"""Serve's ingress."""


def build(settings: ServingSettings, replica: type | str = REPLICA) -> Application:
    """The application of these settings.

    Args:
        settings: with all levels, as `pinned` gives them.
        replica: a class made from settings and a level's name, for tests.

    Raises:
        ValueError: two deployments would have one name.
    """
    names = [deployment_of(level) for level in settings.levels]
    if len({*names, GATEWAY}) <= len(names):
        raise ValueError(f"levels {', '.join(settings.levels)} need deployments of different names, none of them {GATEWAY}")
    *_, last = settings.levels
    levels = [
        _deployment(
            settings, replica, name, of, "by_missed_deadlines" if level == last else "by_late_intents", slots=CALLS_AT_ONCE
        ).bind(settings, level)
        for name, (level, of) in zip(names, settings.levels.items(), strict=True)
    ]
    # A WebSocket through Serve's proxy holds one slot for its whole life.
    slots = settings.max_connections + 100
    gateway = _deployment(settings, Gateway, GATEWAY, settings.gateway, "by_connections", slots=slots)
    return gateway.bind(settings, *levels)


def deployment_of(level: str) -> str:
    """The name of a level's deployment: `planner` is served by `Planner`."""
    return level[:1].upper() + level[1:]


def _deployment(settings: ServingSettings, cls: type | str, name: str, of: Replicas, policy: str, *, slots: int) -> Deployment:
    numbers: dict[str, Any] = {"num_replicas": of.replicas}
    actor: dict[str, Any] = {"num_cpus": of.num_cpus, "num_gpus": of.num_gpus}
    if of.max_replicas > of.replicas:
        actor["runtime_env"] = {"env_vars": ENVIRONMENT}
        numbers = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=of.replicas,
                max_replicas=of.max_replicas,
                upscale_delay_s=settings.scale_up_delay_s,
                downscale_delay_s=settings.scale_down_delay_s,
                metrics_interval_s=METRICS_S,
                look_back_period_s=LOOK_BACK_S,
                policy=AutoscalingPolicy(policy_function=f"libra_ray.on_ray.serving.scaling:{policy}"),
            )
        }
    made: Deployment = serve.deployment(
        name=name,
        ray_actor_options=actor,
        user_config=settings.user_config(),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=2 * LEAVE_S,
        # A line per call would cost more than the call.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        max_ongoing_requests=slots,
        **numbers,
    )(cls)
    # Only the weights may change in place.
    ray_private.set_version(made, _version(settings))
    return made


def _version(settings: ServingSettings) -> str:
    fixed = settings.model_copy(update={"checkpoint": "", "revision": ""})
    return hashlib.sha256(fixed.model_dump_json().encode()).hexdigest()[:16]


def update_weights(checkpoint: str, revision: str = "", app_name: str = APP_NAME) -> None:
    """Have a running application use another checkpoint, without dropping a robot; returns when it does.

    Joins the cluster at RAY_ADDRESS where this process is connected to none.

    Args:
        checkpoint: a folder that all machines see, or a `models:/` address of the store that the application began with.
        revision: another text than before loads the same address again.
        app_name: as `serve status` shows it.

    Raises:
        ValueError: there is no such checkpoint or application, it has other levels, or RAY_ADDRESS names no cluster.
        RuntimeError: the cluster does not answer, or the application cannot load the checkpoint.
    """
    with session.joined():
        running = serve.status().applications
        if app_name not in running:
            raise ValueError(f"no application {app_name!r} runs; running: {', '.join(running) or 'none'}")
        settings: ServingSettings = serve.get_app_handle(app_name).settings.remote().result()
        changed = pinned(settings.model_copy(update={"checkpoint": checkpoint, "revision": revision}))
        if [*changed.levels] != [*settings.levels]:
            has, served = ", ".join(changed.levels), ", ".join(settings.levels)
            raise ValueError(f"{checkpoint} has the levels {has}, application {app_name!r} serves {served}; start another one")
        if not _declared_anew(app_name, changed):
            serve.run(build(changed), name=app_name, route_prefix="/")


def _declared_anew(app_name: str, settings: ServingSettings) -> bool:
    """Change the file's weights of an application that came by `serve deploy`; False where it did not.

    To `serve.run` it would be another application of that name, with all of its processes started anew.
    """
    details = ServeInstanceDetails(**ray_private.serve_details())
    declared = {name: app.deployed_app_config for name, app in details.applications.items() if app.deployed_app_config}
    if app_name not in declared:
        return False
    tree = declared[app_name].model_dump(exclude_unset=True)
    deployments = {part["name"]: part for part in tree.get("deployments", [])}
    names = [*map(deployment_of, settings.levels), GATEWAY]
    named = [{**deployments.pop(name, {"name": name}), "user_config": settings.user_config()} for name in names]
    tree["deployments"] = [*named, *deployments.values()]
    declared[app_name] = ServeApplicationSchema.model_validate(tree)
    # All of them: Serve ends those that a file no longer names.
    ray_private.deploy(ServeDeploySchema(applications=list(declared.values())), app_name)
    return True
