"""From a video to the clips that a network sees: decode, choose frames, resize, crop.

This is the only place that decides which frames of a video are used, when they are shown, and in
which colours and orientation. FFmpeg decodes, through PyAV, which reads times, colour tags and
display matrices; OpenCV resizes. Files that are trusted are decoded in this process (`load_clip`,
`load_windows`); uploads in a child with limits (`service/decode.py`), by the same class `Video`.

What a container declares (frame numbers, counts, durations) is not relied on: where the length of a
video matters, its frames are counted by decoding them, and then it is decoded again. Memory does
not grow with the length of the video.
"""

from __future__ import annotations

import io
import os
import time
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import av.error
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from pynq_kgrc.errors import VideoError
from pynq_kgrc.graph import MAX_PIXELS, MAX_SECONDS, SAMPLINGS, ClipSpec
from pynq_kgrc.quant import Array

FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,h264,hevc,gif,apng"
"""Containers that are opened, as FFmpeg calls them: no playlists, no still images."""

CODECS = frozenset(
    (
        *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "vp6f", "flv", "theora"),
        *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263"),
        *("wmv1", "wmv2", "wmv3", "vc1", "prores", "dvvideo", "rawvideo", "mjpeg", "gif", "apng"),
    )
)
"""Decoders that uploads may use, as FFmpeg calls them."""

CONVERT = "convert it: ffmpeg -i YOURS -c:v libx264 -pix_fmt yuv420p OTHER.mp4"

ACCEPTED = (
    "accepted are MP4, MOV, MKV, WebM, AVI, MPEG-TS, MPEG-PS, WMV, FLV, OGV, raw H.264 and HEVC, "
    f"GIF and APNG; {CONVERT}"
)

MAX_ELONGATION = 100
"""Largest ratio of the long side of a frame to its short side: `fit` scales both alike."""

MAX_RATE = 240
"""Frames a second that a video may have."""

DEFAULT_RATE = 25.0
"""Frames a second of a video that does not say."""


@dataclass(frozen=True)
class Limits:
    """The largest video that is accepted, and how much of it is looked at."""

    max_bytes: int = 200_000_000
    max_pixels: int = MAX_PIXELS
    """Of one frame."""
    max_seconds: float = MAX_SECONDS
    """Of a longer video only the beginning is looked at, and a note says so."""
    decode_seconds: float = float("inf")
    """Processor time of one pass over the video; after it, the same."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames as a network takes them, and where in the video they come from."""

    frames: Array
    """[D, H, W, 3] uint8 RGB, contiguous."""
    start_ms: float
    """When its first frame begins to be shown."""
    end_ms: float
    """When the frame after its last one begins to be shown, or the video ends."""
    notes: tuple[str, ...] = ()
    """What the reader should know: frames that repeat, a file that is cut off."""


class TooLarge(VideoError):
    """Frames of more pixels than are accepted."""


class Frame(NamedTuple):
    """A frame of the video as the network takes it."""

    start_ms: float
    end_ms: float
    pixels: Array
    """[H, W, 3] uint8 RGB; empty for a frame that nobody asked for."""


class FrameSpan(NamedTuple):
    """The frames of one clip, and the times between which they are shown."""

    start_ms: float
    end_ms: float
    pixels: list[Array]


NO_PIXELS: Array = np.empty(0, np.uint8)


# ---- clips of files that are trusted ------------------------------------------------------------


def load_clip(
    source: str | bytes | os.PathLike[str],
    spec: ClipSpec,
    sampling: str | None = None,
    limits: Limits | None = None,
) -> Clip:
    """One clip of a video: consecutive frames from its middle, or spread over all of it.

    A video shorter than the clip is repeated until the clip is full, and the notes say so.

    Args:
        source: a local file, or the contents of one as bytes.
        spec: how many frames, how far apart, how large.
        sampling: "centre" or "uniform"; what the spec says if none, and "centre" if it says
            "windows".
        limits: what to refuse; the defaults of `Limits` if none.

    Raises:
        VideoError: what is wrong with the source, and which limit it exceeds.
    """
    sampling = spec.sampling if sampling is None else sampling
    if sampling not in SAMPLINGS:
        raise VideoError(f"sampling={sampling!r}; accepted are {', '.join(SAMPLINGS)}")
    single = "centre" if sampling == "windows" else sampling
    with _opened(source, spec, limits) as video:
        (span,) = sample(video, single)
        return _clip(span, video)


