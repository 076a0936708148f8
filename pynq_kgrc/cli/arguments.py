"""What the commands share: how they are declared, checks of arguments, and progress bars."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")

Run = Callable[[argparse.Namespace], int]


class Declare(Protocol):
    """Adds a command: its name, what runs it, one line of help, and more of it."""

    def __call__(
        self, name: str, run: Run, text: str, more: str = ""
    ) -> argparse.ArgumentParser: ...


def positive(text: str) -> int:
    """An argument that has to be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def add_sampling(command: argparse.ArgumentParser) -> None:
    """The options that say which frames of a video are looked at."""
    command.add_argument(
        "--stride", type=positive, metavar="FRAMES", help="look every FRAMES frames of each video"
    )
    command.add_argument(
        "--sampling",
        choices=("centre", "uniform"),
        default="centre",
        help="frames of the middle, or spread over the whole video (default: centre)",
    )


def progress(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, desc=text, total=total, disable=None, leave=False)
