"""Decodes untrusted videos in forked children: `python -m pynq_kgrc.service.decode FD`.

Large bodies of inference requests are read in such children too.

The process (a zygote) imports what decoding needs, and forks a child for each message on the
socket FD. A child gets two descriptors: the upload (an unnamed file) and a pipe for the clips. It
sets its resource limits, confines itself (`confine.py`), decodes, and ends. FFmpeg reads from the
descriptor and has no protocol to open files with: a playlist named as a video has no effect.
"""

from __future__ import annotations

import gc
import io
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import BinaryIO

import av
import msgspec
import numpy as np

from pynq_kgrc.errors import VideoError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.service import wire
from pynq_kgrc.service.confine import confine, what_holds
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.tensors import read_body
from pynq_kgrc.service.wire import BodyRequest, ConfinedRequest, DecodeReply, DecodeRequest
from pynq_kgrc.video import CODECS, Limits, TooLarge, Video, decode_jpeg, sample

HARD_SECONDS = 10.0
"""A child is killed that long after it should have stopped by itself."""

SMALLEST_GIF = (
    b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
)
"""A video of one frame of one pixel."""


def open_video(
    file: BinaryIO, request: DecodeRequest, check: Callable[[], None] = lambda: None
) -> Video:
    """An upload, within the limits of a request; `check` is called before each frame.

    Raises:
        VideoError: not a video that is accepted, and why.
    """
    limits = Limits(
        max_pixels=request.max_pixels,
        max_seconds=request.max_seconds,
        decode_seconds=request.decode_seconds,
    )
    return Video(file, request.clip, limits, codecs=CODECS, check=check)


def send_clips(file: BinaryIO, out: BinaryIO, request: DecodeRequest, timer: Timer) -> None:
    """Decode an upload and send a reply for each clip, then one of kind `end`."""
    video = open_video(file, request, check=check_reader(out))
    spans = sample(video, request.sampling, request.window, request.stride)
    for number, span in enumerate(spans):
        head = DecodeReply(
            "clip",
            number=number,
            start_ms=span.start_ms,
            end_ms=span.end_ms,
            decoded=video.count,
            declared_ms=video.declared_ms,
        )
        with timer.paused():  # the pipe may block while the device is busy
            wire.send(out, head, np.stack(span.pixels).tobytes())
    end = DecodeReply(
        "end",
        decoded=video.count,
        declared_ms=video.declared_ms,
        duration_ms=video.end_ms,
        width=video.size[0],
        height=video.size[1],
        codec=video.codec,
        container=video.format,
        notes=video.notes,
    )
    wire.send(out, end)


def check_reader(out: BinaryIO) -> Callable[[], None]:
    """A function that raises BrokenPipeError once the reader of the pipe has closed it."""
    poller = select.poll()
    poller.register(out, 0)  # POLLERR is reported without being asked for

    def check() -> None:
        if poller.poll(0):
            raise BrokenPipeError

    return check


def send_frames(images: BinaryIO, out: BinaryIO, request: DecodeRequest, timer: Timer) -> None:
    """Decode each JPEG image of a live session to a frame [H, W, 3] RGB."""
    while True:
        with timer.paused():
            message = wire.receive(images, dict)
        if message is None:
            return
        timer.restart()
        try:
            frame = decode_jpeg(message[1], request.clip, request.max_pixels)
        except VideoError as error:
            wire.send(out, DecodeReply("error", text=str(error)))
            continue
        wire.send(out, DecodeReply("frame"), frame.tobytes())


# ---- the child's limits ---------------------------------------------------------------------


class Timer:
    """Time limit on the clock: when it expires, SIGALRM ends the process."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self.restart()

    def restart(self) -> None:
        """Start the time limit again."""
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def paused(self) -> Pause:
        """A context in which the time limit does not run."""
        return Pause()


class Pause:
    """Stops the timer; afterwards it continues with the time that was left."""

    def __enter__(self) -> None:
        self.left = signal.setitimer(signal.ITIMER_REAL, 0)[0]

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self.left))


def limit_process(memory: int, seconds: float, processor_time: bool) -> Timer:
    """Limit memory, processor time and open files of this process, and confine it.

    See `confine.py` for what a child may not do.
    """
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    most = used + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if processor_time:
        whole = max(1, round(seconds))
        resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    confine()
    return Timer(seconds)


def run_child(source: int, target: int, request: wire.Orders) -> None:
    """The main function of a child."""
    out = os.fdopen(target, "wb")
    if isinstance(request, ConfinedRequest):
        confine()
        wire.send(out, DecodeReply("confined", notes=what_holds()))
    elif isinstance(request, BodyRequest):
        read_inference(source, out, request)
    else:
        decode(source, out, request)


def read_inference(source: int, out: BinaryIO, request: BodyRequest) -> None:
    """Send the JSON part and the clips of the body of an inference request."""
    limit_process(request.memory_bytes, request.seconds, processor_time=True)
    try:
        with os.fdopen(source, "rb") as file:
            inference, clips = read_body(file.read(request.most + 1), request)
        reply, payload = DecodeReply("body", text=msgspec.json.encode(inference).decode()), clips
    except Refusal as refusal:
        reply = DecodeReply("error", status=refusal.status, text=refusal.text)
        payload = memoryview(b"")
    except MemoryError:
        text = f"reading this body takes more than the {request.memory_bytes} bytes accepted"
        reply = DecodeReply("error", status=413, text=f"{text}: send tensors binary")
        payload = memoryview(b"")
    wire.send(out, reply, payload)


def decode(source: int, out: BinaryIO, request: DecodeRequest) -> None:
    """Decode a video, or the images of a live session."""
    verbs: dict[str, Callable[[BinaryIO, BinaryIO, DecodeRequest, Timer], None]] = {
        "clips": send_clips,
        "frames": send_frames,
    }
    try:
        # a live session has no limit of processor time, but a timer for each image
        limited = request.verb == "clips"
        # a video may be decoded twice, within its own limit each time
        seconds = 2 * request.decode_seconds + HARD_SECONDS if limited else request.decode_seconds
        timer = limit_process(request.decode_bytes, seconds, limited)
        with os.fdopen(source, "rb") as file:
            verbs[request.verb](file, out, request, timer)
    except VideoError as error:
        status = 413 if isinstance(error, TooLarge) else 422
        wire.send(out, DecodeReply("error", status=status, text=str(error)))
    except MemoryError:
        text = f"decoding takes more than the {request.decode_bytes} bytes of memory accepted"
        wire.send(out, DecodeReply("error", status=413, text=text))


def warm_up() -> None:
    """Decode a picture, so that all libraries are loaded before a child limits its memory."""
    request = DecodeRequest("clips", ClipSpec(frames=1, height=1, width=1, short_side=1))
    for _ in open_video(io.BytesIO(SMALLEST_GIF), request).frames():
        pass


def main() -> None:
    """Fork a child for each message on the socket, until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the children
    av.logging.set_level(None)
    warm_up()
    gc.freeze()  # a collection in a child would copy every page (copy on write)
    orders = socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, 1 << 16, 2)
        if not message:
            return
        source, target = descriptors
        if os.fork() == 0:
            try:
                orders.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                run_child(source, target, msgspec.json.decode(message, type=wire.Orders))
            except BrokenPipeError:
                pass  # the service has closed the pipe
            except BaseException as error:
                sys.stderr.write(f"decoding failed: {type(error).__name__}: {error}\n")
            finally:
                os._exit(0)
        os.close(source)
        os.close(target)


if __name__ == "__main__":
    main()
