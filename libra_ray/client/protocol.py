"""What robots and the server say to each other: WebSocket messages in msgpack with numpy arrays.

The transport is the one openpi's client speaks, so `openpi_client.websocket_client_policy.WebsocketClientPolicy` works as it
is; `libra_ray.client.client` holds one of our own. Neither needs torch or Ray, and nothing is ever unpickled.

1. The client connects, with the header `Authorization: Bearer <token>` (or openpi's `Api-Key <token>`) where the server asks
   for one. The server sends its `Handshake` as a map.
2. The client sends one map per request and gets one answer per request, in order. A binary answer is a map; a text answer
   is a refusal, one line that says what would have been valid. After a refusal the connection goes on.

A request (single values may be plain, numpy scalars, or arrays without dimensions):

    <camera>            uint8 (height, width, 3), RGB; or the bytes of a JPEG or PNG; or for policies with a history the last
                        pictures (k, height, width, 3), oldest first. Names as in the handshake, e.g. `observation.image`
    observation.state   (S,) proprioception, any real dtype, finite
    prompt              the instruction, plain text (`task` and `instruction` are taken too)
    step                control steps since the first answer of the episode; left out, the server counts `execute_steps` each
    seq                 any integer; comes back in the answer
    robot               the robot's name; left out, the server gives one per connection, which the answers carry
    reset               true begins a new episode: earlier intents are forgotten, and `step` counts from 0
    success             true or false tells how the episode that ends here went, null that nobody knows
    version             `VERSION`; a server that speaks another one refuses

`reset` and `success` may come alone, without an observation; the answer then has no actions.

An answer:

    actions             float32 (H, D), in the robot's own units
    first_step          absolute control step of actions[0]
    intent_first_step   absolute step of the observation behind the intent that the actions follow; null where there is none
    intent_age_steps    first_step - intent_first_step; the server's limit on the age is in these steps too
    intent_age_ms       time since that observation reached the server
    metadata            what the levels above the last say to people of the intents in use, by name, e.g. `subgoals`
    held                true: no intent covered this step, and the actions are the safe ones, not fresh ones
    robot, seq          whose answer it is
    server_timing       total_ms in the gateway, queue_ms before the call, call_ms of it, compute_ms in it; batch: robots in it;
                        <level>_ms from the picture to the intent in use, of each level above the last

A server about to end closes with `GOING_AWAY`: reconnect, and send `step`. `TOO_BIG` and `UNAUTHORISED` are for good.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import msgpack  # type: ignore[import-untyped]  # it ships no types
import numpy as np
from numpy.typing import NDArray

from libra_ray.client.pictures import jpeg
from libra_ray.spec import RobotSpec
from libra_ray.types import STATE_KEY, Json, Level, Observation

VERSION = 2
"""Of the protocol: raised whenever an old client would misunderstand."""
PROTOCOL = "libra_ray"
PROMPT_KEYS = ("prompt", "task", "instruction")
NUMERIC_KINDS = "biuf"
"""numpy's letters of the dtypes that travel: booleans, integers, floats."""
NOT_NUMERIC = {
    "U": "text; send one plain string, e.g. str(value)",
    "T": "text; send one plain string, e.g. str(value)",
    "S": "bytes; send text as a plain string, e.g. value.item().decode()",
    "O": "Python objects, which are never unpickled; send an array of numbers",
    "V": "records, or of a dtype that is not numpy's own; send numbers, e.g. float32",
    "c": "complex numbers; send real ones",
    "M": "dates; send numbers",
    "m": "durations; send numbers",
}
"""numpy's letters of those that do not: what such an array holds, and what to send in its place."""
MAX_DIMENSIONS = 8
GOING_AWAY, UNAUTHORISED, TOO_BIG, TRY_LATER = 1012, 1008, 1009, 1013
"""Close codes of RFC 6455 and its registry."""


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """What a server says of itself on connecting.

    Attributes:
        observation: feature name -> `dtype` and `shape`, for one robot.
        action: `dtype` and `shape` `(H, D)` of the answer's actions; as of the state, `spec` says what they mean (see `robot`).
        control_hz: control rate that a step stands for, in Hz.
        horizon: H, control steps that the actions of one answer are for.
        levels: of the policy, slow to fast; the last one acts.
        execute_steps: control steps between two requests that the server assumes.
        history: pictures per camera that the policy reads.
        rule: when a new intent is asked for.
        checkpoint_digest: of the weights that were in use when the connection was made.
        normalisation_digest: of the statistics that states and actions are normalised with.
        max_message_bytes: longer requests are refused.
        gateway: which replica answers.
        supersample: pixels that the demonstrations' simulator drew per pixel and axis; a simulated robot should draw alike.
        margin_steps: level -> control steps that it has to spare at present, where it was measured. Above the last level: of an
            intent, when the next one is in use; of the last level: of the time that its answer may take. Below 0: too late.
    """

    observation: dict[str, Json]
    action: Json
    control_hz: float
    horizon: int
    levels: tuple[Level, ...]
    execute_steps: int
    history: int
    rule: str
    checkpoint_digest: str
    normalisation_digest: str
    max_message_bytes: int
    gateway: str = ""
    instructions: tuple[str, ...] = ()
    supersample: int = 1
    margin_steps: Mapping[str, int] = field(default_factory=dict)
    protocol: str = PROTOCOL
    version: int = VERSION

    def message(self) -> Json:
        """The map that is sent."""
        return asdict(self)

    @classmethod
    def read(cls, message: Json) -> Self:
        """The record of a received map; keys that this version does not know are passed over.

        Raises:
            ValueError: another protocol or version.
        """
        if message.get("protocol") != PROTOCOL or message.get("version") != VERSION:
            theirs = f"{message.get('protocol')!r} version {message.get('version')!r}"
            version = message.get("version")
            older = "client" if isinstance(version, int) and version > VERSION else "server"
            raise ValueError(f"the server speaks {theirs}, this client {PROTOCOL!r} version {VERSION}: update the {older}")
        tree = _known(cls, message) | {"instructions": tuple(message.get("instructions", ()))}
        return cls(**tree | {"levels": tuple(Level(**_known(Level, level)) for level in message["levels"])})

    @property
    def cameras(self) -> tuple[str, ...]:
        """The camera features, in the order of the handshake."""
        return tuple(name for name, spec in self.observation.items() if spec["dtype"] == "uint8")

    @property
    def robot(self) -> RobotSpec:
        """The policy's robot, for a driver to compare its own with by `libra_ray.spec.differences`."""
        return RobotSpec.read(self.action, self.observation[STATE_KEY], self.cameras, self.control_hz)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one request; its fields are described above. Of the intent it says None where there is none."""

    actions: NDArray[np.float32]
    first_step: int
    robot: str
    seq: int | None = None
    intent_first_step: int | None = None
    intent_age_steps: int | None = None
    intent_age_ms: float | None = None
    held: bool = False
    server_timing: dict[str, float] = field(default_factory=dict)
    metadata: Json = field(default_factory=dict)

    @classmethod
    def read(cls, message: Json) -> Self:
        """The record of a received map; keys that this version does not know are passed over.

        Raises:
            ValueError: it is not an answer with actions.
        """
        if not isinstance(message.get("actions"), np.ndarray):
            raise ValueError(f"an answer without actions; its keys are {', '.join(map(str, message)) or 'none'}")
        return cls(**_known(cls, message))


def _known(record: type[Any], message: Json) -> Json:
    """The entries that this version's record has."""
    names = {f.name for f in fields(record)}
    return {name: value for name, value in message.items() if name in names}


