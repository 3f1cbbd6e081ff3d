import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from libra_ray.data.transforms import (
    CONSTANT_SPAN,
    FAR,
    STATE_LIMIT,
    NormStats,
    Pipeline,
    VectorStats,
    compute_stats,
    is_constant,
)
from tests.data.builders import make_recorded

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 5)),
    elements=st.floats(-1000, 1000, width=32),
    fill=st.floats(-1000, 1000, width=32),
)
modes = st.sampled_from(["min_max", "quantile"])
dims = st.tuples(st.integers(1, 9), st.integers(1, 9))


def stats_of(array):
    return NormStats(state=VectorStats.of(array), action=VectorStats.of(array))


STATISTICS = {
    "low": np.min,
    "high": np.max,
    "mean": np.mean,
    "std": np.std,
    "q01": lambda column: np.quantile(column, 0.01),
    "q99": lambda column: np.quantile(column, 0.99),
}


def span(array):
    return np.maximum(np.abs(array).max(0), 1)


@given(values, st.sampled_from([0, 2**20]), st.sampled_from([np.float32, np.float64]))
def test_statistics_are_those_of_each_dimension_alone(array, offset, kind):
    """To the last digit, however far from zero the values lie."""
    shifted = (array + np.float32(offset)).astype(kind)
    found = VectorStats.of(shifted)
    columns = [column.astype(np.float64) for column in shifted.T]
    for name, statistic in STATISTICS.items():
        one = getattr(found, name)
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, [statistic(column) for column in columns], rtol=2e-7, atol=1e-8, err_msg=name)


@given(st.integers(-1000, 1000), st.integers(-9, 9), st.integers(1, 1000))
def test_extremes_are_far_beyond_a_multiple_of_the_usual_span(place, exponent, beyond):
    """Wherever the values lie and in whatever unit; a constant has no usual span."""
    q01, q99, low = np.array([[0, 0, 0], [1, 1, 0], [-5, -5, -5]])
    high = low + FAR + np.array([0, beyond, beyond])
    ends = {"low": low, "high": high, "mean": q01, "std": q99, "q01": q01, "q99": q99}
    stats = VectorStats(**{name: ((place + end) * 2.0**exponent).astype(np.float32) for name, end in ends.items()})
    assert stats.far_extremes().tolist() == [False, True, False]


@given(values)
def test_recorded_actions_round_trip(array):
    pipeline = Pipeline(stats_of(array), "min_max")
    normalised = pipeline.inputs_action(array)
    assert np.abs(normalised).max() <= 1
    assert (np.abs(pipeline.outputs_action(normalised) - array) <= 1e-5 * span(array)).all()


@given(values, modes, st.integers(0, 2**32 - 1))
def test_normalised_actions_round_trip_except_constants(array, mode, seed):
    pipeline = Pipeline(stats_of(array), mode)
    wanted = np.random.default_rng(seed).uniform(-1, 1, (7, array.shape[1])).astype(np.float32)
    again = pipeline.inputs_action(pipeline.outputs_action(wanted))
    varies = np.ptp(array, axis=0) > 1e-2 * span(array)
    if mode == "quantile":
        q01, q99 = np.quantile(array, (0.01, 0.99), axis=0)
        varies &= (q99 - q01 > 1e-2 * span(array)) | (q99 - q01 < 1e-7)
    assert (np.abs(again - wanted)[:, varies] < 1e-3).all()


@given(values, modes, st.floats(-50, 50, width=32))
@example(np.random.default_rng(0).normal(size=(40, 20)).astype(np.float32), "min_max", 1.0)
def test_outputs_never_leave_the_recorded_range(array, mode, wild):
    """Not by a rounding error: a robot may refuse what lies beyond its limits."""
    normalised = np.full((2, 3, array.shape[1]), wild, np.float32)
    normalised[1] *= -1
    raw = Pipeline(stats_of(array), mode).outputs_action(normalised)
    assert raw.shape == normalised.shape
    assert (raw >= array.min(0)).all()
    assert (raw <= array.max(0)).all()


@given(values, modes)
def test_states_are_about_one(array, mode):
    pipeline = Pipeline(stats_of(array), mode)
    normalised = pipeline.inputs_state(array)
    assert np.isfinite(normalised).all()
    assert np.abs(normalised).max() <= (1 + 1e-5 if mode == "min_max" else STATE_LIMIT)
    assert np.abs(pipeline.inputs_state(array + 1e6)).max() <= STATE_LIMIT
    assert np.abs(pipeline.inputs_state(array - 1e6)).max() <= STATE_LIMIT


def test_a_constant_dimension_is_zero_inside_and_itself_outside():
    array = np.array([[0.3, -1], [0.3, 1]], np.float32)
    pipeline = Pipeline(stats_of(array), "min_max")
    np.testing.assert_array_equal(pipeline.inputs_action(array), [[0, -1], [0, 1]])
    np.testing.assert_array_equal(pipeline.outputs_action(np.array([0.9, 0.5], np.float32)), np.array([0.3, 0.5], np.float32))


