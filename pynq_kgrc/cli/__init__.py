"""The command `pynq-kgrc`. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from pynq_kgrc.cli.arguments import Run, printable
from pynq_kgrc.errors import ConfigError, KgrcError
from pynq_kgrc.version import VERSION

DESCRIPTION = """\
Recognize actions in videos with 3-D CNNs compiled for an FPGA accelerator with balanced kernel
group sparsity (KGRC), on the accelerator or on its bit-exact emulation on any computer.

From a network to labels:

  pynq-kgrc pull i3d-kinetics400            fetch pretrained weights (47 MB, once)
  pynq-kgrc compile i3d --weights i3d-kinetics400 --clips clips/*.mp4 -o i3d.kgrc
                                            quantize to 8 bits on those clips, and compile
  pynq-kgrc info i3d.kgrc                   layers, modes, sizes, operations
  pynq-kgrc classify video.mp4 -p i3d.kgrc  the five best labels
"""

EPILOG = """\
Exit status: 0 done, 1 compare found a difference or a test of this machine something that does not
work, 2 wrong input, which a message on standard error explains (where one of several videos is
wrong, the results of the others are printed), 3 selftest found no board, 130 Ctrl-C.
With --json every command prints one JSON document, and nothing else, on standard output.
Operations and bytes are emulated counts; nothing here was measured on an FPGA. Files: programs
(.kgrc) are safetensors containers; weights are cached in $XDG_CACHE_HOME/pynq_kgrc, or
~/.cache/pynq_kgrc.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    Every error becomes one line on standard error: no traceback for wrong input, a full disk, a
    lack of memory, Ctrl-C or a closed pipe. SIGTERM ends a command as Ctrl-C does, so that it
    removes its temporary files.
    """
    try:
        with _standard_streams(), _sigterm_as_exit():
            return _run(arguments)
    except KgrcError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except MemoryError as error:
        return _complain(f"not enough memory. {error}".strip())
    except RecursionError as error:
        return _complain(f"input that is nested too deeply: {error}")
    except UnicodeError as error:
        return _complain(f"text that cannot be read or written: {error}")
    except OSError as error:
        return _explain_os_error(error)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
        status: int = options.run(options)
    except SystemExit:  # argparse has printed the help, or what is wrong
        sys.stdout.flush()
        raise
    sys.stdout.flush()  # here, where an error is reported; at the exit of Python it is not
    return status


def _complain(text: str) -> int:
    """Print an error in one line; the exit status for wrong input."""
    with contextlib.suppress(OSError):  # standard error is closed, too
        print(f"pynq-kgrc: {printable(text)}", file=sys.stderr, flush=True)
    return 2


def _explain_os_error(error: OSError) -> int:
    """Name the file of a system error; its exit status."""
    if error.filename == STANDARD_OUTPUT and isinstance(error, BrokenPipeError):
        return 0  # the reader has read enough, like `| head`
    if error.filename is None:
        return _complain(str(error))
    return _complain(f"{os.fsdecode(error.filename)}: {error.strerror}")


STANDARD_OUTPUT = "standard output"


class _Output(io.FileIO):
    """Standard output that names itself in its errors; it discards what follows an error."""

    _failed = False

    def write(self, data: Any) -> int:
        if self._failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            raise type(error)(error.errno, error.strerror, STANDARD_OUTPUT) from None


@contextlib.contextmanager
def _standard_streams() -> Iterator[None]:
    """Standard output whose errors are named, and that escapes what its encoding lacks.

    Raises:
        ConfigError: standard output is closed, so that results would be lost.
    """
    if sys.stderr is None:  # else print(file=sys.stderr) writes to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise ConfigError("standard output is closed; to discard the results use >/dev/null")
    before = sys.stdout
    if before is not sys.__stdout__ or not isinstance(before, io.TextIOWrapper):
        yield  # the caller has replaced it
        return
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(before.fileno(), "w", closefd=False)),
        encoding=before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stdout = before


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that `finally` blocks run.

    A handler that the caller has set stays.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Parser(argparse.ArgumentParser):
    """Prints the arguments of a message with control characters as escapes."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    # here, so that Ctrl-C during these imports is caught by `main`
    from pynq_kgrc.cli import (
        build,
        calibrate,
        classify,
        cluster,
        doctor,
        explore,
        info,
        networks,
        profile,
        selftest,
        serve,
        simulate,
        train,
    )

    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser("pynq-kgrc", description=DESCRIPTION, epilog=EPILOG, formatter_class=style)
    parser.add_argument("--version", action="version", version=f"pynq-kgrc {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Run, text: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=f"{text}\n\n{more}", formatter_class=style
        )
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON for a script to read")
        return added

    families = (
        *(classify, build, train, calibrate, info, networks, explore),
        *(simulate, profile, doctor, selftest, serve, cluster),
    )
    for family in families:
        family.declare(command)
    return parser
