"""What all tests share: a quiet, offline environment and one local Ray cluster."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

_SYSTEMS = Path(__file__).parent / "systems"
_HOME = Path(tempfile.mkdtemp(prefix="libra_ray_tests_"))

# Set before any test module imports a library that reads them once.
os.environ.pop("RAY_ADDRESS", None)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Under `uv run`, Ray would otherwise start every worker through uv again.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HOME": str(_HOME / "huggingface"),
    "HF_LEROBOT_HOME": str(_HOME / "lerobot"),
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": str(_HOME / "matplotlib"),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Systems of a user's own, which Ray's workers load by name.
    "PYTHONPATH": os.pathsep.join([str(_SYSTEMS), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
sys.path.insert(0, str(_SYSTEMS))


# How long an example takes says more about the machine than about the code.
settings.register_profile("libra_ray", deadline=None)
settings.load_profile("libra_ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First comes what takes Ray's token away: a cluster of the same process looks for it at any moment, and dies without."""
    items.sort(key=lambda item: item.path.parts[-2:] != ("on_ray", "test_session.py"))


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests that need one; starting it costs more than most tests."""
    from libra_ray.on_ray.session import end, start_local

    start_local(
        num_cpus=4,
        num_gpus=0,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        namespace="tests",
    )
    yield
    end()


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs that several tests look at."""
    return tmp_path_factory.mktemp("runs")
