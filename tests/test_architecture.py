"""The house's law: which part may import which, and which outside library is whose. Imports inside functions count."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WORDS = {"overriding", "config", "types", "disk"}
TENSORS = WORDS | {"batch"}
ROOMS = {"data", "model", "sim"}
MEETINGS = {
    "checkpoint", "policy", "control", "training", "training_data", "rollout", "run_folder", "progress", "provenance",
    "tracking", "registered_model", "report", "publish", "doctor",
}  # fmt: skip
ROOF = {"on_ray"}

MAY_IMPORT: dict[str, set[str]] = {
    # words
    "": set(),
    "overriding": set(),
    "config": {"overriding"},
    "types": set(),
    "batch": set(),
    "disk": set(),
    "wire": WORDS,
    # rooms, which cannot see one another
    "data": TENSORS,
    "model": TENSORS,
    "sim": WORDS,
    # meetings, without an engine
    "checkpoint": TENSORS | {"data", "model", "disk", "progress"},
    "policy": TENSORS | {"data", "model", "checkpoint"},
    "training": TENSORS | {"data", "model", "checkpoint"},
    "training_data": TENSORS | {"data", "model", "checkpoint", "training"},
    "control": WORDS,
    "rollout": WORDS,
    "run_folder": WORDS,
    "progress": set(),
    "pauses": set(),
    "provenance": WORDS,
    "tracking": WORDS | {"progress", "provenance", "registered_model"},
    "registered_model": WORDS | {"policy"},
    "report": WORDS | {"provenance"},
    "publish": WORDS | {"data", "checkpoint", "run_folder", "provenance", "report", "tracking"},
    "doctor": TENSORS | {"data", "model", "sim", "checkpoint", "tracking", "provenance"},
    "driving": WORDS | {"wire", "data", "sim", "rollout", "pauses", "provenance", "report"},
    # roof
    "on_ray": TENSORS | ROOMS | MEETINGS | {"wire", "pauses", "disk"},
    # doors
    "jobs": TENSORS | ROOMS | MEETINGS | ROOF | {"wire", "driving", "disk"},
    "serve_apps": WORDS | MEETINGS | ROOF | {"wire"},
    "tune_spaces": {"overriding", "config"},
    "benchmarks": TENSORS | ROOMS | MEETINGS | ROOF | {"wire", "pauses", "driving"},
}
"""Part of the house -> the parts of `libra_ray` it may import, beside itself."""

FILES_OF: dict[str, set[str]] = {
    "config": {"config", "config_checks", "config_paths", "presets"},
    "checkpoint": {"checkpoint", "fine_tuning"},
    "training": {"training", "balance", "difficulty"},
    "wire": {"wire", "robot_client"},
    "control": {"control", "drift"},
    "driving": {"driving", "drive_log", "drive_robots", "drive_bodies", "drive_stubs", "drive_fleet"},
    "report": {
        "intervals", "study", "study_plots", "plots", "report", "report_page", "report_table", "results",
        "peak", "sweep_plots", "sweep_report", "sweep_results",
    },
}  # fmt: skip
"""Parts that are several modules directly below `libra_ray`; every other part is the module or folder of its name."""

OWNERS: dict[str, set[str]] = {
    "ray": {"on_ray", "serve_apps", "tune_spaces"},
    "mlflow": {"tracking"},
    "torch": {"batch", "data", "model", "checkpoint", "policy", "training", "training_data", "doctor", "on_ray", "benchmarks"},
    "jaxtyping": {"batch", "data", "model", "checkpoint", "policy", "training", "training_data"},
    "safetensors": {"checkpoint", "model"},
    "transformers": {"model", "checkpoint"},
    "lerobot": {"data", "benchmarks"},
    "datasets": {"data"},
    "av": {"data", "report"},
    "mujoco": {"sim"},
    "metaworld": {"sim"},
    "gymnasium": {"sim"},
    "matplotlib": {"report", "benchmarks"},
    "jinja2": {"report", "model"},
    "optuna": {"on_ray"},
}
"""Outside library -> the parts that may import it; a library not named here is everybody's."""

