"""Connecting to Ray: the same call on a laptop, on an existing cluster and inside a submitted job."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

_QUIET = {"log_to_driver": False, "logging_level": "error"}
"""The user sees this program's lines; Ray's own are in its log folder."""


START_TRIES = 3


@contextmanager
def connected() -> Iterator[None]:
    """Use the cluster this process is connected to, the one at RAY_ADDRESS, or a new local one that ends with the block."""
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**_QUIET)
    else:
        start_local(include_dashboard=False, **_QUIET)
    try:
        yield
    finally:
        ray.shutdown()


def start_local(**options: Any) -> None:
    """A new cluster on this machine; `options` are those of `ray.init`.

    Ray gives its processes half a minute to come up, whatever else the machine has to do: that it took longer is no reason to
    give up a job.
    """
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def is_private() -> bool:
    """Whether the cluster is this process's own, so that no further machines will join it."""
    return not os.environ.get("RAY_ADDRESS")


def available_cpus() -> int:
    """CPUs of the connected cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
