"""What Python, C++ and Verilog share: memory layouts and constants, and `config.h` made from them.

A test changes each of them and looks whether the C++ sources follow (host_tests/test_csim.py).

``python -m pynq_kgrc.accelerator.header --design 8-sparse -o hls_src/config.h``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pynq_kgrc.accelerator.config import DEFAULT_DESIGN, AcceleratorConfig, read_design
from pynq_kgrc.accelerator.plan import ITEM_BITS, BitField
from pynq_kgrc.accelerator.tiling import MIN_FEATURE_ROWS, PORTS, REGION_DISTANCE, RUNS_AHEAD
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.files import written_beside
from pynq_kgrc.quant import ACCUMULATOR_BITS, MAX_SHIFT, MULT_BITS

IMAGE_VERSION = 2
"""Version of what the hardware reads from memory: maps, tables, weights (docs/format.md). It grows
when a layout below changes so that an older bitstream would read it wrongly. The `program_version`
of an overlay's manifest is compared with it."""

FIELDS = (
    "kind",
    *("source", "target", "shortcut", "even_weights", "odd_weights", "indices", "items", "scales"),
    *("item_count", "regions", "vectors"),
    *("in_d", "in_h", "in_w", "out_d", "out_h", "out_w"),
    *("kernel_d", "kernel_h", "kernel_w", "stride_d", "stride_h", "stride_w"),
    *("pad_d", "pad_h", "pad_w", "fill"),
    *("tile_d", "tile_h", "tile_w"),
    *("tap_tiles", "col_steps", "row_steps", "chunks", "chunk_beats"),
    *("pool_d", "pool_h", "pool_w"),
    *("has_shortcut", "shortcut_d", "shortcut_h", "shortcut_w"),
    *("shortcut_zero", "shortcut_mult", "shortcut_shift"),
    *("out_zero", "low", "high", "wide"),
)
"""Fields of a task's descriptor, 32 bits each, in memory order.

`source`, `target`, `shortcut`, `even_weights` and `odd_weights` are addresses, counted in beats of
their port from the start of its memory: the chunks of even numbers lie at one, those of odd numbers
at the other. `items`, `scales` and `indices` are counted in 64-bit words of the tables. Every
output tile reads the same items, scales, weights and indices. The task has `chunks` chunks:
`chunk_beats` beats of a weight port and `AcceleratorConfig.index_words` 64-bit words of indices
each. `vectors` is how many vectors of T_N outputs there are."""

KINDS = ("convolution", "max_pool", "sum_pool")

SCALE_BITS = {"mult": BitField(0, MULT_BITS), "shift": BitField(16, MAX_SHIFT.bit_length())}
"""Bits of the second 64-bit word of a filter's scale; the first is the bias, signed."""

STATUS = (
    "done",
    *("array", "input", "weights", "scale", "store", "plan"),
    "macs",
    *("input_beats", "shortcut_beats", "output_beats", "weight_beats", "table_words"),
    *("input_requests", "shortcut_requests", "output_requests", "weight_requests"),
    "clocks",
)
"""What the kernel reports of a task, a 64-bit word each: 1 when it is done, the trips of its
pipelined loops, then counts, then the clock cycles that it took; 0 in the C-simulation, which has
no clock. All but `done` and `clocks` are the fields of `cost.Cost`."""

INPUT_PORTS = tuple(f"input{number}" for number in range(PORTS))
"""Memory ports that read the input map: plane n of a task is read by port n % 2."""

MAP_PORTS = (*INPUT_PORTS, "shortcut", "output")
"""Memory ports that see the memory of maps."""

WEIGHT_PORTS = tuple(f"weights{number}" for number in range(PORTS))
"""Memory ports that see the memory of weights: chunk c of a tile is read by port c % 2."""

TABLE_PORTS = ("tables", "items", "indices", "scales")
"""Memory ports that see the tables; one process reads each."""

ADDRESSES = (*MAP_PORTS, *WEIGHT_PORTS, *TABLE_PORTS, "status")
"""The kernel's arguments that are 64-bit addresses, in order; `digest`, `first_task` and
`task_count` follow them."""

REQUESTS_AHEAD = 16
"""Requests that a memory port has under way at most; `num_read_outstanding` in hls_src/top.cpp."""

VLNV = "pynq-kgrc:hls:kgrc_run:1.0"
"""Vendor, library, name and version of the kernel. The driver finds the kernel by it."""

MANAGER = "xilinx.com:ip:dfx_axi_shutdown_manager:1.0"
"""The block between a memory port and the processing system that ends open bursts (PG377). pynq
asks all blocks of this VLNV to shut down before it programs the device."""

