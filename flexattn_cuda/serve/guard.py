"""What is decided before a request is read: who asks, how many ask, and how much they may send."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.metrics import Metrics

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_MAX_VALUES = 100_000  # in a JSON body; images are single values, so only an attack has more
_DRAINED = 4  # times the limit of a body are read and dropped, so that the client gets to read the refusal


@dataclass(frozen=True)
class Limits:
    """What requests may be.

    Attributes:
        token: That a client must send; None: none, and then only loopback names are served.
        max_bytes: Maximum size of a body.
        max_pending_bytes: Maximum size of the bodies of all requests that are not answered.
        max_requests: Maximum number of requests to the model at a time.
        timeout: Seconds in which a body must arrive.
    """

    token: str | None
    max_bytes: int
    max_pending_bytes: int
    max_requests: int
    timeout: float


class Guard:
    """ASGI middleware that passes on what is within the limits, with its whole body, and counts responses.

    Args:
        app: The application.
        limits: What is passed on.
        metrics: Counters.
        open_paths: Paths that need no token: what holds nothing secret.
        known_paths: Paths that are counted by name.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, open_paths: frozenset[str], known_paths: frozenset[str]
    ):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._open, self._known = open_paths, known_paths
        self._requests = self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, path = time.monotonic(), scope["path"] if scope["path"] in self._known else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            await self._guarded(scope, receive, counted)
        except RequestError as error:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, counted)
        self._metrics.seconds.labels(path).observe(time.monotonic() - begun)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        if scope["path"] not in self._open:
            self._check_token(headers)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        if self._requests >= self._limits.max_requests:
            raise RequestError("the server is busy; try again in a moment", status=503, code="busy")
        self._requests += 1
        taken = 0
        try:
            declared = headers.get("content-length", "")
            body = await self._body(receive, int(declared) if declared.isdecimal() else 0)
            taken = len(body)
            await self._app(scope, _replayed(body, receive), send)
        finally:
            self._requests -= 1
            self._pending -= taken

    def _check_host(self, headers: Headers) -> None:
        """Without a token, refuse other names than this machine's own: a web page may have any name lead here."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
        if self._limits.token is None and name.lower() not in LOOPBACK_NAMES:
            raise RequestError(
                "this server answers to localhost alone; start it with a token to use another name",
                status=403,
                code="host_not_allowed",
            )

    def _check_token(self, headers: Headers) -> None:
        if self._limits.token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._limits.token.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(
                "the token is missing or wrong; send the server's token as the API key",
                status=401,
                code="invalid_api_key",
            )

    async def _body(self, receive: Receive, declared: int) -> bytes:
        """Return the body; its size is pending from then on.

        Raises:
            RequestError: If it is too large or too slow, or there is too much of others.
        """
        try:
            body = await asyncio.wait_for(self._received(receive, declared), self._limits.timeout)
        except asyncio.TimeoutError:
            raise RequestError("the request did not arrive in time", status=408, code="timeout") from None
        try:
            if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
                raise RequestError(f"the request holds more than {_MAX_VALUES} values", status=413)
        except RequestError:
            self._pending -= len(body)
            raise
        return body

    async def _received(self, receive: Receive, declared: int) -> bytes:
        limit = self._limits.max_bytes
        body, size, complete = bytearray(), 0, False
        try:
            while not complete and size <= _DRAINED * limit and declared <= _DRAINED * limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError("the client went away", status=499)
                chunk = message.get("body", b"")
                size += len(chunk)
                complete = not message.get("more_body", False)
                if size > limit:
                    continue
                self._pending += len(chunk)
                body += chunk
                if self._pending > self._limits.max_pending_bytes:
                    raise RequestError("the server holds as many requests as it may", status=503, code="busy")
            if not complete or size > limit:
                raise RequestError(
                    f"the request has more than the {limit} bytes that are allowed; send a smaller image",
                    status=413,
                    code="request_too_large",
                )
        except BaseException:
            self._pending -= len(body)
            raise
        return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that begins with a body that has been read."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
