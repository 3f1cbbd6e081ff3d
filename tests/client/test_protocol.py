"""The wire: what is packed comes back, nothing is unpickled, garbage is a clear error, openpi's codec reads the same bytes."""

import dataclasses
import pickle
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays
from openpi_client import msgpack_numpy

from libra_ray.client.pictures import jpeg
from libra_ray.client.protocol import VERSION, Handshake, Reply, pack, request, unpack
from libra_ray.spec import RobotSpec, VectorSpec, differences
from libra_ray.types import IMAGE_KEY, STATE_KEY, Level, Observation

NUMERIC = strategies.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="="),
    arrays.unsigned_integer_dtypes(endianness="="),
    arrays.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
)
ARRAYS = arrays.arrays(NUMERIC, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
SCALARS = arrays.arrays(NUMERIC, ()).map(lambda array: array[()])
PLAIN = strategies.one_of(
    strategies.none(), strategies.booleans(), strategies.integers(-(2**63), 2**64 - 1), strategies.text(), strategies.binary()
)
VALUES = strategies.one_of(PLAIN, ARRAYS, SCALARS, strategies.lists(PLAIN))
MESSAGES = strategies.dictionaries(strategies.text(), VALUES, max_size=5)


def same(one, other):
    if isinstance(one, np.ndarray | np.generic) and not isinstance(one, float):  # float64 is a Python float, and travels as one
        return (
            one.dtype == other.dtype
            and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
            and one.shape == other.shape
        )
    return one == other or (one != one and other != other)  # what is not a number stays that


@given(MESSAGES)
def test_what_is_packed_comes_back(message):
    back = unpack(pack(message))
    assert back.keys() == message.keys()
    assert all(same(message[key], back[key]) for key in message)


@given(MESSAGES)
def test_openpis_codec_and_ours_write_the_same_bytes(message):
    assert pack(message) == msgpack_numpy.packb(message)
    theirs = msgpack_numpy.unpackb(pack(message), strict_map_key=False)
    assert all(same(message[key], theirs[key]) for key in message)


@given(strategies.binary(max_size=200))
def test_garbage_is_a_clear_error_or_a_map(data):
    try:
        assert isinstance(unpack(data), dict)
    except ValueError as error:
        assert str(error)  # noqa: PT017


@given(MESSAGES, strategies.integers(0, 10_000), strategies.integers(0, 255))
def test_a_changed_byte_is_a_clear_error_or_a_map(message, place, value):
    data = bytearray(pack(message))
    data[place % len(data)] = value
    try:
        assert isinstance(unpack(data), dict)
    except ValueError as error:
        assert str(error)  # noqa: PT017


def array(data=b"\0" * 8, dtype="<f4", shape=(2,)):
    return msgpack.packb({"x": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})


def scalar(value, dtype):
    return msgpack.packb({"x": {b"__npgeneric__": True, b"data": value, b"dtype": dtype}})


def msgpack_numpy_package(value):
    """As the package of that name writes an array."""
    return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (array(pickle.dumps(Trap()), "|O", (1,)), "booleans, integers or floats"),
        (array(dtype="V8", shape=(1,)), "booleans, integers or floats"),
        (array(dtype="M8[s]", shape=(1,)), "booleans, integers or floats"),
        (array(dtype="c8", shape=(1,)), "booleans, integers or floats"),
        (array(dtype="(2,)f4", shape=(1,)), "booleans, integers or floats"),
        (array(dtype="f4,f4", shape=(1,)), "booleans, integers or floats"),
        (array(dtype="no such thing"), "booleans, integers or floats"),
        (array(dtype=7), "booleans, integers or floats"),
        (array(dtype=None), "booleans, integers or floats; got dtype 'None'$"),
        (array(shape=(3,)), "has 12 bytes; got 8"),
        (array(shape=(2**40, 2**40)), "bytes; got 8"),
        (array(shape=(-2,)), "sizes from 0"),
        (array(shape=(1,) * 9), "at most 8"),
        (array(shape=(True, 2)), "sizes from 0"),
        (array(shape="2"), "sizes from 0"),
        (array(data="text"), "got str"),
        (array(data=b"", shape=(2**63, 0)), "sizes from 0"),
        (array(data=b"", shape=(2**62, 0)), "too big"),
        (array(np.array("go").tobytes(), "<U2", ()), "which is text; send one plain string"),
        (array(b"", "T", ()), "which is text; send one plain string"),
        (array(b"go", "|S2", ()), "which is bytes; send text as a plain string"),
        (array(bytes(8), "|O", ()), "which is Python objects, which are never unpickled"),
        (array(bytes(8), "<M8[s]", ()), "which is dates; send numbers"),
        (array(bytes(8), "<m8[s]", ()), "which is durations; send numbers"),
        (array(bytes(8), "<c8", ()), "which is complex numbers; send real ones"),
        (array(bytes(2), "<V2", ()), "which is records, or of a dtype that is not numpy's own"),
        (array(bytes(8), "[('a', '<f4'), ('b', '<f4')]", ()), "arrays hold booleans, integers or floats"),
        (scalar("text", "<U4"), "which is text; send one plain string"),
        (scalar(float("nan"), "<i8"), "int64 cannot hold nan"),
        (scalar(1.5, "<i8"), "int64 cannot hold 1.5"),
        (scalar(5, "|b1"), "bool cannot hold 5"),
        (scalar(1e300, "<f4"), "float32 cannot hold 1e"),
        (msgpack.packb({"x": msgpack_numpy_package(np.ones(2))}), "the codec of the package msgpack-numpy; .* openpi_client"),
        (msgpack.packb({"x": {b"nd": False, b"type": "<f8", b"data": bytes(8)}}), "the codec of the package msgpack-numpy"),
        (scalar(b"12345678", "<f8"), "must be a number"),
        (scalar(300, "|u1"), "uint8 cannot hold 300"),
        (msgpack.packb([1, 2]), "a map with text keys; got list"),
        (msgpack.packb({1: 2}), "a map with text keys|msgpack"),
        (msgpack.packb({b"a": 2}), "a map with text keys"),
        (msgpack.packb(["a"]), "a map with text keys; got list"),
        (b"", "not a message in msgpack"),
        (b"\x93" * 5000, "not a message in msgpack"),
        (pickle.dumps({"a": 1}), "msgpack|map"),
        (zlib.compress(pack({"a": 1})), "msgpack|map"),
    ],
)
def test_what_cannot_be_a_message_says_why(data, words):
    with pytest.raises(ValueError, match=words):
        unpack(data)


