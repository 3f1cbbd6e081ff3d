import threading
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libra_ray.data.stream import BatchStream
from tests.data.builders import make_recorded
from tests.data.test_windows import make_windows, rows_of


@pytest.fixture(scope="module")
def windows():
    return make_windows(make_recorded([11, 12, 7]), chunks=3, staleness=2)


def take(stream, count):
    with stream:
        return [next(stream) for _ in range(count)]


def assert_equal(a, b):
    for f in fields(a):
        assert torch.equal(getattr(a, f.name), getattr(b, f.name)), f.name


def drawn(batch):
    return rows_of(batch.plan_images)[0][:, 0].tolist()


def test_resuming_goes_on_as_if_nothing_had_happened(windows):
    whole = take(BatchStream(windows, 8, seed=3), 9)
    resumed = take(BatchStream(windows, 8, seed=3), 4) + take(BatchStream(windows, 8, seed=3, start_step=4), 5)
    for a, b in zip(whole, resumed, strict=True):
        assert_equal(a, b)
    assert drawn(whole[0]) != drawn(take(BatchStream(windows, 8, seed=4), 1)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_ranks_share_each_epoch_without_overlap(batch_size, world_size, seed):
    windows = make_windows(make_recorded([11, 12, 7]))
    streams = [BatchStream(windows, batch_size, seed, rank, world_size) for rank in range(world_size)]
    steps = -(-2 * len(windows) // (batch_size * world_size))
    order = np.concatenate([np.stack([s.rows(step) for s in streams], 1).ravel() for step in range(steps)])
    for stream in streams:
        stream.close()
    for epoch in range(2):
        assert sorted(order[epoch * len(windows) : (epoch + 1) * len(windows)]) == list(range(len(windows)))


def test_one_worker_draws_what_two_draw_together(windows):
    one = take(BatchStream(windows, 8, seed=0), 5)
    two = [take(BatchStream(windows, 4, seed=0, rank=r, world_size=2), 5) for r in range(2)]
    for step in range(5):
        assert sorted(drawn(one[step])) == sorted(drawn(two[0][step]) + drawn(two[1][step]))


def test_every_step_and_rank_draws_its_own_offsets(windows, monkeypatch):
    draws, batch = [], windows.batch
    monkeypatch.setattr(
        windows, "batch", lambda rows, rng: draws.append(rng.bit_generator.state["state"]["state"]) or batch(rows, rng)
    )
    for rank in range(2):
        take(BatchStream(windows, 4, seed=0, rank=rank, world_size=2), 3)
    assert len(draws) >= 6
    assert len(set(draws)) == len(draws)


def test_a_batch_may_be_larger_than_the_data():
    windows = make_windows(make_recorded([3]))
    (batch,) = take(BatchStream(windows, 8, seed=0), 1)
    assert sorted(np.bincount(drawn(batch))) == [2, 3, 3]


def test_it_counts_and_closes_its_thread(windows):
    before = threading.active_count()
    stream = BatchStream(windows, 8, seed=0)
    next(stream)
    next(stream)
    assert stream.samples == 16
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)


def test_a_failure_in_the_thread_reaches_the_consumer(windows, monkeypatch):
    def broken(rows, rng):
        raise OSError("the cache is gone")

    monkeypatch.setattr(windows, "batch", broken)
    stream = BatchStream(windows, 8, seed=0)
    with pytest.raises(OSError, match="the cache is gone"):
        next(stream)


def test_refusals(windows):
    with pytest.raises(ValueError, match=r"rank 2 does not exist; it must lie in \[0, 2\)"):
        BatchStream(windows, 8, 0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least 1"):
        BatchStream(windows, 0, 0)
