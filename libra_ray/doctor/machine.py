"""The machine and its account: versions, room, home, encoding, proxies, ports."""

import importlib.metadata
import platform
import socket
import sys
import tempfile
import tomllib
import urllib.request
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from libra_ray.common.disk import check_room, free, size_text
from libra_ray.doctor.finding import Finding

ROOT = Path(__file__).parents[2]
SYNC = "uv sync --locked"
LEAST_DISK, GOOD_DISK, GOOD_SHM = 10**9, 10**10, 2 * 10**9
PORTS = {8765: "the gateways", 8000: "Ray Serve", 8265: "Ray's dashboard"}
LOCAL = ("127.0.0.1", "localhost")


def python() -> str:
    """The interpreter, against pyproject.toml.

    Raises:
        ValueError: it is another one.
    """
    wanted = _project()["requires-python"]
    found = f"{platform.python_version()} at {sys.executable}"
    if not Requirement(f"python{wanted}").specifier.contains(platform.python_version(), prereleases=True):
        raise ValueError(f"{found}, but {wanted} is needed; start jobs with `uv run`, or: {SYNC}")
    return found


def libraries(installed: dict[str, str] | None = None) -> str | Finding:
    """The installed libraries, against pyproject.toml and uv.lock.

    Args:
        installed: name to version; None looks into this environment.

    Raises:
        ValueError: one is missing, or of a version that is not to be.
    """
    found = _installed() if installed is None else installed
    wrong = [
        f"{name} {found.get(name, 'missing')} ({requirement.specifier} needed)"
        for name, requirement in _wanted().items()
        if name not in found or not requirement.specifier.contains(found[name], prereleases=True)
    ]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}; {SYNC}")
    locked = _locked()
    other = [f"{n} {v} ({' or '.join(sorted(locked[n]))} locked)" for n, v in found.items() if v not in locked.get(n, {v})]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        return Finding.warning(f"other versions than tested: {', '.join(other[:5])}{more}", SYNC)
    return f"{sum(name in locked for name in found)} as in uv.lock"


def runs_folder(runs: Path) -> str | Finding:
    """Leave to write recordings, pictures and checkpoints, and room for them.

    Raises:
        ValueError: nothing can be written there.
        NoRoomError: not even a small run fits.
    """
    if fault := obstacle(runs):
        raise ValueError(f"{fault}; give another one: --runs FOLDER")
    check_room(runs, LEAST_DISK, "a small run")
    found = f"{runs}, {size_text(free(runs))} free"
    if free(runs) < GOOD_DISK:
        return Finding.warning(f"{found}, little for pictures and checkpoints", "make room, or give another: --runs FOLDER")
    return found


def shared_memory(folder: Path = Path("/dev/shm")) -> str | Finding:  # noqa: S108  (it is looked at, nothing is written)
    """Where Ray keeps its objects; where it is small, Ray puts them on the disk, which is slow."""
    if not sys.platform.startswith("linux"):
        return "not used on this system"
    found = f"{size_text(free(folder))} free in {folder}" if folder.is_dir() else f"{folder} does not exist"
    if folder.is_dir() and free(folder) >= GOOD_SHM:
        return found
    fix = f"docker run --shm-size=8g, or: mount -o remount,size=8g {folder}"
    return Finding.warning(f"{found}, so Ray's objects go to the disk", fix)


def home() -> str | Finding:
    """Where Hugging Face keeps what it downloads, and Ray's commands their token; jobs run without."""
    fault = obstacle(Path.home()) if Path.home().exists() else f"{Path.home()} does not exist"
    if fault:
        return Finding.warning(f"{fault}, downloaded models cannot be kept", "export HOME=FOLDER, one that you can write to")
    return str(Path.home())


def encoding() -> str | Finding:
    """What the terminal can show; files are UTF-8 whatever it says."""
    used = sys.stdout.encoding or "none"
    if used.lower().replace("-", "") == "utf8":
        return "UTF-8"
    return Finding.warning(f"standard output is {used}, signs that it lacks are shown as ?", "export LC_ALL=C.UTF-8")


def proxies() -> str | Finding:
    """Whether requests to this very machine, e.g. to a tracking server on it, would go to a proxy."""
    names = ", ".join(sorted({f"{scheme}_proxy" for scheme in urllib.request.getproxies()} - {"no_proxy"}))
    caught = [name for name in LOCAL if names and not urllib.request.proxy_bypass(name)]
    if not caught:
        return f"{names}; not for this machine" if names else "none"
    return Finding.warning(
        f"requests to {' and '.join(caught)} go to the proxy in {names}, so Ray's dashboard and local servers are not reached",
        "export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost",
    )


def ports(wanted: dict[int, str] | None = None) -> str | Finding:
    """The ports that serving takes."""
    wanted = PORTS if wanted is None else wanted
    taken = [port for port in wanted if _is_taken(port)]
    if not taken:
        return f"{', '.join(map(str, wanted))} are free"
    text = ", ".join(f"{port} ({wanted[port]}) is taken{_by(port)}" for port in taken)
    return Finding.warning(text, "end that process, or give other ports: docs/serving.md")


def obstacle(folder: Path) -> str:
    """Why no file can be made below `folder`, which need not exist yet; empty where one can.

    One is made and removed: asking for permissions alone forgets read-only mounts, quotas and root.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there} cannot be written to ({error.strerror})" if there.is_dir() else f"{there} is not a folder"


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _wanted() -> dict[str, Requirement]:
    """All that the project and its extras need, by name."""
    project = _project()
    texts = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, texts)}
    return {name: requirement for name, requirement in found.items() if name != project["name"]}


def _locked() -> dict[str, set[str]]:
    """Every locked package's versions; there may be one for each platform."""
    versions: dict[str, set[str]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]:
        if "version" in package:
            versions.setdefault(package["name"], set()).add(package["version"])
    return versions


def _installed() -> dict[str, str]:
    return {canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _by(port: int) -> str:
    """Which process listens, as far as this user may know and the tool to ask with, which is the developers', is there."""
    try:
        import psutil
    except ImportError:
        return ""
    try:
        connections = psutil.net_connections("tcp")
        pid = next(c.pid for c in connections if c.pid and c.status == psutil.CONN_LISTEN and c.laddr.port == port)
        return f" by process {pid} ({' '.join(psutil.Process(pid).cmdline())[:60]})"
    except (psutil.Error, StopIteration):
        return ""
