"""The examples of the page: clips that ship with this package, and the action of each.

Three are real and need a program for colour videos. One is drawn, for the depth program that ships.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pynq_kgrc.files import find_folder, shipped_programs


class Example(msgspec.Struct, frozen=True):
    """A clip that a visitor of the page can have classified."""

    name: str
    """Name of its file."""
    label: str
    """The action that it shows, as Kinetics-400 or the depth program names it."""
    kind: str
    """Media type."""
    picture: str
    """Name of a small picture of it, a file of the page."""


EXAMPLES = (
    Example("right_hand_wave.mp4", "right hand wave", "video/mp4", "wave.webp"),
    Example("arm_wrestling_k400.mp4", "arm wrestling", "video/mp4", "wrestling.webp"),
    Example("v_SoccerJuggling_g23_c01.avi", "juggling soccer ball", "video/avi", "soccer.webp"),
    Example("v_CricketShot_g04_c01_rgb.gif", "playing cricket", "image/gif", "cricket.webp"),
)


def example_files() -> dict[str, tuple[Example, Path]]:
    """The examples that are installed, with their files, by name."""
    folders = [find_folder("clips"), *{path.parent for path in shipped_programs()}]
    found = {}
    for example in EXAMPLES:
        for path in (folder / example.name for folder in folders):
            if path.is_file():
                found[example.name] = (example, path)
    return found
