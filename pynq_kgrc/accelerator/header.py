"""The one list of what passes between driver and hardware, and `config.h` made from a design.

``python -m pynq_kgrc.accelerator.header --design 8-sparse -o hls_src/config.h``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pynq_kgrc.accelerator.config import AcceleratorConfig, read_design
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.storage import written_beside

FIELDS = (
    "kind",
    *("source", "target", "shortcut", "weights", "indices", "items", "scales"),
    *("item_count", "regions", "filter_blocks"),
    *("in_d", "in_h", "in_w", "out_d", "out_h", "out_w"),
    *("kernel_d", "kernel_h", "kernel_w", "stride_d", "stride_h", "stride_w"),
    *("pad_d", "pad_h", "pad_w", "fill"),
    *("tile_d", "tile_h", "tile_w"),
    *("tap_tiles", "col_steps", "row_steps", "chunks", "chunk_beats"),
    *("pool_d", "pool_h", "pool_w"),
    *("has_shortcut", "shortcut_d", "shortcut_h", "shortcut_w"),
    *("shortcut_zero", "shortcut_mult", "shortcut_shift"),
    *("out_zero", "low", "high", "wide"),
    "reserved",
)
"""Fields of a task's descriptor, 32 bits each, in memory order. Addresses count beats of their
port from the start of its memory; `weights` and `indices` are where a pass over the plan begins, of
which each has `chunks` chunks of `chunk_beats` beats."""

KINDS = ("convolution", "max_pool", "sum_pool")

STATUS = (
    "done",
    *("array", "input", "weights", "scale", "store", "plan"),
    "macs",
    *("input_beats", "shortcut_beats", "output_beats", "weight_beats", "table_words"),
)
"""What the kernel reports of a task, 64 bits each: trips of its pipelined loops, then counts."""

MAP_PORTS = ("input", "shortcut", "output")
"""Memory ports that all see the maps."""

TABLE_PORTS = ("tables", "items", "indices", "scales")
"""Memory ports that all see the tables; each has one reader."""

ADDRESSES = (*MAP_PORTS, "weights", *TABLE_PORTS, "status")
"""Arguments of the kernel that are addresses of 64 bits, in its order; `digest`, `first_task` and
`task_count` follow them."""


VLNV = "pynq-kgrc:hls:kgrc_run:1.0"
"""Vendor, library, name and version of the kernel, by which a driver finds it."""

START, DONE, IDLE = 1, 2, 4
"""Bits of CTRL; DONE clears when it is read."""


def register_of(port: str) -> str:
    """The register of a port's address, less `_1` and `_2`: Verilog reserves some names."""
    return f"{port}_r" if port in ("input", "output") else port


def _registers() -> dict[str, int]:
    """Offsets as Vitis HLS lays out arguments: 8 bytes to each, 12 to a 64-bit one.

    What is only written by the kernel has a word of control, and takes twice its words.
    """
    offsets = {"CTRL": 0x00, "GIER": 0x04, "IP_IER": 0x08, "IP_ISR": 0x0C}
    at = 0x10
    for port in ADDRESSES:
        name = register_of(port)
        offsets |= {f"{name}_1": at, f"{name}_2": at + 4}
        at += 12
    offsets |= {"digest_1": at, "digest_2": at + 4, "digest_ctrl": at + 8}
    at += 24
    return {**offsets, "first_task": at, "task_count": at + 8}


REGISTERS = _registers()
"""Name of a register -> its offset in bytes; an address takes two, `_1` the low word."""

MAX_TAPS = 512
"""Taps of the largest kernel."""


def config_header(config: AcceleratorConfig) -> str:
    """The text of `config.h` for a design."""
    numbers = {
        "Bits": config.bits,
        "Sparse": int(config.sparse),
        "Tm": config.tm,
        "Tn": config.tn,
        "Pm": config.pm,
        "Pk": config.pk,
        "Pf": config.pf,
        "Gm": config.gm,
        "Tk": config.tk,
        "Th": config.th,
        "Tw": config.tw,
        "FilterTiles": config.filter_tiles,
        "FeatureRows": config.feature_rows,
        "StoreRows": config.features,
        "RegionRows": config.region_rows,
        "PortPositions": config.port_positions,
        "ChunkWords": config.chunk_words,
        "WeightPortWords": config.weight_port_words,
        "IndexWords": max(1, config.index_words),
        "MaxTaps": MAX_TAPS,
        "StatusWords": len(STATUS),
    }
    lines = [
        f"// The design {config.name}. Made by pynq_kgrc.accelerator.header: change it there.",
        "#pragma once",
        "",
        "namespace kgrc {",
        "",
        "enum Design {",
        *(f"  k{name} = {value}," for name, value in numbers.items()),
        "};",
        "",
        f"static const unsigned long long kDigest = 0x{config.digest}ULL;",
        "",
        "enum Kind { "
        + ", ".join(f"k{_camel(kind)} = {i}" for i, kind in enumerate(KINDS))
        + " };",
        "",
        "// The words of a task's descriptor, 32 bits each.",
        "enum Field {",
        *(f"  k{_camel(name)}," for name in FIELDS),
        "  kFields,",
        "};",
        "",
        "}  // namespace kgrc",
    ]
    return "\n".join(lines) + "\n"


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print `config.h` of a design, or write it; one that is the same is left alone.

    Raises:
        ConfigError: no design of that name, or no such file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pynq_kgrc.accelerator.header", description="Make config.h of a design."
    )
    parser.add_argument("--design", default="8-sparse", help="a name, or the JSON file of a design")
    parser.add_argument("-o", "--output", type=Path, help="file to write instead of printing")
    chosen = parser.parse_args(arguments)
    text = config_header(read_design(chosen.design))
    path: Path | None = chosen.output
    if path is None:
        sys.stdout.write(text)
    elif not path.is_file() or path.read_text("utf-8") != text:
        with written_beside(path) as beside:
            beside.write_text(text, "utf-8")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
