"""What Ray needs of a machine: an address that leads to a cluster, a token, a short folder for its sockets."""

import os
import re
import socket
from pathlib import Path

from libra_ray.doctor import aside
from libra_ray.doctor.finding import Finding
from libra_ray.doctor.machine import writable

LONGEST_SOCKET = 107
"""Bytes of a path that Linux lets a Unix socket have."""
SOCKET_OF_SESSION = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
PATIENCE_S = 3.0
VALID = "unset RAY_ADDRESS (a cluster of its own), or export RAY_ADDRESS=HOST:6379, or auto on a machine of the cluster"


def address(limit_s: float = 60) -> Finding:
    """The cluster that jobs would join."""
    given = os.environ.get("RAY_ADDRESS", "")
    if given in ("", "local"):
        return Finding.ok("ray address", "none, each job starts a cluster of its own")
    shown = f"RAY_ADDRESS={given}"
    if re.match(r"https?://", given):
        fix = f"{VALID}; for `ray job submit`: export RAY_API_SERVER_ADDRESS={given}"
        return Finding.blocker("ray address", f"{shown} is the dashboard's, which no job can join", fix)
    host, colon, port = given.removeprefix("ray://").rpartition(":")
    if given != "auto" and not (colon and host and port.isdigit()):
        return Finding.blocker("ray address", f"{shown} is no address", VALID)
    if given != "auto" and (why := _silent(host, int(port))):
        return Finding.blocker("ray address", f"nothing answers at {shown}: {why}", VALID)
    try:
        cpus = aside.call(try_to_join, limit_s=limit_s)
    except aside.AsideError as error:
        return Finding.blocker("ray address", f"{shown} cannot be joined: {error}", VALID)
    return Finding.ok("ray address", f"{shown}, a cluster with {cpus} CPUs")


def try_to_join() -> int:
    """Join the cluster as a job does; its CPUs."""
    from libra_ray.on_ray.session import available_cpus, connected

    with connected():
        return available_cpus()


def token() -> Finding:
    """Ray's token, which a head asks for as soon as one lies in the home folder, and `ray job submit` sends only if told to."""
    mode = os.environ.get("RAY_AUTH_MODE")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    there = bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
    where = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(path)
    if mode not in (None, "token", "disabled"):
        return Finding.blocker(
            "ray token", f"RAY_AUTH_MODE={mode} is unknown to Ray", "export RAY_AUTH_MODE=token, or disabled"
        )
    if mode == "token" and not there:
        fix = "ray get-auth-token --generate, or copy the cluster's file there, or export RAY_AUTH_MODE=disabled"
        return Finding.blocker("ray token", f"RAY_AUTH_MODE=token, but there is no token in {where}", fix)
    if mode is None and there and any(os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")):
        fix = "export RAY_AUTH_MODE=token (or disabled) here and where the head is started"
        return Finding.warning("ray token", f"{where} is there, which a head asks for and `ray job submit` does not send", fix)
    return Finding.ok("ray token", f"{where}, mode {mode}" if there and mode else f"{where if there else 'none'}, mode not set")


def leftover() -> Finding:
    """The address of the cluster that was started last on this machine, which may have died."""
    path = _temporary() / "ray" / "ray_current_cluster"
    if not path.is_file():
        return Finding.ok("ray leftover", "none")
    named = path.read_text(encoding="utf-8", errors="replace").strip()
    host, _, port = named.rpartition(":")
    why = _silent(host, int(port)) if host and port.isdigit() else "it is no address"
    if why:
        found = f"{path} names the dead cluster {named!r} ({why}): `serve run`, `ray status` and RAY_ADDRESS=auto wait for it"
        return Finding.blocker("ray leftover", found, f"rm {path}")
    return Finding.ok("ray leftover", f"the cluster at {named} is alive")


def sockets() -> Finding:
    """The folder of Ray's sockets, whose paths must be short."""
    folder = _temporary()
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "the default")
    pids = Path("/proc/sys/kernel/pid_max")
    pid = pids.read_text(encoding="utf-8").strip() if pids.exists() else "99999"
    length = len(os.fsencode(folder / SOCKET_OF_SESSION.format(pid=pid)))
    fix = "export RAY_TMPDIR=/tmp, or another short folder that exists and can be written to"
    if length > LONGEST_SOCKET:
        most = LONGEST_SOCKET - (length - len(os.fsencode(folder)))
        return Finding.blocker("ray sockets", f"{name}={folder} is too long for Ray's sockets, {most} bytes at most", fix)
    if not folder.is_dir() or not writable(folder):
        what = "cannot be written to" if folder.is_dir() else "does not exist"
        return Finding.blocker("ray sockets", f"{name}={folder} {what}", fix)
    return Finding.ok("ray sockets", f"in {folder}, {LONGEST_SOCKET - length} bytes to spare")


def _temporary() -> Path:
    """The folder that Ray makes its own in."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")  # noqa: S108  (Ray's own choice)


def _silent(host: str, port: int) -> str:
    """Why nothing answers there; empty where something does."""
    try:
        socket.create_connection((host.strip("[]"), port), PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""
