"""An archive of videos: its files, the result of each file, and the journal of results so far.

Nothing here needs Ray: every process calls `classify_file` for a file, alone or in a cluster, and
`Journal` is the one place where results are kept until the table is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from pynq_kgrc.errors import ConfigError, DataError, KgrcError, VideoError
from pynq_kgrc.graph import DEFAULT_SAMPLING, ClipSpec
from pynq_kgrc.quant import Array
from pynq_kgrc.results import Label, WindowLabels
from pynq_kgrc.runtime import Session, best_labels
from pynq_kgrc.video import Clip, Limits, load_clip, load_windows

VERSION = 2
"""Version of `FileResult`; results of another version are not mixed with these. Version 1 had
`labels` and `scores` as two lists."""


class ArchiveSettings(msgspec.Struct, frozen=True):
    """Everything that decides the result of a file; a table has results of one set of settings."""

    program: str
    """SHA-256 of the program's file."""
    backend: str = "emulate"
    top: int = 5
    stride: int | None = None
    """Frames between the starts of two clips; None: one clip per video."""
    sampling: str = DEFAULT_SAMPLING
    version: int = VERSION

    def differences(self, other: ArchiveSettings) -> str:
        """The fields in which `other` differs, for an error message."""
        ours, theirs = msgspec.to_builtins(self), msgspec.to_builtins(other)
        return ", ".join(
            f"{k} {theirs[k]} there, {v} here" for k, v in ours.items() if v != theirs[k]
        )


class File(msgspec.Struct, frozen=True):
    """A file of the archive; if its size or time of change differs, its result is out of date."""

    path: str
    """Relative to the archive's folder; bytes that are not UTF-8 become backslash escapes."""
    size: int
    modified_ns: int
    place: bytes
    """Absolute path, as the bytes that the system calls take."""


