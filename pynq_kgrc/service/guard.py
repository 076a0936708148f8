"""ASGI middleware before the application: authentication, limits, request ids, metrics and the log.

Plain ASGI, because FastAPI reads the whole body before it checks a key. A request without a key,
from a page of another origin, or with a body that is too large is answered before its body is read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pynq_kgrc.service.jobs import Admission
from pynq_kgrc.service.keys import find_key
from pynq_kgrc.service.metrics import Metrics
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.settings import Settings, is_loopback
from pynq_kgrc.service.waiting import within

log = logging.getLogger("pynq_kgrc.service")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = re.compile(
    r"/(|docs|openapi\.json|page/[a-z.]+|v2/health/(live|ready)|v2/models/[^/]+/ready)"
)
"""Paths that need no key: the page, the description of the API, and health checks."""
WORK_PATHS = re.compile(r"/v1/videos:classify|/v2/models/.+/infer")
"""Paths that need a place in the queue."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_LEFT = 499
"""Status in the log and the metrics where the client left before it was answered (as in nginx)."""
MANAGE_PATHS = re.compile(r"/v2/repository/models/.+/(load|unload)")
"""Paths that need a key that manages."""

SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        b"connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
]


def client_of(scope: Scope) -> str:
    """The address of a client; empty for this machine, and where it is not known."""
    host: str = (scope.get("client") or ("",))[0]
    return "" if is_loopback(host) else host


