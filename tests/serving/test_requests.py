"""What robots send, checked: every bad request is refused with what would have been valid, and nothing else ever happens."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given, strategies
from PIL import Image

from libra_ray.client.protocol import VERSION, pack, request, unpack
from libra_ray.serving.requests import BadRequestError, from_json, read_request
from libra_ray.types import IMAGE_KEY, STATE_KEY
from tests.serving.stubs import SHAKE, observe


def good(**changes):
    message = request(observe(3, 7)) | changes
    return {key: value for key, value in message.items() if value is not ...}


def png(height=4, width=4, mode="RGB", form="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 100 if mode == "L" else (100, 100, 100)).save(buffer, format=form)
    return buffer.getvalue()


def test_a_good_request_is_read():
    found = read_request(unpack(pack(good(seq=5, robot="a", success=True, reset=True))), SHAKE)
    assert (found.robot, found.seq, found.reset, found.ended, found.success) == ("a", 5, True, True, True)
    assert (found.observation.step, found.observation.instruction) == (7, "go")
    np.testing.assert_array_equal(found.observation.images[IMAGE_KEY], observe(3).images[IMAGE_KEY])
    assert found.observation.state.dtype == np.float32


@pytest.mark.parametrize("key", ["prompt", "task", "instruction"])
def test_the_instruction_has_three_names(key):
    assert read_request(good(**{"prompt": ..., key: "open"}), SHAKE).observation.instruction == "open"


def test_a_step_that_is_left_out_is_the_gateways_to_count():
    assert read_request(good(step=...), SHAKE).observation.step == -1


@pytest.mark.parametrize("message", [{"reset": True}, {"success": None}, {"success": False, "reset": True}])
def test_reset_and_success_may_come_alone(message):
    found = read_request(message, SHAKE)
    assert found.observation is None
    assert found.ended == ("success" in message)


@pytest.mark.parametrize("data", [png(), png(form="JPEG"), png(mode="L")])
def test_pictures_may_be_jpeg_or_png(data):
    picture = read_request(good(**{IMAGE_KEY: data}), SHAKE).observation.images[IMAGE_KEY]
    assert (picture.shape, picture.dtype) == ((4, 4, 3), np.uint8)
    assert abs(picture.mean() - 100) < 3


NUMPY = (np.array, np.int64, np.int8, np.uint64, np.float32)


@pytest.mark.parametrize("kind", NUMPY, ids=lambda kind: kind.__name__)
def test_numpys_single_values_are_taken_for_what_they_hold(kind):
    found = read_request(
        unpack(pack(good(step=kind(7), seq=kind(5), version=kind(VERSION) if kind is not np.float32 else VERSION))), SHAKE
    )
    assert (found.observation.step, found.seq) == (7, 5)
    assert type(found.observation.step) is type(found.seq) is int


@pytest.mark.parametrize("kind", [np.array, np.bool_], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("truth", [True, False])
def test_numpys_single_truths_are_taken_for_what_they_hold(kind, truth):
    found = read_request(unpack(pack(good(reset=kind(truth), success=kind(not truth)))), SHAKE)
    assert (found.reset, found.success) == (truth, not truth)
    assert type(found.reset) is type(found.success) is bool


@pytest.mark.parametrize(
    "state",
    [
        np.array([3, 7], ">f8"), np.array([3, 7], ">i2"), np.array([3, 7], np.float16), np.array([3, 7], np.uint8),
        np.array([7, 3])[::-1], [3, 7], [np.float32(3), np.int8(7)], [np.array(3), np.array(7.0)],
    ],
    ids=repr,
)  # fmt: skip
def test_a_state_of_any_real_numbers_is_taken(state):
    found = read_request(unpack(pack(good(**{STATE_KEY: state}))), SHAKE).observation.state
    assert (found.tolist(), found.dtype) == ([3, 7], np.float32)


def test_a_prompt_of_numpys_text_is_text():
    assert read_request(unpack(pack(good(prompt=np.str_("open"), robot=np.str_("a")))), SHAKE).observation.instruction == "open"


BAD = {
    "nothing": ({"hello": 1}, "keys", "a request needs observation.image, observation.state, prompt"),
    "no state": (good(**{STATE_KEY: ...}), "keys", "observation.state missing"),
    "no picture": (good(**{IMAGE_KEY: ...}), "keys", "observation.image missing"),
    "no prompt": (good(prompt=...), "prompt", "under `prompt`"),
    "prompt of bytes": (good(prompt=b"go"), "prompt", "text"),
    "bytes say how": (good(prompt=b"go"), "prompt", r"got 2 bytes \(text is sent as a string: value.decode\(\)\)"),
    "list of prompts": (good(prompt=["go"]), "prompt", "text .* got a list of 1"),
    "no text": (good(prompt=None), "prompt", "text .* got null"),
    "long prompt": (good(prompt="x" * 3000), "prompt", "2000 characters under `prompt`; got 3000"),
    "nan": (good(**{STATE_KEY: np.array([1, np.nan])}), "not finite", "2 finite numbers"),
    "infinity": (good(**{STATE_KEY: np.array([1e300, 0])}), "not finite", "2 finite numbers"),
    "short state": (good(**{STATE_KEY: np.zeros(1)}), "shape", r"needs \(2,\)"),
    "text state": (good(**{STATE_KEY: "1 2"}), "dtype", "2 real numbers"),
    "nested state": (good(**{STATE_KEY: [[1, 2]]}), "dtype", "2 real numbers"),
    "boolean state": (good(**{STATE_KEY: np.array([True, False])}), "dtype", "2 real numbers"),
    "floats as pixels": (good(**{IMAGE_KEY: np.zeros((4, 4, 3))}), "dtype", r"needs uint8 \(4, 4, 3\)"),
    "channels first": (good(**{IMAGE_KEY: np.zeros((3, 4, 4), np.uint8)}), "shape", r"needs uint8 \(4, 4, 3\)"),
    "large": (good(**{IMAGE_KEY: np.zeros((8, 8, 3), np.uint8)}), "shape", r"needs uint8 \(4, 4, 3\)"),
    "history": (good(**{IMAGE_KEY: np.zeros((2, 4, 4, 3), np.uint8)}), "shape", r"needs uint8 \(4, 4, 3\)"),
    "no array": (good(**{IMAGE_KEY: 5}), "dtype", "JPEG or PNG; got int"),
    "no picture file": (good(**{IMAGE_KEY: b"hello"}), "format", "no readable JPEG or PNG"),
    "gif": (good(**{IMAGE_KEY: png(form="GIF", mode="L")}), "format", "no readable JPEG or PNG"),
    "cut file": (good(**{IMAGE_KEY: png()[:-30]}), "format", "no readable JPEG or PNG"),
    "bomb": (good(**{IMAGE_KEY: png(5000, 5000, "L")}), "shape", "pixels; this policy needs"),
    "version 1": (good(version=1), "version", "of version 1; this server speaks version 2: update the client"),
    "a later version": (good(version=3), "version", "of version 3; this server speaks version 2: update the server"),
    "step": (good(step=-1), "value", "at least 0"),
    "half step": (good(step=0.5), "value", "at least 0"),
    "huge step": (good(step=2**60), "value", "at least 0"),
    "step of an array": (good(step=np.array([7])), "value", r"at least 0; got an array of int64 \(1,\)"),
    "half step in an array": (good(step=np.array(0.5)), "value", "at least 0; got float 0.5"),
    "true step": (good(step=np.array(True)), "value", "at least 0; got bool True"),
    "nan step": (good(step=np.array(np.nan)), "value", "at least 0; got float nan"),
    "seq": (good(seq="one"), "value", "seq is a whole number .* got the text 'one'"),
    "reset": (good(reset="yes"), "value", "true or false; got the text 'yes'"),
    "reset of a number": (good(reset=np.array(1)), "value", "true or false; got int 1"),
    "success": (good(success=1), "value", "true, false or null; got int 1"),
    "success of an array": (good(success=np.array([True])), "value", r"got an array of bool \(1,\)"),
    "state of one": (good(**{STATE_KEY: np.array(3.0)}), "shape", r"shape \(\); this policy needs \(2,\)"),
    "state of a map": (good(**{STATE_KEY: {"x": 1}}), "dtype", "2 real numbers; got a map"),
    "name of bytes": (good(robot=b"a"), "name", "printable characters; got 1 bytes"),
    "version of an array": (good(version=np.array([2])), "version", "an array of int64"),
    "no name": (good(robot=""), "name", "1 to 80 printable"),
    "long name": (good(robot="x" * 81), "name", "1 to 80 printable"),
    "odd name": (good(robot="a\nb"), "name", "1 to 80 printable"),
}


@pytest.mark.parametrize(("message", "reason", "words"), BAD.values(), ids=BAD)
def test_a_bad_request_says_what_is_valid(message, reason, words):
    with pytest.raises(BadRequestError, match=words) as caught:
        read_request(message, SHAKE)
    assert caught.value.reason == reason


ANYTHING = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(),
    strategies.floats(),
    strategies.text(max_size=5),
    strategies.binary(max_size=5),
    strategies.lists(strategies.integers(), max_size=3),
    strategies.just(np.zeros((4, 4, 3), np.uint8)),
    strategies.just(np.zeros(2)),
)


@given(strategies.dictionaries(strategies.sampled_from(list(good(seq=1, robot="a", reset=False, success=None))), ANYTHING))
def test_no_value_anywhere_does_more_than_be_refused(changes):
    try:
        found = read_request(good() | changes, SHAKE)
    except BadRequestError:
        return
    assert found.observation.state.shape == (2,)
    assert np.isfinite(found.observation.state).all()
    assert found.observation.images[IMAGE_KEY].shape == (4, 4, 3)


def test_json_stands_for_the_same_request():
    tree = {
        IMAGE_KEY: base64.b64encode(png()).decode(),
        STATE_KEY: [3, 7],
        "prompt": "go",
        "step": 7,
    }
    assert read_request(from_json(tree, SHAKE), SHAKE).observation.images[IMAGE_KEY].mean() == 100
    nested = tree | {IMAGE_KEY: observe(3).images[IMAGE_KEY].tolist()}
    found = read_request(from_json(nested, SHAKE), SHAKE).observation
    np.testing.assert_array_equal(found.images[IMAGE_KEY], observe(3).images[IMAGE_KEY])
    np.testing.assert_array_equal(found.state, [3, 7])


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {IMAGE_KEY: "no base64!"},
        {IMAGE_KEY: [[1, 2], [3]]},
        {IMAGE_KEY: [[[300, 0, 0]]]},
        {IMAGE_KEY: [[[0.5, 0, 0]]]},
        {STATE_KEY: ["a", "b"]},
        {STATE_KEY: {"x": 1}},
        {STATE_KEY: [10**400, 0]},
    ],
)
def test_bad_json_says_so(tree):
    with pytest.raises(BadRequestError):
        from_json(tree, SHAKE)
