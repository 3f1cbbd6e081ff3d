"""What is imported is declared, in the extra of whoever imports it; what is declared is used; and the wheel alone is enough."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.serving.test_web import Server

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)
LIGHT: list[str] = PROJECT["project"]["dependencies"]
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]
NAME = PROJECT["project"]["name"]
SHIPPED = ("libra_ray", "jobs", "serve_apps", "tune_spaces")
OURS = {*SHIPPED, "benchmarks", "tests", *(path.stem for path in (ROOT / "jobs").glob("*.py"))}
NOT_IMPORTED = {"num2words", "timm", "scikit-learn"}
"""Needed by a library that does not install them; pyproject.toml says which one."""
WHO_NEEDS = {
    "": ["libra_ray.client.client", "libra_ray.client.protocol", "libra_ray.types", "libra_ray.config"],
    "policy": ["libra_ray.policy", "libra_ray.checkpoint", "libra_ray.evaluation.rollout", "libra_ray.control.robot"],
    "train": ["libra_ray.on_ray.stages", "libra_ray.on_ray.sweep.runner", "libra_ray.report.publish", "libra_ray.doctor.job"],
    "serve": ["serve_apps.libra"],
    "sim": [
        "libra_ray.sim.metaworld",
        "libra_ray.sim.tabletop.environment",
        "libra_ray.sim.gym_adapter",
        "libra_ray.fleet.run",
    ],
}
"""Extra -> what has to work with nothing else installed."""


def names(requirements: Iterable[str]) -> set[str]:
    """The libraries that requirements ask for, with those of the extras that they name."""
    found: set[str] = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == NAME:
            found |= set().union(*(names(EXTRAS[extra]) for extra in requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def imports(tree: ast.AST, *, also_later: bool) -> Iterator[str]:
    """Dotted names that a module imports; `also_later` with those inside its functions, and those for its types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert not node.level
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not also_later:
            continue
        elif also_later or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, also_later=also_later)


def file_of(module: str) -> Path | None:
    """Where a module of ours is."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def imported(file: Path, *, also_later: bool) -> list[str]:
    return list(imports(ast.parse(file.read_text(encoding="utf-8")), also_later=also_later))


def outside(modules: Iterable[str], *, also_later: bool) -> set[str]:
    """Packages that are not ours and that importing these modules of ours, and whatever they import, asks for."""
    waiting, seen, found = list(modules), set(), set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        top, _, _ = module.partition(".")
        if top not in OURS:
            found |= {top} - sys.stdlib_module_names
        elif file := file_of(module):
            waiting.append(module.rpartition(".")[0] or top)
            waiting += imported(file, also_later=also_later)
    return found


@cache
def installed() -> dict[str, list[str]]:
    """Package -> the libraries that install it."""
    return dict(packages_distributions())


def undeclared(packages: Iterable[str], declared: set[str]) -> set[str]:
    """Packages that no declared library installs."""
    origin = installed()
    return {p for p in packages if not declared & {canonicalize_name(name) for name in origin.get(p, [p.replace("_", "-")])}}


def modules_below(*folders: str) -> list[str]:
    return [".".join(p.relative_to(ROOT).with_suffix("").parts) for top in folders for p in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("extra", WHO_NEEDS)
def test_an_extra_holds_what_its_use_imports(extra):
    declared = names([*LIGHT, *(EXTRAS[extra] if extra else [])])
    assert undeclared(outside(WHO_NEEDS[extra], also_later=False), declared) == set()


def test_what_is_imported_is_declared():
    assert undeclared(outside(modules_below(*SHIPPED), also_later=True), names([*LIGHT, *EXTRAS["all"]])) == set()
    everywhere = outside(modules_below(*SHIPPED, "benchmarks", "tests"), also_later=True) - {
        "talkative",
        "toy_system",
    }  # the tests' own
    assert undeclared(everywhere, names([*LIGHT, *chain(*GROUPS.values())])) == set()


def test_what_is_not_declared_is_seen():
    assert undeclared(["torch", "numpy"], names(LIGHT)) == {"torch"}
    assert undeclared(["ray"], names(EXTRAS["sim"])) == {"ray"}
    assert outside(["libra_ray.fleet.replay"], also_later=False) > {"pyarrow", "av"}
    assert "lerobot" in outside(["libra_ray.data.video"], also_later=True) - outside(["libra_ray.data.video"], also_later=False)


def test_what_is_declared_is_used():
    origin = installed()
    used = {canonicalize_name(n) for p in outside(modules_below(*SHIPPED), also_later=True) for n in origin.get(p, [])}
    assert names([*LIGHT, *EXTRAS["all"]]) - used == NOT_IMPORTED


def test_all_is_every_extra_and_a_checkout_has_all():
    assert names(EXTRAS["all"]) == set().union(*map(names, EXTRAS.values()))
    assert names(GROUPS["checkout"]) == names(EXTRAS["all"])
    assert "checkout" in PROJECT["tool"]["uv"]["default-groups"]


def test_a_library_has_one_range_and_an_exact_pin_says_why():
    every = [Requirement(text) for text in chain(LIGHT, *EXTRAS.values(), *GROUPS.values())]
    ranges = {(canonicalize_name(r.name), str(r.specifier)) for r in every}
    assert len(ranges) == len({name for name, _ in ranges})
    pinned = [line for line in TEXT.splitlines() if re.match(r'    "[\w\[\],-]+([=~]=|.*<)', line)]
    assert len(pinned) > 5
    assert [line for line in pinned if "  # " not in line] == []


# The wheel, in an environment that is otherwise empty.

UV = os.environ.get("UV") or shutil.which("uv")
"""`uv run` says which uv it is."""
ASK = """
import json, sys
import numpy as np
from importlib.resources import files
from libra_ray.client.client import RobotClient
from libra_ray.types import IMAGE_KEY, STATE_KEY, Observation

