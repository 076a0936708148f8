"""Webcams: JPEG images arrive over a WebSocket, predictions for the last frames are sent back.

Images are not queued: of the images that arrive while one is decoded, only the newest is kept and
the others are counted as dropped. A prediction is made whenever a worker is idle and there is a
new frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from typing import Any

import msgspec
import numpy as np
from fastapi import WebSocket, WebSocketDisconnect

from pynq_kgrc.errors import KgrcError
from pynq_kgrc.results import best_labels, is_unsure
from pynq_kgrc.service import wire
from pynq_kgrc.service.catalogue import ServedProgram
from pynq_kgrc.service.metrics import Metrics
from pynq_kgrc.service.options import Options
from pynq_kgrc.service.pool import Pool
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.settings import Settings
from pynq_kgrc.service.videos import DIGITS, Decoder, decode_request, probabilities_of
from pynq_kgrc.service.waiting import within
from pynq_kgrc.service.wire import DecodeReply

IDLE_SECONDS = 30.0
"""A session is closed after this time without an image."""
MAX_SECONDS = 4 * 3600.0
"""A session is closed after this time."""
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013
"""Close codes of RFC 6455 and its registry."""


class LiveSession:
    """The session of one webcam."""

    def __init__(
        self,
        client: WebSocket,
        program: ServedProgram,
        settings: Settings,
        pool: Pool,
        decoder: Decoder,
        metrics: Metrics,
        options: Options,
    ) -> None:
        self.client, self.program, self.pool = client, program, pool
        self.top_k = options.top_k
        self.metrics = metrics
        self.request = decode_request(program, settings, options, "frames")
        self.decoder = decoder
        frames, *picture = program.clip_shape
        self.frame_bytes = int(np.prod(picture))
        self.clip: deque[bytes] = deque(maxlen=frames)
        self.newest: bytes | None = None
        self.received = self.dropped = self.decoded = 0
        self.image_ready, self.frame_ready = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Serve the client until it disconnects.

        Raises:
            KgrcError: why the session ended.
        """
        await self.client.send_json(
            {
                "type": "ready",
                "program": self.program.name,
                "frames": self.clip.maxlen,
                "backend": self.pool.backend,
            }
        )
        tasks = [
            asyncio.ensure_future(part())
            for part in (self._receive_images, self._decode_images, self._predict)
        ]
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=MAX_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive_images(self) -> None:
        while True:
            message = await within(self.client.receive(), IDLE_SECONDS)
            if message["type"] == "websocket.disconnect":
                return
            image = message.get("bytes")
            if image is None:
                raise Refusal(400, "text on a live session; send each frame as a JPEG image")
            self.received += 1
            if self.newest is not None:
                self.dropped += 1
                self.metrics.live_frames.labels("dropped").inc()
            self.newest = image
            self.image_ready.set()

    async def _decode_images(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.decoder.fork(self.request, theirs.fileno(), theirs.fileno())
        stream, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        try:
            while True:
                await self.image_ready.wait()
                self.image_ready.clear()
                image, self.newest = self.newest, None
                if image is None:
                    continue
                writer.write(wire.pack_head({}, len(image)) + image)
                await writer.drain()
                reading = wire.read(stream, DecodeReply, self.frame_bytes)
                answer = await within(reading, self.request.decode_seconds + 5)
                if answer is None:
                    raise Refusal(422, "decoding a frame took too long, or too much memory")
                piece, pixels = answer
                if piece.kind == "error" or len(pixels) != self.frame_bytes:
                    raise Refusal(422, piece.text or "a frame of another size")
                self.decoded += 1
                self.metrics.live_frames.labels("decoded").inc()
                self.clip.append(pixels)
                self.frame_ready.set()
        finally:
            writer.close()

    async def _predict(self) -> None:
        need = self.clip.maxlen or 1
        while True:
            await self.frame_ready.wait()
            self.frame_ready.clear()
            counts = {"received": self.received, "dropped": self.dropped}
            if len(self.clip) < need:
                filling: dict[str, Any] = {"type": "filling", "have": len(self.clip)}
                await self.client.send_json({**filling, "need": need, **counts})
                continue
            began = time.perf_counter()
            found = await self.pool.run(self.program.key, b"".join(self.clip))
            probabilities = probabilities_of(found)
            labels = best_labels(probabilities, self.program.labels, self.top_k, DIGITS)
            threshold = self.program.description.clip.threshold
            await self.client.send_json(
                {
                    "type": "prediction",
                    "labels": msgspec.to_builtins(labels),
                    "unsure": is_unsure(probabilities, threshold),
                    "run_ms": round(1e3 * found.seconds, 1),
                    "latency_ms": round(1e3 * (time.perf_counter() - began), 1),
                    "received": self.received,
                    "dropped": self.dropped,
                }
            )


async def serve_live(session: LiveSession) -> None:
    """Run a session, and send the client the reason if it ends with an error."""
    try:
        await session.run()
    except (WebSocketDisconnect, ConnectionError):
        return
    except asyncio.TimeoutError:
        await refuse_live(session.client, Refusal(408, f"no frame for {IDLE_SECONDS:g} s"))
    except KgrcError as error:
        await refuse_live(session.client, refusal_of(error))


async def refuse_live(client: WebSocket, refusal: Refusal) -> None:
    """Send the client the reason and close; nothing if it has disconnected."""
    with contextlib.suppress(WebSocketDisconnect, ConnectionError, RuntimeError):
        text = {"type": "error", "status": refusal.status, "error": refusal.text}
        await client.send_json(text)
        await client.close(TRY_AGAIN_LATER if refusal.status in (429, 503) else POLICY_VIOLATION)
