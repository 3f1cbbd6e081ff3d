"""What is used of Ray that it does not promise to keep: all in one place, and tested to be there in the pinned version.

Imports stand inside the functions: Ray reads its settings from the environment when it is imported.
"""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libra_ray.types import Json

if TYPE_CHECKING:
    from ray.serve import Deployment
    from ray.serve.handle import DeploymentHandle
    from ray.serve.schema import ServeDeploySchema
    from ray.train.torch import TorchTrainer

WATCHERS = ("start_monitor", "start_api_server", "start_log_monitor")
"""Methods of Ray's `Node` that start what looks on."""
AGENTS_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Of a node's agents, as `RayParams` calls them."""


def local_cluster() -> str:
    """HOST:PORT of the cluster that runs on this machine.

    Raises:
        ConnectionError: none does.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address("auto"))


def version_of_cluster(place: str, token: str, timeout_s: float) -> str:
    """The version of Ray that answers at HOST:PORT; `ray.init` would wait for minutes, in silence.

    Args:
        place: HOST:PORT.
        token: to show; empty to show none.
        timeout_s: longest wait.

    Raises:
        grpc.RpcError: none answers, or, with code UNAUTHENTICATED, it asks for another token.
    """
    import grpc
    from ray._common.tls_utils import load_certs_from_env
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        chain, key, authority = load_certs_from_env()
        channel = grpc.secure_channel(place, grpc.ssl_channel_credentials(authority, key, chain), GLOBAL_GRPC_OPTIONS)
    else:
        channel = grpc.insecure_channel(place, GLOBAL_GRPC_OPTIONS)
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with channel:
        answer = NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=timeout_s, metadata=metadata)
    return str(answer.ray_version)


def user_token() -> str:
    """The user's token, from RAY_AUTH_TOKEN or a file, whatever RAY_AUTH_MODE says; empty where there is none.

    Raises:
        ValueError: it cannot be read, or not be shown: at one that is not ASCII gRPC ends the whole process.
    """
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader
    from ray.exceptions import AuthenticationError

    loader = AuthenticationTokenLoader.instance()
    try:
        token = str(loader.get_raw_token(ignore_auth_mode=True)) if loader.has_token(ignore_auth_mode=True) else ""
        token.encode("ascii")
    except (UnicodeError, AuthenticationError) as error:
        raise ValueError(
            f"Ray's token, in RAY_AUTH_TOKEN or the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, cannot be used ({error}); "
            "remove or mend it, or write a new one: uv run ray get-auth-token --generate"
        ) from None
    return token


def forget_user_token() -> None:
    """Have Ray look for the user's token again."""
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

    AuthenticationTokenLoader.instance().reset_cache()


def read_settings_again() -> None:
    """Have Ray, imported already, take over what was written into the environment since."""
    from ray._private.authentication.authentication_token_setup import Config

    Config.initialize("")


def bring_nothing() -> None:
    """Under `uv run`, keep Ray from uploading the checkout and installing its environment anew; Ray may be imported already."""
    from ray._private import ray_constants

    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def machine_cpus() -> int:
    """CPUs that a cluster started on this machine will have."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())


def machine_gpus() -> int:
    """GPUs that a cluster started on this machine will have."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    found = int(manager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


def serve_details() -> Json:
    """What `serve.status` is made of. Making it costs Serve's controller tens of milliseconds."""
    from ray.serve.context import _get_global_client

    details: Json = _get_global_client().get_serve_details()
    return details


def sockets_folder() -> Path:
    """Where the Unix sockets of this machine's Ray lie, of a process that is connected to it."""
    from ray._private import worker

    return Path(worker._global_node.get_sockets_dir_path())  # noqa: SLF001


def started_processes() -> list[int]:
    """Process ids of what `ray.init` started here for a cluster of this process's own; none where it joined another."""
    from ray._private import worker

    node = worker._global_node  # noqa: SLF001
    return [each.process.pid for kind in node.all_processes.values() for each in kind] if node is not None else []


@contextmanager
def unwatched() -> Iterator[None]:
    """A cluster that the block starts has nothing for its dashboard, its autoscaler and a driver that prints workers' logs.

    `ray.init` starts them whatever it is told, and they import for seconds while those processes do without which there is no
    cluster: on a machine that has other work, a node gives itself up whose own took longer than 15 s. Later they take as much
    CPU together as all replicas that wait for a robot.
    """
    from ray._private.node import Node

    kept = {name: getattr(Node, name) for name in WATCHERS}
    for name in WATCHERS:
        setattr(Node, name, lambda self, **options: None)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