def load_windows(
    source: str | bytes | os.PathLike[str],
    spec: ClipSpec,
    stride: int | None = None,
    limits: Limits | None = None,
) -> Iterator[Clip]:
    """Clips that begin every `stride` frames of the video; the last one ends with the video.

    The video is decoded as the clips are taken: a clip is held in memory, not the video.

    Args:
        source: a local file, or the contents of one as bytes.
        spec: how many frames, how far apart, how large.
        stride: frames from one clip to the next; what the spec says if none, and the length of a
            clip if it says nothing.
        limits: what to refuse; the defaults of `Limits` if none.

    Raises:
        VideoError: as `load_clip`; also a stride below 1.
    """
    if stride is not None and stride < 1:
        raise VideoError(f"stride={stride} frames; accepted is 1 or more")
    with _opened(source, spec, limits) as video:
        for span in sample(video, "windows", stride=stride):
            yield _clip(span, video)


@contextmanager
def _opened(
    source: str | bytes | os.PathLike[str], spec: ClipSpec, limits: Limits | None
) -> Iterator[Video]:
    """A trusted file as a `Video`; every message begins with its name."""
    limits = limits or Limits()
    name = "the video" if isinstance(source, bytes) else os.fspath(source)
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    try:
        with _file(source, limits) as file:
            video = Video(file, spec, limits, threads=0)
            try:
                yield video
            finally:
                video.close()
    except VideoError as error:
        raise type(error)(f"{readable}: {error}") from None


@contextmanager
def _file(source: str | bytes | os.PathLike[str], limits: Limits) -> Iterator[BinaryIO]:
    file: BinaryIO
    if isinstance(source, bytes):
        size, file = len(source), io.BytesIO(source)
    else:
        if "://" in os.fspath(source):
            raise VideoError("an address; only local files and bytes are read")
        path = Path(source)
        try:
            if not path.is_file():
                raise VideoError("there is no such file")
            size, file = path.stat().st_size, path.open("rb")
        except (OSError, ValueError) as error:
            raise VideoError(f"cannot be read: {getattr(error, 'strerror', error)}") from error
    with file:
        if size == 0:
            raise VideoError("the file is empty (0 bytes)")
        if size > limits.max_bytes:
            raise VideoError(f"{size} bytes are more than the {limits.max_bytes} accepted")
        yield file


def _clip(span: FrameSpan, video: Video) -> Clip:
    return Clip(np.stack(span.pixels), span.start_ms, span.end_ms, tuple(video.notes))


# ---- which frames ---------------------------------------------------------------------------