class Guard:
    """Wraps an ASGI application.

    Args:
        app: answers the requests that are accepted.
        settings: keys and limits.
        metrics: counts requests.
        draining: whether the service is about to stop; answers then close their connection.
        queue: if it is full, requests for work are refused here, before their body is read.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        metrics: Metrics,
        draining: Callable[[], bool],
        queue: Admission,
    ) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.draining, self.queue = draining, queue
        # DNS rebinding: without a key, accept only a Host header that names localhost
        self.local_only = is_loopback(settings.host) and not settings.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        exchange = Exchange(self, scope, receive, send)
        try:
            self.check(scope, exchange.head)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        else:
            try:
                # uvicorn leaves out the body of an answer to HEAD
                asked = {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope
                await self.app(asked, exchange.receive, exchange.send)
                scope.setdefault("route", asked.get("route"))
            except Refusal as refusal:
                if exchange.status:
                    raise
                await exchange.refuse(refusal)
        finally:
            exchange.close()

    def check(self, scope: Scope, head: dict[str, str]) -> None:
        """Refuse a request that must not reach the application.

        Raises:
            Refusal: 400, 401, 403, 413, 421, 429 or 431.
        """
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope.get("raw_path", b"")) > self.settings.max_header_bytes:
            most = self.settings.max_header_bytes
            raise Refusal(431, f"a header of more than the {most} bytes accepted", close=True)
        host = head.get("host", "")
        if self.local_only and not is_loopback(_split(f"//{host}", "Host").hostname or ""):
            raise Refusal(421, "this service answers to localhost only", close=True)
        origin = head.get("origin")
        unsafe = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if origin is not None and unsafe and _split(origin, "Origin").netloc != host:
            raise Refusal(403, "pages of another origin may not use this service", close=True)
        path = scope["path"]
        key = find_key(self.settings.keys, head)
        scope.setdefault("state", {})["key"] = key
        if self.settings.keys and not OPEN_PATHS.fullmatch(path):
            if key is None:
                raise Refusal(401, "a key is needed: Authorization: Bearer KEY", close=True)
            if MANAGE_PATHS.fullmatch(path) and not key.manages:
                raise Refusal(403, f"the key {key.name} may {key.role}, not manage", close=True)
        if "content-length" in head and "transfer-encoding" in head:  # RFC 9112, 6.3
            raise Refusal(400, "Content-Length beside Transfer-Encoding", close=True)
        length = head.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise Refusal(400, "a Content-Length that is not a number", close=True)
        if len(length) > 18 or int(length) > self.settings.max_bytes:
            raise Refusal(
                413,
                f"a body of {length[:30]} bytes; accepted are {self.settings.max_bytes}",
                close=True,
            )
        if WORK_PATHS.fullmatch(path) and unsafe:
            self.queue.check(client_of(scope))


def _split(address: str, header: str) -> SplitResult:
    """The parts of an address in a header.

    Raises:
        Refusal: 400, it is none.
    """
    try:
        return urlsplit(address)
    except ValueError:
        raise Refusal(400, f"a {header} header that is no address", close=True) from None


class Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.head = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        asked = self.head.get("x-request-id", "")
        self.id = asked if REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = self.id
        self.began = time.perf_counter()
        self.received = self.status = 0
        has_body = self.head.get("content-length", "0") != "0" or "transfer-encoding" in self.head
        self.body_done = scope["type"] == "websocket" or not has_body
        self.ended = False

    async def receive(self) -> Message:
        """The next part of the request, within a time limit (token bucket) and a size limit.

        The time limit is `body_seconds` plus a second for every `body_rate` bytes received.

        Raises:
            Refusal: 408 or 413.
        """
        if self.body_done:
            return await self._receive()
        settings = self.guard.settings
        extra = self.received / settings.body_rate
        left = settings.body_seconds + extra - (time.perf_counter() - self.began)
        try:
            message = await within(self._receive(), max(0.001, left))
        except asyncio.TimeoutError:
            raise Refusal(
                408,
                f"the body did not arrive: {self.received} bytes within "
                f"{time.perf_counter() - self.began:.0f} s",
                close=True,
            ) from None
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.body_done = not message.get("more_body", False)
            if self.received > settings.max_bytes:
                text = f"a body of more than the {settings.max_bytes} bytes accepted"
                raise Refusal(413, text, close=True)
        else:
            self.body_done = True
        return message

    async def send(self, message: Message) -> None:
        """Send the next part of the answer, with the headers that all answers have."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            headers += [(b"x-request-id", self.id.encode()), *SAFE_HEADERS]
            if self.body_done:  # nothing is left to read: it can be reused
                headers = [pair for pair in headers if pair != (b"connection", b"close")]
            named = {name for name, _ in headers}
            if b"cache-control" not in named:
                headers.append((b"cache-control", b"no-store"))
            if b"connection" not in named and (self.guard.draining() or not self.body_done):
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        elif message["type"] == "websocket.accept":
            self.status = 101
        elif message["type"] == "websocket.close" and not self.status:
            self.status = 403
        if self.scope["type"] == "websocket":  # HTTP connections have a timer in server.py
            await within(self._send(message), self.guard.settings.send_seconds)
        else:
            await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error."""
        if self.scope["type"] == "websocket":
            await self._receive()  # websocket.connect comes before any answer
            self.status = refusal.status
            await self._send({"type": "websocket.close", "code": 1008, "reason": refusal.text})
            return
        body = json.dumps({"error": refusal.text}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers.update(refusal.headers)
        coded = [(k.encode(), v.encode()) for k, v in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": coded})
        await self.send({"type": "http.response.body", "body": body})

    def close(self) -> None:
        """Count and log the request."""
        seconds = time.perf_counter() - self.began
        route = getattr(self.scope.get("route"), "path", "other")
        method = self.scope.get("method", "WEBSOCKET")
        status = self.status or CLIENT_LEFT
        metrics = self.guard.metrics
        # bounded label cardinality: unknown methods share one time series
        known = method if method in ("GET", "POST", "DELETE", "HEAD", "WEBSOCKET") else "other"
        metrics.requests.labels(route, known, str(status)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        metrics.received_bytes.inc(self.received)
        level = logging.DEBUG if route.startswith("/v2/health") else logging.INFO
        key = self.scope["state"].get("key")
        log.log(
            level,
            "request",
            extra={
                "request_id": self.id,
                "method": method,
                "path": self.scope["path"][:200],
                "status": status,
                "ms": round(1e3 * seconds, 1),
                "received": self.received,
                "client": (self.scope.get("client") or ("",))[0],
                **({} if key is None else {"key": key.name}),
            },
        )
