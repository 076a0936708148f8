"""Messages between the processes of the service: a JSON head and a payload, over a pipe.

A message is two little-endian lengths (4 bytes for the head, 8 for the payload), then the head and
the payload. A decoder child may be taken over by the video that it decodes, so the reader checks
lengths and types.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import struct
from typing import Any, BinaryIO, TypeVar

import msgspec

from pynq_kgrc.analysis.documents import ProgramDescription, TaskDescription
from pynq_kgrc.errors import DeviceError
from pynq_kgrc.graph import MAX_PIXELS, MAX_SECONDS, ClipSpec

LENGTHS = struct.Struct("<IQ")
MAX_HEAD = 4_000_000
MAX_PAYLOAD = 1 << 30

T = TypeVar("T")


class Command(msgspec.Struct, forbid_unknown_fields=True):
    """To a worker: `load` a program from `path`, `run` a clip, `drop` a program, or `ping`."""

    verb: str
    key: str = ""
    path: str = ""


class LayerRun(msgspec.Struct, frozen=True, kw_only=True):
    """One task of a clip: counted work, and milliseconds on this host."""

    task: str
    macs: int
    bytes: int
    """Traffic to and from memory."""
    ms: float


class TimedTask(TaskDescription, frozen=True, kw_only=True):
    """One task of a program, with its modelled time."""

    modelled_ms: float


class ProgramDocument(ProgramDescription, frozen=True, kw_only=True):
    """A program as it is described to clients: with labels and modelled latency."""

    tasks: tuple[TimedTask, ...]
    labels: list[str]
    """One per class; empty if the program has none."""
    modelled_ms: float
    """Latency of a clip by the cost model, at `modelled_clock_mhz`."""
    modelled_clock_mhz: float


class Answer(msgspec.Struct):
    """A worker's answer to a command; `error` is empty if the command succeeded."""

    error: str = ""
    kind: str = ""
    """Class of the error, such as DeviceError."""
    seconds: float = 0.0
    layers: list[LayerRun] = []
    program: ProgramDocument | None = None


class DecodeRequest(msgspec.Struct, tag="decode", forbid_unknown_fields=True):
    """To a decoder child: what to decode, into which clips, within which limits."""

    verb: str
    """`clips` of a video, or `frames` of a live session."""
    clip: ClipSpec
    sampling: str = "windows"
    """One of `graph.SAMPLINGS`."""
    window: int | None = None
    stride: int | None = None
    max_pixels: int = MAX_PIXELS
    max_seconds: float = MAX_SECONDS
    decode_seconds: float = 120.0
    decode_bytes: int = 1_000_000_000


class BodyRequest(msgspec.Struct, tag="body", frozen=True, forbid_unknown_fields=True):
    """How to read the body of an inference request. To a decoder child."""

    model: str
    clip_shape: tuple[int, int, int, int]
    """[D, H, W, 3]."""
    most: int
    """Largest body after decompression, in bytes."""
    encoding: str = ""
    """Content-Encoding."""
    head_length: str | None = None
    """Inference-Header-Content-Length: bytes of the JSON part; without it all is JSON."""
    memory_bytes: int = 250_000_000
    """Address space that a decoder child may add."""
    seconds: float = 30.0
    """Time limit of a decoder child."""

    @property
    def clip_bytes(self) -> int:
        """Bytes of a clip."""
        return math.prod(self.clip_shape)


class ConfinedRequest(msgspec.Struct, tag="confined", forbid_unknown_fields=True):
    """To a decoder child: confine yourself, and tell what you cannot do."""


Orders = DecodeRequest | BodyRequest | ConfinedRequest
"""What a decoder child may be asked for."""


class DecodeReply(msgspec.Struct):
    """From a decoder child; `kind` is `clip`, `frame`, `end`, `body`, `confined` or `error`."""

    kind: str
    number: int = 0
    start_ms: float = 0.0
    end_ms: float = 0.0
    decoded: int = 0
    declared_ms: float = 0.0
    duration_ms: float = 0.0
    width: int = 0
    height: int = 0
    codec: str = ""
    container: str = ""
    notes: list[str] = []
    status: int = 422
    text: str = ""


def enlarge_pipe(descriptor: int) -> None:
    """Set a pipe's buffer to 1 MB instead of 64 kB: a clip passes in fewer system calls."""
    with contextlib.suppress(OSError):  # the system limits the pipe buffers of a user
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 1 << 20)


def pack_head(head: Any, payload: int) -> bytes:
    """The lengths and the head of a message whose payload has `payload` bytes."""
    text = msgspec.json.encode(head)
    return LENGTHS.pack(len(text), payload) + text


def send(file: BinaryIO, head: Any, payload: bytes | memoryview = b"") -> None:
    """Write one message; blocks."""
    file.write(pack_head(head, len(payload)))
    if payload:
        file.write(payload)
    file.flush()


def receive(file: BinaryIO, kind: type[T]) -> tuple[T, bytes] | None:
    """Read one message, or None at the end of the file; blocks.

    Raises:
        DeviceError: the bytes are not a message of that kind.
    """
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head, payload = _unpack_lengths(lengths)
    text = file.read(head)
    body = file.read(payload)
    if len(text) < head or len(body) < payload:
        return None
    return _decode_head(text, kind), body


async def read(
    stream: asyncio.StreamReader, kind: type[T], most: int = MAX_PAYLOAD
) -> tuple[T, bytes] | None:
    """As `receive`, for asyncio.

    Raises:
        DeviceError: the bytes are not a message of that kind, or the payload exceeds `most`.
    """
    try:
        head, payload = _unpack_lengths(await stream.readexactly(LENGTHS.size), most)
        text = await stream.readexactly(head)
        body = await stream.readexactly(payload) if payload else b""
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _decode_head(text, kind), body


def _unpack_lengths(lengths: bytes, most: int = MAX_PAYLOAD) -> tuple[int, int]:
    head, payload = LENGTHS.unpack(lengths)
    if head > MAX_HEAD or payload > most:
        raise DeviceError(f"a message of {head} + {payload} bytes; at most {MAX_HEAD} + {most}")
    return head, payload


def _decode_head(text: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise DeviceError(f"not a message: {error}") from error
