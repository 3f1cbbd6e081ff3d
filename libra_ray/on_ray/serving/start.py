"""`serve run` on this machine or on a cluster: as quick as Ray allows, and with one line where it fails."""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.scripts import parse_runtime_env_args

from libra_ray.on_ray import session
from libra_ray.on_ray.serving.app import build
from libra_ray.serving.listener import check_free
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import pinned

AT_ONCE_S = 0.5
_ERROR = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): (.+)$", re.MULTILINE)
"""The last line of a traceback."""
_RUNTIME_ENV = ("runtime_env", "runtime_env_json", "working_dir")


def started(settings: ServingSettings, options: Mapping[str, Any]) -> Application:
    """Connect to Ray, as the jobs do, and start the application; returns when all of its replicas are ready.

    `serve run` does both by itself, after it has built the application. But it joins whatever cluster was last started on this
    machine, and waits without end where that is dead; and it answers a replica that cannot start with a traceback.

    Args:
        options: of `serve run`, as its command line gave them.

    Raises:
        ValueError: there is no such checkpoint, RAY_ADDRESS or a folder that Ray needs cannot be used, the port is in use, or
            this machine is too small.
        RuntimeError: no cluster that can be used answers at RAY_ADDRESS, or the application's replicas cannot start.
    """
    session.prepare_serve_run(options["address"])
    if settings.port and session.is_private():
        check_free(settings.host, settings.port)
    environment = parse_runtime_env_args(**{name: options[name] for name in _RUNTIME_ENV})
    with ThreadPoolExecutor(1) as aside:
        # A folder is looked at in no time. The registry is asked by MLflow, whose import takes as long as the start of Ray.
        asked = aside.submit(pinned, settings)
        with suppress(TimeoutError):
            asked.result(timeout=AT_ONCE_S)
        session.connect_serve_run(runtime_env=environment)
        settings = asked.result()
    check_size(settings)
    application = build(settings)
    if settings.port and session.is_private():
        # Robots come to that port, and nobody but this process's user to this cluster: a proxy would only cost CPU.
        serve.start(proxy_location="Disabled")
    run(application, name=options["name"], route_prefix=options["route_prefix"])
    return application


def check_size(settings: ServingSettings) -> None:
    """Refuse more processes than this machine's own cluster will ever hold: Serve would wait for its growth, without a word.

    Raises:
        ValueError: names what is wanted and what there is.
    """
    if not session.is_private():
        return
    kinds = {"CPU": "num_cpus", "GPU": "num_gpus"}
    for kind, name in kinds.items():
        processes = (*settings.levels.values(), settings.gateway)
        # Ray's own resolution: ten times a tenth is one.
        wanted = round(sum(of.replicas * getattr(of, name) for of in processes), 4)
        present = ray.cluster_resources().get(kind, 0)
        if wanted > present:
            raise ValueError(
                f"levels and gateway reserve {wanted:g} {kind}s, this machine gives Ray {present:g}; lower the {name} or "
                "replicas of levels.LEVEL or gateway"
            )


def run(application: Application, name: str, route_prefix: str) -> None:
    """Start an application on the connected cluster; returns when all of its replicas are ready, or leaves nothing of it.

    Raises:
        RuntimeError: its replicas cannot start; the text is the error of one of them.
    """
    try:
        serve.run(application, name=name, route_prefix=route_prefix)
    except BaseException as error:
        cause = _cause(name) if isinstance(error, RuntimeError) else ""
        serve.delete(name)
        if cause:
            raise RuntimeError(cause) from error
        raise


def _cause(name: str) -> str:
    """What a replica that could not start says, out of the traceback that Serve keeps of it; empty where it keeps none."""
    known = serve.status().applications.get(name)
    for deployment in known.deployments.values() if known else ():
        if said := _ERROR.findall(deployment.message):
            return str(said[-1])
    return ""