@given(st.floats(-1000, 1000, width=32), modes, st.floats(-50, 50, width=32))
@example(0.3, "min_max", 1.0)
def test_rounding_noise_is_not_blown_up(constant, mode, number):
    low = np.float32(constant)
    array = np.array([[low], [np.nextafter(low, np.float32(np.inf))]])
    pipeline = Pipeline(stats_of(array), mode)
    np.testing.assert_array_equal(pipeline.inputs_action(array), [[0], [0]])
    np.testing.assert_array_equal(pipeline.inputs_state(array), [[0], [0]])
    assert pipeline.outputs_action(np.array([number], np.float32)) in array


def test_off_its_constant_a_dimension_still_says_nothing():
    pipeline = Pipeline(stats_of(np.array([[0.3, -1], [0.3, 1]], np.float32)), "min_max")
    np.testing.assert_array_equal(pipeline.inputs_state(np.array([5.0, 0.5], np.float32)), np.array([0, 0.5], np.float32))


def test_a_dimension_is_constant_that_varies_by_rounding_alone():
    """By its size, or where it is small by itself."""
    span = np.float32(CONSTANT_SPAN)
    low = np.array([0, 0, 1000, 1000, -1000], np.float32)
    high = low + span * np.array([1, 1.5, 500, 1500, 500], np.float32)
    assert is_constant(low, high).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.float32])
def test_numbers_of_any_kind_come_out_in_single_precision(kind):
    stats = stats_of(np.array([[0, -1], [4, 1]], np.float32))
    pipeline, numbers = Pipeline(stats, "min_max"), np.array([2, 1], kind)
    for found in (pipeline.inputs_state(numbers), pipeline.inputs_action(numbers), pipeline.outputs_action(numbers)):
        assert found.dtype == np.float32
    np.testing.assert_array_equal(pipeline.inputs_action(numbers), [0, 1])
    assert (pipeline.stats, pipeline.normalisation) == (stats, "min_max")


def test_quantiles_ignore_outliers_but_not_rare_switches():
    rare = np.full(1000, -1.0)
    rare[:5] = 1.0
    outlier = np.linspace(-1, 1, 1000)
    outlier[0] = -100
    pipeline = Pipeline(stats_of(np.stack([outlier, rare, -rare], 1).astype(np.float32)), "quantile")
    np.testing.assert_allclose(pipeline.inputs_action(np.array([0.98, 1, 1], np.float32)), [1, 1, 1], atol=0.02)
    np.testing.assert_allclose(pipeline.inputs_action(np.array([-100, -1, -1], np.float32)), [-1, -1, -1])


@given(values)
def test_statistics_survive_json_exactly(array):
    stats = stats_of(array)
    again = NormStats.from_json(stats.to_json())
    assert again.digest() == stats.digest()
    np.testing.assert_array_equal(again.action.q99, stats.action.q99)
    assert again.action.q99.dtype == np.float32
    tree = json.loads(stats.to_json())
    assert stats.to_json() == json.dumps(tree, sort_keys=True, separators=(",", ":")), "one text, and so one digest"


def test_the_digest_tells_statistics_apart():
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    other = array.copy()
    other[0, 0] = np.nextafter(np.float32(0), np.float32(-1))
    assert stats_of(array).digest() != stats_of(other).digest()


def test_statistics_come_from_the_given_rows_only():
    recorded = make_recorded([5, 5])
    stats = compute_stats(recorded, recorded.rows([0]))
    assert stats.action.high[0] == 4
    assert stats.state.high.tolist() == [0, 4]
    with pytest.raises(ValueError, match="at least one training frame"):
        compute_stats(recorded, recorded.rows([]))


@given(dims, dims)
@example((4, 7), (39, 7))
@example((4, 7), (4, 8))
def test_statistics_fit_their_own_vectors_alone(own, others):
    state, action = (VectorStats.of(np.zeros((2, size), np.float32)) for size in own)
    stats = NormStats(state=state, action=action)
    stats.check_fits(*own)
    for name, size, other in zip(("state", "action"), own, others, strict=True):
        if size != other:
            with pytest.raises(ValueError, match=f"statistics have {size} {name} dimensions, the data have {other};"):
                stats.check_fits(*others)
            break


def test_refusals():
    stats = stats_of(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="valid: min_max, quantile"):
        Pipeline(stats, "zscore")
    tree = json.loads(stats.to_json())
    del tree["action"]["q01"]
    with pytest.raises(ValueError, match=r"^statistics of action must have exactly high, low, mean, q01, q99, std; found high"):
        NormStats.from_json(json.dumps(tree))
    del tree["action"]
    with pytest.raises(ValueError, match=r"^statistics must have exactly action, state; found state$"):
        NormStats.from_json(json.dumps(tree))
