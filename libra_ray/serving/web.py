"""The gateway's face: WebSocket, plain HTTP and the live page, as one ASGI application for own port and Serve's proxy."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from libra_ray.client.protocol import GOING_AWAY, pack, unpack
from libra_ray.serving.gateway import GatewayCore, NotReadyError
from libra_ray.serving.page.live_page import fleet_page
from libra_ray.serving.requests import BadRequestError, from_json
from libra_ray.serving.retry import NoAnswerError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MSGPACK = ("application/msgpack", "application/x-msgpack")
TOKEN_COOKIE = "libra_ray_token"  # noqa: S105  # the cookie's name
REFUSED = (BadRequestError, NotReadyError, NoAnswerError, ValueError)
SLOW_READER_S = 5.0
"""A robot that does not take its answer for so long is disconnected: what it would do with it is no longer safe."""


class Web:
    """The ASGI application of one gateway.

    Args:
        core: answers requests.
    """

    def __init__(self, core: GatewayCore) -> None:
        self._core, self._settings = core, core.settings
        self._sockets: set[_Socket] = set()
        routes = [
            Route("/act", self._act, methods=["POST"]),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/fleet.json", self._fleet),
            Route("/", self._page),
        ]
        self._http = Starlette(routes=routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    def send_away(self) -> None:
        """Tell all robots to come back to another gateway, each after the answer that is under way."""
        for socket in self._sockets:
            socket.leave()

    async def gone(self, patience_s: float) -> None:
        """Wait until all have left."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience_s
        while self._sockets and loop.time() < end:
            await asyncio.sleep(0.02)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        core, status = self._core, self._refusal(scope)
        if status is not None:
            await _refuse(scope, send, *status)
            return
        core.connections += 1
        socket = _Socket(core, receive, send, scope)
        self._sockets.add(socket)
        try:
            await socket.serve()
        finally:
            self._sockets.discard(socket)
            core.connections -= 1
            for name in core.robots.left(socket):
                core.telemetry.disconnected(name)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """HTTP status and text where a connection is not wanted."""
        core = self._core
        if (wrong := self._unauthorised(scope)) is not None:
            return wrong
        if not core.ready:
            return 503, "not ready: the policy is still loading, or this gateway is about to end"
        if core.connections >= self._settings.max_connections:
            core.telemetry.refused("too many connections")
            return 503, f"this gateway has its {self._settings.max_connections} connections; try again later"
        return None

    def _unauthorised(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        # A page of another site, open in somebody's browser, must not command robots on that machine.
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            self._core.telemetry.refused("origin")
            return 403, "requests from pages of other sites are refused"
        token = self._settings.token
        if token and not any(hmac.compare_digest(given.encode(), token.encode()) for given in _tokens(headers, scope)):
            self._core.telemetry.refused("token")
            return 401, "this server asks for its token: send the header `Authorization: Bearer <token>`"
        return None

    async def _act(self, request: HttpRequest) -> Response:
        if (wrong := self._unauthorised(request.scope)) is not None:
            return JSONResponse({"error": wrong[1]}, wrong[0])
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            if kind not in (*MSGPACK, "application/json"):
                raise BadRequestError("format", f"content type {kind!r}; valid: application/json, {MSGPACK[0]}")
            body = await self._body(request)
            message = unpack(body) if kind in MSGPACK else from_json(_parsed(body), self._core.handshake)
            answer = await self._core.answer(message, "http")
        except (NotReadyError, NoAnswerError) as error:
            return JSONResponse({"error": str(error)}, 503)
        except ValueError as error:
            self._core.telemetry.refused(error.reason if isinstance(error, BadRequestError) else "format")
            return JSONResponse({"error": str(error)}, 400)
        if kind in MSGPACK:
            return Response(pack(answer), media_type=MSGPACK[0])
        return Response(json.dumps(answer, default=_as_list), media_type="application/json")

    async def _body(self, request: HttpRequest) -> bytes:
        limit, body = self._settings.max_message_bytes, bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise BadRequestError("size", f"a request has at most {limit} bytes")
        except ClientDisconnect:
            raise BadRequestError("format", "the request broke off") from None
        return bytes(body)

    async def _healthz(self, request: HttpRequest) -> Response:
        return PlainTextResponse("ok")

    async def _readyz(self, request: HttpRequest) -> Response:
        return PlainTextResponse("ready") if self._core.ready else PlainTextResponse("not ready: loading", 503)

    async def _fleet(self, request: HttpRequest) -> Response:
        if (wrong := self._unauthorised(request.scope)) is not None:
            return JSONResponse({"error": wrong[1]}, wrong[0])
        return JSONResponse(await self._core.board.fleet(), headers={"Cache-Control": "no-store"})

    async def _page(self, request: HttpRequest) -> Response:
        if (wrong := self._unauthorised(request.scope)) is not None:
            return PlainTextResponse(wrong[1], wrong[0])
        page = HTMLResponse(fleet_page(), headers={"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})
        if self._settings.token:
            # The page's own requests cannot carry the header that let the page in.
            page.set_cookie(TOKEN_COOKIE, self._settings.token, httponly=True, samesite="strict")
        return page


class _Socket:
    """One WebSocket connection: requests are answered one after the other."""

    def __init__(self, core: GatewayCore, receive: Receive, send: Send, scope: Scope) -> None:
        self._core, self._receive, self._send, self._scope = core, receive, send, scope
        self._name = core.new_name()
        self._leaving = False
        self._listening: asyncio.Future[Any] | None = None

    def leave(self) -> None:
        """Close as soon as nothing is under way."""
        self._leaving = True
        if self._listening is not None:
            self._listening.cancel()

    async def serve(self) -> None:
        """Until the robot, or this gateway, goes."""
        await self._send({"type": "websocket.accept"})
        try:
            await self._give(pack(self._core.handshake.message()))
            while not self._leaving:
                event = await self._next()
                if event is None:
                    break
                if event["type"] == "websocket.disconnect":
                    return
                await self._give(await self._answered(event))
            await self._send({"type": "websocket.close", "code": GOING_AWAY, "reason": "connect again"})
        except Exception as error:  # noqa: BLE001  # it vanished: what uvicorn or Serve's proxy raise then depends on the moment
            if isinstance(error, TimeoutError):
                self._core.telemetry.refused("slow reader")

    async def _next(self) -> MutableMapping[str, Any] | None:
        """The next event; None where this gateway wants the robot to leave."""
        self._listening = asyncio.ensure_future(self._receive())
        try:
            return await self._listening
        except asyncio.CancelledError:
            if self._leaving:
                return None
            raise
        finally:
            self._listening = None

    async def _answered(self, event: MutableMapping[str, Any]) -> bytes | str:
        core, data = self._core, event.get("bytes")
        try:
            if data is None:
                raise BadRequestError("format", "requests are binary messages in msgpack; got a text message")
            if len(data) > core.settings.max_message_bytes:
                raise BadRequestError("size", f"a request has at most {core.settings.max_message_bytes} bytes")
            return pack(await core.answer(unpack(data), self._name, self))
        except REFUSED as error:
            core.telemetry.refused(error.reason if isinstance(error, BadRequestError) else _word(error))
            return str(error)
        except Exception as error:  # noqa: BLE001  # the border of one request: the robot hears of it, the others do not
            core.telemetry.refused("internal")
            return f"this request could not be answered ({type(error).__name__}: {error}); the connection goes on"

    async def _give(self, data: bytes | str) -> None:
        key = "bytes" if isinstance(data, bytes) else "text"
        async with asyncio.timeout(SLOW_READER_S):
            await self._send({"type": "websocket.send", key: data})


def _word(error: Exception) -> str:
    if isinstance(error, NotReadyError):
        return "not ready"
    return "no answer" if isinstance(error, NoAnswerError) else "format"


def _tokens(headers: dict[bytes, str], scope: Scope) -> list[str]:
    """The tokens that a request carries: in its header, its cookie or, for the page in a browser, its address."""
    scheme, _, given = headers.get(b"authorization", "").partition(" ")
    found = [given.strip()] if scheme.lower() in ("bearer", "api-key") else []
    cookie = SimpleCookie(headers.get(b"cookie", ""))
    found += [cookie[TOKEN_COOKIE].value] if TOKEN_COOKIE in cookie else []
    return found + (parse_qs(scope["query_string"].decode("latin-1")).get("token", []) if scope["type"] == "http" else [])


async def _refuse(scope: Scope, send: Send, status: int, text: str) -> None:
    """Refuse a connection before it is one, with an HTTP status where the server can send one."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008 if status < 500 else 1013, "reason": text})
        return
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("format", f"the body is no JSON: {error}") from None


def _as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON")
