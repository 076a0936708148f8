"""The settings of a build: what hls_src/Makefile passes to the tools for a design and a board.

``python -m pynq_kgrc.accelerator.build --design 8-kv260 --board kv260``

prints them as assignments of a shell. Without them the tools are not started.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence

from pynq_kgrc.accelerator.boards import Board, board
from pynq_kgrc.accelerator.config import AcceleratorConfig, read_design
from pynq_kgrc.accelerator.header import memory_ports
from pynq_kgrc.accelerator.resources import uram_parts
from pynq_kgrc.errors import ConfigError


def build_settings(config: AcceleratorConfig, target: Board) -> Mapping[str, str]:
    """Environment variables of the Tcl files in hls_src/scripts, by their names.

    Raises:
        ConfigError: the board has no board part, or lacks a port that the kernel uses.
    """
    ports = memory_ports()
    lacking = [port for port in ports if port not in target.ports]
    if lacking:
        raise ConfigError(
            f"{target.name} has no port {', '.join(lacking)} to memory; there are "
            f"{', '.join(target.ports)}"
        )
    if not target.board_part:
        raise ConfigError(
            f"{target.name} is only modelled: it has no board_part in accelerator/boards.py, whose "
            f"preset sets up the processing system"
        )
    return {
        "KGRC_BOARD": target.name,
        "KGRC_PART": target.part,
        "KGRC_BOARD_PART": target.board_part,
        "KGRC_PORTS": " ".join(f"{port} {{{' '.join(names)}}}" for port, names in ports.items()),
        "KGRC_URAM": ",".join(uram_parts(config, target)) or "nothing",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the settings.

    Raises:
        ConfigError: no such design or board, or see `build_settings`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pynq_kgrc.accelerator.build",
        description="Print the settings of a build as assignments of a shell.",
    )
    parser.add_argument("--design", required=True, help="a name, or the JSON file of a design")
    parser.add_argument("--board", required=True, help="the name of a board")
    chosen = parser.parse_args(arguments)
    settings = build_settings(read_design(chosen.design), board(chosen.board))
    print(" ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items()))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
