"""Where files are: folders that travel with the package, and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

BESIDE = {
    "hls_src": "hls_src",
    "overlays": "overlays",
    "notebooks": "notebooks",
    "clips": "examples/clips",
}
"""Name in an installed package -> place in the checkout, as `package_dir` in setup.py has it."""


def find_folder(name: str) -> Path:
    """A folder of `BESIDE`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / BESIDE[name]


def user_cache() -> Path:
    """The folder of this project's cached files: $XDG_CACHE_HOME/pynq_kgrc, or ~/.cache/pynq_kgrc.

    An empty XDG_CACHE_HOME counts as unset, as the XDG base directory specification has it.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pynq_kgrc"


def shipped_programs() -> tuple[Path, ...]:
    """The compiled programs that come with this package, sorted by name."""
    return tuple(sorted(Path(__file__).resolve().with_name("programs").glob("*.kgrc")))
