"""Uploads: the body of a request, raw or multipart, is stored in an unnamed temporary file.

The kernel deletes an unnamed file when the last process that has it open ends, however it ends.
No path leads to it, so another upload cannot refer to it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pynq_kgrc.service.refusal import Refusal

VIDEO_FIELDS = ("video", "file")
MAX_FIELD = 1000
"""Largest field of a form other than the video, in bytes."""
MAX_PARTS = 16


class Room:
    """The room for uploads on a disk: what is free, less what uploads under way were promised.

    Args:
        folder: a folder on that disk.
        keep: bytes that stay free.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.promised = 0
        """Bytes that were announced by uploads under way and have not arrived yet."""

    def check(self, size: int, promised: int = 0) -> None:
        """Refuse `size` more bytes that do not fit beside what is to stay free.

        Args:
            size: the bytes.
            promised: how many of them were promised to this upload before.

        Raises:
            Refusal: 507, the disk is full.
        """
        others = self.promised - promised
        free = shutil.disk_usage(self.folder).free - others
        if free < size + self.keep:
            raise Refusal(
                507,
                f"no room for an upload of {size} bytes: {max(0, free)} are free beside other "
                f"uploads, and {self.keep} stay free",
                60,
            )


class Upload:
    """A video in an unnamed temporary file; closing it deletes it.

    Args:
        room: the disk on which the file is.
        expected: bytes that the client announced, which are reserved; 0 if it did not.

    Raises:
        Refusal: 507, the disk is full.
    """

    def __init__(self, room: Room, expected: int) -> None:
        self.room, self.promised = room, 0
        room.check(expected)
        folder = room.folder
        self.file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115
        self.size = 0
        self.fields: list[tuple[str, str]] = []
        """Name and text of each further field of a form."""
        self._promise(expected)

    def _promise(self, change: int) -> None:
        self.promised += change
        self.room.promised += change

    def write(self, data: bytes) -> None:
        """Append data.

        Raises:
            Refusal: 507, the disk is full.
        """
        own = min(len(data), self.promised)
        self.room.check(len(data), own)
        try:
            while data:
                written = self.file.write(data)
                self.size += written
                data = data[written:]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise Refusal(507, f"the disk is full after {self.size} bytes", 60) from error
            raise
        self._promise(-own)

    def complete(self) -> None:
        """All has arrived: what was promised beyond it is free again."""
        self._promise(-self.promised)

    def open(self) -> int:
        """A new descriptor of the file, with a read position of its own."""
        return os.open(f"/proc/self/fd/{self.file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close and delete the file."""
        self.complete()
        self.file.close()


class _Form:
    """Parses a multipart body: one video, and small fields."""

    def __init__(self, upload: Upload, boundary: bytes) -> None:
        self.upload = upload
        self.videos = self.parts = 0
        self._field = self._value = b""
        self._header = self._header_value = b""
        self._in_video = False
        self.ended = False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_header_value,
                "on_header_end": self._header_end,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finished,
            },
        )

    def _begin(self) -> None:
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise Refusal(400, f"a form of more than {MAX_PARTS} parts")
        self._field = self._value = self._header = self._header_value = b""
        self._in_video = False

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._field = parse_options_header(self._header_value)[1].get(b"name", b"")
            self._in_video = self._field.decode("latin-1") in VIDEO_FIELDS
            self.videos += self._in_video
            if self.videos > 1:
                raise Refusal(400, "a form with more than one video; send them one by one")
        self._header = self._header_value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_video:
            self.upload.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD:
            name = self._field.decode("latin-1")[:50]
            raise Refusal(400, f"field {name!r} of the form has more than {MAX_FIELD} bytes")

    def _end(self) -> None:
        if not self._in_video and self._field:
            name = self._field.decode("utf-8", "replace")
            self.upload.fields.append((name, self._value.decode("utf-8", "replace")))

    def _finished(self) -> None:
        self.ended = True


async def receive_upload(
    chunks: AsyncIterator[bytes], content_type: str, expected: int, room: Room
) -> Upload:
    """Store the body of a request in a file; `expected` is its announced size, or 0.

    Raises:
        Refusal: 400 a malformed form, or one without a video; 415 another type of body; 507.
    """
    kind, options = parse_options_header(content_type)
    text = kind.decode("latin-1").lower()
    form = text == "multipart/form-data"
    accepted = text.startswith("video/") or text in ("application/octet-stream", "image/gif", "")
    if not form and not accepted and text != "application/x-www-form-urlencoded":
        raise Refusal(
            415,
            f"a body of type {text[:50]!r}; send a video as video/mp4 (or another video type), "
            f"application/octet-stream, or multipart/form-data",
        )
    if form and not options.get(b"boundary"):
        raise Refusal(400, "multipart/form-data without a boundary")
    upload = Upload(room, expected)
    try:
        reader = _Form(upload, options[b"boundary"]) if form else None
        async for chunk in chunks:
            if reader is None:
                upload.write(chunk)
            elif chunk:
                reader.parser.write(chunk)
        if reader is not None:
            if not reader.ended:
                raise Refusal(400, "a form that is cut off")
            if not reader.videos:
                raise Refusal(400, f"a form without a part named {' or '.join(VIDEO_FIELDS)}")
        if not upload.size:
            raise Refusal(400, "an empty video (0 bytes)")
        upload.complete()
    except FormParserError as error:
        upload.close()
        raise Refusal(400, f"not a form: {error}") from error
    except BaseException:
        upload.close()
        raise
    return upload