OWN_PORTS = {"input": ("HPC0", "HPC1"), "weights": ("HP0", "HP1"), "output": ("HP2",)}
"""Ports of the processing system by the kernel's memory ports: `input0` takes the first of `input`,
`input1` the second. All other memory ports share OTHER_PORT."""

OTHER_PORT = "HP3"


def memory_ports() -> dict[str, tuple[str, ...]]:
    """Port of the processing system -> the kernel's memory ports that it carries, in order.

    Raises:
        ConfigError: the kernel has more ports of a kind than OWN_PORTS has for it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for port in ADDRESSES:
        kind = port.rstrip("0123456789_")
        number = int(port[len(kind) :].lstrip("_") or 0)
        system = OWN_PORTS.get(kind, (OTHER_PORT,))
        if number >= len(system):
            raise ConfigError(f"{port}: OWN_PORTS has {len(system)} for {kind}: {system}")
        found[system[number]] = (*found.get(system[number], ()), port)
    return found


START, DONE, IDLE = 1, 2, 4
"""Bits of the register CTRL; DONE clears when it is read."""


def register_of(port: str) -> str:
    """The name of a port's address registers without `_1` and `_2`.

    `output` is a reserved word of Verilog: Vitis HLS adds `_r` to it.
    """
    return f"{port}_r" if port == "output" else port


def _registers() -> dict[str, int]:
    """Offsets as Vitis HLS lays out arguments: 8 bytes each, 12 for a 64-bit one.

    An output register is followed by a control word and occupies 24 bytes instead of 12.
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
"""Register name -> byte offset. A 64-bit address has two: `_1` holds its low half."""

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
        "SumBits": ACCUMULATOR_BITS[config.bits],
        "MinFeatureRows": MIN_FEATURE_ROWS,
        "RequestsAhead": REQUESTS_AHEAD,
        "RunsAhead": RUNS_AHEAD,
        "RegionDistance": REGION_DISTANCE,
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
        "enum Kind {",
        *_counted("", KINDS),
        "};",
        "",
        "// The fields of a task's descriptor, 32 bits each.",
        "enum Field {",
        *_counted("", FIELDS),
        "  kFields,",
        "};",
        "",
        "// The words of a task's status, 64 bits each.",
        "enum Status {",
        *_counted("Status", STATUS),
        "  kStatusWords,",
        "};",
        "",
        "// The memory ports, in the order of the kernel's arguments.",
        "enum Port {",
        *_counted("Port", ADDRESSES),
        "  kPorts,",
        "};",
        "",
        "// The first bit and the width of each field of an item of the plan.",
        "enum ItemBits {",
        *_bits("Item", ITEM_BITS),
        "};",
        "",
        "// The same of the second word of a filter's scale.",
        "enum ScaleBits {",
        *_bits("Scale", SCALE_BITS),
        "};",
        "",
        "}  // namespace kgrc",
    ]
    return "\n".join(lines) + "\n"


def _counted(prefix: str, names: Iterable[str]) -> list[str]:
    return [f"  k{prefix}{_camel(name)}," for name in names]


def _bits(prefix: str, fields: Mapping[str, BitField]) -> list[str]:
    lines = []
    for name, field in fields.items():
        lines.append(f"  k{prefix}{_camel(name)}First = {field.shift},")
        lines.append(f"  k{prefix}{_camel(name)}Bits = {field.width},")
    return lines


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def verilog_parameters(config: AcceleratorConfig) -> dict[str, int]:
    """The parameters of the module `mac_array` (hls_src/rtl) for a design."""
    return {
        "BITS": config.bits,
        "SPARSE": int(config.sparse),
        "TM": config.tm,
        "GM": config.gm,
        "TN": config.tn,
        "PM": config.pm,
        "PK": config.pk,
        "PF": config.pf,
        "POSITIONS": config.port_positions,
        "REGION_ROWS": config.region_rows,
        "FEATURE_ROWS": config.feature_rows,
        "FILTER_TILES": config.filter_tiles,
        "SUM": ACCUMULATOR_BITS[config.bits],
        "MIN_ROWS": MIN_FEATURE_ROWS,
        "REGION_DISTANCE": REGION_DISTANCE,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print `config.h` of a design, or write it; a file that already has this text is left alone.

    Raises:
        ConfigError: no design of that name, or no such file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pynq_kgrc.accelerator.header", description="Make config.h of a design."
    )
    parser.add_argument(
        "--design", default=DEFAULT_DESIGN, help="a name, or the JSON file of a design"
    )
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