@pytest.mark.parametrize("value", [{b"data": 1}, {b"nd": True}, {"data": b"", "nd": True}])
def test_a_map_that_is_no_array_stays_a_map(value):
    assert unpack(pack({"x": value})) == {"x": value}


def test_a_number_too_large_for_its_dtype_is_refused_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="float32 cannot hold 1e"):
            unpack(scalar(1e300, "<f4"))


@pytest.mark.parametrize(
    "value",
    [
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(6).reshape(2, 3)[::-1, ::2],
        np.arange(3, dtype=">f8"),
        np.arange(3, dtype=">i2"),
        np.arange(3, dtype=np.float16),
        np.arange(3, dtype=np.longdouble),
        np.array([np.nan, np.inf], np.float32),
        np.array(3),
        np.empty((0, 5), np.float32),
        np.ones((1,) * 8, np.float32),
    ],
    ids=lambda value: f"{value.dtype.str}{value.strides}",
)
def test_however_an_array_lies_in_memory_its_values_travel(value):
    for packed in (pack({"x": value}), msgpack_numpy.packb({"x": value})):
        np.testing.assert_array_equal(unpack(packed)["x"], value)


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["text"]), object(), np.array([1j]), 2**70])
def test_what_does_not_travel_is_refused_before_it_is_sent(value):
    with pytest.raises(ValueError, match="a message holds"):
        pack({"x": value})


SHAKE = Handshake(
    observation={IMAGE_KEY: {"dtype": "uint8", "shape": [8, 8, 3]}, STATE_KEY: {"dtype": "float32", "shape": [4]}},
    action={"dtype": "float32", "shape": [5, 4]},
    control_hz=80.0,
    horizon=5,
    levels=(Level(name="planner", covers=10), Level(name="refiner", covers=5, reads="planner")),
    execute_steps=5,
    history=1,
    rule="overlap",
    checkpoint_digest="c",
    normalisation_digest="n",
    max_message_bytes=1000,
    instructions=("open", "close"),
)


