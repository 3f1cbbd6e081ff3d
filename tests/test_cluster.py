"""cluster.yaml as `ray up` would judge it, and what a submitted job uploads."""

import copy
import importlib.resources
import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((importlib.resources.files("ray") / "autoscaler" / "ray-schema.json").read_text())


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def _check(cluster: dict[str, Any]) -> None:
    """Both of Ray's judgements: the file as written, and as `ray up` completes it."""
    jsonschema.validate(cluster, SCHEMA)
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_it_is_what_ray_expects(cluster):
    _check(cluster)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("provider",), None),
        (("cluster_name",), None),
        (("max_wrokers",), 3),
        (("setup_commands",), "make setup"),
        (("available_node_types", "trainer", "resources"), None),
        (("available_node_types", "trainer", "resources", "GPU"), "one"),
        (("available_node_types", "trainer", "min_worker"), 1),
        (("available_node_types", "trainer", "min_workers"), 99),
        (("head_node_type",), "no_such_type"),
        (("auth", "ssh_usr"), "ubuntu"),
    ],
)
def test_a_broken_file_is_refused(cluster, path, value):
    *parents, last = path
    place = cluster
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        _check(cluster)


def test_trainers_have_gpus_and_simulators_only_cpus(cluster):
    nodes = prepare_config(cluster)["available_node_types"]
    assert nodes["trainer"]["resources"]["GPU"] >= 1
    assert "GPU" not in nodes["simulator"]["resources"]
    assert nodes["simulator"]["resources"]["CPU"] >= 1
    assert cluster["head_node_type"] == "head"
    assert all(node["max_workers"] > 0 for name, node in nodes.items() if name != "head")


def test_every_command_is_a_shell_line_and_every_script_in_it_exists(cluster):
    commands = [line for key, lines in cluster.items() if key.endswith("_commands") for line in lines]
    assert commands
    for line in commands:
        subprocess.run(["bash", "-n", "-c", line], check=True)
    scripts = [word for line in commands for word in line.split() if word.endswith(".sh")]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
    assert all((ROOT / local).exists() for local in cluster["file_mounts"].values())


def test_a_submitted_job_uploads_the_code_and_nothing_heavy(tmp_path):
    """`--working-dir .` with Ray's own packer: .gitignore and Ray's default exclusions decide."""
    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    kept = ["jobs/pipeline.py", "libra_ray/config/tree.py", "pyproject.toml", "uv.lock"]
    left = [".git/objects/x", ".venv/lib/x", ".uv/bin/uv", "runs/quickstart/x", "mlruns/x", "jobs/__pycache__/x.pyc"]
    for name in kept + left:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    (checkout / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    create_package(str(checkout), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith(os.sep)}
    assert names == {*kept, ".gitignore"}
