"""Files: folders that travel with the package, the user's cache, and files written whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BESIDE = {
    "hls_src": "hls_src",
    "overlays": "overlays",
    "notebooks": "notebooks",
    "clips": "examples/clips",
}
"""Folder in an installed package -> folder in a checkout; setup.py's `package_dir` agrees."""


def find_folder(name: str) -> Path:
    """A folder of `BESIDE`: inside the package if installed, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / BESIDE[name]


def user_cache() -> Path:
    """The folder of cached files: $XDG_CACHE_HOME/pynq_kgrc, or ~/.cache/pynq_kgrc.

    An empty XDG_CACHE_HOME counts as unset, as the XDG Base Directory Specification asks.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pynq_kgrc"


def cached_program(name: str) -> Path:
    """The path of a program of that name in the user's cache; the file need not exist."""
    return user_cache() / "programs" / f"{name}.kgrc"


def shipped_programs() -> tuple[Path, ...]:
    """The compiled programs that come with this package, sorted by name."""
    return tuple(sorted(Path(__file__).resolve().with_name("programs").glob("*.kgrc")))


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