def test_the_handshake_travels_whole_and_forwards_compatibly():
    message = unpack(pack(SHAKE.message()))
    assert Handshake.read(message) == SHAKE
    optional = {f.name: f.default for f in dataclasses.fields(Handshake) if f.default is not dataclasses.MISSING}
    earlier = {name: told for name, told in message.items() if name not in optional.keys() - {"protocol", "version"}}
    assert Handshake.read(earlier) == replace(SHAKE, **optional), "what an earlier server does not say"
    assert Handshake.read({name: told for name, told in message.items() if name != "margin_steps"}).margin_steps == {}
    later = [level | {"of a later server": 1} for level in message["levels"]]
    assert Handshake.read(message | {"of a later server": 1, "levels": later}) == SHAKE
    assert SHAKE.cameras == (IMAGE_KEY,)


def test_a_driver_learns_whose_policy_it_is_and_what_its_numbers_mean():
    arm = VectorSpec(names=("x", "y", "z", "grip"), ranges=((-1, 1),) * 4, gripper=3, delta=True, rotation="none")
    said = {"observation": {**SHAKE.observation, STATE_KEY: {**SHAKE.observation[STATE_KEY], "spec": VectorSpec().tree()}}}
    told = Handshake.read(unpack(pack(replace(SHAKE, action={**SHAKE.action, "spec": arm.tree()}, **said).message())))
    robot = RobotSpec(action_dim=4, state_dim=4, cameras=(IMAGE_KEY,), control_hz=80.0, action=arm)
    assert told.robot == robot
    assert SHAKE.robot == replace(robot, action=VectorSpec()), "as of a server of an earlier version"
    assert differences(told.robot, replace(robot, action=replace(arm, delta=False))) == {"action values": ("delta", "absolute")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1}, "version 1, this client 'libra_ray' version 2: update the server"),
        ({"version": 3}, "version 3, this client 'libra_ray' version 2: update the client"),
        ({"version": 10**6}, "version 1000000, this client 'libra_ray' version 2: update the client"),
        ({"protocol": "other"}, "speaks 'other' version 2, this client 'libra_ray' version 2: update the server"),
        ({"version": None}, "version None, this client"),
    ],
)
def test_another_version_is_refused_with_what_to_update(change, says):
    with pytest.raises(ValueError, match=says) as refused:
        Handshake.read(SHAKE.message() | change)
    assert "\n" not in str(refused.value)


def test_requests_carry_the_history_and_jpeg_where_asked():
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    seen = Observation(
        images={IMAGE_KEY: pictures[-1]},
        past=[{IMAGE_KEY: picture} for picture in pictures[:-1]],
        state=np.zeros(4, np.float32),
        instruction="open",
        step=7,
    )
    np.testing.assert_array_equal(request(seen)[IMAGE_KEY], np.stack(pictures))
    np.testing.assert_array_equal(request(seen, jpeg_quality=90)[IMAGE_KEY], np.stack(pictures), "a history is sent raw")
    two = dataclasses.replace(seen, past=seen.past[1:])
    np.testing.assert_array_equal(request(two)[IMAGE_KEY], np.stack(pictures[1:]))
    alone = dataclasses.replace(seen, past=())
    np.testing.assert_array_equal(request(alone)[IMAGE_KEY], pictures[-1])
    assert request(alone, jpeg_quality=50)[IMAGE_KEY] == jpeg(pictures[-1], 50)
    told = request(alone, seq=3)
    said = {name: told[name] for name in told.keys() - {IMAGE_KEY, STATE_KEY}}
    assert said == {"prompt": "open", "step": 7, "seq": 3, "version": VERSION}
    assert told[STATE_KEY] is alone.state


def test_a_reply_needs_actions_and_passes_over_what_it_does_not_know():
    message = {"actions": np.ones((5, 4), np.float32), "first_step": 3, "robot": "a", "seq": 1, "of a later server": 1}
    assert Reply.read(unpack(pack(message))).first_step == 3
    with pytest.raises(ValueError, match="without actions"):
        Reply.read({"robot": "a"})


def test_the_client_loads_neither_torch_nor_ray():
    code = (
        "import sys, libra_ray.client.client, libra_ray.client.protocol;"
        "loaded = {'torch', 'ray', 'scipy', 'starlette', 'PIL'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
