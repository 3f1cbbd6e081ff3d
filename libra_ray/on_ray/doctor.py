"""What Ray needs of a machine: an address that leads to a cluster, a token, a folder for its sessions."""

import os
from collections.abc import Iterable
from pathlib import Path

from libra_ray.doctor import aside
from libra_ray.doctor.finding import Finding
from libra_ray.on_ray import cluster, machine


def address(limit_s: float = 120) -> str:
    """The cluster that jobs would join."""
    return aside.call(try_to_join, limit_s=limit_s) if cluster.wanted() else "none, each job starts a cluster of its own"


def try_to_join() -> str:
    """Join the cluster as a job does; what it is, in words.

    Raises:
        ValueError: RAY_ADDRESS is no address.
        RuntimeError: no cluster that can be used answers there.
    """
    from libra_ray.on_ray.session import available_cpus, connected

    with connected():
        return f"RAY_ADDRESS={cluster.wanted()}, a cluster with {available_cpus()} CPUs"


def token() -> str | Finding:
    """Ray's token: a head asks for it as soon as one lies in the home folder, and Ray's commands send it only if told to.

    Jobs see to themselves.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    where = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else path if Path(path).is_file() else ""
    if mode == "token" and not where:
        fix = "uv run ray get-auth-token --generate, or copy the head's there, or unset RAY_AUTH_MODE"
        return Finding.warning(f"RAY_AUTH_MODE=token, but there is none in {path}: `ray` and `serve` refuse to work", fix)
    if mode is None and where and os.environ.get("RAY_API_SERVER_ADDRESS"):
        fix = "export RAY_AUTH_MODE=token (or disabled) here and where the head is started"
        return Finding.warning(f"a head asks for the one in {where}, which `ray job submit` does not send", fix)
    return f"{where or 'none'}, RAY_AUTH_MODE {'is not set' if mode is None else f'is {mode}'}"


def folder(limit_s: float = 60) -> Iterable[Finding]:
    """The folder of a new Ray's sockets and logs, and in it the address of the cluster that was started last.

    Raises:
        ValueError: Ray cannot use it.
    """
    if cluster.wanted():
        yield Finding.ok("that of the cluster at RAY_ADDRESS")
        return
    place, passed_over = machine.sessions_folder()
    yield Finding.warning(passed_over, "export RAY_TMPDIR=/tmp, or unset TMPDIR") if passed_over else Finding.ok(f"{place}/ray")
    left = Path(place, "ray", "ray_current_cluster")
    if left.is_file():
        named = left.read_text(encoding="utf-8", errors="replace").strip()
        try:
            aside.call(cluster.asks_for_token, f"{named!r}, which {left} names", named, "", limit_s=limit_s)
        except aside.AsideError as error:
            found = Finding.refused(error, "").found
            yield Finding.warning(f"{found}: `ray status` and `serve status` wait for it", f"rm {left}")
