"""Strangers' videos are decoded here: `python -m pynq_kgrc.service.decode FD`.

The process with the socket FD imports what decoding needs, and forks a child for each upload. The
child gets two descriptors, the upload (a file without a name) and a pipe for the clips, sets its
limits, decodes, and ends. It opens no file, so that a playlist dressed as a video leads nowhere.
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
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import av
import av.error
import msgspec
import numpy as np

from pynq_kgrc.errors import VideoError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.quant import Array
from pynq_kgrc.service import wire
from pynq_kgrc.service.wire import DecodeRequest, DecodeReply
from pynq_kgrc.video import MAX_ELONGATION, fit

FORMATS = "mov,matroska,avi,mpegts,gif"
ACCEPTED = "accepted are MP4, MOV, MKV, WebM, AVI, MPEG-TS and GIF"

CODECS = (
    "h264,hevc,mpeg4,msmpeg4v1,msmpeg4v2,msmpeg4,h263,flv,vp8,vp9,libdav1d,av1,mpeg1video,"
    "mpeg2video,mjpeg,theora,gif,wmv1,wmv2,prores,dvvideo,rawvideo"
)

SMALLEST_GIF = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
"""A video of one frame of one pixel."""

MAX_RATE = 240
"""Frames a second that a video may have."""


class Frame(NamedTuple):
    """A frame of the video as the network wants it, and when it is shown."""

    ms: float
    pixels: Array


NO_PIXELS: Array = np.empty(0, np.uint8)
"""The pixels of a frame that nobody looks at."""


class FrameSpan(NamedTuple):
    """Frames of one clip; `end_ms` is when its last frame begins to be shown."""

    start_ms: float
    end_ms: float
    pixels: list[Array]


def clip_spec(request: DecodeRequest) -> ClipSpec:
    """What `video.fit` asks for."""
    return ClipSpec(request.frames, request.height, request.width, request.short_side, request.step)


# ---- choosing frames ------------------------------------------------------------------------


def frame_offsets(frames: int, step: int, window: int | None) -> list[int]:
    """The frames of a window that a clip takes: every `step`-th, or spread evenly over `window`."""
    if window is None:
        return [i * step for i in range(frames)]
    if frames == 1:
        return [window // 2]
    return [round(i * (window - 1) / (frames - 1)) for i in range(frames)]


def spread_offsets(frames: int, count: int) -> list[int]:
    """The middles of as many parts of the video as a clip has frames; none if it is shorter.

    As `video.load_clip` with sampling="uniform".
    """
    if count < frames:
        return []
    edges = np.linspace(0, count, frames + 1)
    return [int(i) for i in (edges[:-1] + edges[1:]) / 2]


def cut_windows(frames: Iterable[Frame], offsets: list[int], stride: int) -> Iterator[FrameSpan]:
    """Windows that begin every `stride` frames; the last ends with the video.

    As `video.load_windows`, in one pass. A video shorter than a window starts over.

    Raises:
        VideoError: there is no frame.
    """
    span = offsets[-1] + 1
    kept: deque[Frame] = deque(maxlen=span)
    count = following = 0
    last = -1
    for frame in frames:
        kept.append(frame)
        count += 1
        if count == following + span:
            yield _frame_span([kept[i] for i in offsets])
            last = following
            following += stride
    if not count:
        raise VideoError(
            "not one frame could be decoded; the video is cut off or damaged, or decoding it takes "
            "more memory than is accepted"
        )
    if last != max(0, count - span):
        yield _frame_span([kept[i % len(kept)] for i in offsets])


def _frame_span(chosen: list[Frame]) -> FrameSpan:
    times = [frame.ms for frame in chosen]
    return FrameSpan(min(times), max(times), [frame.pixels for frame in chosen])


# ---- decoding -------------------------------------------------------------------------------


class Video:
    """An upload that is open. Nothing that its container declares is relied on.

    Raises:
        VideoError: not a video that is accepted, and why.
    """

    def __init__(self, file: BinaryIO, request: DecodeRequest) -> None:
        self.request, self.spec = request, clip_spec(request)
        file.seek(0)
        options = {
            "protocol_whitelist": "none",
            "format_whitelist": FORMATS,
            "codec_whitelist": CODECS,
            "max_pixels": str(request.max_pixels),
        }
        try:
            self.container = av.open(file, "r", options=options, metadata_errors="replace")
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(
                f"not a video that can be read ({reason(error)}); {ACCEPTED}"
            ) from None
        streams = self.container.streams.video
        if not streams:
            kinds = sorted({stream.type for stream in self.container.streams})
            raise VideoError(f"the file has no video, only {', '.join(kinds) or 'nothing'}")
        self.stream = streams[0]
        codec = self.stream.codec_context
        if codec is None:
            raise VideoError("the video is of a codec that is not accepted")
        self.check_size(codec.width, codec.height)
        codec.options = {**codec.options, "max_pixels": str(request.max_pixels)}
        codec.thread_count = 1
        rate = float(self.stream.average_rate or 0)
        self.frame_ms = 1000 / (rate if 1 <= rate <= MAX_RATE else 25.0)
        self.codec = str(codec.name)
        self.format = str(self.container.format.name)
        self.size = (codec.width, codec.height)
        self.declared = self.stream.frames if 0 < self.stream.frames < 10_000_000 else 0
        duration = self.stream.duration
        base = self.stream.time_base
        if duration and base and float(duration * base) > request.max_seconds + 1:
            raise TooLong(
                f"a video of {float(duration * base):.0f} s is longer than the "
                f"{request.max_seconds:g} s accepted"
            )
        self.count = 0
        self.end_ms = 0.0
        self.notes: list[str] = []

    def check_size(self, width: int, height: int) -> None:
        """Refuse frames that are too large.

        Raises:
            TooLarge: names both sizes.
        """
        if width * height > self.request.max_pixels:
            raise TooLarge(
                f"frames of {width} x {height} pixels are larger than the "
                f"{self.request.max_pixels} accepted"
            )
        if max(width, height) > MAX_ELONGATION * max(1, min(width, height)):
            raise VideoError(
                f"frames of {width} x {height} pixels are too elongated; accepted is up to "
                f"{MAX_ELONGATION} to 1"
            )

    def frames(self, wanted: Container[int] | None = None) -> Iterator[Frame]:
        """Every frame, upright and as large as the network wants it.

        Args:
            wanted: numbers of the frames whose pixels matter; all if none. Others are empty.
        """
        first: float | None = None
        ms = -self.frame_ms
        limit = self.request.max_seconds
        try:
            for frame in self.container.decode(self.stream):
                self.check_size(frame.width, frame.height)
                time = None if frame.pts is None or frame.time is None else 1000 * frame.time
                if first is None:
                    first = time or 0.0
                # times that do not increase are no times
                shown = ms + self.frame_ms if time is None else time - first
                ms = shown if shown > ms else ms + self.frame_ms
                if ms > 1000 * limit or self.count > MAX_RATE * limit:
                    raise TooLong(f"a video longer than the {limit:g} s accepted")
                self.count += 1
                self.end_ms = ms + self.frame_ms
                needed = wanted is None or self.count - 1 in wanted
                yield Frame(ms, fit(upright(frame), self.spec) if needed else NO_PIXELS)
        except (av.error.FFmpegError, ValueError) as error:
            if not self.count and not all(self.size):  # FFmpeg hides a size beyond max_pixels
                raise TooLarge(
                    f"frames of more than the {self.request.max_pixels} pixels accepted, or of "
                    f"a size that cannot be told"
                ) from None
            if not self.count:
                raise VideoError(
                    f"not one frame could be decoded ({reason(error)}); the video is cut off, "
                    f"or damaged"
                ) from None
            self.notes.append(f"decoding stopped after frame {self.count}: {reason(error)}")
        if self.declared > self.count * 1.05 + 1:
            self.notes.append(
                f"{self.count} frames of {self.declared} declared: the video is cut off or damaged"
            )


class TooLarge(VideoError):
    """Frames of more pixels than are accepted."""


class TooLong(VideoError):
    """A video of more seconds than are accepted."""


def upright(frame: Any) -> Array:
    """A frame as BGR [H, W, 3], turned as the file says it is to be shown."""
    pixels: Array = frame.to_ndarray(format="bgr24")
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def reason(error: Exception) -> str:
    """What FFmpeg has to say, without the name it gave the file."""
    text = str(getattr(error, "strerror", "") or error)
    return text.split(":")[0].removeprefix("[Errno ").strip()


def send_clips(file: BinaryIO, out: BinaryIO, request: DecodeRequest, timer: Timer) -> None:
    """Decode an upload; a message for each clip, and one at the end."""
    video = Video(file, request)
    offsets = frame_offsets(request.frames, request.step, request.window)
    windows = cut_windows(until_reader_leaves(video.frames(), out), offsets, request.stride or offsets[-1] + 1)
    if request.uniform:
        for _ in until_reader_leaves(video.frames(wanted=()), out):
            pass  # frames are counted, the container is not believed
        spread = spread_offsets(request.frames, video.count)
        video = Video(file, request)
        if spread:
            frames = until_reader_leaves(video.frames(wanted=set(spread)), out)
            windows = iter([_frame_span([frame for frame in frames if frame.pixels.size])])
        else:  # too short to spread
            windows = cut_windows(until_reader_leaves(video.frames(), out), offsets, 1)
    for number, window in enumerate(windows):
        head = DecodeReply(
            "clip",
            number=number,
            start_ms=window.start_ms,
            end_ms=window.end_ms + video.frame_ms,
            decoded=video.count,
            declared=video.declared,
        )
        with timer.paused():  # whoever waits for the device must not run out of time
            wire.send(out, head, np.stack(window.pixels).tobytes())
    if video.count < (request.frames if request.uniform else offsets[-1] + 1):
        video.notes.append(
            f"the video has {video.count} frames, the network looks at {offsets[-1] + 1}: "
            f"it starts over to fill the clip"
        )
    end = DecodeReply(
        "end",
        decoded=video.count,
        declared=video.declared,
        duration_ms=video.end_ms,
        width=video.size[0],
        height=video.size[1],
        codec=video.codec,
        container=video.format,
        notes=video.notes,
    )
    wire.send(out, end)


def until_reader_leaves(frames: Iterator[Frame], out: BinaryIO) -> Iterator[Frame]:
    """The frames, for as long as somebody is there to read what comes of them.

    Raises:
        BrokenPipeError: nobody is.
    """
    reader = select.poll()
    reader.register(out, 0)  # that the other end is closed is told unasked
    for frame in frames:
        if reader.poll(0):
            raise BrokenPipeError
        yield frame


def send_frames(images: BinaryIO, out: BinaryIO, request: DecodeRequest, timer: Timer) -> None:
    """Decode the JPEG images of a live session, each to a frame [H, W, 3] RGB."""
    while True:
        with timer.paused():
            message = wire.receive(images, dict)
        if message is None:
            return
        timer.restart()
        try:
            frame = decode_jpeg(message[1], request)
        except VideoError as error:
            wire.send(out, DecodeReply("error", text=str(error)))
            continue
        wire.send(out, DecodeReply("frame"), frame.tobytes())


def decode_jpeg(image: bytes, request: DecodeRequest) -> Array:
    """A JPEG image as the network wants a frame: [H, W, 3] RGB.

    Raises:
        VideoError: no JPEG image, or too large.
    """
    if image[:2] != b"\xff\xd8":
        raise VideoError(f"an image that begins with {image[:2].hex() or 'nothing'}, not a JPEG")
    codec = av.CodecContext.create("mjpeg", "r")
    codec.options = {"max_pixels": str(request.max_pixels)}
    codec.thread_count = 1
    try:
        frames = [*codec.decode(av.Packet(image)), *codec.decode(None)]
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(f"a JPEG that cannot be decoded: {reason(error)}") from None
    if not frames:
        raise VideoError("a JPEG without an image")
    if frames[0].width * frames[0].height > request.max_pixels:
        raise VideoError(f"an image of more than {request.max_pixels} pixels")
    return fit(frames[0].to_ndarray(format="bgr24"), clip_spec(request))


# ---- the child's limits ---------------------------------------------------------------------


class Timer:
    """Wall time for decoding: when it runs out, the system ends the process."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def paused(self) -> Pause:
        """A context in which time does not count."""
        return Pause()


