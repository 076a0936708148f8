"""uvicorn with what it lacks: limits of time, an open ear in a crowd, and a polite end.

uvicorn waits for ever for a request's head, and for a client that does not read its answer; its
limit of connections counts those that send nothing. So each connection has timers here. And the
loop reads whatever has arrived before it goes on: a thousand requests in one turn would hold up
everybody else for half a second. So those that bring a body wait at a `RequestThrottle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
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
BACKLOG = 4096
"""Connections that may wait to be accepted."""
ACCEPTS_PER_TURN = 32
"""Connections accepted in one turn of the loop."""
REQUESTS_PER_TURN = 8
"""Requests with a body that are let in in one turn of the loop; each takes about 1 ms."""
HEAD_BYTES = 1 << 14
"""So much is read of a request before it is let in."""
READ_BYTES = 1 << 18
LINGER_SECONDS = 5.0
LINGER_BYTES = 10_000_000
"""So much of a refused body is taken."""
MAX_WEBSOCKET_MESSAGE = 4_000_000
"""Of a message on a WebSocket: a JPEG image."""


class LingeringTransport:
    """A transport that, told to close, first takes what the client is still sending.

    A client that sends its whole body before it listens would otherwise hear of a reset instead of
    the answer. What arrives is thrown away before anything looks at it.
    """

    def __init__(self, transport: asyncio.Transport, body_arrived: Callable[[], bool]) -> None:
        self._transport, self._body_arrived = transport, body_arrived
        self.discarded: int | None = None
        """Bytes since the answer; none before it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more can be said."""
        return self.discarded is not None or self._transport.is_closing()

    def close(self) -> None:
        """Close; if the client is still sending, say so and wait until it is done."""
        if self.is_closing():
            return
        if self._body_arrived():
            self._transport.close()
            return
        self.discarded = 0
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)

    def discard(self, count: int) -> None:
        """Bytes that nobody wants."""
        self.discarded = (self.discarded or 0) + count
        if self.discarded > LINGER_BYTES:
            self._transport.abort()


class RequestThrottle:
    """Lets requests in, a few in each turn of the loop, first come first served."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def wait(self, enter: Callable[[], None]) -> None:
        """Have this called when it is its turn."""
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
    """HTTP/1.1 whose heads arrive and whose answers leave in time, or the connection is closed."""

    header_seconds = 10.0
    send_seconds = 30.0
    throttle: RequestThrottle
    buffer: memoryview
    """One for all connections: what is read into it is copied before the next one reads."""
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _held_data: bytes | None = None
    _lingering: LingeringTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the time for the first head."""
        self._lingering = LingeringTransport(cast(asyncio.Transport, transport), self._body_has_arrived)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        self._start_timer()

    def _body_has_arrived(self) -> bool:
        return self.conn.their_state is not h11.SEND_BODY

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: few of them before the request is let in."""
        outside = self._is_idle() and self._lingering.discarded is None
        return self.buffer[:HEAD_BYTES] if outside else self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes have arrived; those that begin a request with a body wait at the throttle."""
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
        """Stop the time if the head is whole, start it if another one begins."""
        super().data_received(data)
        if not self._is_idle():
            self._stop_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_timer()

    def shutdown(self) -> None:
        """Who is at the door is still let in."""
        self._proceed()
        super().shutdown()

    def pause_writing(self) -> None:
        """The client reads too slowly: start its time."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection is no longer HTTP."""
        super().handle_websocket_upgrade(event)
        self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for."""
        self._stop_timer()
        if self._send_timer is not None:
            self._send_timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._held_data is not None:  # not the client's fault
            self._start_timer()
        elif self._is_idle() and not self.transport.is_closing():
            if self.conn.trailing_data[0]:
                self.transport.write(REQUEST_TIMEOUT)
            self.transport.close()


class Server(uvicorn.Server):
    """On SIGTERM not ready at once, deaf after `drain_seconds`, gone when all is answered."""

    def __init__(self, config: uvicorn.Config, drain_seconds: float) -> None:
        super().__init__(config)
        self.drain_seconds = drain_seconds
        self._stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept a few connections a turn, though many may wait: who is there already goes on."""
        await super().startup(sockets)
        for bound in sockets or []:
            bound.listen(BACKLOG)

    @property
    def draining(self) -> bool:
        """Whether the end is near."""
        return self._stop_at is not None or self.should_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the service, not the process: there is more to close than this."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one hurries it."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; asked ten times a second."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to.

    Raises:
        ConfigError: the address is taken, or not ours.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends small answers at once only where the protocol is named
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
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="websockets-sansio",
        ws_max_size=MAX_WEBSOCKET_MESSAGE,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(settings.grace_seconds),
        backlog=ACCEPTS_PER_TURN,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        **options,
    )
    return Server(config, settings.drain_seconds)
