"""The gateway's face: WebSocket, plain HTTP and the live page, as one ASGI application for own port and Serve's proxy."""

import asyncio
import hmac
import json
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from libra_ray.client.protocol import GOING_AWAY, pack, unpack
from libra_ray.serving.gateway import GatewayCore, NotReadyError
from libra_ray.serving.page.live_page import fleet_page
from libra_ray.serving.requests import BadRequestError, from_json
from libra_ray.serving.retry import NoAnswerError

MSGPACK = ("application/msgpack", "application/x-msgpack")
TOKEN_COOKIE = "libra_ray_token"  # noqa: S105  # the cookie's name
SLOW_READER_S = 5.0
"""A robot that does not take its answer for so long is disconnected: what it would do with it is no longer safe."""


class Web:
    """The ASGI application of one gateway."""

    def __init__(self, core: GatewayCore) -> None:
        self._core, self._settings = core, core.settings
        routes = [
            WebSocketRoute("/{anywhere:path}", self._robot),
            Route("/act", self._act, methods=["POST"]),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/fleet.json", self._fleet),
            Route("/", self._page),
        ]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _refused})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        await self._app(scope, receive, send)

    async def gone(self, timeout_s: float) -> None:
        """Wait until all have left."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self._core.connections and loop.time() < end:
            await asyncio.sleep(0.02)

    async def _robot(self, socket: WebSocket) -> None:
        core = self._core
        self._admit(socket)
        if not core.ready:
            raise HTTPException(503, "not ready: the policy is still loading, or this gateway is about to end")
        if len(core.connections) >= self._settings.max_connections:
            core.telemetry.refused("too many connections")
            text = f"this gateway has its {self._settings.max_connections} connections; try again later"
            raise HTTPException(503, text)
        connection = _Connection(core, socket)
        core.connections.add(connection)
        try:
            await connection.serve()
        finally:
            core.connections.discard(connection)
            core.robots.left(connection)

    def _admit(self, connection: HTTPConnection) -> None:
        """Refuse pages of other sites, and whoever has not the token: in a header, a cookie or the page's address."""
        headers = connection.headers
        origin = headers.get("origin")
        # A page of another site, open in somebody's browser, must not command robots on that machine.
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            self._core.telemetry.refused("origin")
            raise HTTPException(403, "requests from pages of other sites are refused")
        token = self._settings.token
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if scheme.lower() in ("bearer", "api-key") else []
        given += [connection.cookies.get(TOKEN_COOKIE, "")]
        given += connection.query_params.getlist("token") if connection.scope["type"] == "http" else []
        if token and not any(hmac.compare_digest(one.encode(), token.encode()) for one in given):
            self._core.telemetry.refused("token")
            raise HTTPException(401, "this server asks for its token: send the header `Authorization: Bearer <token>`")

    async def _act(self, request: Request) -> Response:
        self._admit(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            if kind not in (*MSGPACK, "application/json"):
                raise BadRequestError("format", f"content type {kind!r}; valid: application/json, {MSGPACK[0]}")
            body = await self._body(request)
            message = unpack(body) if kind in MSGPACK else from_json(_parsed(body), self._core.handshake)
            answer = await self._core.answer(message, "http")
        except (NotReadyError, NoAnswerError) as error:
            raise HTTPException(503, str(error)) from None
        except ValueError as error:
            self._core.telemetry.refused(_word(error))
            raise HTTPException(400, str(error)) from None
        if kind in MSGPACK:
            return Response(pack(answer), media_type=MSGPACK[0])
        return Response(json.dumps(answer, default=_as_list), media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        limit, body = self._settings.max_message_bytes, bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise BadRequestError("size", f"a request has at most {limit} bytes")
        except ClientDisconnect:
            raise BadRequestError("format", "the request broke off") from None
        return bytes(body)

    async def _healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _readyz(self, request: Request) -> Response:
        return PlainTextResponse("ready") if self._core.ready else PlainTextResponse("not ready: loading", 503)

    async def _fleet(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse(await self._core.engine.fleet(), headers={"Cache-Control": "no-store"})

    async def _page(self, request: Request) -> Response:
        self._admit(request)
        page = HTMLResponse(fleet_page(), headers={"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})
        if self._settings.token:
            # The page's own requests cannot carry the header that let the page in.
            page.set_cookie(TOKEN_COOKIE, self._settings.token, httponly=True, samesite="strict")
        return page


class _Connection:
    """One robot's WebSocket: requests are answered one after the other."""

    def __init__(self, core: GatewayCore, socket: WebSocket) -> None:
        self._core, self._socket = core, socket
        self._name = core.new_name()
        self._leaving = False
        self._listening: asyncio.Timeout | None = None

    def leave(self) -> None:
        """Close as soon as nothing is under way."""
        self._leaving = True
        if self._listening is not None:
            self._listening.reschedule(0.0)

    async def serve(self) -> None:
        """Until the robot, or this gateway, goes."""
        await self._socket.accept()
        try:
            await self._send_data(pack(self._core.greeting().message()))
            while (message := await self._next()) is not None:
                if message["type"] == "websocket.disconnect":
                    return
                await self._send_data(await self._answered(message))
            await self._socket.close(GOING_AWAY, "connect again")
        except Exception as error:  # noqa: BLE001  # it vanished: what uvicorn or Serve's proxy raise then depends on the moment
            if isinstance(error, TimeoutError):
                self._core.telemetry.refused("slow reader")

    async def _next(self) -> Message | None:
        """The next message; None where this gateway wants the robot to leave."""
        if self._leaving:
            return None
        try:
            async with asyncio.timeout(None) as self._listening:
                return await self._socket.receive()
        except TimeoutError:
            return None
        finally:
            self._listening = None

    async def _answered(self, message: Message) -> bytes | str:
        core, data = self._core, message.get("bytes")
        try:
            if data is None:
                raise BadRequestError("format", "requests are binary messages in msgpack; got a text message")
            if len(data) > core.settings.max_message_bytes:
                raise BadRequestError("size", f"a request has at most {core.settings.max_message_bytes} bytes")
            return pack(await core.answer(unpack(data), self._name, self))
        except (NotReadyError, NoAnswerError, ValueError) as error:
            core.telemetry.refused(_word(error))
            return str(error)
        except Exception as error:  # noqa: BLE001  # the border of one request: the robot hears of it, the others do not
            core.telemetry.refused("internal")
            return f"this request could not be answered ({type(error).__name__}: {error}); the connection goes on"

    async def _send_data(self, data: bytes | str) -> None:
        async with asyncio.timeout(SLOW_READER_S):
            await (self._socket.send_bytes(data) if isinstance(data, bytes) else self._socket.send_text(data))


async def _refused(connection: HTTPConnection, error: Exception) -> Any:
    """A refusal as JSON; for a connection that is none yet as an HTTP status, where the server can send one."""
    assert isinstance(error, HTTPException)
    if not isinstance(connection, WebSocket):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    await connection.receive()  # websocket.connect
    if "websocket.http.response" in connection.scope.get("extensions", {}):
        return PlainTextResponse(error.detail, error.status_code)
    await connection.close(1008 if error.status_code < 500 else 1013, error.detail)
    return None


def _word(error: Exception) -> str:
    """One of a few words for counting."""
    if isinstance(error, BadRequestError):
        return error.reason
    if isinstance(error, NotReadyError):
        return "not ready"
    return "no answer" if isinstance(error, NoAnswerError) else "format"


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("format", f"the body is no JSON: {error}") from None


def _as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON")
