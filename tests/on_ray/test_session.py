"""Connecting to Ray as the machine is: addresses that lead nowhere, tokens, folders; all refused before Ray waits for them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import ray
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from libra_ray.on_ray import cluster, machine, ray_private, session
from tests.processes import survivors

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """No cluster, no token, no folder is named; what the code sets is undone, in Ray's own memory too."""
    assert not ray.is_initialized(), "it would look for its token meanwhile, and end this process (see conftest.py)"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR"):
            patch.setenv(name, "")
            patch.delenv(name)
        yield
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """What a cluster's head answers when it is asked whether it lives."""

    def __init__(self, token: str = "", version: str = ray.__version__):
        self.token, self.version = token, version

    def CheckAlive(self, request, context):
        if self.token and ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers = []

    def start(**head: str) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(**head), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def _closed_port() -> int:
    with socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
        return int(unbound.getsockname()[1])


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001", "head", "head:", ":6379", "head:port"])
def test_what_is_no_address_of_a_cluster_is_named_with_what_is(address):
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=.*give auto .*HOST:PORT.*unset RAY_ADDRESS") as refused:
        cluster.reachable(address)
    assert repr(address) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_cluster_that_is_gone_is_refused_at_once(monkeypatch):
    address = f"127.0.0.1:{_closed_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for ask in (session.check, lambda: session.connected().__enter__(), lambda: session.prepare_serve_run(address)):
        with pytest.raises(RuntimeError, match=rf"no Ray cluster answers at RAY_ADDRESS='{address}'.*give auto"):
            ask()


def test_a_name_that_nobody_has_is_refused():
    with pytest.raises(RuntimeError, match=r"RAY_ADDRESS='no-such-host.invalid:6379'"):
        cluster.reachable("no-such-host.invalid:6379")


def test_what_listens_but_is_no_ray_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as pool:

        def hang_up() -> None:
            other.accept()[0].close()

        pool.submit(hang_up)
        with pytest.raises(RuntimeError, match="no Ray cluster answers"):
            cluster.reachable(f"127.0.0.1:{other.getsockname()[1]}")


def test_a_cluster_that_asks_for_no_token_is_sent_none(serve):
    address = serve()
    assert cluster.reachable(address) == address
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "else Ray would send the home folder's, and its workers would die of it"
    os.environ["RAY_AUTH_MODE"] = "token"
    with pytest.raises(RuntimeError, match=r"asks for no token.*unset RAY_AUTH_MODE"):
        cluster.reachable(address)


def test_a_token_is_sent_where_the_user_says_so(serve, monkeypatch):
    address = serve(token=TOKEN)
    monkeypatch.setattr(cluster, "user_token", lambda: TOKEN)
    with pytest.raises(RuntimeError, match=r"asks for the token .*RAY_AUTH_MODE=token.*RAY_AUTH_TOKEN"):
        cluster.reachable(address)
    os.environ["RAY_AUTH_MODE"] = "token"
    assert cluster.reachable(address) == address
    for other in ("", "f" * 64):
        monkeypatch.setattr(cluster, "user_token", lambda other=other: other)
        with pytest.raises(RuntimeError, match="asks for the token"):
            cluster.reachable(address)


def test_another_version_is_refused(serve):
    with pytest.raises(RuntimeError, match=rf"runs Ray 1\.2\.3, this environment has {ray.__version__}"):
        cluster.reachable(serve(version="1.2.3"))


@pytest.mark.parametrize(("address", "private"), [("", True), ("local", True), ("10.0.0.1:6379", False), ("auto", False)])
def test_unset_and_local_mean_a_ray_of_ones_own(monkeypatch, address, private):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert session.is_private() == private


def test_serve_run_joins_no_cluster_that_merely_was_started_last(monkeypatch, tmp_path):
    """A cluster that died leaves its address in a file, which Ray would follow, and wait."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{_closed_port()}")
    monkeypatch.setattr(machine, "_choose_token", lambda *, shared: None)
    monkeypatch.setattr(machine, "_fault", lambda folder: "")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["address"]))
    session.prepare_serve_run(None)
    session.connect_serve_run()
    assert asked == ["local"], "Ray starts its own"


def test_a_cluster_that_does_not_come_up_is_tried_again_and_then_told_in_one_line(monkeypatch, tmp_path):
    """As on a machine with much else to do; each try leaves nothing behind."""
    happened = []

    def too_late(**options):
        happened.append("tried")
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(machine, "prepare_start", lambda *, shared: None)
    monkeypatch.setattr(ray, "init", too_late)
    monkeypatch.setattr(ray, "shutdown", lambda: happened.append("ended"))
    with pytest.raises(RuntimeError, match=r"^Ray's processes did not come up in 3 tries.*logs says more\)$") as told:
        session.start_local()
    assert "\n" not in str(told.value)
    assert happened == ["tried", "ended"] * session.START_TRIES


def test_a_long_tmpdir_gives_way_to_tmp_aloud(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 90)))
    machine._choose_folder()
    assert os.environ.pop("RAY_TMPDIR") == "/tmp"
    assert "TMPDIR=" in capsys.readouterr().err
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 90)))
    with pytest.raises(ValueError, match=r"RAY_TMPDIR=.* is too long .*at most \d+ bytes"):
        machine._choose_folder()


def test_a_folder_that_ray_cannot_use_is_refused_by_the_first_look(monkeypatch, tmp_path):
    """`--fresh` puts an earlier run aside after that look, not before."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(machine, "_LONGEST_SOCKET", 10_000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    session.check()
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ValueError, match=r"RAY_TMPDIR=.* has 1 MiB free"):
        session.check()


