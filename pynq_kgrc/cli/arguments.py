"""What the commands share: how they are declared, common options, and what they print."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

from pynq_kgrc.accelerator.config import DEFAULT_DESIGN
from pynq_kgrc.graph import SAMPLINGS

if TYPE_CHECKING:
    from torch import nn

PROGRAM_HELP = "a compiled .kgrc, or a name that pull takes with --design"
"""Help of `--program`, whose value `program_file` reads."""

T = TypeVar("T")

Run = Callable[[argparse.Namespace], int]


class Declare(Protocol):
    """Adds a command: its name, the function that runs it, one line of help, and more help."""

    def __call__(
        self, name: str, run: Run, text: str, more: str = ""
    ) -> argparse.ArgumentParser: ...


MOST = 10**9
"""Largest value of an option whose own bounds are wider than any use."""

DAY = 86_400
"""Largest time limit that an option gives, in seconds."""


def whole(least: int, most: int) -> Callable[[str], int]:
    """Reads an argument that has to be a whole number within bounds, for argparse's `type`."""

    def read(text: str) -> int:
        from pynq_kgrc.service.options import is_whole

        if not is_whole(text, least, most):
            raise argparse.ArgumentTypeError(
                f"{text[:50]!r} is not accepted; use a whole number from {least} to {most}"
            )
        return int(text)

    return read


positive = whole(1, MOST)
"""Reads an argument that has to be a whole number of 1 or more."""


def bounded(name: str) -> Callable[[str], int]:
    """Reads an argument within the bounds that the service has for this option."""

    def read(text: str) -> int:
        from pynq_kgrc.service.options import bounds

        return whole(*bounds(name))(text)

    return read


NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", re.IGNORECASE)


def number(text: str) -> float:
    """Read an argument that has to be a finite number in ASCII digits."""
    if len(text) > 50 or NUMBER.fullmatch(text) is None or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is not accepted; use a number like 0.8")
    return float(text)


def file_to_write(text: str) -> Path:
    """Read the path of an output file, and check before the work that it can be written."""
    path = Path(text)
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent  # missing folders are created
    shown = printable(text)
    if not path.name or path.is_dir():
        raise argparse.ArgumentTypeError(f"{shown!r} is a folder; use the name of a file")
    if (path.exists() and not path.is_file()) or path.absolute().parent == Path("/dev"):
        # the file is written beside it and renamed: as root that would replace /dev/null
        raise argparse.ArgumentTypeError(f"{shown!r} is no regular file; use the name of a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{shown!r} cannot be written: {printable(parent)} is no folder that you may write to"
        )
    return path


def check_plot(path: Path) -> None:
    """Check before the work that a plot can be made.

    Raises:
        ConfigError: its name has another suffix, or matplotlib is missing.
    """
    from importlib.util import find_spec

    from pynq_kgrc.errors import ConfigError, to_install

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: use a name that ends in .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        raise ConfigError(f"--plot needs matplotlib: {to_install('plots')}")


