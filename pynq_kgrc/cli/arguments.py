"""What the commands share: how they are declared, common options, and progress bars."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from pynq_kgrc.graph import SAMPLINGS

DEFAULT_DESIGN = "8-sparse"
"""The preset that commands take without `--design`."""

T = TypeVar("T")

Run = Callable[[argparse.Namespace], int]


class Declare(Protocol):
    """Adds a command: its name, the function that runs it, one line of help, and more help."""

    def __call__(
        self, name: str, run: Run, text: str, more: str = ""
    ) -> argparse.ArgumentParser: ...


def positive(text: str) -> int:
    """Read an argument that has to be an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def add_design(command: argparse.ArgumentParser, purpose: str, *old_names: str) -> None:
    """Add `--design`, the one spelling of the option that chooses an accelerator.

    `accelerator.config.read_design(options.design)` reads it.

    Args:
        command: gets the option.
        purpose: what the command uses the accelerator for, as in "the accelerator to compile for".
        old_names: earlier spellings ("--config"), still accepted but not in the help.
    """
    command.add_argument(
        "--design",
        default=DEFAULT_DESIGN,
        metavar="DESIGN",
        help=f"{purpose}: the name of a preset, or a .json that explore -o wrote "
        f"(default: {DEFAULT_DESIGN})",
    )
    if old_names:
        command.add_argument(
            *old_names, dest="design", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def add_sampling(command: argparse.ArgumentParser) -> None:
    """Add the options that choose the frames of a video, instead of the program."""
    command.add_argument(
        "--stride",
        type=positive,
        metavar="FRAMES",
        help="cover the whole video with clips that start every FRAMES frames",
    )
    command.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        help="one clip of consecutive frames from the middle of the video (centre), one spread "
        "over all of it (uniform), or clips one after the other (windows); default: as the program "
        "says",
    )


def progress(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """Pass the items on; on a terminal, show a progress bar."""
    from tqdm import tqdm

    yield from tqdm(items, desc=text, total=total, disable=None, leave=False)
