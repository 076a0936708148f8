"""The examples of the page: clips that ship with this package, and the action of each.

Three are colour videos. One is of a depth camera, for the program that ships.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pynq_kgrc.files import find_folder


class Example(msgspec.Struct, frozen=True):
    """A clip that a visitor of the page can have classified."""

    name: str
    """Its file in the folder of the clips."""
    label: str
    """The action that it shows, as Kinetics-400 or the depth program names it."""
    kind: str
    """Media type."""
    picture: str
    """Name of a small picture of it, a file of the page."""


EXAMPLES = (
    Example("depth/a01_s2_t1.mp4", "right arm swipe to the left", "video/mp4", "swipe.webp"),
    Example("arm_wrestling_k400.mp4", "arm wrestling", "video/mp4", "wrestling.webp"),
    Example("v_SoccerJuggling_g23_c01.avi", "juggling soccer ball", "video/avi", "soccer.webp"),
    Example("v_CricketShot_g04_c01_rgb.gif", "playing cricket", "image/gif", "cricket.webp"),
)


def example_files() -> dict[str, tuple[Example, Path]]:
    """The examples that are installed, with their files, by name."""
    folder = find_folder("clips")
    found = {example.name: (example, folder / example.name) for example in EXAMPLES}
    return {name: each for name, each in found.items() if each[1].is_file()}
