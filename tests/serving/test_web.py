"""The gateway's sockets, real ones, in front of systems in this process: every client, every bad input, every way to leave."""

import asyncio
import base64
import json
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager

import msgpack
import numpy as np
import pytest
import websockets.sync.client
from openpi_client import msgpack_numpy as openpi
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed, InvalidStatus

from libra_ray.client.client import AsyncRobotClient, RefusedError, RobotClient, WrongRobotError
from libra_ray.client.protocol import GOING_AWAY, TOO_BIG, Handshake, pack, request, unpack
from libra_ray.serving.listener import Listener, check_free
from libra_ray.serving.web import Web
from libra_ray.types import IMAGE_KEY, STATE_KEY
from tests.serving.bench import Bench, check
from tests.serving.stubs import HORIZON, StubLevel, observe

LIMIT = 64 * 1024


class Ready(StubLevel):
    """A level whose intent is there before the last level has answered: robots are never told to hold."""

    delay_s = 0.0


class Server:
    """A gateway on a port of its own, in a thread of its own."""

    def __init__(self, port=0, ready=True, **changes):
        self.port = port or free_port()
        self.address = f"ws://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.call(self._start(ready, changes))

    async def _start(self, ready, changes):
        self.bench = Bench(kinds={"planner": Ready}, max_message_bytes=LIMIT, **changes)
        self.core = self.bench.core
        self.web = Web(self.core)
        self.listener = Listener(self.web, host="127.0.0.1", port=self.port, max_message_bytes=LIMIT, owner="tests")
        self.listener.open()
        if ready:
            await self.bench.start()

    def call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    async def drain(self):
        self.core.draining = True
        self.listener.refuse_new()
        self.core.send_away()
        await self.web.gone(5)

    def stop(self):
        if self.thread.is_alive():
            self.call(self.listener.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()

    def http(self, path, body=None, **headers):
        """Status, content type and body."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        ask = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body, headers=headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ask, timeout=10) as answer:
                return answer.status, answer.headers.get_content_type(), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get_content_type(), error.read()

    def socket(self, **options):
        return websockets.sync.client.connect(self.address, compression=None, proxy=None, **options)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(**changes):
    server = Server(**changes)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


def message(number=1, at=0, **changes):
    whole = request(observe(number, at)) | changes
    return {key: value for key, value in whole.items() if value is not ...}


def until(condition, patience_s=10):
    end = time.monotonic() + patience_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_openpis_client_works_as_it_is(server):
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    metadata = client.get_server_metadata()
    assert Handshake.read(metadata).horizon == HORIZON
    for step in range(0, 25, 5):
        answer = client.infer(message(7, step=..., seq=step))
        assert answer["actions"].shape == (HORIZON, 5)
        assert (answer["actions"][:, 0] == 7).all()
        assert (answer["first_step"], answer["seq"]) == (step, step)
        assert {"total_ms", "queue_ms", "call_ms", "compute_ms", "batch"} <= answer["server_timing"].keys()
        assert {"intent_age_steps", "intent_age_ms", "held", "intent_first_step"} <= answer.keys()
    with pytest.raises(RuntimeError, match=r"observation.state has shape \(3,\)"):
        client.infer(message(7, **{STATE_KEY: np.zeros(3)}))
    assert client.infer(message(7, step=...))["first_step"] == 25


def test_our_client_drives_episodes(server):
    with RobotClient(server.address, robot="robot 3") as client:
        assert client.handshake.execute_steps == HORIZON
        for _ in range(2):
            client.reset()
            for step in range(0, 20, 5):
                check(client.act(observe(3, step)), 3, step)
            client.report(success=True)
    row = next(row for row in server.core.snapshot().robots if row.name == "robot 3")
    assert (row.episodes, row.successes) == (2, 2)


def test_pictures_may_come_as_jpeg(server):
    with RobotClient(server.address, robot="robot 4", jpeg_quality=95) as client:
        check(client.act(observe(4)), 4, 0)


def test_many_robots_at_once_each_get_their_own(server):
    async def robot(number):
        async with AsyncRobotClient(server.address, robot=f"robot {number}") as client:
            for step in range(0, 100, 5):
                reply = await client.act(observe(number, step))
                check(reply, number, step)

    async def fleet():
        await asyncio.gather(*[robot(100 + n) for n in range(16)])

    asyncio.run(fleet())
    assert max(map(len, server.bench.refiner.batches)) > 1


GARBAGE = {
    "bytes": (b"garbage", "msgpack"),
    "nothing": (b"", "msgpack"),
    "a list": (pack({"a": 1})[1:], "msgpack|map"),
    "text": ("hello", "binary messages in msgpack"),
    "version": (pack(message(version=1)), "speaks version 2: update the client"),
    "nan": (pack(message(**{STATE_KEY: np.array([np.nan, 0])})), "finite"),
    "dtype": (pack(message(**{IMAGE_KEY: np.zeros((4, 4, 3))})), "needs uint8"),
    "size": (pack(message(**{IMAGE_KEY: np.zeros((40, 40, 3), np.uint8)})), "needs uint8"),
    "keys": (pack({"hello": 1}), "a request needs"),
    "text in an array": (openpi.packb(message(prompt=np.array("go"))), "which is text; send one plain string"),
    "bytes in an array": (openpi.packb(message(prompt=np.array(b"go"))), "which is bytes"),
    "dates": (openpi.packb(message(step=np.array(0, "M8[s]"))), "which is dates"),
    "bytes as prompt": (openpi.packb(message(prompt=b"go")), "value.decode()"),
    "step of an array": (openpi.packb(message(step=np.array([0]))), "got an array of int64 (1,)"),
    "msgpack-numpy": (
        msgpack.packb(
            message(**{name: {b"nd": True, b"type": "<f4", b"shape": [1], b"data": b"1234"} for name in (STATE_KEY, IMAGE_KEY)})
        ),
        "the codec of the package msgpack-numpy",
    ),
    "an endless shape": (
        msgpack.packb({"x": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [2**64 - 1, 0]}}),
        "sizes from 0",
    ),
    "a long state": (pack(message(**{STATE_KEY: np.full(100, np.nan)})), "shape (100,)"),
}


@pytest.mark.parametrize(("data", "words"), GARBAGE.values(), ids=GARBAGE)
def test_after_a_bad_request_the_connection_goes_on(server, data, words):
    before = server.core.snapshot().refused
    with server.socket() as client:
        unpack(client.recv())
        client.send(data)
        assert isinstance(text := client.recv(), str)
        assert any(word in text for word in words.split("|")), text
        assert "\n" not in text
        client.send(pack(message()))
        assert unpack(client.recv())["first_step"] == 0
    assert sum(server.core.snapshot().refused.values()) == sum(before.values()) + 1


def test_a_gigabyte_is_refused_by_its_first_bytes(server):
    """The header of a frame tells its length: the connection is closed without waiting for the rest."""
    with server.socket() as client:
        client.recv()
        header = bytes([0x82, 0x80 | 127]) + struct.pack("!Q", 2**30) + b"mask"
        client.socket.sendall(header + b"\0" * 100)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
        assert closed.value.rcvd.code == TOO_BIG
    with RobotClient(server.address, robot="too big") as client, pytest.raises(RefusedError):
        client.ask({"observation.image": b"x" * (2 * LIMIT)})
    check_alive(server)


def check_alive(server):
    with RobotClient(server.address, robot="robot 1") as client:
        check(client.act(observe(1), reset=True), 1, 0)


def test_a_client_that_vanishes_is_forgotten(server):
    before = len(server.core.connections)
    client = server.socket()
    client.recv()
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.send(pack(message(9, robot="vanishing")))
    until(lambda: len(server.core.connections) > before)
    client.socket.close()
    until(lambda: len(server.core.connections) == before)
    check_alive(server)


def test_too_many_connections_are_refused_and_the_others_notice_nothing():
    with serving(max_connections=20) as server, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.socket()).recv()
        with pytest.raises(InvalidStatus) as refused:
            server.socket()
        assert refused.value.response.status_code == 503
        assert b"20 connections" in refused.value.response.body
        with pytest.raises(ConnectionError, match="no server"):
            RobotClient(server.address, robot="late", patience_s=0.2)


def test_nobody_is_let_in_before_the_systems_are_loaded():
    with serving(ready=False) as server:
        assert server.http("/healthz")[0] == 200
        assert server.http("/readyz")[0] == 503
        assert server.http("/act", json.dumps({}).encode(), content_type="application/json")[0] == 503
        with pytest.raises(InvalidStatus):
            server.socket()
        threading.Timer(0.3, lambda: server.call(server.bench.start())).start()
        with RobotClient(server.address, robot="robot 5") as client:
            check(client.act(observe(5)), 5, 0)
        assert server.http("/readyz")[0] == 200


def test_a_token_is_asked_for_everywhere_but_by_probes():
    with serving(token="secret") as server:
        assert server.http("/readyz")[0] == 200
        assert server.http("/act", b"{}", content_type="application/json")[0] == 401
        assert server.http("/fleet.json")[0] == server.http("/")[0] == 401
        assert server.http("/", authorization="Bearer secret")[0] == server.http("/?token=secret")[0] == 200
        assert server.http("/fleet.json", cookie="libra_ray_token=secret")[0] == 200
        for wrong in (None, "other"):
            with pytest.raises(RefusedError, match="asks for its token"):
                RobotClient(server.address, robot="a", token=wrong)
        with RobotClient(server.address, robot="robot 1", token="secret") as client:
            check(client.act(observe(1)), 1, 0)
        assert WebsocketClientPolicy("127.0.0.1", server.port, api_key="secret").infer(message())["first_step"] == 0


def test_pages_of_other_sites_command_nobody(server):
    """A browser sends where its page came from; a robot does not."""
    with pytest.raises(InvalidStatus) as refused:
        server.socket(origin="http://elsewhere.example")
    assert refused.value.response.status_code == 403
    assert server.http("/act", b"{}", origin="http://elsewhere.example")[0] == 403
    assert server.http("/", origin=f"http://127.0.0.1:{server.port}")[0] == 200


def test_plain_http_answers_as_the_socket_does(server):
    tree = {STATE_KEY: [6, 0], "prompt": "go", "robot": "robot 6", "step": 0, "seq": 1}
    tree[IMAGE_KEY] = observe(6).images[IMAGE_KEY].tolist()
    status, kind, body = server.http("/act", json.dumps(tree).encode(), content_type="application/json; charset=utf-8")
    assert (status, kind) == (200, "application/json")
    answer = json.loads(body)
    assert (answer["robot"], answer["seq"], np.shape(answer["actions"])) == ("robot 6", 1, (HORIZON, 5))
    packed = server.http("/act", pack(message(6, 5, robot="robot 6")), content_type="application/msgpack")
    assert unpack(packed[2])["intent_first_step"] == 0, "its plan was remembered by its name"


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"{}", "text/plain", "valid: application/json"),
        (b"{", "application/json", "no JSON"),
        (b"[" * 50_000, "application/json", "no JSON"),
        (b"[]", "application/json", "JSON object"),
        (b"{}", "application/json", "a request needs"),
        (b"xyz", "application/msgpack", "msgpack"),
        (b"x" * (LIMIT + 1), "application/json", f"at most {LIMIT} bytes"),
        (json.dumps({IMAGE_KEY: base64.b64encode(b"no").decode()}).encode(), "application/json", "observation.state missing"),
        (b'{"%s": [1%s, 0]}' % (STATE_KEY.encode(), b"0" * 400), "application/json", "list of numbers"),
    ],
)
def test_a_bad_post_says_what_is_valid(server, body, kind, words):
    status, _, answer = server.http("/act", body, content_type=kind)
    assert status == 400
    assert words in json.loads(answer)["error"]


def test_draining_moves_robots_to_another_gateway_and_none_is_lost():
    """Two gateways on one port: one leaves, its robots go on at the other, from the step at which they are."""
    with serving() as one, serving(port=one.port):
        counts = []

        async def robot(number, leave):
            async with AsyncRobotClient(one.address, robot=f"robot {number}") as client:
                for step in range(0, 300, 5):
                    check(await client.act(observe(number, step)), number, step)
                    if step == 100:
                        leave()
                counts.append(client.reconnects)

        async def fleet():
            drained = []

            def leave():
                if not drained:
                    drained.append(asyncio.run_coroutine_threadsafe(leaver.drain(), leaver.loop))

            leaver = one
            await asyncio.gather(*[robot(n, leave) for n in range(12)])
            assert drained[0].result(5) is None

        asyncio.run(fleet())
        assert not one.core.connections
        assert len(counts) == 12
        assert sum(counts) > 0


def test_a_server_that_comes_back_is_found_again():
    with serving() as one, RobotClient(one.address, robot="robot 1", patience_s=10) as client:
        check(client.act(observe(1)), 1, 0)
        one.call(one.drain())
        one.stop()
        threading.Timer(0.3, lambda: again.append(Server(port=one.port))).start()
        again: list[Server] = []
        check(client.act(observe(1, 5)), 1, 5)
        assert client.reconnects == 1
        again[0].stop()


def test_drained_connections_close_with_the_code_that_means_come_again():
    with serving() as server, server.socket() as client:
        client.recv()
        server.call(server.drain())
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
        assert closed.value.rcvd.code == GOING_AWAY


def test_a_vanished_server_is_a_clear_error():
    with pytest.raises(ConnectionError, match=r"no server at ws://127\.0\.0\.1"):
        RobotClient(f"127.0.0.1:{free_port()}", robot="a", patience_s=0.3)
    with pytest.raises(ValueError, match="write ws://host:port"):
        RobotClient("http://127.0.0.1:1", robot="a")


def test_an_answer_to_another_robot_is_never_taken():
    """A server that sends robot B what robot A asked for, as one public server does."""
    from websockets.sync.server import serve as websocket_server

    def crossed(connection):
        connection.send(pack(Handshake(**shake).message()))
        asked = unpack(connection.recv())
        connection.send(pack(asked | {"robot": "another", "actions": np.zeros((5, 5), np.float32), "first_step": 0}))

    from tests.serving.stubs import DESCRIPTION

    shake = DESCRIPTION | {"execute_steps": 5, "rule": "fifo", "max_message_bytes": 1}
    port = free_port()
    with websocket_server(crossed, "127.0.0.1", port, compression=None) as crossing:
        threading.Thread(target=crossing.serve_forever, daemon=True).start()
        with RobotClient(f"127.0.0.1:{port}", robot="mine") as client, pytest.raises(WrongRobotError, match="'another'"):
            client.act(observe(1))
        crossing.shutdown()


def test_a_port_that_is_taken_is_a_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="give another port"):
            listener(port)
        with pytest.raises(ValueError, match="give another port"):
            check_free("127.0.0.1", port, patience_s=0.3)
        threading.Timer(0.2, taken.close).start()
        check_free("127.0.0.1", port, patience_s=60)
    check_free("127.0.0.1", free_port())


def listener(port, owner="tests", host="127.0.0.1"):
    return Listener(lambda *_: None, host=host, port=port, max_message_bytes=LIMIT, owner=owner)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells")
def test_only_gateways_of_one_application_share_a_port(host):
    """Else the system would send a robot to one policy or the other; what has ended, in whatever way, is no obstacle."""
    port = free_port()
    first = listener(port)
    again = listener(port)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"port {port} of {host} .*another application's robots"):
            listener(port, owner="others", host=host)
        first.refuse_new()
    other = listener(free_port(), owner="others", host=host)
    again.refuse_new()
    last = listener(port, owner="others", host=host)
    with pytest.raises(ValueError, match="another application"):
        listener(port)
    last.refuse_new()
    other.refuse_new()
