"""Folders that are not code and travel with the package: sources, overlays, notebooks, clips."""

from __future__ import annotations

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
