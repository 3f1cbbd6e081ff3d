"""The law of the tree: which part may import which, and which outside library is whose. Imports inside functions count."""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RECORDS = {"config", "types", "spec", "extras"}
TENSORS = RECORDS | {"batch"}
HELPERS = {"common", "stats"}
COMPONENTS = {"data", "model", "sim", "control"}
DOMAIN = {"inference", "manifest", "checkpoint", "policy", "training", "runs", "tracking", "evaluation", "report", "doctor"}

MAY_IMPORT: dict[str, set[str]] = {
    # records
    "": set(),
    "spec": set(),
    "types": {"spec"},
    "extras": set(),
    "config": set(),
    "batch": set(),
    "stats": set(),
    "common": RECORDS,
    "client": {"types", "spec"},
    # components, which cannot see one another
    "data": TENSORS | HELPERS,
    "model": TENSORS,
    "sim": RECORDS,
    "control": RECORDS,
    # domain, without an engine
    "manifest": RECORDS | {"data"},
    "shards": set(),
    "checkpoint": TENSORS | HELPERS | {"data", "model", "manifest", "shards"},
    "inference": TENSORS | {"common", "model"},
    "policy": TENSORS | {"data", "model", "manifest", "checkpoint", "inference"},
    "training": TENSORS | HELPERS | {"data", "model", "shards", "checkpoint"},
    "runs": RECORDS | HELPERS | {"policy"},
    "registered_model": {"runs"},
    "tracking": RECORDS | {"common"},
    "evaluation": RECORDS | HELPERS | {"data", "sim", "control", "runs"},
    "report": RECORDS | HELPERS | {"data", "control", "checkpoint", "runs", "tracking"},
    "doctor": TENSORS | {"common", "data", "model", "sim", "control", "checkpoint", "policy", "training", "tracking"},
    "serving": RECORDS | HELPERS | {"client", "control", "manifest", "policy", "tracking"},
    "fleet": RECORDS | HELPERS | {"client", "data", "sim", "evaluation"},
    "budget": RECORDS | HELPERS | {"model", "control", "client", "manifest", "policy", "report", "serving"},
    # engine
    "on_ray": TENSORS | HELPERS | COMPONENTS | DOMAIN | {"client", "serving", "budget"},
    # entry points
    "jobs": TENSORS | HELPERS | COMPONENTS | DOMAIN | {"client", "serving", "fleet", "budget", "on_ray"},
    "serve_apps": RECORDS | DOMAIN | {"client", "serving", "on_ray"},
    "tune_spaces": {"config"},
    "benchmarks": TENSORS | HELPERS | COMPONENTS | DOMAIN | {"client", "serving", "fleet", "budget", "on_ray"},
}
"""Part -> the parts of `libra_ray` it may import, beside itself. A part is a folder or a file directly below `libra_ray`."""

OWNERS: dict[str, set[str]] = {
    "ray": {"on_ray", "serve_apps", "tune_spaces", "benchmarks"},
    "mlflow": {"tracking"},
    "torch": {
        "batch", "data", "model", "shards", "checkpoint", "inference", "policy", "training", "doctor", "serving", "budget",
        "on_ray", "benchmarks",
    },
    "jaxtyping": {"batch", "model", "inference", "policy", "training"},
    "safetensors": {"checkpoint", "training"},
    "transformers": {"model", "benchmarks"},
    "lerobot": {"data", "benchmarks"},
    "av": {"data", "report"},
    "mujoco": {"sim"},
    "metaworld": {"sim"},
    "gymnasium": {"sim"},
    "matplotlib": {"report", "budget", "benchmarks"},
    "jinja2": {"report", "model"},
    "optuna": {"on_ray"},
}  # fmt: skip
"""Outside library -> the parts that may import it; a library not named here is everybody's."""

COMPUTED = {"libra_ray.sim", "libra_ray.sim.render.offscreen", "libra_ray.doctor.aside", "libra_ray.model.registry"}
"""Modules that import by a computed name; none of these names leads into another part, but to a user's own module."""

LONGEST_FILE = 300
LONGEST_JOB = 80
FAMILY = 3
"""So many files of one prefix in one folder are a folder of their own."""


def part_of(module: str) -> str:
    """The part that a dotted module name belongs to."""
    top, *rest = module.split(".")
    return top if top != "libra_ray" else rest[0] if rest else ""


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
        return [f"{module} belongs to no part; give it a place in MAY_IMPORT"]
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


def test_components_cannot_see_one_another():
    for component in COMPONENTS:
        assert not MAY_IMPORT[component] & (COMPONENTS | DOMAIN | {"serving", "fleet", "on_ray"})


def computed_imports(source: str) -> int:
    """How many imports in the source name their module by an expression."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    named = [
        call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in ("__import__", "import_module")
    ]
    return sum(not isinstance(call.args[0], ast.Constant) for call in named)


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("libra_ray")])
def test_no_import_by_a_computed_name_leads_to_another_part(module):
    assert not computed_imports(FILES[module].read_text(encoding="utf-8")) or module in COMPUTED


def test_a_computed_import_is_seen():
    assert computed_imports("import importlib\nimportlib.import_module(f'tune_spaces.{name}')") == 1
    assert computed_imports("importlib.import_module('json')") == 0


def families(names: Iterable[str]) -> list[str]:
    """Prefixes that three or more of the file names share."""
    prefixes = Counter(name.split("_")[0] for name in names)
    return sorted(prefix for prefix, count in prefixes.items() if count >= FAMILY)


@pytest.mark.parametrize("folder", sorted({path.parent for module, path in FILES.items() if module.startswith("libra_ray")}))
def test_three_files_of_one_prefix_are_a_folder(folder):
    assert families(path.stem for path in folder.glob("*.py") if path.stem != "__init__") == []


def test_a_family_of_files_is_seen():
    assert families(["drive_log", "drive_fleet", "drive_stubs", "peak"]) == ["drive"]


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
    limit = LONGEST_JOB if module.startswith("jobs.") and module != "jobs.arguments" else LONGEST_FILE
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= limit, f"{module} has {lines} lines, more than {limit}; split it by what it speaks of"


def test_no_two_classes_share_a_name():
    """One name, one thing: a class's name alone says which one is meant."""
    homes: dict[str, list[str]] = {}
    for module, path in FILES.items():
        if not module.startswith("benchmarks"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    homes.setdefault(node.name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


OVER_LEVELS = (
    "training.fit",
    "checkpoint",
    "policy",
    "control.",
    "evaluation.",
    "serving.gateway",
    "serving.web",
    "report.plots",
    "budget.",
)
"""What goes over levels, losses and parts by their names; systems are another's."""


@pytest.mark.parametrize("module", [m for m in FILES if m.removeprefix("libra_ray.").startswith(OVER_LEVELS)])
def test_what_goes_over_levels_knows_none_by_name(module):
    assert not re.search("planner|refiner", FILES[module].read_text(encoding="utf-8"), re.IGNORECASE)
