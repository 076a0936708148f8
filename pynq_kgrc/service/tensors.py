"""The body of an inference request: its JSON part and the values of its tensor.

A JSON tensor or a compressed body is read in a decoder child (`decode.py`), because that may take
seconds and much memory. Imports no web framework.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable
from functools import cache
from itertools import chain
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.wire import BodyRequest

INPUT = "frames"
MAX_BATCH = 32
"""Most clips of a request."""
HEADER_LENGTH = "inference-header-content-length"
MAX_HEAD = 1_000_000
"""Largest JSON part of a request whose tensor is binary, in bytes."""
MAX_JSON = 32_000_000
"""Largest JSON part of a request whose tensor is JSON too."""
NESTED = re.compile(rb"[ \t\r\n\[]*")

Byte = Annotated[int, Meta(ge=0, le=255)]


class Tensor(msgspec.Struct):
    """An input tensor of a request."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class RequestedOutput(msgspec.Struct):
    """An output tensor that a request asks for."""

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(msgspec.Struct):
    """The JSON part of a request. A field that is null counts as absent."""

    inputs: list[Tensor]
    id: str | None = None
    outputs: list[RequestedOutput] | None = None
    parameters: dict[str, Any] | None = None


def read_body(body: bytes | bytearray, how: BodyRequest) -> tuple[InferRequest, memoryview]:
    """The JSON part of a body, without the data of its tensor, and the clips, one after the other.

    Raises:
        Refusal: 400, 413 or 415; names the input, its value, and what the model accepts.
    """
    plain = inflate(body, how.encoding, how.most)
    size = len(plain)
    if how.head_length is not None:
        size = _head_size(how.head_length, size)
    most = MAX_JSON if how.head_length is None else MAX_HEAD
    if size > most:
        raise Refusal(413, f"JSON of {size} bytes; accepted are {most}: send tensors binary")
    try:
        request = msgspec.json.decode(memoryview(plain)[:size], type=InferRequest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Refusal(400, f"not an inference request: {error}") from error
    values = read_clips(how, request, memoryview(plain)[size:])
    for tensor in request.inputs:
        tensor.data = msgspec.Raw(b"null")
    return request, values


def _head_size(text: str, body: int) -> int:
    digits = text.isascii() and text.isdigit() and len(text) < 19
    if not digits or int(text) > body:
        raise Refusal(400, f"{HEADER_LENGTH}: {text[:30]} of a body of {body} bytes")
    return int(text)


def inflate(body: bytes | bytearray, encoding: str, most: int) -> bytes | bytearray:
    """Decompress a body, to at most `most` bytes (a zip bomb is refused).

    Raises:
        Refusal: 400 damaged, 413 too large, 415 unknown encoding.
    """
    kinds = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
    encoding = encoding.strip().lower().removeprefix("x-")
    if encoding in ("", "identity"):
        return body
    if encoding not in kinds:
        raise Refusal(415, f"Content-Encoding {encoding[:30]!r}; accepted are gzip and deflate")
    reader = zlib.decompressobj(kinds[encoding])
    try:
        plain = reader.decompress(body, most + 1)
    except zlib.error as error:
        raise Refusal(400, f"the {encoding} body is damaged: {error}") from error
    if len(plain) > most:
        raise Refusal(413, f"the body inflates to more than the {most} bytes accepted")
    if not reader.eof:
        raise Refusal(400, f"the {encoding} body is cut off")
    return plain


def read_clips(how: BodyRequest, request: InferRequest, binary: memoryview) -> memoryview:
    """The clips of a request, uint8 [clips, D, H, W, 3].

    Raises:
        Refusal: 400, names the input, its value, and what the model accepts.
    """
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        named = ", ".join(tensor.name[:30] for tensor in request.inputs[:5]) or "none"
        raise Refusal(400, f"inputs {named}; {how.model} has one, {INPUT}")
    tensor = request.inputs[0]
    if tensor.datatype != "UINT8":
        raise Refusal(400, f"input {INPUT} of type {tensor.datatype[:20]}; accepted is UINT8")
    shape, wanted = tuple(tensor.shape), how.clip_shape
    count = 1 if shape == wanted else shape[0] if shape[1:] == wanted else 0
    if not 1 <= count <= MAX_BATCH:
        raise Refusal(
            400,
            f"input {INPUT} of shape {str(list(shape))[:60]}; accepted are "
            f"{[-1, *wanted]} with 1 to {MAX_BATCH} clips",
        )
    size = count * how.clip_bytes
    declared = (tensor.parameters or {}).get("binary_data_size")
    if declared is None:
        if binary:
            raise Refusal(
                400, f"{len(binary)} bytes after the JSON; no input declares a binary_data_size"
            )
        return memoryview(read_values(tensor.data, shape))
    if type(declared) is not int or declared != len(binary) or len(binary) != size:
        raise Refusal(
            400,
            f"input {INPUT}: binary_data_size {str(declared)[:20]}, {len(binary)} bytes arrived; "
            f"its shape takes {size}",
        )
    return binary


def split_clips(how: BodyRequest, values: memoryview) -> list[memoryview]:
    """Each of the clips that `read_clips` gave, without a copy."""
    step = how.clip_bytes
    return [values[at : at + step] for at in range(0, len(values), step)]


def read_values(text: msgspec.Raw, shape: tuple[int, ...]) -> bytes:
    """The values 0 to 255 of a JSON tensor, flat or nested as its shape, in row-major order.

    >>> list(read_values(msgspec.Raw(b"[[1, 2], [3, 4]]"), (2, 2)))
    [1, 2, 3, 4]

    Raises:
        Refusal: 400, other values, or another number or nesting of them.
    """
    opening = NESTED.match(bytes(memoryview(text)[:1000]))
    nested = opening is not None and opening[0].count(b"[") > 1
    try:
        return _nested_values(text, shape) if nested else _flat_values(text, math.prod(shape))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refusal(
            400,
            f"input {INPUT}: data that cannot be read ({str(error)[:200]}); accepted are "
            f"{math.prod(shape)} whole numbers from 0 to 255, flat or nested as the shape",
        ) from error


def _flat_values(text: msgspec.Raw, count: int) -> bytes:
    values = bytes(msgspec.json.decode(text or b"null", type=list[Byte]))
    if len(values) != count:
        raise Refusal(400, f"input {INPUT}: data are {len(values)} values, not {count}")
    return values


def _nested_values(text: msgspec.Raw, shape: tuple[int, ...]) -> bytes:
    """Part by part down to three dimensions: lists of numbers take much memory."""
    if len(shape) <= 3:
        rows: Iterable[Any] = msgspec.json.decode(text, type=_nested_type(shape))
        for _ in shape[1:]:
            rows = chain.from_iterable(rows)
        return bytes(rows)
    parts = msgspec.json.decode(text, type=_list_of(msgspec.Raw, shape[0]))
    return b"".join(_nested_values(part, shape[1:]) for part in parts)


@cache
def _nested_type(shape: tuple[int, ...]) -> Any:
    kind: Any = Byte
    for count in reversed(shape):
        kind = _list_of(kind, count)
    return kind


def _list_of(kind: Any, count: int) -> Any:
    return Annotated[list[kind], Meta(min_length=count, max_length=count)]


def whole_parameter(
    parameters: dict[str, Any] | None, name: str, least: int, most: int, default: int
) -> int:
    """A parameter of the protocol that is a whole number; the default if it is absent or null.

    Raises:
        Refusal: 400, another type or out of bounds.
    """
    value = (parameters or {}).get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:  # True is an int, too
        raise Refusal(
            400, f"{name}={_shown(value)}; accepted are whole numbers from {least} to {most}"
        )
    return value


def flag_parameter(parameters: dict[str, Any] | None, name: str, default: bool) -> bool:
    """A parameter of the protocol that is true or false; the default if it is absent or null.

    Raises:
        Refusal: 400, another type.
    """
    value = (parameters or {}).get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise Refusal(400, f"{name}={_shown(value)}; accepted are true and false")
    return value


def _shown(value: Any) -> str:
    return msgspec.json.encode(value)[:40].decode("utf-8", "replace")