class FileResult(msgspec.Struct, frozen=True):
    """The labels of a file, or the reason why it has none."""

    path: str
    size: int
    modified_ns: int
    labels: tuple[Label, ...] = ()
    """The best labels of the whole video, by the mean of its clips' probabilities."""
    windows: tuple[WindowLabels, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None


def find_files(folder: Path, leave_out: Iterable[Path] = ()) -> list[File]:
    """Every file below a folder, sorted by path, without hidden files and links to folders.

    Raises:
        DataError: the folder does not exist, a folder cannot be read, or there is no file.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    skipped = {path.absolute() for path in leave_out}
    found = []
    for base, folders, names in os.walk(folder.absolute(), onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(base, name)
            if name.startswith(".") or path in skipped:
                continue
            found.append(_as_file(path, os.path.relpath(path, folder)))
    if not found:
        raise DataError(f"{folder}: contains no file")
    return sorted(found, key=lambda file: file.path)


def _as_file(path: Path, name: str) -> File:
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    try:
        status = path.stat()
    except OSError:  # such as a dangling link: `classify_file` reports it
        return File(text, 0, 0, os.fsencode(path))
    return File(text, status.st_size, status.st_mtime_ns, os.fsencode(path))


def digest_of(program: Path) -> str:
    """SHA-256 of a program's file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return hashlib.sha256(program.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{program}: cannot be read: {error.strerror}") from error


def classify_file(session: Session, file: File, settings: ArchiveSettings) -> FileResult:
    """Classify one file; a file that is not a readable video gives a result with an error.

    Raises:
        KgrcError: the device or the program failed, not the file.
    """
    path = Path(os.fsdecode(file.place))
    clips: list[tuple[Clip, Array]] = []
    try:
        clips_of_file = read_clips(path, session.program.clip, settings.stride, settings.sampling)
        for clip in clips_of_file:
            # keep the times, not the frames: a long video has many windows
            kept = Clip(clip.frames[:0], clip.start_ms, clip.end_ms, clip.notes)
            clips.append((kept, session.run(clip.frames).probabilities))
    except VideoError as error:
        return failed(file, str(error).removeprefix(f"{path}: "))
    names = session.program.labels
    labels = best_labels(np.mean([p for _, p in clips], axis=0), names, settings.top)
    windows = tuple(
        WindowLabels(clip.start_ms, clip.end_ms, best_labels(p, names, settings.top))
        for clip, p in clips
    )
    notes = tuple(dict.fromkeys(note for clip, _ in clips for note in clip.notes))
    return FileResult(file.path, file.size, file.modified_ns, labels, windows, notes)


LONG = Limits(max_bytes=1 << 40, max_seconds=1e6)
"""Limits for local files: memory does not grow with the length of a video."""


def read_clips(path: Path, spec: ClipSpec, stride: int | None, sampling: str) -> Iterator[Clip]:
    """The clips of a local file, decoded one at a time: one by `sampling`, or one every `stride`.

    Raises:
        VideoError: it cannot be read; every exception of a decoder becomes one of this file.
    """
    try:
        if stride is not None:
            yield from load_windows(path, spec, stride=stride, limits=LONG)
        else:
            yield load_clip(path, spec, sampling=sampling, limits=LONG)
    except KgrcError:
        raise
    except Exception as error:
        why = f"cannot be decoded: {type(error).__name__}: {error}"
        raise VideoError(f"{path}: {why}") from error


def failed(file: File, why: str) -> FileResult:
    """The result of a file that could not be classified."""
    return FileResult(file.path, file.size, file.modified_ns, error=why)


class Journal:
    """Results on disk, one transaction each, so that a run may end at any moment.

    A context manager. Its file is locked for as long as it is open.

    Args:
        path: a sqlite file; it is created if it does not exist.
        settings: what the results depend on.

    Raises:
        ConfigError: the file has results of other settings, is not a journal, or is in use.
    """

    def __init__(self, path: Path, settings: ArchiveSettings) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path}: cannot be written: {error}") from error
        try:
            self._open(settings)
        except BaseException:
            self._store.close()
            raise

    def _open(self, settings: ArchiveSettings) -> None:
        try:
            # the lock is held until this process ends, however it ends
            self._store.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._store.execute("BEGIN EXCLUSIVE")
            self._store.execute("CREATE TABLE IF NOT EXISTS question (document BLOB)")
            self._store.execute("CREATE TABLE IF NOT EXISTS rows (path TEXT PRIMARY KEY, row BLOB)")
            stored = self._store.execute("SELECT document FROM question").fetchone()
            if stored is None:
                text = msgspec.json.encode(settings)
                self._store.execute("INSERT INTO question VALUES (?)", (text,))
            else:
                check_same_settings(self.path, stored[0], settings)
            self._store.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ConfigError(f"{self.path}: another run is writing these results") from error
            raise ConfigError(f"{self.path}: cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{self.path}: is not a journal of results: {error}") from error

    def add(self, result: FileResult) -> None:
        """Store a result; it replaces an older one of the same path.

        Raises:
            DataError: it cannot be written; results that were added before are safe.
        """
        try:
            document = (result.path, msgspec.json.encode(result))
            self._store.execute("INSERT OR REPLACE INTO rows VALUES (?, ?)", document)
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: a result cannot be written: {error}") from error

    def results(self, files: Iterable[File]) -> Iterator[FileResult]:
        """The stored results that are up to date, in the order of `files`."""
        for file in files:
            query = "SELECT row FROM rows WHERE path = ?"
            stored = self._store.execute(query, (file.path,)).fetchone()
            if stored is not None:
                result = msgspec.json.decode(stored[0], type=FileResult)
                if (result.size, result.modified_ns) == (file.size, file.modified_ns):
                    yield result

    def close(self) -> None:
        """Close the file and release its lock."""
        self._store.close()

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_same_settings(path: Path, stored: bytes, settings: ArchiveSettings) -> None:
    """Refuse a file whose results were made with other settings.

    Raises:
        ConfigError: names the fields that differ.
    """
    try:
        other = msgspec.json.decode(stored, type=ArchiveSettings)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: has results of another release ({error})") from error
    if other != settings:
        raise ConfigError(
            f"{path}: has results of other settings ({settings.differences(other)}); "
            f"give another --out, or --anew to start over"
        )