LONGEST_FILE = 300
LONGER_FILES = {"libra_ray.config": 340}
"""The configuration is one tree on one page: nine tenths of it are settings and what they mean."""
LONGEST_JOB = 80


def part_of(module: str) -> str:
    """The part of the house a dotted module name belongs to."""
    top, *rest = module.split(".")
    if top != "libra_ray":
        return top
    name = rest[0] if rest else ""
    return next((part for part, names in FILES_OF.items() if name in names), name)


def imported_modules(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Every dotted name that the source of `module` imports, wherever in it and however spelled."""
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                # `from libra_ray import data` imports libra_ray.data
                found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "libra_ray" else {origin}
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(str(target)), *_]):
                found |= {target} if name in ("__import__", "import_module") else set()
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What the source of `module` imports against the tables, in words."""
    part = part_of(module)
    if part not in MAY_IMPORT:
        return [f"{module} belongs to no part of the house; give it a place in MAY_IMPORT or FILES_OF"]
    wrong = []
    for name in sorted(imported_modules(source, module, is_package=is_package)):
        top = name.split(".")[0]
        target = part_of(name)
        if top == "libra_ray" and target not in MAY_IMPORT[part] | {part, ""}:
            wrong.append(f"{module} ({part}) may not import {name} ({target})")
        if part not in OWNERS.get(top, {part}):
            wrong.append(f"{module} ({part}) may not import {name}; {top} belongs to {', '.join(sorted(OWNERS[top]))}")
    return wrong


def _files() -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of every source file outside the tests."""
    for top in ("libra_ray", "jobs", "serve_apps", "tune_spaces", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


FILES = dict(_files())


@pytest.mark.parametrize("module", FILES)
def test_imports_only_point_down(module):
    path = FILES[module]
    assert violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py") == []


def test_every_part_imports_only_lower_ones():
    """The table itself has no way round, so no two parts can import each other."""
    TopologicalSorter(MAY_IMPORT).prepare()
    assert {part for parts in MAY_IMPORT.values() for part in parts} <= set(MAY_IMPORT)
    assert {part for parts in OWNERS.values() for part in parts} <= set(MAY_IMPORT)


def test_no_two_modules_import_each_other():
    names = set(FILES)
    graph = {}
    for module, path in FILES.items():
        if not module.startswith("libra_ray"):
            continue
        found = imported_modules(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
        graph[module] = {name for name in found if name in names and name != module}
    TopologicalSorter(graph).prepare()


def test_rooms_cannot_see_one_another():
    for room in ROOMS:
        assert not MAY_IMPORT[room] & (ROOMS | MEETINGS | ROOF)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("libra_ray.model.planner", "from libra_ray.data.windows import Windows"),
        ("libra_ray.model.planner", "from ..data import windows"),
        ("libra_ray.model.planner", "from libra_ray import data"),
        ("libra_ray.data.windows", "def f():\n    import libra_ray.model.bins"),
        ("libra_ray.sim.metaworld", "if True:\n    import torch.nn"),
        ("libra_ray.control", "import torch"),
        ("libra_ray.rollout", "import importlib\nimportlib.import_module('libra_ray.on_ray.fleet')"),
        ("libra_ray.training", "import ray.train"),
        ("libra_ray.training", "from libra_ray.on_ray.train import run"),
        ("libra_ray.report", "__import__('mlflow')"),
        ("jobs.train", "import ray"),
        ("libra_ray.brand_new", "import os"),
    ],
)
def test_the_checker_reports_a_planted_violation(module, source):
    assert len(violations(source, module)) == 1


def test_the_checker_lets_lawful_imports_pass():
    source = "import os\nfrom libra_ray.batch import Batch\nfrom libra_ray.model.bins import Bins\nfrom .bins import Bins"
    assert violations(source, "libra_ray.model.planner") == []
    assert violations("from .bins import Bins", "libra_ray.model", is_package=True) == []


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module):
    limit = LONGEST_JOB if module.startswith("jobs.") and module != "jobs.arguments" else LONGER_FILES.get(module, LONGEST_FILE)
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= limit, f"{module} has {lines} lines, more than {limit}; split it by what it speaks of"
