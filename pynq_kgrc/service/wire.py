"""Messages between the processes of the service: a JSON head and a payload, over a pipe.

A message is two lengths, little-endian (4 bytes of head, 8 of payload), then head and payload. Both
sides are ours, but a child that decodes a stranger's video may be taken over, so that the one
who reads checks lengths and types.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import struct
from typing import Any, BinaryIO, TypeVar

import msgspec

from pynq_kgrc.errors import DeviceError

LENGTHS = struct.Struct("<IQ")
MAX_HEAD = 4_000_000
MAX_PAYLOAD = 1 << 30

T = TypeVar("T")


class Command(msgspec.Struct, forbid_unknown_fields=True):
    """For a worker: `load` a program from `path`, `run` a clip, `drop` a program, or `ping`."""

    verb: str
    key: str = ""
    path: str = ""


class Answer(msgspec.Struct):
    """A worker's; `error` is empty if all went well."""

    error: str = ""
    kind: str = ""
    """The error's class, such as DeviceError."""
    seconds: float = 0.0
    layers: list[dict[str, Any]] = []
    program: dict[str, Any] = {}


class DecodeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """For a child that decodes: what to do, within which limits."""

    verb: str
    """`clips` of a video, or `frames` of a live session."""
    frames: int
    height: int
    width: int
    short_side: int
    step: int
    window: int | None = None
    stride: int | None = None
    uniform: bool = False
    """One clip whose frames are spread over the whole video."""
    max_pixels: int = 1920 * 1088
    max_seconds: float = 600.0
    decode_seconds: float = 120.0
    decode_bytes: int = 1_000_000_000


class DecodeReply(msgspec.Struct):
    """From a child that decodes: a clip, a frame, the end, or an error."""

    kind: str
    number: int = 0
    start_ms: float = 0.0
    end_ms: float = 0.0
    decoded: int = 0
    declared: int = 0
    duration_ms: float = 0.0
    width: int = 0
    height: int = 0
    codec: str = ""
    container: str = ""
    notes: list[str] = []
    status: int = 422
    text: str = ""


def enlarge_pipe(descriptor: int) -> None:
    """Let a pipe hold a megabyte instead of 64 kB: a clip passes in fewer turns."""
    with contextlib.suppress(OSError):  # the user's pipes may be limited
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 1 << 20)


def pack_head(head: Any, payload: int) -> bytes:
    """What goes before a payload of that many bytes."""
    text = msgspec.json.encode(head)
    return LENGTHS.pack(len(text), payload) + text


def send(file: BinaryIO, head: Any, payload: bytes | memoryview = b"") -> None:
    """Write one message; blocks."""
    file.write(pack_head(head, len(payload)))
    if payload:
        file.write(payload)
    file.flush()


def receive(file: BinaryIO, kind: type[T]) -> tuple[T, bytes] | None:
    """Read one message; none at the end; blocks.

    Raises:
        DeviceError: what arrives is no message of that kind.
    """
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head, payload = _checked(lengths)
    text = file.read(head)
    body = file.read(payload)
    if len(text) < head or len(body) < payload:
        return None
    return _decoded(text, kind), body


async def read(
    stream: asyncio.StreamReader, kind: type[T], most: int = MAX_PAYLOAD
) -> tuple[T, bytes] | None:
    """As `receive`, without blocking others.

    Raises:
        DeviceError: what arrives is no message of that kind, or its payload exceeds `most`.
    """
    try:
        head, payload = _checked(await stream.readexactly(LENGTHS.size), most)
        text = await stream.readexactly(head)
        body = await stream.readexactly(payload) if payload else b""
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _decoded(text, kind), body


def _checked(lengths: bytes, most: int = MAX_PAYLOAD) -> tuple[int, int]:
    head, payload = LENGTHS.unpack(lengths)
    if head > MAX_HEAD or payload > most:
        raise DeviceError(f"a message of {head} + {payload} bytes; at most {MAX_HEAD} + {most}")
    return head, payload


def _decoded(text: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise DeviceError(f"not a message: {error}") from error