def readable(text: object) -> str:
    """A path or text as valid Unicode: bytes that are not UTF-8 become escapes."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(text: object) -> str:
    """A path or text in one line: line breaks and other control characters become escapes."""
    return "".join(
        each.encode("unicode_escape").decode()
        if unicodedata.category(each) in ("Cc", "Zl", "Zp")
        else each
        for each in readable(text)
    )


def add_design(
    command: argparse.ArgumentParser,
    purpose: str,
    *old_names: str,
    default: str | None = DEFAULT_DESIGN,
) -> None:
    """Add `--design`, the one spelling of the option that chooses an accelerator.

    `accelerator.config.read_design(options.design)` reads it.

    Args:
        command: gets the option.
        purpose: what the command uses the accelerator for, as in "the accelerator to compile for".
        old_names: earlier spellings ("--config"), still accepted but not in the help.
        default: the preset that is taken without the option; None if an overlay says it.
    """
    command.add_argument(
        "--design",
        default=default,
        metavar="DESIGN",
        help=f"{purpose}: the name of a preset, or a .json that explore -o wrote "
        f"(default: {default or f'that of the overlay, else {DEFAULT_DESIGN}'})",
    )
    if old_names:
        command.add_argument(
            *old_names, dest="design", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def add_backend(command: argparse.ArgumentParser) -> None:
    """Add `--backend`, what runs the program."""
    command.add_argument(
        "--backend",
        default="emulate",
        help="emulate, native, csim, board or auto (default: emulate)",
    )


def add_weights(
    command: argparse.ArgumentParser, purpose: str, *, required: bool = False, partial: bool = False
) -> None:
    """Add `--weights` and `--entry`; with `partial`, also `--partial`. `load_weights` reads them.

    Args:
        command: gets the options.
        purpose: what the weights are for, as in "state dict to start from".
        required: whether the command cannot do without.
        partial: whether the command can do without the file's classifier.
    """
    command.add_argument(
        "--weights",
        metavar="WEIGHTS",
        required=required,
        help=f"{purpose}: a file of torch.save or safetensors, or a NAME that pull takes",
    )
    command.add_argument(
        "--entry",
        metavar="ENTRY",
        help="which entry of WEIGHTS holds the weights, where it has several, such as model and "
        "model_ema",
    )
    if partial:
        command.add_argument(
            "--partial",
            action="store_true",
            help="take all of WEIGHTS but the classifier, which keeps its random weights",
        )


def weights_file(name: str) -> Path:
    """The file of `--weights`, fetched if it is the name of published weights.

    Raises:
        ModelError: published weights cannot be fetched.
    """
    from pynq_kgrc.models.pretrained import RELEASES, pull

    return pull(name) if name in RELEASES else Path(name)


def load_weights(
    options: argparse.Namespace, network: nn.Module, classifier: bool | None = True
) -> str:
    """Fill a network with `--weights`; one line that says what was taken.

    Args:
        options: have `weights` and `entry`.
        network: is filled.
        classifier: as of `models.checkpoint.load_state`.

    Raises:
        ModelError: as `load_state`.
    """
    from pynq_kgrc.models.checkpoint import load_state

    path = weights_file(options.weights)
    told = load_state(network, path, entry=options.entry, classifier=classifier)
    return f"{printable(options.weights)}: {printable(told)}"


def add_top(command: argparse.ArgumentParser, text: str) -> None:
    """Add `--top`, the number of labels."""
    command.add_argument("--top", type=bounded("top_k"), default=5, help=f"{text} (default: 5)")


def add_sampling(command: argparse.ArgumentParser) -> None:
    """Add the options that choose the frames of a video, instead of the program."""
    either = command.add_mutually_exclusive_group()
    either.add_argument(
        "--stride",
        type=bounded("stride"),
        metavar="FRAMES",
        help="cover the whole video with clips that start every FRAMES frames",
    )
    either.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        help="one clip of consecutive frames from the middle of the video (centre), one spread "
        "over all of it (uniform), or clips one after the other (windows); default: as the program "
        "says",
    )


def progress(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """Pass the items on; on a terminal, show a progress bar."""
    from tqdm import tqdm

    yield from tqdm(items, desc=printable(text), total=total, disable=None, leave=False)


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each stage that begins: a bar on a terminal, else lines.

    It counts stages and seconds; how many there will be is not known.
    """
    from tqdm import tqdm

    with tqdm(unit=" stages", disable=None, leave=False) as bar:

        def begin(text: str) -> None:
            if bar.disable:
                print(printable(text), file=sys.stderr)
            bar.set_description(printable(text))
            bar.update()

        yield begin


def program_file(name: Path) -> Path:
    """The file of `--program`: a path, or the name of a program (`compiler.released`).

    A named program is for the design of the installed overlay, or for the default design.

    Raises:
        KgrcError: a named program cannot be made.
    """
    from pynq_kgrc.backends.chosen import installed_design
    from pynq_kgrc.compiler.released import find_program

    with stages() as stage:
        return find_program(name, installed_design(), stage)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line at once; a progress bar on the terminal makes room for it."""
    from tqdm import tqdm

    file = file or sys.stdout
    with tqdm.external_write_mode(file=file):
        print(line, file=file, flush=True)


def draw_bar(share: float, width: int = 20) -> str:
    """A bar for a share of 0 to 1, in characters that standard output can show."""
    full = "\N{FULL BLOCK}"
    try:
        full.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        full = "#"
    return f"{full * round(width * share):{width}}"