seen = {IMAGE_KEY: np.full((4, 4, 3), 7, np.uint8)}
with RobotClient(sys.argv[1], robot="light") as robot:
    reply = robot.act(Observation(images=seen, state=np.array([7, 0], np.float32), instruction="go", step=0))
print(json.dumps({
    "from": str(files("libra_ray")), "actions": reply.actions.shape,
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""
FILES = (
    "report/templates/report.html.j2", "report/templates/style.html.j2", "report/templates/sweep.html.j2",
    "serving/page/fleet.html", "serving/page/fleet.css", "serving/page/fleet.js", "sim/tabletop/tabletop.xml", "py.typed",
)  # fmt: skip
HEAVY = {"torch", "ray", "mlflow", "mujoco", "lerobot", "transformers"}


def ran(*command: str | Path, **environment: str) -> str:
    # A program that is run from the checkout would find the checkout's files first.
    done = subprocess.run(
        command, cwd=Path("/"), env={**os.environ, **environment}, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if not UV:
        pytest.skip("there is no uv on this machine to build the wheel with")
    out = tmp_path_factory.mktemp("wheel")
    ran(UV, "build", "--wheel", "--offline", "--quiet", "--python", sys.executable, "--out-dir", out, ROOT)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def light(wheel) -> Path:
    """The interpreter of an environment that holds the wheel and, in the locked versions, what it asks for."""
    root = wheel.parent / "environment"
    alone = ("--python", sys.executable, "--locked", "--offline", "--quiet", "--no-default-groups", "--no-install-project")
    try:
        ran(UV, "sync", "--project", ROOT, *alone, UV_PROJECT_ENVIRONMENT=str(root))
    except RuntimeError as error:
        if "Network connectivity is disabled" not in str(error):
            raise
        pytest.skip(f"uv's cache lacks one of {', '.join(sorted(names(LIGHT)))}: {str(error).splitlines()[0]}")
    python = root / "bin" / "python"
    ran(UV, "pip", "install", "--python", python, "--offline", "--quiet", "--no-deps", wheel)
    ran(UV, "pip", "check", "--python", python)
    return python


def test_the_wheel_holds_what_is_no_python_and_nothing_else(wheel):
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"libra_ray/{name}" for name in FILES} <= set(held)
    assert {name.partition("/")[0] for name in held} == {"libra_ray", f"libra_ray-{PROJECT['project']['version']}.dist-info"}
    others = {p.relative_to(ROOT).as_posix() for p in (ROOT / "libra_ray").rglob("*") if p.is_file()}
    assert {name for name in others if not name.endswith(".pyc")} <= set(held)


def test_the_light_client_asks_a_real_server(light):
    held = json.loads(ran(UV, "pip", "list", "--python", light, "--format", "json"))
    assert {package["name"] for package in held} == names(LIGHT) | {NAME}
    server = Server()
    try:
        answer = json.loads(ran(light, "-c", ASK, server.address))
    finally:
        server.stop()
    assert Path(answer["from"]).is_relative_to(light.parents[1])
    assert answer["actions"] == [5, 5]
    assert not HEAVY & set(answer["loaded"])


MISSING = {
    "import libra_ray.policy": "torch is not installed; pip install 'libra-ray[policy]'",
    "import libra_ray.model.libra": "torch is not installed; pip install 'libra-ray[policy]'",
    "import libra_ray.data.dataset": "pyarrow is not installed; pip install 'libra-ray[policy]'",
    "import libra_ray.training.fit": "torch is not installed; pip install 'libra-ray[train]'",
    "import libra_ray.report.publish": "jinja2 is not installed; pip install 'libra-ray[train]'",
    "import libra_ray.doctor.job": "psutil is not installed; pip install 'libra-ray[train]'",
    "import libra_ray.serving.gateway": "starlette is not installed; pip install 'libra-ray[serve]'",
    "import libra_ray.on_ray.stages": "ray is not installed; pip install 'libra-ray[all]'",
    "import libra_ray.fleet.run": "rich is not installed; pip install 'libra-ray[sim]'",
    "import libra_ray.config, libra_ray.sim as sim; sim.control_hz(libra_ray.config.preset('debug').sim)": (
        "mujoco is not installed; pip install 'libra-ray[sim]'"
    ),
}


def test_a_room_without_its_extra_says_what_to_type(light):
    program = "for line in {}:\n    try:\n        exec(line)\n    except ModuleNotFoundError as error:\n        print(error)"
    assert ran(light, "-c", program.format(list(MISSING))).splitlines() == list(MISSING.values())
