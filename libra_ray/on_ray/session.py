"""Connecting to Ray: the same call on a laptop, on an existing cluster and inside a submitted job."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psutil
import ray

from libra_ray.on_ray import cluster, machine, ray_private

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
"""The user sees this program's lines; Ray's own are in its log folder."""
_OWN: dict[str, Any] = {"include_dashboard": False, **_QUIET}
"""Of a cluster that ends with this process: nobody looks at its dashboard."""

START_TRIES = 3
END_PATIENCE_S = 5.0
"""Processes of a cluster that was ended may take so long; an idle one takes less than a second."""
SELDOM_IN_CORE = (
    "RAY_raylet_report_resources_period_milliseconds",
    "RAY_raylet_check_gc_period_milliseconds",
    "RAY_object_manager_timer_freq_ms",
    "RAY_local_fs_monitor_interval_ms",
    "RAY_kill_idle_workers_interval_ms",
    "RAY_memory_monitor_refresh_ms",
)
"""Ray's own timers of 100 to 250 ms; each of them is also a field of `ray_config_def.h`."""
SELDOM = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    **dict.fromkeys(SELDOM_IN_CORE, "1000"),
    "RAY_task_events_report_interval_ms": "0",
    "RAY_ray_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
}
"""What Ray does up to ten times a second in each of its processes: on one machine that takes processors from the robots it
serves. Tasks' events are for the dashboard alone, which such a cluster has not."""


@contextmanager
def connected() -> Iterator[None]:
    """Use the cluster this process is connected to, the one at RAY_ADDRESS, or a new local one that ends with the block.

    Raises:
        ValueError: RAY_ADDRESS, or a folder that Ray needs, cannot be used; the message names the variable.
        RuntimeError: no cluster that can be used answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        yield
        return
    if address := cluster.wanted():
        _join(address)
    else:
        start_local(**_OWN)
    try:
        yield
    finally:
        end()


@contextmanager
def joined() -> Iterator[None]:
    """Use the cluster this process is connected to, or the one at RAY_ADDRESS, to ask something of what runs there.

    Raises:
        ValueError: RAY_ADDRESS is unset, or no address of a cluster.
        RuntimeError: no cluster that can be used answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        yield
        return
    if not (address := cluster.wanted()):
        raise ValueError(f"RAY_ADDRESS is unset, so nothing says which cluster is meant; {cluster.A_CLUSTER}")
    ray_private.bring_nothing()
    _join(address)
    try:
        yield
    finally:
        ray.shutdown()


def check() -> None:
    """Refuse what `connected` would, without connecting or starting anything.

    Raises:
        ValueError: RAY_ADDRESS is no address of a cluster, or a folder or token that Ray needs cannot be used.
        RuntimeError: no cluster that can be used answers there.
    """
    if ray.is_initialized():
        return
    if address := cluster.wanted():
        cluster.reachable(address)
    else:
        machine.sessions_folder()
        machine.check_token()


def prepare_serve_run(address: str | None) -> None:
    """`check` for the command `serve run`.

    By itself that would join whatever cluster was last started on this machine, and wait without end where it is dead.

    Args:
        address: what the user gave it as `--address`; RAY_ADDRESS where they gave none.

    Raises:
        ValueError, RuntimeError: see `check`.
    """
    os.environ["RAY_ADDRESS"] = address or "local"
    check()


def connect_serve_run(**options: Any) -> None:
    """Connect as `connected` does, for as long as this process lives; `options` are those of `ray.init`.

    A cluster of its own does nothing that a server does not need.

    Raises:
        ValueError: RAY_ADDRESS, or a folder that Ray needs, cannot be used; the message names the variable.
        RuntimeError: no cluster that can be used answers at RAY_ADDRESS.
    """
    if address := cluster.wanted():
        _join(address, **options)
    else:
        for name, value in SELDOM.items():
            os.environ.setdefault(name, value)
        start_local(shared=True, **_OWN, **options)
        atexit.register(end)


def _join(address: str, **options: Any) -> None:
    place = cluster.reachable(address)
    try:
        ray.init(address=place, **_QUIET, **options)
    except Exception as error:
        ray.shutdown()
        raise RuntimeError(f"RAY_ADDRESS={address!r} answers, but this machine cannot join it: {error}") from error


def start_local(*, shared: bool = False, **options: Any) -> None:
    """A new cluster on this machine, without what nobody looks at: dashboard, autoscaler, reader of logs.

    Ray gives its processes half a minute to come up, whatever else the machine has to do: that it took longer is no reason to
    give up a job.

    Args:
        shared: other programs of the user will talk to it too.
        options: of `ray.init`.

    Raises:
        ValueError: RAY_TMPDIR or TMPDIR names a folder that Ray cannot use.
        RuntimeError: its processes did not come up, tried several times.
    """
    machine.prepare_start(shared=shared)
    for left in reversed(range(START_TRIES)):
        try:
            with ray_private.unwatched(), nullcontext() if left == START_TRIES - 1 else ray_private.unhurried():
                ray.init(address="local", **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise RuntimeError(
                    f"Ray's processes did not come up in {START_TRIES} tries, as where a machine has too much else to do; run "
                    f"this again when it has less ({machine.sessions_folder()[0]}/ray/session_latest/logs says more)"
                ) from error


def end() -> None:
    """Leave the cluster; one that `start_local` made ends, with every process that it had.

    Ray's processes end by themselves when their cluster does, but for those that lock themselves out while they exit: a worker
    whose subscriber is told of something just then waits for itself for good (seen with Ray 2.60's train controller).
    """
    below: list[psutil.Process] = []
    for pid in ray_private.started_processes():
        with suppress(psutil.Error):
            started = psutil.Process(pid)
            # Another's, where the one that was started has ended and its number came up again.
            below += started.children(recursive=True) if started.ppid() == os.getpid() else []
    ray.shutdown()
    _, left = psutil.wait_procs(below, timeout=END_PATIENCE_S)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def is_private() -> bool:
    """Whether the cluster is this process's own, so that no further machines will join it."""
    return not cluster.wanted()


def available_cpus() -> int:
    """CPUs of the connected cluster, or of the one that `connected` would start here; at least 1."""
    return max(1, present_cpus())


def present_cpus() -> int:
    """The same; 0 where a cluster's machines are yet to come."""
    return int(ray.cluster_resources().get("CPU", 0)) if ray.is_initialized() else ray_private.machine_cpus()


def available_gpus() -> float:
    """GPUs of the connected cluster, or of the one that `connected` would start here."""
    return ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else ray_private.machine_gpus()
