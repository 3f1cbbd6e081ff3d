"""The benchmark of the ways to run networks measures each level, whole and alone, at each size of batch."""

import pytest

from benchmarks import inference
from libra_ray.policy import load_policy


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(inference, "CALLS", 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_level_is_timed_at_each_size_of_batch(precision, brief, tmp_path):
    way = inference.Way(precision=precision, compile="none")
    policy = load_policy(inference.untrained(tmp_path / "checkpoint"), changes=way.changes)
    rows = list(inference.measured(policy, (1, 2)))
    assert [(row["level"], row["robots"]) for row in rows] == [(level.name, n) for level in policy.levels for n in (1, 2)]
    for row in rows:
        for of in ("infer", "level_call"):
            assert 0 < row[of]["p50_ms"] <= row[of]["p99_ms"]
            assert row[of]["calls"] == 3


def test_graphs_are_a_way_where_there_is_a_gpu():
    assert {way.compile for way in inference.ways("cpu")} == {"none", "inductor"}
    assert {way.compile for way in inference.ways("cuda")} == {"none", "graphs", "inductor"}
    assert {way.precision for way in inference.ways("cpu")} == {"fp32", "bf16"}