class Pause:
    """Stops the timer, and sets it going with what was left."""

    def __enter__(self) -> None:
        self.left = signal.setitimer(signal.ITIMER_REAL, 0)[0]

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self.left))


def limit_process(request: DecodeRequest) -> Timer:
    """Memory, processor time, files and processes of this process; nothing can be written."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    most = used + request.decode_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # a live session lasts as long as it lasts, each image has the timer
    if request.verb == "clips":
        seconds = max(1, round(request.decode_seconds))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    return Timer(request.decode_seconds)


def run_child(source: int, target: int, request: DecodeRequest) -> None:
    """What a child does from its first instruction to its last."""
    out = os.fdopen(target, "wb")
    verbs: dict[str, Callable[[BinaryIO, BinaryIO, DecodeRequest, Timer], None]] = {
        "clips": send_clips,
        "frames": send_frames,
    }
    try:
        timer = limit_process(request)
        with os.fdopen(source, "rb") as file:
            verbs[request.verb](file, out, request, timer)
    except VideoError as error:
        status = {TooLarge: 413, TooLong: 413}.get(type(error), 422)
        wire.send(out, DecodeReply("error", status=status, text=str(error)))
    except MemoryError:
        text = f"decoding takes more than the {request.decode_bytes} bytes of memory accepted"
        wire.send(out, DecodeReply("error", status=413, text=text))


def warm_up() -> None:
    """Decode a picture, so that a child finds everything imported before its memory is limited."""
    request = DecodeRequest("clips", frames=1, height=1, width=1, short_side=1, step=1)
    for _ in Video(io.BytesIO(SMALLEST_GIF), request).frames():
        pass


def main() -> None:
    """Fork a child for each message on the socket, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the children
    av.logging.set_level(None)
    warm_up()
    gc.freeze()  # a child that collects garbage would copy every page
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
                run_child(source, target, msgspec.json.decode(message, type=DecodeRequest))
            except BrokenPipeError:
                pass  # nobody wants the clips any more
            except BaseException as error:
                sys.stderr.write(f"decoding failed: {type(error).__name__}: {error}\n")
            finally:
                os._exit(0)
        os.close(source)
        os.close(target)


if __name__ == "__main__":
    main()
