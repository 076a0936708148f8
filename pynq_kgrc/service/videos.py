"""Classify an upload: clips from a decoder child, scores from the pool, then segments."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import msgspec
import numpy as np

from pynq_kgrc.errors import DeviceError
from pynq_kgrc.quant import Array
from pynq_kgrc.results import WindowSum
from pynq_kgrc.service import wire
from pynq_kgrc.service.catalogue import ServedProgram
from pynq_kgrc.service.jobs import Report
from pynq_kgrc.service.options import Options
from pynq_kgrc.service.pool import ClipRun, Pool
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.schemas import (
    BoardFacts,
    Classification,
    LayerFacts,
    ProgramName,
    Progress,
    Timings,
    VideoFacts,
)
from pynq_kgrc.service.settings import Settings
from pynq_kgrc.service.tensors import InferRequest
from pynq_kgrc.service.uploads import Upload
from pynq_kgrc.service.waiting import in_order, within
from pynq_kgrc.service.wire import (
    BodyRequest,
    ConfinedRequest,
    DecodeReply,
    DecodeRequest,
    LayerRun,
    ProgramDocument,
)

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}
"""Only a process with one thread may fork safely, so the numeric libraries get one thread."""

CONFINED_SECONDS = 30.0
"""Time limit for the first child; the process that forks it may still be starting."""

DIGITS = 6
"""Decimals of the confidences in an answer."""

Clips = AsyncIterator[tuple[DecodeReply, bytes]]


class Decoder:
    """The process that forks a child for each upload (a zygote); restarted if it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reading = asyncio.Lock()

    def start(self) -> None:
        """Start the process; forking a child from it takes 10 ms instead of a second."""
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
        """End the process; running children end when their pipe closes."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None

    @property
    def pid(self) -> int:
        """Process id; 0 if there is no process."""
        return 0 if self._process is None else self._process.pid

    def fork(self, request: wire.Orders, source: int, target: int) -> None:
        """Fork a child that reads from descriptor `source` and writes to `target`.

        Raises:
            DeviceError: the process does not start.
        """
        for _ in range(2):
            if self._socket is None or self._process is None or self._process.poll() is not None:
                self.start()
            assert self._socket is not None
            try:
                socket.send_fds(self._socket, [msgspec.json.encode(request)], [source, target])
                return
            except OSError:
                self.stop()
        raise DeviceError("the process that decodes videos does not start")

    @contextlib.asynccontextmanager
    async def clips(
        self, upload: Upload, request: DecodeRequest, clip_bytes: int
    ) -> AsyncIterator[Clips]:
        """The clips of an upload; the last reply, of kind `end`, has the properties of the video.

        The pipe's buffer gives back-pressure: while a clip runs on the device, the child decodes
        about two clips ahead. Leaving the context ends the child.
        """
        async with self._child(upload.open(), request, max(1 << 16, clip_bytes)) as stream:
            yield _replies(stream, request, clip_bytes)

    async def body(self, upload: Upload, request: BodyRequest) -> tuple[InferRequest, memoryview]:
        """The body of an inference request, read by a child; see `tensors.read_body`.

        One at a time, so that all of them take no more memory than one.

        Raises:
            Refusal: what is wrong with the body; 413, it takes too much time or memory.
        """
        async with self._reading, self._child(upload.open(), request, 1 << 20) as stream:
            try:
                reading = wire.read(stream, DecodeReply, request.most)
                message = await within(reading, request.seconds + 5)
            except (asyncio.TimeoutError, DeviceError):
                message = None
        if message is None:
            raise Refusal(
                413,
                f"reading this body failed, or took more than the {request.seconds:g} s or "
                f"{request.memory_bytes} bytes of memory accepted: send tensors binary",
            )
        reply, clips = message
        if reply.kind == "error":
            raise Refusal(reply.status if reply.status in (413, 415) else 400, reply.text[:500])
        return msgspec.json.decode(reply.text, type=InferRequest), memoryview(clips)

    async def confined(self) -> list[str]:
        """What a child on this machine cannot do, by trying it; see `confine.what_holds`.

        Raises:
            DeviceError: no child answers.
        """
        nothing = os.open(os.devnull, os.O_RDONLY)
        async with self._child(nothing, ConfinedRequest(), 1 << 16) as stream:
            message = await within(wire.read(stream, DecodeReply), CONFINED_SECONDS)
        if message is None:
            raise DeviceError("the process that decodes videos does not answer")
        return message[0].notes

    @contextlib.asynccontextmanager
    async def _child(
        self, source: int, request: wire.Orders, ahead: int
    ) -> AsyncIterator[asyncio.StreamReader]:
        """What a child writes that reads from `source`, which is closed here.

        `ahead` bytes are read of it before they are asked for.
        """
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        wire.enlarge_pipe(ours)
        try:
            self.fork(request, source, theirs)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(source)
            os.close(theirs)
        stream = asyncio.StreamReader(limit=ahead)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(ours, "rb", buffering=0)
        )
        try:
            yield stream
        finally:
            transport.close()


async def _replies(stream: asyncio.StreamReader, request: DecodeRequest, clip_bytes: int) -> Clips:
    """The replies of a decoder child, up to `end`.

    Raises:
        Refusal: what is wrong with the video.
    """
    began = time.monotonic()
    while True:
        try:
            reading = wire.read(stream, DecodeReply, clip_bytes)
            message = await within(reading, request.decode_seconds + 5)
        except (asyncio.TimeoutError, DeviceError):
            message = None
        if message is None:
            if time.monotonic() - began >= 0.9 * request.decode_seconds:
                why = f"took longer than the {request.decode_seconds:g} s accepted"
            else:
                why = (
                    f"failed, or took more than the {request.decode_bytes} bytes of memory accepted"
                )
            raise Refusal(422, f"decoding this video {why}")
        reply, payload = message
        if reply.kind == "error":
            raise Refusal(413 if reply.status == 413 else 422, reply.text[:500])
        if reply.kind == "clip" and len(payload) != clip_bytes:
            raise Refusal(422, "decoding this video gave a clip of another size")
        yield reply, payload
        if reply.kind == "end":
            return


def decode_request(
    program: ServedProgram, settings: Settings, options: Options, verb: str = "clips"
) -> DecodeRequest:
    """The request to a decoder child for this program.

    A video is sampled as the program says, unless the options have a sampling, or a window or
    stride, which imply "windows".
    """
    clip = program.description.clip
    spans = options.window if options.stride is None else options.stride
    return DecodeRequest(
        verb,
        clip,
        sampling=clip.chosen_sampling(options.sampling, spans),
        window=options.window,
        stride=options.stride,
        max_pixels=settings.max_pixels,
        max_seconds=settings.max_seconds,
        decode_seconds=settings.decode_seconds,
        decode_bytes=settings.decode_bytes,
    )


def check_options(program: ServedProgram, settings: Settings, options: Options) -> None:
    """Refuse a window that is shorter than the program's clip, or too long.

    Raises:
        Refusal: 422, names the accepted range.
    """
    frames = program.description.clip.frames
    if options.window is not None and not frames <= options.window <= settings.max_window:
        raise Refusal(
            422,
            f"window={options.window}; a clip of {program.name} has {frames} frames; accepted "
            f"are {frames} to {max(frames, settings.max_window)}",
        )


async def classify(
    upload: Upload,
    program: ServedProgram,
    options: Options,
    settings: Settings,
    pool: Pool,
    decoder: Decoder,
    report: Report,
) -> Classification:
    """Classify a video; `report` is called with the progress after each window.

    Raises:
        Refusal: what is wrong with the video, or why no worker can run it.
    """
    began = time.perf_counter()
    clip_bytes = int(np.prod(program.clip_shape))
    request = decode_request(program, settings, options)
    clip = program.description.clip
    windows = WindowSum(program.labels, options.top_k, clip.threshold, DIGITS)
    layers: list[LayerRun] = []
    run = waited = 0.0
    end = DecodeReply("end")
    async with decoder.clips(upload, request, clip_bytes) as replies:

        async def clips() -> Clips:
            nonlocal end
            async for reply, payload in replies:
                if reply.kind == "end":
                    end = reply
                    return
                yield reply, payload

        runs = in_order(clips(), lambda clip: pool.run(program.key, clip[1]), pool.size)
        async with contextlib.aclosing(runs):
            async for (reply, _), found in runs:
                times = round(reply.start_ms, 1), round(reply.end_ms, 1)
                windows.add(*times, probabilities_of(found))
                layers, run, waited = found.layers, run + found.seconds, waited + found.waited
                share = min(1.0, reply.end_ms / reply.declared_ms) if reply.declared_ms else None
                progress = Progress(len(windows.windows), reply.decoded, share)
                report(progress, windows.windows)
    total = time.perf_counter() - began
    recognition = windows.result(end.notes, pool.backend)
    return Classification(
        **{name: getattr(recognition, name) for name in recognition.__struct_fields__},
        program=ProgramName(program.name, program.version),
        video=video_facts(end),
        timings_ms=timings_of(total, run, waited),
        layers=layer_facts(layers, program.description),
        board=BoardFacts(
            latency_ms=program.description.modelled_ms,
            clock_mhz=program.description.modelled_clock_mhz,
            kind="modelled",
            note="of a clip, by the cost model; not measured on a board",
        ),
    )


def probabilities_of(run: ClipRun) -> Array:
    """The probabilities [classes] of a clip, float32."""
    probabilities: Array = np.frombuffer(run.scores, "<f4").reshape(2, -1)[1]
    return probabilities


def video_facts(end: DecodeReply) -> VideoFacts:
    """The properties of a video, from the decoder's last reply."""
    return VideoFacts(
        duration_ms=round(end.duration_ms, 1),
        frames=end.decoded,
        width=end.width,
        height=end.height,
        codec=end.codec,
        container=end.container,
        notes=end.notes,
    )


def timings_of(total: float, run: float, waited: float) -> Timings:
    """The document of times that are given in seconds."""
    return Timings(
        wait_for_device=round(1e3 * waited, 2),
        run=round(1e3 * run, 2),
        decode_and_rest=round(1e3 * (total - run - waited), 2),
        total=round(1e3 * total, 2),
    )


def layer_facts(layers: list[LayerRun], description: ProgramDocument) -> list[LayerFacts]:
    """The layers of a clip with their modelled time; 0 if the cost model has no such task."""
    modelled = {task.name: task.modelled_ms for task in description.tasks}
    return [
        LayerFacts(**msgspec.structs.asdict(layer), modelled_ms=modelled.get(layer.task, 0.0))
        for layer in layers
    ]
