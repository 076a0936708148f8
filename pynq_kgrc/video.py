"""From a video file to the frames of a clip: decode, sample, resize, crop.

This uses OpenCV in this process: only for files that you trust. Frame numbers and counts in a
container are not trusted: a first pass over the video counts and times its frames. A second pass
keeps the frames of the clips, resized and cropped, so that memory does not grow with the video.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pynq_kgrc.errors import VideoError
from pynq_kgrc.graph import DEFAULT_SAMPLING, SAMPLINGS, ClipSpec
from pynq_kgrc.quant import Array

OPTIONS = "protocol_whitelist;file|format_whitelist;mov,matroska,avi,mpegts,gif"
"""Options for FFmpeg: open local files of these containers only, no playlists, images or URLs.

OpenCV 4.11 for Linux ignores them (opencv/opencv#27091), so `_is_container` checks the same.
"""

MAX_ELONGATION = 100
"""The largest ratio of the sides of a frame: `fit` scales the long side with the short one."""


@dataclass(frozen=True)
class Limits:
    """The largest video that is read."""

    max_bytes: int = 200_000_000
    max_pixels: int = 1920 * 1088
    """Pixels of one frame."""
    max_seconds: float = 600.0


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of one clip, and their time in the video."""

    frames: Array
    """[D, H, W, 3] uint8 RGB, contiguous."""
    start_ms: float
    end_ms: float
    notes: tuple[str, ...] = ()
    """Remarks for the user: frames that repeat, a file that is cut off."""


def load_clip(
    source: str | Path | bytes,
    spec: ClipSpec,
    sampling: str = DEFAULT_SAMPLING,
    limits: Limits | None = None,
) -> Clip:
    """Read one clip of a video: consecutive frames from its middle, or spread over all of it.

    A video that is shorter than the clip is repeated until the clip is full; the notes say so.

    Args:
        source: the path of a local file, or the bytes of a file.
        spec: number, distance and size of the frames.
        sampling: "centre" or "uniform".
        limits: larger videos are refused; the defaults of `Limits` if None.

    Raises:
        VideoError: the source cannot be read or exceeds a limit, which the message names; or an
            unknown sampling.
    """
    if sampling not in SAMPLINGS:
        raise VideoError(f"sampling={sampling!r}; accepted are {', '.join(SAMPLINGS)}")
    with _local(source) as (path, name), _Video(path, name, limits or Limits()) as video:
        if sampling == "uniform" and video.count >= spec.frames:
            edges = np.linspace(0, video.count, spec.frames + 1)
            wanted = [int(i) for i in (edges[:-1] + edges[1:]) / 2]
        else:
            start = max(0, (video.count - spec.frames * spec.step) // 2)
            wanted = _consecutive(start, spec, video.count)
        (clip,) = video.clips([wanted], spec)
        return clip


def load_windows(
    source: str | Path | bytes,
    spec: ClipSpec,
    stride: int | None = None,
    limits: Limits | None = None,
) -> Iterator[Clip]:
    """Yield clips that start every `stride` frames of the video (the span of a clip if None).

    The last clip ends with the video, so that the clips cover all of it. The video is decoded
    lazily, clip by clip.

    Raises:
        VideoError: as `load_clip`; or a stride below 1.
    """
    span = (spec.frames - 1) * spec.step + 1
    stride = span if stride is None else stride
    if stride < 1:
        raise VideoError(f"stride is {stride} frames; accepted are 1 or more")
    with _local(source) as (path, name), _Video(path, name, limits or Limits()) as video:
        last = max(0, video.count - span)
        starts = [*range(0, last, stride), last]
        yield from video.clips([_consecutive(s, spec, video.count) for s in starts], spec)


def _consecutive(start: int, spec: ClipSpec, count: int) -> list[int]:
    """Frame numbers of a clip that starts at `start`; past the end, from the first frame again."""
    return [(start + i * spec.step) % count for i in range(spec.frames)]


@contextmanager
def _local(source: str | Path | bytes) -> Iterator[tuple[Path, str]]:
    """The path of the source, and its name for messages; bytes are written to a temporary file."""
    if not isinstance(source, bytes):
        if "://" in str(source):
            raise VideoError(f"{source}: a URL; accepted are local files and bytes")
        yield Path(source), str(source)
        return
    handle, path = tempfile.mkstemp(prefix="pynq_kgrc-", suffix=".video")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source)
        yield Path(path), "the video"
    finally:
        Path(path).unlink(missing_ok=True)


class _Video:
    """A video whose frames have been counted and timed; a context manager."""

    def __init__(self, path: Path, name: str, limits: Limits) -> None:
        self.path, self.name, self.limits = path, name, limits
        self._check_file()
        self.times_ms, declared, fps = self._measure()
        self.count = len(self.times_ms)
        self.frame_ms = 1000 / fps
        self.notes: list[str] = []
        if declared > self.count * 1.05 + 1:
            self.notes.append(
                f"decoding stopped at frame {self.count} of {declared} declared: "
                f"the file is cut off or damaged"
            )

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *_: object) -> None:
        """Each pass opens and closes the file itself."""

    def _check_file(self) -> None:
        try:
            if not self.path.is_file():
                raise VideoError(f"{self.name}: there is no such file")
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                head = file.read(256)
        except OSError as error:
            raise VideoError(f"{self.name}: cannot be read: {error.strerror}") from error
        if size == 0:
            raise VideoError(f"{self.name}: the file is empty (0 bytes)")
        if size > self.limits.max_bytes:
            raise VideoError(
                f"{self.name}: {size} bytes are more than the {self.limits.max_bytes} accepted"
            )
        if not _is_container(head):
            raise VideoError(f"{self.name}: {_why_not(self.path)}")

    @contextmanager
    def _opened(self) -> Iterator[cv2.VideoCapture]:
        before = os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS")
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = OPTIONS
        try:
            capture = cv2.VideoCapture(str(self.path.absolute()), cv2.CAP_FFMPEG)
        finally:
            if before is None:
                del os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"]
            else:
                os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = before
        try:
            if not capture.isOpened():
                raise VideoError(f"{self.name}: {_why_not(self.path)}")
            # upright frames: the default differs between OpenCV 4.11 and 5.0
            capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
            self._check_pixels(
                capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
            )
            yield capture
        except cv2.error as error:  # for example a frame of another size than the one before
            raise VideoError(f"{self.name}: OpenCV cannot read a frame; it is damaged") from error
        finally:
            capture.release()

    def _check_pixels(self, width: float, height: float) -> None:
        if width * height > self.limits.max_pixels:
            raise VideoError(
                f"{self.name}: frames of {int(width)} x {int(height)} pixels are larger than the "
                f"{self.limits.max_pixels} accepted"
            )
        if max(width, height) > MAX_ELONGATION * max(1, min(width, height)):
            raise VideoError(
                f"{self.name}: frames of {int(width)} x {int(height)} pixels are too elongated; "
                f"accepted is up to {MAX_ELONGATION} to 1"
            )

    def _measure(self) -> tuple[list[float], int, float]:
        """Times of all frames in ms, the declared number of frames (0: none), and the rate."""
        with self._opened() as capture:
            fps = capture.get(cv2.CAP_PROP_FPS)
            fps = fps if math.isfinite(fps) and 1 <= fps <= 240 else 25.0
            declared = capture.get(cv2.CAP_PROP_FRAME_COUNT)
            times: list[float] = []
            most = int(self.limits.max_seconds * fps) + 1
            while capture.grab():
                times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
                if len(times) > most or times[-1] > self.limits.max_seconds * 1000:
                    raise VideoError(
                        f"{self.name}: longer than the {self.limits.max_seconds:g} s accepted"
                    )
        if not times:
            raise VideoError(
                f"{self.name}: not one frame could be decoded; the file is cut off or damaged"
            )
        steps = np.diff(times)
        if not np.isfinite(times).all() or times[0] < 0 or (steps.size and steps.min() <= 0):
            times = [i * 1000 / fps for i in range(len(times))]
        sane = 0 < declared <= 10_000_000
        return times, int(declared) if sane else 0, fps

    def clips(self, wanted: Sequence[list[int]], spec: ClipSpec) -> Iterator[Clip]:
        """Yield the clips of these frame numbers, each as soon as its last frame is decoded."""
        needed = {number for numbers in wanted for number in numbers}
        kept: dict[int, Array] = {}
        waiting = list(wanted)
        with self._opened() as capture:
            for number in range(max(needed) + 1):
                if not capture.grab():
                    break
                if number not in needed:
                    continue
                ok, frame = capture.retrieve()
                if not ok:
                    break
                self._check_pixels(frame.shape[1], frame.shape[0])
                kept[number] = fit(frame, spec)
                while waiting and max(waiting[0]) <= number:
                    yield self._clip(waiting.pop(0), kept, spec)
                    oldest = min((min(numbers) for numbers in waiting), default=number)
                    for old in [n for n in kept if n < oldest]:
                        del kept[old]
        if waiting:  # the first pass decoded more than the second
            raise VideoError(f"{self.name}: frame {number} decoded once, but not again")

    def _clip(self, numbers: list[int], kept: dict[int, Array], spec: ClipSpec) -> Clip:
        notes = list(self.notes)
        if numbers != sorted(set(numbers)):
            span = (spec.frames - 1) * spec.step + 1
            notes.append(
                f"the video has {self.count} frames, a clip spans {span}: "
                f"it starts over to fill the clip"
            )
        frames = np.stack([kept[number] for number in numbers])
        first, last = min(numbers), max(numbers)
        end = self.times_ms[last] + self.frame_ms
        return Clip(frames, self.times_ms[first], end, tuple(notes))


