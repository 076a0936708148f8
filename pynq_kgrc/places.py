"""Where files are: the folders that ship with the package, and the user's cache."""

from __future__ import annotations

import os
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


def shipped_programs() -> tuple[Path, ...]:
    """The compiled programs that come with this package, sorted by name."""
    return tuple(sorted(Path(__file__).resolve().with_name("programs").glob("*.kgrc")))
