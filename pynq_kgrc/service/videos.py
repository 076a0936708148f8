"""From an upload to actions: clips from a child that decodes, through the pool, to segments."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec
import numpy as np

from pynq_kgrc.errors import DeviceError
from pynq_kgrc.service import wire
from pynq_kgrc.service.catalogue import ServedProgram
from pynq_kgrc.service.pool import Pool
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.settings import Settings
from pynq_kgrc.service.uploads import Upload
from pynq_kgrc.service.waiting import within
from pynq_kgrc.service.wire import DecodeRequest, DecodeReply

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}
"""A child is forked, and what is forked must have one thread."""

Clips = AsyncIterator[tuple[DecodeReply, bytes]]


class Decoder:
    """The process that forks a child for each upload; started anew if it is gone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the process; a child takes 10 ms from then on instead of a second."""
        self.stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pynq_kgrc.service.decode", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                start_new_session=True,
            )
        ours.settimeout(5.0)
        self._socket = ours

    def stop(self) -> None:
        """End it; children that are at work end with their pipe."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None

    @property
    def pid(self) -> int:
        """Of the process; 0 if there is none."""
        return 0 if self._process is None else self._process.pid

    def fork(self, request: DecodeRequest, source: int, target: int) -> None:
        """A child that reads from one descriptor and writes to the other.

        Raises:
            DeviceError: there cannot be one.
        """
        for _ in range(2):
            if self._socket is None or self._process is None or self._process.poll() is not None:
                self.start()
            assert self._socket is not None
            try:
                socket.send_fds(self._socket, [msgspec.json.encode(job)], [source, target])
                return
            except OSError:
                self.stop()
        raise DeviceError("the process that decodes videos does not start")

    @contextlib.asynccontextmanager
    async def clips(self, upload: Upload, request: DecodeRequest, clip_bytes: int) -> AsyncIterator[Clips]:
        """The clips of an upload, and last the piece that says what the video was.

        While one is looked at, the next two are decoded; leaving the context ends the child.
        """
        source = upload.open()
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        wire.enlarge_pipe(ours)
        try:
            self.fork(job, source, theirs)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(source)
            os.close(theirs)
        stream = asyncio.StreamReader(limit=max(1 << 16, clip_bytes))
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(ours, "rb", buffering=0)
        )
        try:
            yield _pieces(stream, job, clip_bytes)
        finally:
            transport.close()


async def _pieces(stream: asyncio.StreamReader, request: DecodeRequest, clip_bytes: int) -> Clips:
    """Clips and the end.

    Raises:
        Refusal: what was wrong with the video.
    """
    began = time.monotonic()
    while True:
        try:
            reading = wire.read(stream, DecodeReply, clip_bytes)
            message = await within(reading, job.decode_seconds + 5)
        except (asyncio.TimeoutError, DeviceError):
            message = None
        if message is None:
            if time.monotonic() - began >= 0.9 * job.decode_seconds:
                why = f"took longer than the {job.decode_seconds:g} s accepted"
            else:
                why = f"failed, or took more than the {job.decode_bytes} bytes of memory accepted"
            raise Refusal(422, f"decoding this video {why}")
        piece, payload = message
        if piece.kind == "error":
            raise Refusal(413 if piece.status == 413 else 422, piece.text[:500])
        if piece.kind == "clip" and len(payload) != clip_bytes:
            raise Refusal(422, "decoding this video gave a clip of another size")
        yield piece, payload
        if piece.kind == "end":
            return


class Options(msgspec.Struct, frozen=True):
    """What a client may choose."""

    top_k: int = 5
    window: int | None = None
    stride: int | None = None
    program: str | None = None
    sampling: Literal["windows", "uniform"] = "windows"


def decode_request(program: ServedProgram, settings: Settings, options: Options, verb: str = "clips") -> DecodeRequest:
    """The order for a child."""
    clip = program.description["clip"]
    return DecodeRequest(
        verb,
        frames=clip["frames"],
        height=clip["height"],
        width=clip["width"],
        short_side=clip["short_side"],
        step=clip["step"],
        window=options.window,
        stride=options.stride,
        uniform=options.sampling == "uniform",
        max_pixels=settings.max_pixels,
        max_seconds=settings.max_seconds,
        decode_seconds=settings.decode_seconds,
        decode_bytes=settings.decode_bytes,
    )