@contextmanager
def unhurried() -> Iterator[None]:
    """A cluster that the block starts does not wait for its agents.

    A node waits 15 s for each to say which port it took, and gives itself up; that cannot be set. Here the ports are chosen
    before: should another program take one meanwhile, the cluster does not come up, as it would not have otherwise.
    """
    from ray._private.node import Node, get_port_filename

    start = Node.start_raylet

    def start_raylet(self: Any, *arguments: Any, **options: Any) -> Any:
        ports = dict(zip(AGENTS_PORTS, _free_ports(len(AGENTS_PORTS)), strict=True))
        self._ray_params.update(**ports)
        for name, port in ports.items():
            # Where the node looks for what its agents will say.
            Path(self.get_session_dir_path(), get_port_filename(self.node_id, name)).write_text(str(port), encoding="utf-8")
        return start(self, *arguments, **options)

    setattr(Node, start.__name__, start_raylet)
    try:
        yield
    finally:
        setattr(Node, start.__name__, start)


def _free_ports(count: int) -> list[int]:
    """Different ones, below those that systems give to connections."""
    with ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            tried = held.enter_context(socket.socket())
            with suppress(OSError):
                tried.bind(("", 20_000 + secrets.randbelow(12_000)))
                found.append(int(tried.getsockname()[1]))
        return found


def running_replicas(handle: "DeploymentHandle[Any]") -> int:
    """Replicas that a handle's router knows: Serve's controller tells it of every change, so that nobody need ask.

    Reads what there is: the public property makes the router, which must happen in the event loop that is to use it.
    """
    router = handle._init_router()._asyncio_router._request_router  # noqa: SLF001
    return len(router.curr_replicas) if router is not None else 0


def deploy(declared: "ServeDeploySchema", app_name: str) -> None:
    """What `serve deploy` does, from inside the cluster; returns when the application runs.

    Raises:
        RuntimeError: it cannot.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    client.deploy_apps(declared)
    client._wait_for_application_running(app_name)  # noqa: SLF001


def set_version(deployment: "Deployment", version: str) -> None:
    """Serve restarts replicas of another version, and by default every deployment is one: with this, only where it differs."""
    deployment._version = version  # noqa: SLF001


def direct(handle: "DeploymentHandle[Any]") -> "DeploymentHandle[Any]":
    """The handle with calls over gRPC from process to process, by a router in the caller's own event loop.

    Actor calls stream their answers, and a replica reports those in one thread, where the answer to a caller that was killed
    holds up everybody else's for two seconds (Ray 2.60). Every hop between threads waits for the others.

    Serve has environment variables for the same, RAY_SERVE_USE_GRPC_BY_DEFAULT and RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP. With
    them a gateway answered 0.93, 0.89 and 0.83 times as many requests per second of 1, 16 and 96 robots, and with plain calls
    0.93, 0.79 and 0.66 times (`benchmarks/results/serve_means.md`, two cores).
    """
    handle._init(_run_router_in_separate_loop=False)  # noqa: SLF001
    return handle.options(_by_reference=False, request_serialization="pickle", response_serialization="pickle")


def torch_trainer(*, alone: bool, **options: Any) -> "TorchTrainer":
    """Ray Train's trainer, without the processes that it starts beside the workers for what is not used here.

    Each takes as long to come up as a worker, before the first step and again after a fault. One hands out Ray Data's data
    sets: there are none. Where the cluster is this program's own, one more asks an autoscaler for machines that there are not,
    and another frees what a lost controller had reserved, which ends with the program.

    Args:
        alone: whether the cluster is this program's own.
        options: of `TorchTrainer`.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    unused = (DatasetsCallback, PlacementGroupCleanerCallback) if alone else (DatasetsCallback,)

    class Unasked(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            """Nobody is asked for resources."""

        def _maybe_send_resource_request(self) -> None:
            """Nor reminded."""

    class Lean(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

        def _initialize_and_run_controller(self, *, scaling_policy: Any, **given: Any) -> Any:
            policy = Unasked(scaling_policy.scaling_config) if alone else scaling_policy
            return super()._initialize_and_run_controller(scaling_policy=policy, **given)

    return Lean(**options)
