"""The machine and its account: versions, room, home, name, encoding, proxies, ports."""

import getpass
import importlib.metadata
import locale
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from libra_ray.doctor.finding import Finding

ROOT = Path(__file__).parents[2]
SYNC = "uv sync --locked"
GIB = 2**30
LEAST_DISK, GOOD_DISK = 1 * GIB, 10 * GIB
GOOD_SHM = 2 * GIB
PORTS = {8765: "the gateways", 8000: "Ray Serve", 8265: "Ray's dashboard"}
LOCAL = ("127.0.0.1", "localhost")


def python() -> Finding:
    """The interpreter, against pyproject.toml."""
    wanted = _project()["requires-python"]
    found = f"{platform.python_version()} at {sys.executable}"
    if not Requirement(f"python{wanted}").specifier.contains(platform.python_version(), prereleases=True):
        return Finding.blocker("python", f"{found}, but {wanted} is needed", f"start jobs with `uv run`, or: {SYNC}")
    return Finding.ok("python", found)


def libraries(installed: dict[str, str] | None = None) -> Finding:
    """The installed libraries, against pyproject.toml and uv.lock.

    Args:
        installed: name to version; None looks into this environment.
    """
    found = _installed() if installed is None else installed
    wanted = [Requirement(text) for text in _project()["dependencies"]]
    names = [canonicalize_name(requirement.name) for requirement in wanted]
    missing = [name for name in names if name not in found]
    if missing:
        return Finding.blocker("libraries", f"{', '.join(missing)} missing", SYNC)
    wrong = [
        f"{name} {found[name]} ({requirement.specifier} needed)"
        for name, requirement in zip(names, wanted, strict=True)
        if not requirement.specifier.contains(found[name], prereleases=True)
    ]
    if wrong:
        return Finding.blocker("libraries", ", ".join(wrong), SYNC)
    locked = _locked()
    other = [f"{n} {v} ({' or '.join(sorted(locked[n]))} locked)" for n, v in found.items() if v not in locked.get(n, {v})]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        return Finding.warning("libraries", f"other versions than tested: {', '.join(other[:5])}{more}", SYNC)
    return Finding.ok("libraries", f"{sum(name in locked for name in found)} as in uv.lock")


def runs_folder(runs: Path) -> Finding:
    """Room for recordings, pictures and checkpoints, and leave to write them."""
    there = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    if not there.is_dir() or not writable(there):
        what = "is not a folder" if not there.is_dir() else "cannot be written to"
        return Finding.blocker("runs folder", f"{there} {what}", "give another one: --runs FOLDER")
    free = shutil.disk_usage(there).free
    found = f"{runs}, {free / GIB:.1f} GiB free"
    fix = f"free some in {there}, or give a folder on another disk: --runs FOLDER"
    if free < LEAST_DISK:
        return Finding.blocker("runs folder", f"{found}; a run needs {LEAST_DISK / GIB:.0f} GiB and more", fix)
    if free < GOOD_DISK:
        return Finding.warning("runs folder", f"{found}; that is little for pictures and checkpoints", fix)
    return Finding.ok("runs folder", found)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:  # noqa: S108  (it is looked at, nothing is written)
    """Where Ray keeps its objects; where it is small, Ray puts them on the disk, which is slow."""
    if not sys.platform.startswith("linux"):
        return Finding.ok("shared memory", "not used on this system")
    fix = f"docker run --shm-size=8g, or: mount -o remount,size=8g {folder}"
    if not folder.is_dir():
        return Finding.warning("shared memory", f"{folder} does not exist, so Ray's objects go to the disk", fix)
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GOOD_SHM:
        return Finding.warning("shared memory", f"{found}, so Ray's objects go to the disk", fix)
    return Finding.ok("shared memory", found)


