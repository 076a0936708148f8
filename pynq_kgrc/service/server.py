"""uvicorn with what it lacks: time for the head of a request, and a polite end.

uvicorn waits for ever for a request's head, and its limit of connections counts those that send
nothing; so each connection has a timer here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
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

TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 59\r\n"
    b'connection: close\r\n\r\n{"error": "the head of the request did not arrive in time"}'
)
BACKLOG = 4096
"""Connections that may wait to be accepted."""
AT_ONCE = 32
"""Connections accepted in one turn of the loop."""
LINGER_SECONDS = 5.0
LINGER_BYTES = 10_000_000
"""So much of a refused body is taken."""
MAX_SOCKET = 4_000_000
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

    def discard(self, data: bytes) -> None:
        """Count what nobody wants."""
        self.discarded = (self.discarded or 0) + len(data)
        if self.discarded > LINGER_BYTES:
            self._transport.abort()


class TimedProtocol(H11Protocol):
    """HTTP/1.1 whose heads arrive in time, or the connection is closed."""

    header_seconds = 10.0
    _head_timer: asyncio.TimerHandle | None = None
    _lingering: LingeringTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the time for the first head."""
        self._lingering = LingeringTransport(cast(asyncio.Transport, transport), self._has_body)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        self._start_timer()

    def _has_body(self) -> bool:
        return self.conn.their_state is not h11.SEND_BODY

    def data_received(self, data: bytes) -> None:
        """Stop the time if the head is whole, start it if another one begins."""
        if self._lingering.discarded is not None:
            self._lingering.discard(data)
            return
        super().data_received(data)
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting:
            self._stop_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection is no longer HTTP."""
        super().handle_websocket_upgrade(event)
        self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for."""
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self.transport.is_closing():
            if self.conn.trailing_data[0]:
                self.transport.write(TOO_SLOW)
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
    protocol = type("Timed", (TimedProtocol,), {"header_seconds": settings.header_seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="websockets-sansio",
        ws_max_size=MAX_SOCKET,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(settings.grace_seconds),
        backlog=AT_ONCE,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        **options,
    )
    return Server(config, settings.drain_seconds)