def sample(
    video: Video, sampling: str, window: int | None = None, stride: int | None = None
) -> Iterator[FrameSpan]:
    """The clips of a video.

    Args:
        video: an open video that has not been decoded yet.
        sampling: "windows": clips that begin every `stride` frames; the last ends with the video.
            "centre": one clip from the middle. "uniform": one clip spread over the whole video.
        window: frames of the video that a clip is spread over, instead of every `step`-th.
        stride: for "windows"; the length of a window if none.

    Raises:
        VideoError: there is no frame; see `Video.frames` for the rest.
    """
    spec = video.spec
    offsets = frame_offsets(spec.frames, spec.step, window)
    if sampling == "windows":
        length = offsets[-1] + 1
        for span in cut_windows(video.frames(), offsets, stride or spec.stride or length):
            if video.count < length:  # all of the video is known: it is shorter than the window
                video.note_repeats(length)
            yield span
        return
    for _ in video.frames(wanted=()):
        pass  # count them: the number that a container declares may be wrong
    count = video.count
    if not count:
        raise no_frame()
    end_ms, notes = video.end_ms, video.notes
    numbers = spread_numbers(spec.frames, count) if sampling == "uniform" else []
    if not numbers:  # also where there are too few frames to spread a clip over
        start = max(0, (count - spec.frames * spec.step) // 2)
        numbers = [(start + offset) % count for offset in offsets]
    video.rewind()
    wanted, kept = frozenset(numbers), {}
    with closing(video.frames(wanted)) as frames:
        for number, frame in enumerate(frames):
            if number in wanted:
                kept[number] = frame
            if len(kept) == len(wanted):
                break
    if len(kept) < len(wanted):
        raise VideoError(
            f"{count} frames were decoded once, but not again; it changes or is damaged"
        )
    video.count, video.end_ms, video.notes = count, end_ms, notes  # of the first, whole pass
    video.note_repeats(spec.frames if sampling == "uniform" else offsets[-1] + 1)
    yield _span([kept[number] for number in numbers])


def frame_offsets(frames: int, step: int, window: int | None) -> list[int]:
    """The frames of a window that a clip takes: every `step`-th, or spread evenly over `window`."""
    if window is None:
        return [i * step for i in range(frames)]
    if frames == 1:
        return [window // 2]
    return [round(i * (window - 1) / (frames - 1)) for i in range(frames)]


def spread_numbers(frames: int, count: int) -> list[int]:
    """Frame numbers at the middles of `frames` equal parts of a video; none if it is shorter."""
    if count < frames:
        return []
    edges = np.linspace(0, count, frames + 1)
    return [int(i) for i in (edges[:-1] + edges[1:]) / 2]


def cut_windows(frames: Iterable[Frame], offsets: list[int], stride: int) -> Iterator[FrameSpan]:
    """Windows that begin every `stride` frames; the last ends with the video.

    A video that is shorter than a window is repeated.

    Raises:
        VideoError: there is no frame.
    """
    length = offsets[-1] + 1
    kept: deque[Frame] = deque(maxlen=length)
    count = following = 0
    last = -1
    for frame in frames:
        kept.append(frame)
        count += 1
        if count == following + length:
            yield _span([kept[i] for i in offsets])
            last = following
            following += stride
    if not count:
        raise no_frame()
    if last != max(0, count - length):
        yield _span([kept[i % len(kept)] for i in offsets])


def _span(chosen: list[Frame]) -> FrameSpan:
    start, end = min(f.start_ms for f in chosen), max(f.end_ms for f in chosen)
    return FrameSpan(start, end, [frame.pixels for frame in chosen])


def no_frame() -> VideoError:
    """The error of a video from which nothing could be decoded."""
    return VideoError("not one frame could be decoded; the video is cut off or damaged")


# ---- decoding -------------------------------------------------------------------------------


class Video:
    """An open video.

    Args:
        file: the container; it is read from its start.
        spec: the size of the frames, and the rate at which the network was trained.
        limits: what to refuse.
        threads: of the decoder; 0 lets FFmpeg choose.
        codecs: decoders that may be used, as FFmpeg calls them, such as `CODECS`; all if none.
        check: called before each frame; what it raises ends the decoding.

    Raises:
        VideoError: not a video that is accepted, and why.
    """

    def __init__(
        self,
        file: BinaryIO,
        spec: ClipSpec,
        limits: Limits,
        threads: int = 1,
        codecs: frozenset[str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.file, self.spec, self.limits = file, spec, limits
        self._threads, self._codecs, self._check = threads, codecs, check
        self._converter = VideoReformatter()
        self._open()
        codec = self._stream.codec_context
        self.codec = str(codec.name)
        self.format = str(self._container.format.name)
        self.size = (codec.width, codec.height)
        rate = float(self._stream.average_rate or 0)
        self._frame_ms = 1000 / (rate if 1 <= rate <= MAX_RATE else DEFAULT_RATE)
        self.declared_ms = self._declared_ms()
        self._reset()

    def _open(self) -> None:
        options = {
            "protocol_whitelist": "none",
            "format_whitelist": FORMATS,
            "max_pixels": str(self.limits.max_pixels),
        }
        if self._codecs is not None:
            options["codec_whitelist"] = ",".join(sorted(self._codecs))
        self.file.seek(0)
        try:
            self._container = av.open(self.file, "r", options=options, metadata_errors="replace")
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(_why_not(self.file, error)) from None
        streams = self._container.streams.video
        if not streams:
            kinds = sorted({stream.type for stream in self._container.streams})
            raise VideoError(f"the file has no video, only {', '.join(kinds) or 'nothing'}")
        self._stream = streams[0]
        codec = self._stream.codec_context
        # the whitelist of the container does not reach the decoder that PyAV opens
        if codec is None or (self._codecs is not None and codec.name not in self._codecs):
            name = "unknown to FFmpeg" if codec is None else codec.name
            raise VideoError(f"a video of the codec {name}, which is not accepted; {CONVERT}")
        self._check_size(codec.width, codec.height)
        codec.options = {**codec.options, "max_pixels": str(self.limits.max_pixels)}
        codec.thread_count = self._threads
        if self._threads != 1:
            codec.thread_type = "AUTO"

    def _reset(self) -> None:
        self.count = 0
        """Frames so far, at the network's rate if it has one."""
        self.end_ms = 0.0
        """When the last of them ends."""
        self.notes: list[str] = []

    def close(self) -> None:
        """Free the decoder. The file stays open."""
        self._container.close()

    def rewind(self) -> None:
        """Begin again with the first frame."""
        self.close()
        self._open()
        self._reset()

    def _declared_ms(self) -> float:
        """The length that the container declares for all of its streams; 0 if it declares none.

        FFmpeg shortens the duration of an AVI file that is cut off; the count in its header stays.
        (In MP4 the count includes frames that an edit list hides.)
        """
        duration = (self._container.duration or 0) / 1000
        if self.format == "avi":
            duration = max(duration, self._stream.frames * self._frame_ms)
        return max(0.0, duration)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise TooLarge(
                f"frames of {width} x {height} pixels are larger than the "
                f"{self.limits.max_pixels} accepted"
            )
        if max(width, height) > MAX_ELONGATION * max(1, min(width, height)):
            raise VideoError(
                f"frames of {width} x {height} pixels are too elongated; accepted is up to "
                f"{MAX_ELONGATION} to 1"
            )

    def frames(self, wanted: Container[int] | None = None) -> Generator[Frame]:
        """Every frame, upright and of the network's size.

        A network with a rate of its own (`ClipSpec.rate`) gets frames at that rate: for each moment
        the frame that is shown then. Where the file gives no times, its frames are taken as they
        are.

        Args:
            wanted: numbers of the frames whose pixels matter; all if none. Others have none.

        Raises:
            TooLarge: a frame of more pixels than are accepted.
            VideoError: not one frame can be decoded.
        """
        seconds = self.limits.max_seconds
        began = time.process_time()
        last: tuple[Any, Array] = (None, NO_PIXELS)
        for start, end, picture in self._at_rate(self._shown()):
            if start > 1000 * seconds or self.count > MAX_RATE * seconds:
                self._note_rest(f"only {seconds:g} s of a video are looked at")
                return
            if self.count and time.process_time() - began > self.limits.decode_seconds:
                self._note_rest(f"decoding took {self.limits.decode_seconds:g} s by then")
                return
            number, self.count, self.end_ms = self.count, self.count + 1, end
            pixels = NO_PIXELS
            if wanted is None or number in wanted:
                if last[0] is not picture:
                    last = (picture, fit(upright(picture, self._converter), self.spec))
                pixels = last[1]
            yield Frame(start, end, pixels)

    def _note_rest(self, why: str) -> None:
        """Note that the rest of the video is not looked at."""
        self.notes.append(f"the video was looked at up to {self.end_ms / 1000:.1f} s: {why}")

    def note_repeats(self, needed: int) -> None:
        """Note that a video of fewer frames than a clip needs is repeated."""
        if self.count < needed:
            self.notes.append(
                f"the video has {self.count} frames, a clip spans {needed}: "
                f"the video is repeated to fill the clip"
            )

    def _shown(self) -> Iterator[tuple[float, float, Any]]:
        """Each picture, with the times in ms from the video's start at which it is shown.

        A picture ends when the next one begins; so it is handed on one picture late.
        """
        self._timed = True
        first: float | None = None
        before: tuple[float, Any] | None = None
        for picture in self._decoded():
            self._check()
            self._check_size(picture.width, picture.height)
            shown = None if picture.pts is None or picture.time is None else 1000 * picture.time
            if first is None:
                first = shown or 0.0
            following = 0.0 if before is None else before[0] + self._frame_ms
            start = following if shown is None else shown - first
            if before is not None:
                if start <= before[0]:  # times that do not increase are no times
                    self._timed, start = False, following
                yield before[0], start, before[1]
            self._timed = self._timed and shown is not None
            before = start, picture
        if before is not None:
            picture = before[1]
            length = float((picture.duration or 0) * (picture.time_base or 0)) * 1000
            lasts = length if 1000 / MAX_RATE <= length <= 60_000 else self._frame_ms
            yield before[0], before[0] + lasts, picture

    def _at_rate(
        self, pictures: Iterator[tuple[float, float, Any]]
    ) -> Iterator[tuple[float, float, Any]]:
        """The pictures at the network's rate: for each interval the one shown at its middle."""
        if self.spec.rate is None:
            yield from pictures
            return
        period, number = 1000 / self.spec.rate, 0
        for start, end, picture in pictures:
            if not self._timed:
                yield start, end, picture
                continue
            while (number + 0.5) * period < end:
                if (number + 0.5) * period >= start:
                    yield number * period, (number + 1) * period, picture
                number += 1

    def _decoded(self) -> Iterator[Any]:
        """Pictures as they come; what goes wrong is noted, and the next packet is tried."""
        damaged = decoded = 0
        begin = (self._container.start_time or 0) / 1000
        reach, problem = 0.0, ""
        packets = self._container.demux()
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.error.FFmpegError, ValueError) as error:
                problem = f"reading stopped: {reason(error)}"
                break
            if packet.pts is not None and packet.time_base is not None:
                stop = 1000 * float((packet.pts + (packet.duration or 0)) * packet.time_base)
                reach = max(reach, stop - begin)
            if packet.stream is not self._stream and packet.stream_index != self._stream.index:
                continue
            try:
                pictures = packet.decode()
            except MemoryError:
                raise
            except (av.error.FFmpegError, ValueError) as error:
                damaged += 1
                problem = problem or reason(error)
                continue
            for picture in pictures:
                decoded += 1
                yield picture
        if not decoded:
            if damaged and not all(self.size):  # FFmpeg hides a size beyond max_pixels
                raise TooLarge(
                    f"frames of more than the {self.limits.max_pixels} pixels accepted, or of "
                    f"a size that cannot be told"
                )
            raise no_frame() if not problem else VideoError(f"{no_frame()} ({problem})")
        missing = self.declared_ms - reach
        if missing > max(2.5 * self._frame_ms, 0.02 * self.declared_ms):
            self.notes.append(
                f"decoding stopped at {reach / 1000:.2f} s of {self.declared_ms / 1000:.2f} s: "
                f"the file is cut off or damaged"
            )
        elif damaged:
            self.notes.append(
                f"{damaged} packets are damaged ({problem}); their frames are missing"
            )
        elif problem:
            self.notes.append(f"{problem}: the file is cut off or damaged")


def upright(picture: Any, converter: VideoReformatter) -> Array:
    """A decoded picture as RGB [H, W, 3] uint8, rotated and mirrored as the file asks.

    FFmpeg's display matrix maps a point (x, y) to (a x + c y, b x + d y); it is rounded to one of
    the eight symmetries of a rectangle. Colours are converted by the matrix and range that the
    picture is tagged with, or BT.601 if it has no tag.
    """
    # one thread: swscale would start some for each picture
    pixels: Array = converter.reformat(picture, format="rgb24", threads=1).to_ndarray()
    matrix = _display_matrix(picture)
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):  # the axes change places
        pixels = pixels.swapaxes(0, 1)
        across, down = c, b
    else:
        across, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _display_matrix(picture: Any) -> tuple[int, int, int, int] | None:
    """a, b, c, d of a picture's display matrix, in 16.16 fixed point; none if it has none."""
    for data in picture.side_data:
        if data.type.name == "DISPLAYMATRIX":
            numbers = np.frombuffer(bytes(data), np.int32)
            return int(numbers[0]), int(numbers[1]), int(numbers[3]), int(numbers[4])
    return None


def fit(frame: Array, spec: ClipSpec) -> Array:
    """An RGB frame as [height, width, 3]: its short side resized, its centre cropped.

    Bilinear, as the input of the pretrained networks was resized.
    """
    height, width = frame.shape[:2]
    scale = spec.short_side / min(height, width)
    # never smaller than the crop, whatever the rounding
    size = (max(spec.width, round(width * scale)), max(spec.height, round(height * scale)))
    if size != (width, height):
        frame = cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_LINEAR)
    top, left = (size[1] - spec.height) // 2, (size[0] - spec.width) // 2
    return np.ascontiguousarray(frame[top : top + spec.height, left : left + spec.width])


def decode_jpeg(image: bytes, spec: ClipSpec, max_pixels: int) -> Array:
    """A JPEG image as the network takes a frame: [H, W, 3] uint8 RGB.

    Raises:
        VideoError: not a JPEG image, or too large.
    """
    if image[:2] != b"\xff\xd8":
        raise VideoError(f"an image that begins with {image[:2].hex() or 'nothing'}, not a JPEG")
    codec = av.CodecContext.create("mjpeg", "r")
    codec.options = {"max_pixels": str(max_pixels)}
    codec.thread_count = 1
    try:
        pictures = [*codec.decode(av.Packet(image)), *codec.decode(None)]
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(f"a JPEG that cannot be decoded: {reason(error)}") from None
    if not pictures:
        raise VideoError("a JPEG without an image")
    if pictures[0].width * pictures[0].height > max_pixels:
        raise VideoError(f"an image of more than {max_pixels} pixels")
    return fit(upright(pictures[0], VideoReformatter()), spec)


# ---- messages -------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """FFmpeg's message, without the name that it gave the file."""
    text = str(getattr(error, "strerror", "") or error)
    return text.split(":")[0].removeprefix("[Errno ").strip()


def _why_not(file: BinaryIO, error: Exception) -> str:
    """Why FFmpeg does not open a file, as far as its first and last megabyte tell."""
    file.seek(0)
    head = file.read(1 << 20)
    file.seek(max(0, file.seek(0, io.SEEK_END) - (1 << 20)))
    body = head + file.read()
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return f"sound only, a WAV file; {ACCEPTED}"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        if b"auds" in body and b"vids" not in body:
            return "an AVI file with sound only, no video"
        return "an AVI file without video that can be read; it is cut off or damaged"
    if head[4:8] == b"ftyp":
        if b"moov" not in body:
            return "an MP4 file without its index (moov); it is cut off"
        return f"an MP4 file that cannot be read ({reason(error)}); it is damaged"
    if head[:4] == b"\x1aE\xdf\xa3":
        return f"a Matroska file that cannot be read ({reason(error)}); it is cut off or damaged"
    return f"not a video that can be read ({reason(error)}); {ACCEPTED}"
