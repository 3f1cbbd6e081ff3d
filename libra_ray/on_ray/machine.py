"""A Ray of this program's own, on the machine as it is: its settings, its folder for sockets and logs, its token."""

import getpass
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from libra_ray.on_ray.cluster import wanted
from libra_ray.on_ray.ray_private import bring_nothing, forget_user_token, user_token

_SETTINGS = {
    # On one machine every worker is a child of this very environment; starting each through `uv run` again costs seconds
    # apiece. On a cluster (RAY_ADDRESS) Ray's own default stays, which brings the environment to the nodes.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Ray's workers are nice to whatever else runs; here the run is what the machine is for.
    "RAY_worker_niceness": "0",
    # A machine of one's own is not preempted; the watcher would cost every training run seconds of imports.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # As long as an agent takes to come up where a machine has much else to do.
    "RAY_agent_register_timeout_ms": "120000",
    # How soon a worker's reports, and its end, are noticed. Asking one machine often costs nothing.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_LAST_RESORT = "/tmp"  # noqa: S108  (the folder that Ray itself takes where no variable names one)
_SOCKET_DEPTH = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
"""Bytes of a Unix socket's path."""
LEAST_FREE_BYTES = 64 * 2**20
"""Below, Ray's processes end without a word while they start."""


def prepare() -> None:
    """A name and a home for a user who has none; Ray's settings for one machine, where no cluster is wanted.

    What the user has set stays.
    """
    _name_the_user()
    if wanted():
        return
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if "ray" in sys.modules and os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0":
        # The command `serve run` has imported Ray before any module of ours.
        bring_nothing()


def _name_the_user() -> None:
    """In a container the user may be a bare number, at which libraries that ask for a home folder, or a name, end."""
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir(), f"home-{os.getuid()}")
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home)
        sys.stderr.write(f"this user has no home folder and HOME is unset; caches go to {home}\n")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def prepare_start(*, shared: bool) -> None:
    """See to what a new Ray on this machine needs before it starts; all of it is told to Ray by the environment.

    Args:
        shared: other programs of the user will talk to it too.

    Raises:
        ValueError: RAY_TMPDIR names a folder that Ray cannot use, or TMPDIR, and /tmp is none either.
    """
    _choose_folder()
    _choose_token(shared=shared)


def _choose_folder() -> None:
    folder, passed_over = sessions_folder()
    if passed_over:
        sys.stderr.write(f"{passed_over}\n")
        os.environ["RAY_TMPDIR"] = folder


def sessions_folder() -> tuple[str, str]:
    """The folder of Ray's sessions, RAY_TMPDIR, else TMPDIR, else /tmp; and why a TMPDIR that it cannot use is passed over.

    Raises:
        ValueError: RAY_TMPDIR names a folder that Ray cannot use, or TMPDIR, and /tmp is none either.
    """
    named = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    folder = os.environ.get(named) or _LAST_RESORT
    fault = _fault(folder)
    if not fault:
        return folder, ""
    if named == "TMPDIR" and not _fault(_LAST_RESORT):
        return _LAST_RESORT, f"TMPDIR={folder} {fault}; Ray's sockets and logs go to {_LAST_RESORT}/ray"
    raise ValueError(f"{f'{named}=' if named else ''}{folder} {fault}; set RAY_TMPDIR to a folder that it can use")


def _fault(folder: str) -> str:
    """Why Ray cannot keep its sessions there; empty where it can."""
    longest = _LONGEST_SOCKET - _SOCKET_DEPTH
    if not Path(folder).is_absolute():
        return "is not an absolute path"
    if len(os.fsencode(folder)) > longest:
        return f"is too long for Ray's sockets, at most {longest} bytes"
    try:
        Path(folder, "ray").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot hold Ray's sessions ({error.strerror})"
    if not os.access(f"{folder}/ray", os.W_OK | os.X_OK):
        return "cannot hold Ray's sessions (Permission denied)"
    if (free := shutil.disk_usage(folder).free) < LEAST_FREE_BYTES:
        return f"has {free >> 20} MiB free, Ray needs at least {LEAST_FREE_BYTES >> 20}"
    return ""


def check_token() -> None:
    """Refuse a token that Ray could not show.

    Raises:
        ValueError: what lies in its place is no text.
    """
    if _shows_token():
        user_token()


def _shows_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def _choose_token(*, shared: bool) -> None:
    """A token of this process's own where the user has none, and nobody else needs it.

    Ray would write one into the home folder: every later head asks for that, while `ray job submit` sends it only if told to.
    And there is not always a home folder to write into.
    """
    if not _shows_token() or user_token():
        return
    if not (shared and _home_is_writable()):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        forget_user_token()


def _home_is_writable() -> bool:
    try:
        home = Path.home()
    except RuntimeError:
        return False
    folder = home / ".ray"
    return os.access(folder if folder.exists() else home, os.W_OK)