def home() -> Finding:
    """Where Ray keeps its token, and Hugging Face its models."""
    fix = "export HOME=FOLDER, one that you can write to"
    try:
        folder = Path.home()
    except RuntimeError:
        return Finding.blocker("home", "HOME is not set, and the system knows no home of this user", fix)
    if not folder.is_dir():
        return Finding.blocker("home", f"{folder} does not exist", fix)
    if not writable(folder):
        return Finding.blocker("home", f"{folder} cannot be written to", fix)
    return Finding.ok("home", str(folder))


def user() -> Finding:
    """The user's name, which caches are named by."""
    try:
        return Finding.ok("user", getpass.getuser())
    except (KeyError, OSError):
        found = f"user number {os.getuid()} has no name here"
        return Finding.warning("user", found, "export USER=NAME LOGNAME=NAME")


def encoding() -> Finding:
    """How text is printed and, where a library does not say it, written."""
    used = {"the locale": locale.getencoding(), "standard output": sys.stdout.encoding or "none"}
    other = [f"{where} is {name}" for where, name in used.items() if name.lower().replace("-", "") != "utf8"]
    if sys.flags.utf8_mode:
        other = [text for text in other if not text.startswith("the locale")]
    if other:
        return Finding.warning("encoding", f"{' and '.join(other)}, not UTF-8", "export PYTHONUTF8=1 LC_ALL=C.UTF-8")
    return Finding.ok("encoding", "UTF-8")


def proxies(tracking_uri: str = "") -> Finding:
    """Whether requests to this very machine, e.g. to a tracking server on it, would go to a proxy."""
    known = sorted({f"{scheme}_proxy" for scheme in urllib.request.getproxies()} - {"no_proxy"})
    if not known:
        return Finding.ok("proxies", "none")
    names = ", ".join(known)
    caught = [name for name in LOCAL if not urllib.request.proxy_bypass(name)]
    if not caught:
        return Finding.ok("proxies", f"{names}; not for this machine")
    found = f"requests to {' and '.join(caught)}, this machine, go to the proxy in {names}"
    fix = "export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost"
    if urlsplit(tracking_uri).hostname in caught:
        return Finding.blocker("proxies", f"{found}, so tracking.uri is not reached", fix)
    return Finding.warning("proxies", f"{found}: Ray's dashboard, `ray job submit` and local servers are not reached", fix)


def ports(wanted: dict[int, str] | None = None) -> Finding:
    """The ports that serving takes."""
    wanted = PORTS if wanted is None else wanted
    taken = [port for port in wanted if _is_taken(port)]
    if not taken:
        return Finding.ok("ports", f"{', '.join(map(str, wanted))} are free")
    text = ", ".join(f"{port} ({wanted[port]}) is taken{_by(port)}" for port in taken)
    return Finding.warning("ports", text, "end that process, or give other ports: docs/serving.md")


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _locked() -> dict[str, set[str]]:
    """Every locked package's versions; there may be one for each platform."""
    versions: dict[str, set[str]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]:
        if "version" in package:
            versions.setdefault(package["name"], set()).add(package["version"])
    return versions


def _installed() -> dict[str, str]:
    return {canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}


def writable(folder: Path) -> bool:
    """Whether a file can be made there; asking for permissions alone forgets read-only mounts, quotas and root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _by(port: int) -> str:
    """Which process listens, as far as this user may know."""
    sockets = {inode for table in ("tcp", "tcp6") for inode in _listening(Path("/proc/net") / table, port)}
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(entry.readlink()) in sockets:
                command = (entry.parents[1] / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f" by process {entry.parents[1].name} ({command[:60]})"
        except OSError:
            continue
    return ""


def _listening(table: Path, port: int) -> Iterator[str]:
    rows = table.read_text(encoding="utf-8").splitlines()[1:] if table.exists() else []
    for row in rows:
        place, state, inode = (row.split()[i] for i in (1, 3, 9))
        if state == "0A" and re.fullmatch(rf"[0-9A-F]+:{port:04X}", place):
            yield f"socket:[{inode}]"