def fit(frame: Array, spec: ClipSpec) -> Array:
    """Resize a BGR frame by its short side, crop its centre, and convert it to RGB [H, W, 3].

    The resize is bilinear, as in the training of the pretrained networks.
    """
    height, width = frame.shape[:2]
    scale = spec.short_side / min(height, width)
    # rounding must not make it smaller than the crop
    size = (max(spec.width, round(width * scale)), max(spec.height, round(height * scale)))
    if size != (width, height):
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
    top, left = (size[1] - spec.height) // 2, (size[0] - spec.width) // 2
    cut = frame[top : top + spec.height, left : left + spec.width, ::-1]
    return np.ascontiguousarray(cut)


def _is_container(head: bytes) -> bool:
    """Whether a file starts with the signature of MP4, AVI, Matroska, GIF or MPEG-TS."""
    return (
        head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or head[:4] == b"\x1aE\xdf\xa3"
        or head[:4] == b"GIF8"
        or (head[:1] == b"G" and head[188:189] == b"G")
        or (
            head[4:5] == b"G" and head[196:197] == b"G"
        )  # M2TS: 4 bytes of time stamp before every packet
    )


def _why_not(path: Path) -> str:
    """The reason why OpenCV cannot open a file, as far as its first and last bytes show."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        body = head + file.read()
    accepted = "accepted are MP4, MKV, WebM, AVI, MPEG-TS and GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return f"sound only, a WAV file; {accepted}"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        if b"auds" in body and b"vids" not in body:
            return "an AVI file with sound only, no video"
        return "an AVI file without video that can be read; it is cut off or damaged"
    if head[4:8] == b"ftyp":
        if b"moov" not in body:
            return "an MP4 file without its index (moov); it is cut off"
        if b"soun" in body and b"vide" not in body:
            return "an MP4 file with sound only, no video"
        return "an MP4 file without video that can be read; it is damaged"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "a Matroska file without video that can be read; it is cut off or has sound only"
    return f"not a video; {accepted}"