def request(observation: Observation, *, jpeg_quality: int | None = None, **extra: Any) -> Json:
    """The map of one request.

    Args:
        jpeg_quality: 1 to 95 sends the pictures as JPEG; None sends them raw.
        extra: `seq`, `robot`, `reset`, `success`.
    """
    pictures: Json = {}
    for name in observation.images:
        seen = observation.pictures(name, len(observation.past) + 1)
        pictures[name] = np.stack(seen) if len(seen) > 1 else seen[0]
        if jpeg_quality is not None and len(seen) == 1:
            pictures[name] = jpeg(seen[0], jpeg_quality)
    return {
        **pictures,
        STATE_KEY: observation.state,
        "prompt": observation.instruction,
        "step": observation.step,
        "version": VERSION,
        **extra,
    }


def pack(message: Mapping[str, Any]) -> bytes:
    """A map of plain values and numeric arrays as msgpack, arrays as openpi's client writes them.

    Raises:
        ValueError: a value that does not travel.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_pack_array)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"a message holds text, numbers, lists, maps and numeric arrays; {error}") from error
    return packed


def unpack(data: bytes | bytearray | memoryview) -> Json:
    """The map of one message; arrays are read-only views of `data`.

    Raises:
        ValueError: it is no msgpack map, or holds an array of other numbers, size or codec than it should.
    """
    try:
        message = msgpack.unpackb(data, object_hook=_unpack_array)
    except _BadArrayError as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"not a message in msgpack: {str(error) or type(error).__name__}") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise ValueError(f"a message is a map with text keys; got {type(message).__name__}")
    return message


class _BadArrayError(ValueError):
    """It is msgpack, but holds an array or scalar that does not travel."""


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in NUMERIC_KINDS:
        raise TypeError(
            f"an array of {value.dtype} does not travel: it holds {NOT_NUMERIC.get(value.dtype.kind, 'no numbers')}"
        )
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} does not travel")


def _unpack_array(tree: dict[Any, Any]) -> Any:
    try:
        if b"__ndarray__" in tree:
            return _array(tree.get(b"data"), _dtype(tree.get(b"dtype")), tree.get(b"shape"))
        if b"__npgeneric__" in tree:
            return _scalar(tree.get(b"data"), _dtype(tree.get(b"dtype")))
    except (ValueError, OverflowError) as error:
        raise _BadArrayError(str(error)) from error
    if b"nd" in tree and b"data" in tree:
        # Its sender would not understand the arrays of the answer either.
        raise _BadArrayError(
            "an array in the codec of the package msgpack-numpy; this protocol has openpi's: pack and unpack with "
            "openpi_client.msgpack_numpy, or with libra_ray.client.protocol"
        )
    return tree


def _dtype(name: Any) -> np.dtype[Any]:
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in NUMERIC_KINDS:
        which = f", which is {NOT_NUMERIC[dtype.kind]}" if dtype is not None and dtype.kind in NOT_NUMERIC else ""
        raise ValueError(f"arrays hold booleans, integers or floats; got dtype {str(name)[:40]!r}{which}")
    return dtype


def _scalar(value: Any, dtype: np.dtype[Any]) -> np.generic:
    if not isinstance(value, bool | int | float):
        raise ValueError(f"a numpy scalar must be a number; got {type(value).__name__}")
    try:
        with np.errstate(over="ignore"):
            scalar: np.generic = dtype.type(value)
        kept = np.isinf(scalar) == np.isinf(value) if dtype.kind == "f" else scalar == value
    except (OverflowError, ValueError):
        kept = False
    if not kept:
        raise ValueError(f"a numpy scalar that does not fit its dtype: {dtype} cannot hold {value}")
    return scalar


def _array(data: Any, dtype: np.dtype[Any], shape: Any) -> NDArray[Any]:
    whole = isinstance(shape, list | tuple) and len(shape) <= MAX_DIMENSIONS
    if not whole or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"an array's shape is at most {MAX_DIMENSIONS} sizes from 0; got {str(shape)[:80]}")
    size = dtype.itemsize * math.prod(shape)
    if not isinstance(data, bytes) or len(data) != size:
        length = len(data) if isinstance(data, bytes) else type(data).__name__
        raise ValueError(f"an array of {dtype} {tuple(shape)} has {size} bytes; got {length}")
    return np.ndarray(tuple(shape), dtype, buffer=data)
