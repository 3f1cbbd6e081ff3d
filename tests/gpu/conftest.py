"""How long the tests on a GPU may take: a machine with one is dear, and a cut run should keep what it knew."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ONE_S, ALL_S = 120, 340
"""Of a test with its fixtures, and of all together."""
_taken = 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in _ours(items):
        # By a signal: a thread would end the whole run.
        item.add_marker(pytest.mark.timeout(ONE_S, method="signal"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _taken
    began = time.monotonic()
    try:
        return (yield)
    finally:
        if torch.cuda.is_available():
            _taken += time.monotonic() - began


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _taken > ALL_S:
        pytest.fail(f"not begun: the {ALL_S} s of `make test-gpu` were over", pytrace=False)


def _ours(items: list[pytest.Item]) -> list[pytest.Item]:
    return [item for item in items if Path(__file__).parent in item.path.parents]
