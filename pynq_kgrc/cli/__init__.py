"""The command `pynq-kgrc`. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pynq_kgrc.cli import (
    build,
    calibrate,
    classify,
    cluster,
    doctor,
    explore,
    info,
    serve,
    train,
)
from pynq_kgrc.cli.arguments import Run
from pynq_kgrc.errors import KgrcError
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
Exit status: 0 done, 1 compare found a difference, 2 wrong input, which a message on standard error
explains. With --json every command prints one JSON document, and nothing else, on standard output.
Operations and bytes are emulated counts; nothing here was measured on an FPGA. Files: programs
(.kgrc) are safetensors containers; weights are cached in $XDG_CACHE_HOME/pynq_kgrc, or
~/.cache/pynq_kgrc.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KgrcError as error:
        print(f"pynq-kgrc: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "pynq-kgrc", description=DESCRIPTION, epilog=EPILOG, formatter_class=style
    )
    parser.add_argument("--version", action="version", version=f"pynq-kgrc {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Run, text: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=f"{text}\n\n{more}", formatter_class=style
        )
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON for a script to read")
        return added

    for family in (classify, build, train, calibrate, info, explore, doctor, serve, cluster):
        family.declare(command)
    return parser
