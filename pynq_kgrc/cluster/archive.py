"""An archive of videos: which files it has, what one file shows, and what was found out so far.

Nothing here needs Ray: `look` is what every process does with a file, alone or in a cluster, and
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
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Session, best_labels
from pynq_kgrc.video import Clip, load_clip, load_windows

VERSION = 1
"""Of the rows; results of another version are not mixed with these."""


class Question(msgspec.Struct, frozen=True):
    """What is asked of every file; results belong to one question."""

    program: str
    """SHA-256 of the program's file."""
    backend: str = "emulate"
    top: int = 5
    stride: int | None = None
    """Frames between two clips; none: one clip a video."""
    sampling: str = "centre"
    version: int = VERSION

    def differences(self, other: Question) -> str:
        """In which fields another question differs, in words."""
        ours, theirs = msgspec.to_builtins(self), msgspec.to_builtins(other)
        return ", ".join(
            f"{k} {theirs[k]} there, {v} here" for k, v in ours.items() if v != theirs[k]
        )


class File(msgspec.Struct, frozen=True):
    """A file as it was found; one that changes is another file."""

    path: str
    """Below the archive's folder; bytes that are no UTF-8 as backslash escapes."""
    size: int
    modified_ns: int
    place: bytes
    """Where it can be opened."""


class Window(msgspec.Struct, frozen=True):
    """A clip of a video and its best labels."""

    start_ms: float
    end_ms: float
    labels: list[str]
    scores: list[float]


class Row(msgspec.Struct, frozen=True):
    """What a file shows, or why that is not known."""

    path: str
    size: int
    modified_ns: int
    labels: list[str] = []
    """The best over the whole video, by the mean of its clips' probabilities."""
    scores: list[float] = []
    """Their probabilities."""
    windows: list[Window] = []
    notes: list[str] = []
    error: str | None = None


def find_files(folder: Path, leave_out: Iterable[Path] = ()) -> list[File]:
    """Every file below a folder, sorted by path; hidden ones and links to folders are left out.

    Raises:
        DataError: no such folder, one that cannot be read, or no file in it.
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
        raise DataError(f"{folder}: holds no file")
    return sorted(found, key=lambda file: file.path)


def _as_file(path: Path, name: str) -> File:
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    try:
        seen = path.stat()
    except OSError:  # such as a link that leads nowhere: `look` will say so
        return File(text, 0, 0, os.fsencode(path))
    return File(text, seen.st_size, seen.st_mtime_ns, os.fsencode(path))


def digest_of(program: Path) -> str:
    """SHA-256 of a program's file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return hashlib.sha256(program.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{program}: cannot be read: {error.strerror}") from error


def look(session: Session, file: File, question: Question) -> Row:
    """What a file shows; a file that is no video gives a row that says why.

    Raises:
        KgrcError: the device or the program is at fault, not the file.
    """
    path = Path(os.fsdecode(file.place))
    windows: list[tuple[Clip, Array]] = []
    try:
        for clip in _clips(path, session.program.clip, question):
            probabilities = session.run(clip.frames).probabilities
            # the frames are not kept: a long video has many windows
            seen = Clip(clip.frames[:0], clip.start_ms, clip.end_ms, clip.notes)
            windows.append((seen, probabilities))
    except VideoError as error:
        return failed(file, str(error).removeprefix(f"{path}: "))
    names = session.program.labels

    def best(scores: Array) -> tuple[list[str], list[float]]:
        labels = best_labels(scores, names, question.top)
        return [each.label for each in labels], [each.confidence for each in labels]

    labels, scores = best(np.mean([s for _, s in windows], axis=0))
    found = [Window(clip.start_ms, clip.end_ms, *best(s)) for clip, s in windows]
    notes = list(dict.fromkeys(note for clip, _ in windows for note in clip.notes))
    return Row(file.path, file.size, file.modified_ns, labels, scores, found, notes)


def _clips(path: Path, spec: ClipSpec, question: Question) -> Iterator[Clip]:
    """The clips to look at; whatever a decoder thinks of is the file's fault, not the archive's."""
    try:
        if question.stride:
            yield from load_windows(path, spec, stride=question.stride)
        else:
            yield load_clip(path, spec, sampling=question.sampling)
    except KgrcError:
        raise
    except Exception as error:
        raise VideoError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def failed(file: File, why: str) -> Row:
    """The row of a file of which nothing is known but why."""
    return Row(file.path, file.size, file.modified_ns, error=why)


class Journal:
    """Rows on disk, one transaction each, so that a run can end at any moment; a context manager.

    Args:
        path: a sqlite file; it is made if it is not there.
        question: what the rows answer.

    Raises:
        ConfigError: the file answers another question, is no journal, or is in use.
    """

    def __init__(self, path: Path, question: Question) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # nobody else until this process ends, however it ends
            self._store = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path}: cannot be written: {error}") from error
        try:
            self._open(question)
        except BaseException:
            self._store.close()
            raise

    def _open(self, question: Question) -> None:
        try:
            self._store.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._store.execute("BEGIN EXCLUSIVE")
            self._store.execute("CREATE TABLE IF NOT EXISTS question (document BLOB)")
            self._store.execute("CREATE TABLE IF NOT EXISTS rows (path TEXT PRIMARY KEY, row BLOB)")
            asked = self._store.execute("SELECT document FROM question").fetchone()
            if asked is None:
                text = msgspec.json.encode(question)
                self._store.execute("INSERT INTO question VALUES (?)", (text,))
            else:
                check_question(self.path, asked[0], question)
            self._store.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ConfigError(f"{self.path}: another run is writing these results") from error
            raise ConfigError(f"{self.path}: cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{self.path}: is no journal of results: {error}") from error

    def add(self, row: Row) -> None:
        """Keep a row, in place of an older one of the same path.

        Raises:
            DataError: it cannot be written; the rows before it are safe.
        """
        try:
            document = (row.path, msgspec.json.encode(row))
            self._store.execute("INSERT OR REPLACE INTO rows VALUES (?, ?)", document)
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: a result cannot be written: {error}") from error

    def rows(self, files: Iterable[File]) -> Iterator[Row]:
        """The rows of those files that have one, as they are now, in the order of the files."""
        for file in files:
            query = "SELECT row FROM rows WHERE path = ?"
            kept = self._store.execute(query, (file.path,)).fetchone()
            if kept is not None:
                row = msgspec.json.decode(kept[0], type=Row)
                if (row.size, row.modified_ns) == (file.size, file.modified_ns):
                    yield row

    def close(self) -> None:
        """Let others at the file."""
        self._store.close()

    def delete(self) -> None:
        """Close and remove it."""
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


def check_question(path: Path, asked: bytes, question: Question) -> None:
    """Refuse results of another question.

    Raises:
        ConfigError: says in what the questions differ.
    """
    try:
        other = msgspec.json.decode(asked, type=Question)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: holds results of another release ({error})") from error
    if other != question:
        raise ConfigError(
            f"{path}: holds results of another question ({question.differences(other)}); "
            f"give another --out, or --anew to start over"
        )
