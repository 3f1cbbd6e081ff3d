"""What a robot sent, checked before it shares a batch with others: a bad request is refused alone, with what would be valid."""

import base64
import binascii
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from libra_ray.client.protocol import PROMPT_KEYS, VERSION, Handshake
from libra_ray.types import STATE_KEY, Json, Observation

MAX_NAME = 80
MAX_PROMPT = 2000
MAX_STEP = 2**53


class BadRequestError(ValueError):
    """A request that is refused.

    Attributes:
        reason: one of a few words, for counting.
    """

    def __init__(self, reason: str, text: str) -> None:
        self.reason = reason
        super().__init__(text)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One checked request.

    Attributes:
        observation: None where the request only resets or reports; its step is -1 where the request has none.
        robot: None where the request has no name.
        ended: whether it tells how an episode went, which `success` does.
    """

    observation: Observation | None
    robot: str | None
    seq: int | None
    reset: bool
    ended: bool
    success: bool | None


def read_request(message: Json, handshake: Handshake) -> Request:
    """The checked request of a received map.

    Raises:
        BadRequestError: says what would have been valid.
    """
    version = _plain(message.get("version", VERSION))
    if not isinstance(version, int) or isinstance(version, bool) or version != VERSION:
        older = "client" if isinstance(version, int) and version < VERSION else "server"
        said = version if isinstance(version, int) else _described(version)
        raise BadRequestError(
            "version", f"a request of version {said}; this server speaks version {VERSION}: update the {older}"
        )
    reset, success = _plain(message.get("reset", False)), _plain(message.get("success"))
    ended = "success" in message
    if not isinstance(reset, bool):
        raise BadRequestError("value", f"reset is true or false; got {_described(reset)}")
    if not isinstance(success, bool | None):
        raise BadRequestError("value", f"success is true, false or null; got {_described(success)}")
    known = {*handshake.observation, *PROMPT_KEYS}
    has_observation = any(name in message for name in known)
    if not has_observation and not reset and not ended:
        raise BadRequestError("keys", f"a request needs {_listed(handshake)}; got keys {_shown(list(message))}")
    return Request(
        observation=_observation(message, handshake) if has_observation else None,
        robot=_name(message.get("robot")),
        seq=_whole(message, "seq", -MAX_STEP),
        reset=reset,
        ended=ended,
        success=success,
    )


def from_json(tree: Any, handshake: Handshake) -> Json:
    """The map that a JSON request stands for: pictures as base64 of a JPEG or PNG, or as nested lists; vectors as lists.

    Raises:
        BadRequestError: says what would have been valid.
    """
    if not isinstance(tree, dict):
        raise BadRequestError("format", f"the body is a JSON object; got {type(tree).__name__}")
    message = dict(tree)
    for name in handshake.observation:
        if name not in message:
            continue
        value = message[name]
        try:
            if isinstance(value, str):
                message[name] = base64.b64decode(value.partition("base64,")[2] or value, validate=True)
            elif name in handshake.cameras:
                message[name] = _as_uint8(np.asarray(value))
            else:
                message[name] = np.asarray(value, np.float64)
        except (ValueError, TypeError, OverflowError, binascii.Error) as error:
            raise BadRequestError("format", f"{name} is neither base64 nor a list of numbers of one shape: {error}") from None
    return message


def _as_uint8(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.dtype.kind not in "iu" or (values.size and not (values.min() >= 0 and values.max() <= 255)):
        raise ValueError("pixels are whole numbers from 0 to 255")
    return values.astype(np.uint8)


def _observation(message: Json, handshake: Handshake) -> Observation:
    missing = [name for name in handshake.observation if name not in message]
    if missing:
        raise BadRequestError("keys", f"{', '.join(missing)} missing; a request needs {_listed(handshake)}")
    prompt = next((message[name] for name in PROMPT_KEYS if name in message), None)
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        got = f"{len(prompt)} characters" if isinstance(prompt, str) else _described(prompt)
        raise BadRequestError("prompt", f"the instruction is text of at most {MAX_PROMPT} characters under `prompt`; got {got}")
    pictures = {name: _pictures(name, message[name], handshake) for name in handshake.cameras}
    history = max((len(stack) for stack in pictures.values()), default=1)
    if any(len(stack) != history for stack in pictures.values()):
        raise BadRequestError("shape", "all cameras must send equally many pictures")
    seen = [{name: stack[t] for name, stack in pictures.items()} for t in range(history)]
    return Observation(
        images=seen[-1],
        past=seen[:-1],
        state=_state(message[STATE_KEY], handshake.observation[STATE_KEY]["shape"][0]),
        instruction=prompt,
        step=_whole(message, "step", 0, absent=-1),
    )


def _pictures(name: str, value: Any, handshake: Handshake) -> NDArray[np.uint8]:
    """`(k, height, width, 3)` of one camera, 1 <= k <= the policy's history."""
    shape = tuple(handshake.observation[name]["shape"])
    if isinstance(value, bytes):
        value = _decoded(name, value, shape)
    if not isinstance(value, np.ndarray):
        raise BadRequestError("dtype", f"{name} is a uint8 array {shape}, or bytes of a JPEG or PNG; got {_described(value)}")
    stack = value[None] if value.ndim == len(shape) else value
    if value.dtype != np.uint8:
        raise BadRequestError("dtype", f"{name} is {value.dtype}; this policy needs uint8 {shape}")
    if stack.shape[1:] != shape or not 1 <= len(stack) <= handshake.history:
        more = f", or the last k <= {handshake.history} of them" if handshake.history > 1 else ""
        raise BadRequestError("shape", f"{name} has shape {value.shape}; this policy needs uint8 {shape}{more}")
    return stack


