"""uvicorn with timeouts per connection, a throttle for bursts of requests, and graceful shutdown.

uvicorn has no timeout for a request's header (slow-loris) or for a client that does not read its
answer, and its connection limit counts idle connections. So each connection has timers here.
asyncio reads all sockets that have data before it runs anything else (head-of-line blocking): a
thousand requests in one iteration of the loop would delay all others for half a second. So
requests with a body wait in a `RequestThrottle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pynq_kgrc.errors import ConfigError
from pynq_kgrc.service.guard import App
from pynq_kgrc.service.settings import Settings

log = logging.getLogger("pynq_kgrc.service")

REQUEST_TIMEOUT = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 59\r\n"
    b'connection: close\r\n\r\n{"error": "the head of the request did not arrive in time"}'
)
BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"x-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
)
BACKLOG = 4096
"""Connections that the kernel queues until they are accepted."""
ACCEPTS_PER_TURN = 32
"""Connections accepted in one iteration of the event loop."""
REQUESTS_PER_TURN = 8
"""Requests with a body that start in one iteration of the event loop; each takes about 1 ms."""
HEAD_BYTES = 1 << 14
"""Bytes that are read of a request before the throttle lets it proceed."""
READ_BYTES = 1 << 18
"""Size of the read buffer that all connections share."""
LINGER_SECONDS = 5.0
LINGER_BYTES = 10_000_000
"""A lingering close reads the rest of a refused body for at most this time and size."""
MAX_WEBSOCKET_MESSAGE = 4_000_000
"""Largest message on a WebSocket (a JPEG image), in bytes."""


class LingeringTransport:
    """A transport with a lingering close: it reads what the client still sends, then closes.

    If it closed at once, a client that sends its whole body before it reads would get a connection
    reset instead of the answer. The bytes that arrive are discarded unparsed.
    """

    def __init__(self, transport: asyncio.Transport, body_arrived: Callable[[], bool]) -> None:
        self._transport, self._body_arrived = transport, body_arrived
        self.discarded: int | None = None
        """Bytes discarded since the close began; None before it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more can be sent."""
        return self.discarded is not None or self._transport.is_closing()

    def close(self) -> None:
        """Close; if the body has not arrived, send EOF and discard input for a limited time.

        TLS cannot send EOF and go on reading: there the client sees the end of the answer only.
        """
        if self.is_closing():
            return
        if self._body_arrived():
            self._transport.close()
            return
        self.discarded = 0
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)

    def discard(self, count: int) -> None:
        """Count discarded bytes; abort the connection if they are too many."""
        self.discarded = (self.discarded or 0) + count
        if self.discarded > LINGER_BYTES:
            self._transport.abort()


class RequestThrottle:
    """A FIFO queue of requests, of which a few proceed in each iteration of the event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def wait(self, enter: Callable[[], None]) -> None:
        """Queue a callback that lets a request proceed."""
        self._waiting.append(enter)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._open)

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(min(REQUESTS_PER_TURN, len(self._waiting))):
            loop.call_soon(self._waiting.popleft())
        if self._waiting:
            loop.call_soon(self._open)


