"""Decodes untrusted videos in forked children: `python -m pynq_kgrc.service.decode FD`.

The process (a zygote) imports what decoding needs, and forks a child for each message on the
socket FD. A child gets two descriptors: the upload (an unnamed file) and a pipe for the clips. It
sets its resource limits, decodes, and ends. FFmpeg reads from the descriptor and has no protocol to
open files with, so that a playlist with the name of a video has no effect.
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
from pynq_kgrc.service.wire import DecodeReply, DecodeRequest
from pynq_kgrc.video import MAX_ELONGATION, fit

FORMATS = "mov,matroska,avi,mpegts,gif"
ACCEPTED = "accepted are MP4, MOV, MKV, WebM, AVI, MPEG-TS and GIF"

CODECS = (
    "h264,hevc,mpeg4,msmpeg4v1,msmpeg4v2,msmpeg4,h263,flv,vp8,vp9,libdav1d,av1,mpeg1video,"
    "mpeg2video,mjpeg,theora,gif,wmv1,wmv2,prores,dvvideo,rawvideo"
)
"""FFmpeg applies this list to the container only. It is not in force for the codec, which PyAV
opens without it: videos of other codecs are decoded too."""

SMALLEST_GIF = (
    b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
)
"""A video of one frame of one pixel."""

MAX_RATE = 240
"""Largest frame rate of a video, in frames per second."""


class Frame(NamedTuple):
    """A frame of the video, scaled for the network, and the time at which it is shown."""

    ms: float
    pixels: Array


NO_PIXELS: Array = np.empty(0, np.uint8)
"""The pixels of a frame that is in no clip."""


class FrameSpan(NamedTuple):
    """The frames of one clip; `end_ms` is the time at which its last frame is first shown."""

    start_ms: float
    end_ms: float
    pixels: list[Array]


def clip_spec(request: DecodeRequest) -> ClipSpec:
    """The clip specification that `video.fit` takes."""
    return ClipSpec(request.frames, request.height, request.width, request.short_side, request.step)


# ---- choosing frames ------------------------------------------------------------------------


def frame_offsets(frames: int, step: int, window: int | None) -> list[int]:
    """Offsets of a clip's frames in its window: every `step`-th, or evenly spread over `window`."""
    if window is None:
        return [i * step for i in range(frames)]
    if frames == 1:
        return [window // 2]
    return [round(i * (window - 1) / (frames - 1)) for i in range(frames)]


def spread_offsets(frames: int, count: int) -> list[int]:
    """Frame numbers for uniform sampling: the middle of each of `frames` equal parts of the video.

    Empty if the video is shorter than the clip.

    As `video.load_clip` with sampling="uniform".
    """
    if count < frames:
        return []
    edges = np.linspace(0, count, frames + 1)
    return [int(i) for i in (edges[:-1] + edges[1:]) / 2]


def cut_windows(frames: Iterable[Frame], offsets: list[int], stride: int) -> Iterator[FrameSpan]:
    """Sliding windows, one every `stride` frames; the last window ends with the video.

    As `video.load_windows`, in one pass. A video shorter than a window is repeated.

    Raises:
        VideoError: the video has no frame.
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
    """An open upload. Sizes and counts that its container declares are checked, not trusted.

    Raises:
        VideoError: why the video is not accepted.
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
        """Refuse frames that are too large or too elongated.

        Raises:
            TooLarge: names the size and the limit.
            VideoError: the frames are too elongated.
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
        """Every frame, upright and scaled for the network.

        Args:
            wanted: numbers of the frames to scale; None: all. Other frames have `NO_PIXELS`.

        Raises:
            TooLarge, TooLong: the video exceeds a limit.
            VideoError: no frame can be decoded.
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
                # a time stamp that does not increase is replaced: one frame after the last
                shown = ms + self.frame_ms if time is None else time - first
                ms = shown if shown > ms else ms + self.frame_ms
                if ms > 1000 * limit or self.count > MAX_RATE * limit:
                    raise TooLong(f"a video longer than the {limit:g} s accepted")
                self.count += 1
                self.end_ms = ms + self.frame_ms
                needed = wanted is None or self.count - 1 in wanted
                yield Frame(ms, fit(upright(frame), self.spec) if needed else NO_PIXELS)
        except (av.error.FFmpegError, ValueError) as error:
            if not self.count and not all(self.size):  # FFmpeg reports size 0 beyond max_pixels
                raise TooLarge(
                    f"frames of more than the {self.request.max_pixels} pixels accepted, or of "
                    f"an unknown size"
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
    """The frames have more pixels than are accepted."""


class TooLong(VideoError):
    """The video is longer than accepted."""


def upright(frame: Any) -> Array:
    """A frame as BGR [H, W, 3], rotated by the display matrix of the file."""
    pixels: Array = frame.to_ndarray(format="bgr24")
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def reason(error: Exception) -> str:
    """FFmpeg's error message, without the file's name."""
    text = str(getattr(error, "strerror", "") or error)
    return text.split(":")[0].removeprefix("[Errno ").strip()


def send_clips(file: BinaryIO, out: BinaryIO, request: DecodeRequest, timer: Timer) -> None:
    """Decode an upload and send a reply for each clip, then one of kind `end`."""
    video = Video(file, request)
    offsets = frame_offsets(request.frames, request.step, request.window)
    windows = cut_windows(
        until_reader_leaves(video.frames(), out), offsets, request.stride or offsets[-1] + 1
    )
    if request.uniform:
        for _ in until_reader_leaves(video.frames(wanted=()), out):
            pass  # count the frames: the container's own count may be wrong
        spread = spread_offsets(request.frames, video.count)
        video = Video(file, request)
        if spread:
            frames = until_reader_leaves(video.frames(wanted=set(spread)), out)
            windows = iter([_frame_span([frame for frame in frames if frame.pixels.size])])
        else:  # shorter than a clip
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
        with timer.paused():  # the pipe may block while the device is busy
            wire.send(out, head, np.stack(window.pixels).tobytes())
    if video.count < (request.frames if request.uniform else offsets[-1] + 1):
        video.notes.append(
            f"the video has {video.count} frames, a clip spans {offsets[-1] + 1}: "
            f"the video is repeated to fill the clip"
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
    """The frames, until the reader of the pipe has closed it.

    Raises:
        BrokenPipeError: the reader has closed the pipe.
    """
    reader = select.poll()
    reader.register(out, 0)  # POLLERR is reported without being asked for
    for frame in frames:
        if reader.poll(0):
            raise BrokenPipeError
        yield frame


def send_frames(images: BinaryIO, out: BinaryIO, request: DecodeRequest, timer: Timer) -> None:
    """Decode each JPEG image of a live session to a frame [H, W, 3] RGB."""
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
    """Decode a JPEG image and scale it for the network: [H, W, 3] RGB.

    Raises:
        VideoError: not a JPEG image, damaged, or too large.
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


def limit_process(request: DecodeRequest) -> Timer:
    """Set the resource limits of this process: memory, processor time, open files, core dumps.

    RLIMIT_FSIZE forbids to write to files. RLIMIT_NOFILE leaves room for a few files to be opened;
    neither the file system nor the network is closed off (no seccomp, no Landlock).
    """
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    most = used + request.decode_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # a live session has no limit of processor time, but a timer for each image
    if request.verb == "clips":
        seconds = max(1, round(request.decode_seconds))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    return Timer(request.decode_seconds)


def run_child(source: int, target: int, request: DecodeRequest) -> None:
    """The main function of a child."""
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
    """Decode a picture, so that all libraries are loaded before a child limits its memory."""
    request = DecodeRequest("clips", frames=1, height=1, width=1, short_side=1, step=1)
    for _ in Video(io.BytesIO(SMALLEST_GIF), request).frames():
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
                run_child(source, target, msgspec.json.decode(message, type=DecodeRequest))
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
