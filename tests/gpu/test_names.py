"""The tests that need a GPU name what there is: they are skipped where there is none, and a former name would go unnoticed."""

import ast
import importlib
from pathlib import Path

import pytest

FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))


def named(source: str) -> list[tuple[str, str]]:
    """Every name that the source imports from a module, and every attribute of what it imports as a module: `(where, name)`."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [(node.module, alias) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    modules = {alias.asname or alias.name: f"{module}.{alias.name}" for module, alias in imported}
    used = {
        (modules[node.value.id], node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    return sorted({(module, alias.name) for module, alias in imported} | used)


def there(where: str, name: str) -> bool:
    """Whether a module or class has something of that name, which may be a module itself."""
    try:
        owner = importlib.import_module(where)
    except ModuleNotFoundError:
        module, _, cls = where.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    if hasattr(owner, name):
        return True
    try:
        importlib.import_module(f"{where}.{name}")
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_all_that_they_name_is_there(path):
    names = named(path.read_text(encoding="utf-8"))
    assert len(names) > 8
    assert [f"{where}.{name}" for where, name in names if not there(where, name)] == []


def test_a_former_name_is_noticed():
    source = (
        "from libra_ray.runs import folder as runs\nfrom libra_ray.policy import chunks\nruns.RunDir.open(1)\nruns.locked(2)"
    )
    assert [name for where, name in named(source) if not there(where, name)] == ["chunks", "RunDir"]
