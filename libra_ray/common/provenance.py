"""Where a result comes from: code revision, machine, library versions and the configuration as it may be shown."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libra_ray.config import Config
from libra_ray.config.overrides import flatten

LIBRARIES = ("ray", "torch", "transformers", "lerobot", "metaworld", "mujoco", "mlflow", "numpy")
CODE = ("libra_ray", "jobs", "serve_apps", "tune_spaces", "benchmarks", ":!benchmarks/results", "pyproject.toml", "uv.lock")
"""What results come from, as git's path specifications; pages, tests and earlier results are not."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine, with the versions of the libraries that matter.

    Attributes:
        cpu: its model; `cores`: those the process may use.
        memory_gb: GiB.
        gpu: None without one.
    """

    cpu: str
    cores: int | None
    memory_gb: float
    gpu: str | None
    os: str
    python: str
    libraries: Mapping[str, str]


def git_revision(folder: Path | None = None) -> str | None:
    """The commit that `folder` (by default this package's checkout) is at, with `-dirty` where code differs from it.

    None where the folder is not the root of a git checkout, e.g. in an installed package or a submitted job.
    """
    root = (folder or Path(__file__).parents[2]).resolve()
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return None
    status = ("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    changed = _output("git", "-C", str(root), *status, "--", *CODE)
    return f"{commit}-dirty" if changed else commit


def describe_hardware() -> Hardware:
    """The machine that this process runs on."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return Hardware(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=", ".join(gpus.splitlines()) if gpus else None,
        os=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries=library_versions(*LIBRARIES),
    )


def library_versions(*names: str) -> dict[str, str]:
    """The versions of those of the named distributions that are installed."""
    return {name: version for name in names if (version := _version(name))}


def public_config(config: Config) -> dict[str, Any]:
    """The flattened configuration, as reports and trackers may show it: credentials inside addresses are masked."""
    flat = flatten(config)
    return {name: masked(value) if isinstance(value, str) else value for name, value in flat.items()}


def masked(text: str) -> str:
    """A text whose addresses no longer show who asks, e.g. `postgresql://***@host`."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", text)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), flags=re.MULTILINE) if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