class TimedProtocol(H11Protocol, asyncio.BufferedProtocol):
    """HTTP/1.1 with time limits for a request's header and for a client that does not read.

    A connection that exceeds a limit is closed.
    """

    header_seconds = 10.0
    send_seconds = 30.0
    throttle: RequestThrottle
    buffer: memoryview
    """Shared by all connections: the data is copied out before another connection reads."""
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _held_data: bytes | None = None
    _upgraded = False
    """Whether the connection has become a WebSocket, which has time limits of its own."""
    _lingering: LingeringTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timer for the first header."""
        self._lingering = LingeringTransport(cast(asyncio.Transport, transport), self._body_arrived)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        self._start_timer()

    def _body_arrived(self) -> bool:
        """Whether the request's body has arrived completely, or it has none."""
        return self.conn.their_state is not h11.SEND_BODY

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def get_buffer(self, sizehint: int) -> memoryview:
        """The buffer for the next read: a small one until the throttle lets the request proceed."""
        waiting = self._is_idle() and self._lingering.discarded is None
        return self.buffer[:HEAD_BYTES] if waiting else self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process `nbytes` new bytes; a new request other than GET waits in the throttle."""
        if self._lingering.discarded is not None:
            self._lingering.discard(nbytes)
            return
        data = bytes(self.buffer[:nbytes])
        if self._is_idle() and not data.startswith(b"GET "):
            self._held_data = data
            self.transport.pause_reading()
            self.throttle.wait(self._proceed)
        else:
            self.data_received(data)

    def _proceed(self) -> None:
        data, self._held_data = self._held_data, None
        if data is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        """Stop the timer when the header is complete; start it when another request begins."""
        super().data_received(data)
        if self._upgraded or not self._is_idle():
            self._stop_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_timer()

    def shutdown(self) -> None:
        """Let a waiting request proceed, then shut down."""
        self._proceed()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP/1.1, in JSON as all errors are; uvicorn answers in plain text."""
        body = json.dumps({"error": f"not a request of HTTP/1.1: {msg}"}).encode()
        self.transport.write(BAD_REQUEST % len(body) + body)
        self.transport.close()

    def pause_writing(self) -> None:
        """The write buffer is full (back-pressure): start the timer for the client to read."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again: stop its timer."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection becomes a WebSocket: stop the timer for the header."""
        super().handle_websocket_upgrade(event)
        self._upgraded = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_timer()
        if self._send_timer is not None:
            self._send_timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_seconds, self._header_timed_out)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _header_timed_out(self) -> None:
        self._head_timer = None
        if self._held_data is not None:  # the throttle delayed it, not the client
            self._start_timer()
        elif self._is_idle() and not self.transport.is_closing():
            if self.conn.trailing_data[0]:
                self.transport.write(REQUEST_TIMEOUT)
            self.transport.close()


class Server(uvicorn.Server):
    """A server with connection draining.

    SIGTERM makes the service not ready at once. After `drain_seconds` it accepts no connections,
    and it ends when all requests are answered.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float) -> None:
        super().__init__(config)
        self.drain_seconds = drain_seconds
        self._stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with a long queue, but accept only a few connections per iteration of the loop.

        uvicorn takes one number for both.
        """
        await super().startup(sockets)
        for bound in sockets or []:
            bound.listen(BACKLOG)

    @property
    def draining(self) -> bool:
        """Whether the service is shutting down."""
        return self._stop_at is not None or self.should_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """On SIGTERM and SIGINT stop the server, not the process: other parts must be closed.

        A server in a thread other than the main one gets no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts draining, a second one stops at once."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; uvicorn calls this ten times a second."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        ConfigError: the address is in use, or does not belong to this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sets TCP_NODELAY only on a socket whose protocol is given explicitly
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return bound


def make_server(app: App, settings: Settings, **options: Any) -> Server:
    """A server for this application; `serve(sockets=[...])` runs it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    shared = {
        "header_seconds": settings.header_seconds,
        "send_seconds": settings.send_seconds,
        "throttle": RequestThrottle(),
        "buffer": memoryview(bytearray(READ_BYTES)),
    }
    protocol = type("Timed", (TimedProtocol,), shared)
    certificate, key = settings.tls or (None, None)
    config = uvicorn.Config(
        app,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        http=protocol,
        ws="websockets-sansio",
        ws_max_size=MAX_WEBSOCKET_MESSAGE,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(settings.grace_seconds),
        backlog=ACCEPTS_PER_TURN,
        # a proxy on this machine says who the client is, in X-Forwarded-For
        proxy_headers=True,
        forwarded_allow_ips="127.0.0.1,::1",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        **options,
    )
    return Server(config, settings.drain_seconds)
