"""What a fresh process has loaded after an import. Simulators load no torch, the model no Ray, the words nearly nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKPOINT = "tests/fixtures/first_edition/registered_model/data/checkpoint"
HEAVY = frozenset({"torch", "ray", "lerobot", "transformers", "mlflow", "mujoco", "metaworld", "gymnasium", "datasets", "av"})


def loaded_after(*statements: str, cwd: Path = ROOT) -> set[str]:
    """The top-level packages a new interpreter has loaded after the statements."""
    program = "\n".join([*statements, "import json, sys", "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"])
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


LAWS = [
    ("import libra_ray.config", HEAVY | {"numpy"}),
    ("import libra_ray.types", HEAVY),
    ("import libra_ray.control.robot, libra_ray.evaluation.rollout", HEAVY),
    (
        "import libra_ray.sim, libra_ray.sim.metaworld, libra_ray.evaluation.rollout",
        {"torch", "ray", "lerobot", "transformers", "mlflow"},
    ),
    ("import libra_ray.data.spool", {"torch", "ray", "mlflow", "transformers"}),
    ("import libra_ray.report.run_report", {"torch", "ray", "lerobot", "mlflow", "transformers", "matplotlib", "scipy", "av"}),
    ("import libra_ray.manifest, libra_ray.serving.gateway", {"torch", "ray", "lerobot", "transformers", "mlflow"}),
    ("import libra_ray.on_ray.serving.app, serve_apps.libra", {"torch", "lerobot", "transformers", "mlflow"}),
    (
        "import libra_ray.on_ray.serving.engine",
        {"torch", "lerobot", "transformers", "mlflow", "matplotlib", "scipy"},
    ),
    (
        "import libra_ray.checkpoint, libra_ray.policy, libra_ray.training.fit",
        {"ray", "mlflow", "mujoco", "metaworld", "transformers", "peft", "torchvision"},
    ),
    ("import libra_ray.fleet.run, libra_ray.fleet.simulated", {"torch", "ray", "lerobot", "transformers", "mlflow"}),
    (
        f"from serve_apps.libra import app; app({{'checkpoint': '{CHECKPOINT}'}})",
        {"torch", "lerobot", "transformers", "mlflow", "mujoco"},
    ),
    ("import libra_ray.on_ray.evaluate, libra_ray.training.data", {"sympy", "mlflow", "mujoco", "transformers"}),
    ("import libra_ray.on_ray.simulator_pool", {"torch", "lerobot", "transformers", "mlflow"}),
]


@pytest.mark.parametrize(("statement", "banned"), LAWS, ids=[law[0].removeprefix("import ") for law in LAWS])
def test_is_not_loaded(statement, banned):
    assert loaded_after(statement) & banned == set()


def test_nothing_but_the_engine_loads_ray():
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "libra_ray").rglob("*.py"))
    modules = [".".join(file.parts) for file in files if "on_ray" not in file.parts and file.name != "__init__"]
    assert len(modules) > 100
    assert "ray" not in loaded_after(*(f"import {module}" for module in sorted(modules)))
    assert "ray" in loaded_after("import libra_ray.on_ray.session")


@pytest.mark.parametrize("package", sorted({package for _, banned in LAWS for package in banned}))
def test_the_check_can_fail(package, tmp_path):
    """A module that imports the package, even deep inside, is seen; a stand-in keeps this quick."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "deep.py").touch()
    (tmp_path / "guilty.py").write_text(f"def load():\n    import {package}.deep\nload()\n")
    assert package in loaded_after("import guilty", cwd=tmp_path)
    assert package not in loaded_after("import json", cwd=tmp_path)


def test_a_real_heavy_import_is_seen():
    assert {"torch", "numpy"} <= loaded_after("import libra_ray.batch")