def test_the_longest_folder_that_passes_is_one_that_ray_takes():
    longest = machine._LONGEST_SOCKET - machine._SOCKET_DEPTH
    session_name = "session_2026-01-01_00-00-00_000000_4194304"
    folder = "/" + "x" * (longest - 1)
    ray._private.utils.validate_socket_filepath(f"{folder}/ray/{session_name}/sockets/plasma_store")
    assert "too long" in machine._fault(folder + "x")


def test_a_folder_that_is_a_file_relative_or_full_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "f"
    file.touch()
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_LONGEST_SOCKET", 10_000)
        assert "cannot hold" in machine._fault(str(file))
        assert "absolute" in machine._fault("tmp")
        patch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
        assert "1 MiB free" in machine._fault(str(tmp_path))


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_job_leaves_no_token_and_needs_no_home(tmp_path, home):
    program = (
        "import os; from libra_ray.on_ray import machine as m; m._choose_token(shared={}); print(os.environ['RAY_AUTH_TOKEN'])"
    )
    env = {name: value for name, value in os.environ.items() if name != "HOME"} | {"HOME": home or str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program.format(home is not None)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert len(done.stdout.strip()) == 64, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "t\u00f6ken".encode(), None], ids=["binary", "not ASCII", "missing"])
def test_a_token_that_ray_could_not_show_is_refused(content, tmp_path, monkeypatch):
    """It would end the process by an assertion of gRPC's, or by a traceback."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "auth_token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    if content is not None:
        (tmp_path / "auth_token").write_bytes(content)
    ray_private.forget_user_token()
    try:
        for refuse in (machine.check_token, lambda: machine._choose_token(shared=False)):
            with pytest.raises(ValueError, match=r"^Ray's token, .* cannot be used \(.*\); remove or mend it") as refused:
                refuse()
            assert "\n" not in str(refused.value)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        machine.check_token()
    finally:
        monkeypatch.undo()
        ray_private.forget_user_token()


LINES = [
    ("checkpoint=runs/nowhere", {}, "no checkpoint at 'runs/nowhere'"),
    ("checkpoint=runs/nowhere", {"RAY_ADDRESS": "http://127.0.0.1:8265"}, "RAY_ADDRESS='http://127.0.0.1:8265'"),
]


@pytest.mark.parametrize(("argument", "more", "says"), LINES)
def test_serve_run_refuses_in_one_line(argument, more, says, tmp_path):
    """The command as typed, in another process; what it cannot serve ends it before it starts Ray."""
    env = os.environ | {"PYTHONPATH": str(ROOT), **more}
    command = [Path(sys.executable).parent / "serve", "run", "--app-dir", ROOT, "serve_apps.libra:app", argument]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("serve run: error: ")
    assert says in line


def test_under_uv_run_serve_uploads_nothing():
    """The command `serve` imports Ray before any module of ours, and Ray has read its settings by then."""
    program = (
        "import ray\nfrom ray._private import ray_constants\nassert ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV\n"
        "import libra_ray.on_ray\nassert not ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, check=True)


def test_a_user_without_name_and_home_gets_both(monkeypatch, tmp_path, capsys):
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine.os, "getuid", lambda: 54_321)
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    machine._name_the_user()
    assert Path.home() == tmp_path / "home-54321"
    assert machine.getpass.getuser() == "uid-54321"
    assert "HOME" in capsys.readouterr().err


def test_a_cluster_of_ones_own_leaves_no_process_that_cannot_end(tmp_path):
    """As Ray's worker that waits for itself in its C code while it exits: the cluster has forgotten it by then."""
    script = """
import ctypes, os, time, ray
from libra_ray.on_ray import session

@ray.remote
class Waiting:
    def pid(self):
        libc = ctypes.CDLL(None)
        libc["__cxa_atexit"](ctypes.cast(libc.pause, ctypes.c_void_p), None, None)
        return os.getpid()
    def leave(self):
        ray.actor.exit_actor()

session.END_PATIENCE_S = 0.5
with session.connected():
    actor = Waiting.remote()
    print(ray.get(actor.pid.remote()))
    try:
        ray.get(actor.leave.remote())
    except ray.exceptions.RayActorError:
        time.sleep(0.5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert survivors([int(done.stdout)], patience_s=1) == []
