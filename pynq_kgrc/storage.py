"""Atomic writes: a file is written under a temporary name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; it is renamed to `path` when the block ends.

    After an exception the temporary file is gone, and a file at `path` is unchanged.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    try:
        with _written_beside(path) as beside:
            yield beside
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        beside.chmod(0o644)
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave a renamed but empty file
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
