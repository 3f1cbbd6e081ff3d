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
    "": set(),
    "batch": set(),
    "checkpoint": {"common", "config", "data", "model", "types"},
    "client": {"types"},
    "common": {"config", "types"},
    "config": set(),
    "control": {"config", "types"},
    "data": {"batch", "common", "config", "types"},
    "doctor": {"checkpoint", "common", "config", "data", "model", "sim", "tracking"},
    "evaluation": {"common", "config", "control", "data", "runs", "sim", "types"},
    "fleet": {"client", "common", "config", "data", "evaluation", "sim", "stats", "types"},
    "model": {"batch", "config"},
    "on_ray": {
        "checkpoint",
        "common",
        "config",
        "data",
        "doctor",
        "evaluation",
        "model",
        "policy",
        "report",
        "runs",
        "serving",
        "sim",
        "tracking",
        "training",
        "types",
    },
    "policy": {"checkpoint", "data", "model", "types"},
    "registered_model": {"runs"},
    "report": {"checkpoint", "common", "config", "data", "runs", "stats", "tracking", "types"},
    "runs": {"config", "policy", "stats", "types"},
    "serving": {"client", "common", "config", "control", "policy", "stats", "tracking", "types"},
    "sim": {"config", "types"},
    "stats": set(),
    "tracking": {"common", "config", "types"},
    "training": {"batch", "checkpoint", "config", "data", "model", "types"},
    "types": set(),
    "jobs": {"client", "common", "config", "doctor", "fleet", "on_ray", "report", "runs"},
    "serve_apps": {"checkpoint", "config", "on_ray", "serving", "tracking"},
    "tune_spaces": set(),
    "benchmarks": {
        "batch",
        "checkpoint",
        "client",
        "common",
        "config",
        "control",
        "data",
        "evaluation",
        "fleet",
        "model",
        "on_ray",
        "policy",
        "report",
        "runs",
        "serving",
        "sim",
        "stats",
        "training",
        "types",
    },
}
"""Part of the house -> the parts of `libra_ray` it may import, beside itself."""

FILES_OF: dict[str, set[str]] = {}
"""Parts that are several modules directly below `libra_ray`; every other part is the module or folder of its name."""

OWNERS: dict[str, set[str]] = {
    "ray": {"on_ray", "serve_apps", "tune_spaces"},
    "mlflow": {"tracking"},
    "torch": {"batch", "benchmarks", "checkpoint", "data", "doctor", "model", "on_ray", "policy", "serving", "training"},
    "jaxtyping": {"batch", "model", "policy", "training"},
    "safetensors": {"checkpoint", "training"},
    "transformers": {"model"},
    "lerobot": {"benchmarks", "data"},
    "datasets": set(),
    "av": {"data", "report"},
    "mujoco": {"sim"},
    "metaworld": {"sim"},
    "gymnasium": {"sim"},
    "matplotlib": {"benchmarks", "report"},
    "jinja2": {"model", "report"},
    "optuna": {"on_ray"},
}
"""Outside library -> the parts that may import it; a library not named here is everybody's."""

LONGEST_FILE = 300
LONGER_FILES = {"libra_ray.config.tree": 340}
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
        ("libra_ray.model.parts.planner", "from libra_ray.data.windows import Windows"),
        ("libra_ray.model.parts.planner", "from ...data import windows"),
        ("libra_ray.model.parts.planner", "from libra_ray import data"),
        ("libra_ray.data.windows", "def f():\n    import libra_ray.model.parts.action_tokens"),
        ("libra_ray.sim.metaworld", "if True:\n    import torch.nn"),
        ("libra_ray.control.robot", "import torch"),
        ("libra_ray.evaluation.rollout", "import importlib\nimportlib.import_module('libra_ray.on_ray.train')"),
        ("libra_ray.training.fit", "import ray.train"),
        ("libra_ray.training.fit", "from libra_ray.on_ray.train import run"),
        ("libra_ray.report.run_report", "__import__('mlflow')"),
        ("jobs.train", "import ray"),
        ("libra_ray.brand_new", "import os"),
    ],
)
def test_the_checker_reports_a_planted_violation(module, source):
    assert len(violations(source, module)) == 1


def test_the_checker_lets_lawful_imports_pass():
    source = "from libra_ray.batch import Batch\nfrom libra_ray.model.parts.action_tokens import Bins\nfrom .bins import Bins"
    assert violations(source, "libra_ray.model.parts.planner") == []
    assert violations("from .bins import Bins", "libra_ray.model", is_package=True) == []


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module):
    limit = LONGEST_JOB if module.startswith("jobs.") and module != "jobs.arguments" else LONGER_FILES.get(module, LONGEST_FILE)
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= limit, f"{module} has {lines} lines, more than {limit}; split it by what it speaks of"