def _decoded(name: str, data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            # Known from the header: a small file that unfolds to a huge picture is refused before it does.
            if image.size != (shape[1], shape[0]):
                raise BadRequestError("shape", f"{name} has {image.size} pixels; this policy needs {(shape[1], shape[0])}")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRequestError("format", f"{name} is no readable JPEG or PNG: {error}") from None


def _state(value: Any, dims: int) -> NDArray[np.float32]:
    if isinstance(value, list | tuple):
        numbers = [_plain(v) for v in value]
        value = np.asarray(numbers, np.float64) if all(isinstance(v, int | float) for v in numbers) else value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise BadRequestError("dtype", f"{STATE_KEY} is {dims} real numbers; got {_described(value)}")
    if value.shape != (dims,):
        raise BadRequestError("shape", f"{STATE_KEY} has shape {value.shape}; this policy needs ({dims},)")
    with np.errstate(over="ignore"):
        state = value.astype(np.float32)
    if not np.isfinite(state).all():
        first = int(np.argmin(np.isfinite(state)))
        raise BadRequestError("not finite", f"{STATE_KEY} must be {dims} finite numbers; number {first} is {value[first]}")
    return state


def _whole[T](message: Json, name: str, least: int, *, absent: T = None) -> int | T:  # type: ignore[assignment]  # T is None there
    value = _plain(message.get(name))
    if value is None:
        return absent
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_STEP:
        raise BadRequestError("value", f"{name} is a whole number of at least {least}; got {_described(value)}")
    return value


def _name(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME or not value.isprintable():
        raise BadRequestError("name", f"robot is a name of 1 to {MAX_NAME} printable characters; got {_described(value)}")
    return value


def _plain(value: Any) -> Any:
    """What a numpy scalar or an array without dimensions holds; everything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


def _described(value: Any) -> str:
    """What was sent, in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {value}"[:40]
    if isinstance(value, bytes):
        return f"{len(value)} bytes (text is sent as a string: value.decode())"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "null" if value is None else "a map" if isinstance(value, dict) else f"a {type(value).__name__}"


def _listed(handshake: Handshake) -> str:
    return ", ".join([*handshake.observation, "prompt"])


def _shown(keys: list[Any]) -> str:
    return str([str(key)[:40] for key in keys[:10]])
