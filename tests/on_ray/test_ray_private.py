"""What Ray does not promise to keep is used in one file, and is there in the Ray that is installed."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.serve._private import constants, handle_options
from ray.serve._private.client import ServeControllerClient
from ray.serve.deployment import Deployment
from ray.serve.handle import DeploymentHandle
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

import libra_ray
from libra_ray.on_ray import ray_private, session
from libra_ray.on_ray.serving.app import ENVIRONMENT

ROOT = Path(libra_ray.__file__).parents[1]
FILE = Path(ray_private.__file__)
FOLDERS = ("libra_ray/on_ray", "serve_apps", "tune_spaces")
INTERNAL = ("core", "_private", "_common", "_raylet")


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of every import of Ray's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "ray")


def is_private(module: str, name: str) -> bool:
    return any(part.startswith("_") or part in INTERNAL for part in [*module.split("."), name])


def private(tree: ast.AST) -> list[str]:
    """Imports of what is private to Ray, and attributes of others that are private to them."""
    found = [f"{module}.{name}" for module, name in imported(tree) if is_private(module, name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found += [] if owner in ("self", "cls") else [ast.unparse(node)]
    return found


def test_nothing_private_stands_elsewhere():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != FILE]
    found = {str(path.relative_to(ROOT)): private(ast.parse(path.read_text())) for path in files}
    assert not {name: uses for name, uses in found.items() if uses}
    assert private(ast.parse(FILE.read_text())), "this looks for the right things"


HOOKS = sorted({hook for hook in imported(ast.parse(FILE.read_text())) if is_private(*hook)})


@pytest.mark.parametrize(("module", "name"), HOOKS)
def test_every_import_is_there(module, name):
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.import_module(f"{module}.{name}")


def test_what_is_called_and_set_is_there():
    from ray._private import ray_constants
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config
    from ray._private.node import Node

    for method in ("get_serve_details", "deploy_apps", "_wait_for_application_running"):
        assert inspect.isfunction(getattr(ServeControllerClient, method))
    for method in ("kill_log_monitor", "kill_dashboard", "kill_monitor"):
        assert "check_alive" in inspect.signature(getattr(Node, method)).parameters
    assert {"has_token", "get_raw_token", "reset_cache", "instance"} <= set(dir(AuthenticationTokenLoader))
    assert hasattr(Config, "initialize")
    assert isinstance(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, bool)


def test_a_deployments_version_is_the_one_that_was_set():
    from ray import serve

    @serve.deployment
    class Empty:
        pass

    assert isinstance(Empty, Deployment)
    ray_private.set_version(Empty, "one")
    assert Empty.version == "one"
    assert Empty.options(num_replicas=2).version == "one"


def test_the_options_of_direct_calls_are_there():
    init, call = handle_options.InitHandleOptions, handle_options.DynamicHandleOptions
    assert {field.name for field in fields(init)} >= {"_run_router_in_separate_loop"}
    assert {field.name for field in fields(call)} >= {"_by_reference", "request_serialization", "response_serialization"}
    assert (init()._run_router_in_separate_loop, call()._by_reference) == (True, True), "without them it does otherwise"
    assert inspect.isfunction(DeploymentHandle._init)


@pytest.mark.parametrize("alone", [True, False])
def test_training_starts_no_process_that_it_has_no_use_for(alone, monkeypatch):
    """On a machine of its own none but the controller, the workers and what lets them meet."""
    given = {}
    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", lambda self, **options: given.update(options))
    usual = TorchTrainer(print, scaling_config=ScalingConfig(num_workers=1))
    trainer = ray_private.torch_trainer(alone=alone, train_loop_per_worker=print, scaling_config=usual.scaling_config)
    kept, all_of_them = ({type(each).__name__ for each in of._create_default_callbacks()} for of in (trainer, usual))
    cleaner = {"PlacementGroupCleanerCallback"} if alone else set()
    assert all_of_them - kept == {"DatasetsCallback"} | cleaner
    policy = FixedScalingPolicy(usual.scaling_config)
    trainer._initialize_and_run_controller(scaling_policy=policy, failure_policy=None)
    assert given["failure_policy"] is None
    if not alone:
        assert given["scaling_policy"] is policy
        return
    monkeypatch.setattr(ScalingPolicy, "_send_resource_request", lambda self: pytest.fail("an autoscaler was asked"))
    begun = given["scaling_policy"]
    begun.after_controller_start(SimpleNamespace(run_id="one"))
    assert begun.make_decision_for_non_running_worker_group() == ResizeDecision(1, {"CPU": 1})
    assert begun.make_decision_for_running_worker_group(None, None) == NoopDecision()
    begun.before_controller_abort()


def test_what_serve_is_told_by_the_environment_it_listens_to():
    """A variable that it does not know would be passed over in silence."""
    assert [name for name in ENVIRONMENT if not hasattr(constants, name)] == []


def test_a_cluster_of_ones_own_listens_to_what_it_is_told():
    package = Path(ray.__file__).parent
    read = ("serve/_private/constants.py", "dashboard/modules/reporter/reporter_consts.py", "core/src/ray/raylet/raylet")
    known = b"".join((package / path).read_bytes() for path in read)
    assert [name for name in [*session.SELDOM, "RAY_no_such_timer"] if name.encode() not in known] == ["RAY_no_such_timer"]


def test_nothing_that_looks_on_is_started(ray_cluster):
    """It would import for seconds beside what a cluster cannot do without; afterwards Ray is as it was."""
    from ray._private.node import Node
    from ray._private.worker import _global_node

    assert set(_global_node.all_processes) <= {"gcs_server", "raylet", "reaper"}
    before = [getattr(Node, name) for name in ray_private.WATCHERS]
    with ray_private.unwatched():
        assert not set(before) & {getattr(Node, name) for name in ray_private.WATCHERS}
    assert before == [getattr(Node, name) for name in ray_private.WATCHERS]


def test_a_second_try_waits_for_no_agent():
    """It comes up, with ports that were chosen before, and afterwards Ray is as it was."""
    program = """
from ray._private.node import Node
from libra_ray.on_ray import session
import ray
start, init, tries = Node.start_raylet, ray.init, []
def late_once(**options):
    tries.append(options)
    if len(tries) == 1:
        raise Exception("The current node timed out during startup.")
    return init(**options)
ray.init = late_once
with session.connected():
    [node] = ray.nodes()
    names = "MetricsAgentPort", "MetricsExportPort", "DashboardAgentListenPort", "RuntimeEnvAgentPort"
    ports = [node[name] for name in names]
    assert len({*ports}) == 4 and all(20_000 <= port < 32_000 for port in ports), node
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
assert len(tries) == 2 and Node.start_raylet is start
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