def check_options(program: ServedProgram, settings: Settings, options: Options) -> None:
    """Refuse a window that the program's clip does not fit in, or that is too long.

    Raises:
        Refusal: 422, names what is accepted.
    """
    frames = program.description["clip"]["frames"]
    if options.window is not None and not frames <= options.window <= settings.max_window:
        raise Refusal(
            422,
            f"window={options.window}; {program.name} looks at {frames} frames, so that accepted "
            f"are {frames} to {max(frames, settings.max_window)}",
        )


async def classify(
    upload: Upload,
    program: ServedProgram,
    options: Options,
    settings: Settings,
    pool: Pool,
    decoder: Decoder,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """What a video shows, as it is answered to the client (docs/service.md); `report` hears of
    the progress after each window.

    Raises:
        Refusal: what was wrong.
    """
    began = time.perf_counter()
    clip_bytes = int(np.prod(program.clip_shape))
    job = decode_request(program, settings, options)
    windows: list[tuple[DecodeReply, Any]] = []
    layers: list[dict[str, Any]] = []
    run = waited = 0.0
    end = DecodeReply("end")
    async with decoder.clips(upload, job, clip_bytes) as pieces:
        async for piece, payload in pieces:
            if piece.kind == "end":
                end = piece
                break
            found = await pool.run(program.key, payload)
            scores = np.frombuffer(found.values, "<f4").reshape(2, -1)[1]
            windows.append((piece, scores))
            layers, run, waited = found.layers, run + found.seconds, waited + found.waited
            share = min(1.0, piece.decoded / piece.declared) if piece.declared else None
            report({"windows": len(windows), "frames": piece.decoded, "share": share})
    total = time.perf_counter() - began
    mean = np.mean([scores for _, scores in windows], axis=0)
    modelled = {row["name"]: row["modelled_ms"] for row in program.description["tasks"]}
    return {
        "program": {"name": program.name, "version": program.version},
        "backend": pool.backend,
        "video": {
            "duration_ms": round(end.duration_ms, 1),
            "frames": end.decoded,
            "width": end.width,
            "height": end.height,
            "codec": end.codec,
            "container": end.container,
            "notes": end.notes,
        },
        "labels": best(mean, program.labels, options.top_k),
        "segments": merge([(p.start_ms, p.end_ms, s) for p, s in windows], program.labels),
        "windows": [
            {
                "start_ms": round(piece.start_ms, 1),
                "end_ms": round(piece.end_ms, 1),
                "labels": best(scores, program.labels, options.top_k),
            }
            for piece, scores in windows
        ],
        "timings_ms": {
            "wait_for_device": round(1e3 * waited, 2),
            "run": round(1e3 * run, 2),
            "decode_and_rest": round(1e3 * (total - run - waited), 2),
            "total": round(1e3 * total, 2),
        },
        "layers": [{**layer, "modelled_ms": modelled.get(layer["task"], 0.0)} for layer in layers],
        "board": {
            "latency_ms": program.description["modelled_ms"],
            "clock_mhz": program.description["modelled_clock_mhz"],
            "kind": "modelled",
            "note": "of a clip, by the cost model; not measured on a board",
        },
    }


def best(scores: Any, labels: list[str], count: int) -> list[dict[str, Any]]:
    """The best labels with their probabilities, the best first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return [{"label": labels[i], "confidence": round(float(scores[i]), 6)} for i in order]


def merge(windows: list[tuple[float, float, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """Windows in a row with the same best label as one segment.

    Where windows overlap, the border between two segments is the middle of the overlap.

    Args:
        windows: start_ms, end_ms, and probabilities [classes].
        labels: a name for each class.
    """
    runs: list[list[tuple[float, float, float, int]]] = []
    for start, end, scores in windows:
        top = int(np.argmax(scores))
        if not runs or runs[-1][0][3] != top:
            runs.append([])
        runs[-1].append((start, end, float(scores[top]), top))
    segments = []
    for i, run in enumerate(runs):
        start, end = run[0][0], run[-1][1]
        if i > 0:
            start = max(start, (start + runs[i - 1][-1][1]) / 2)
        if i + 1 < len(runs):
            end = min(end, (end + runs[i + 1][0][0]) / 2)
        segments.append(
            {
                "label": labels[run[0][3]],
                "confidence": round(sum(window[2] for window in run) / len(run), 6),
                "start_ms": round(start, 1),
                "end_ms": round(end, 1),
            }
        )
    return segments
