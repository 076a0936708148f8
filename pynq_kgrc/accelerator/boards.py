"""Boards as data: the resources of the chip and the peak bandwidth of its memory.

Chips: the vendor's device tables, DS891 (Zynq UltraScale+ overview) and DS987 (Kria K26). Memory:
bus width x 2 x clock of the processing system's DDR port, from the vendors' board presets
(github.com/Xilinx/XilinxBoardStore, `PSU__DDRC__BUS_WIDTH` and `PSU__CRF_APB__DDR_CTRL__FREQMHZ`).
A real design sustains less than the peak. None of this was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pynq_kgrc.errors import ConfigError


@dataclass(frozen=True)
class Board:
    """A board that the accelerator may be built for."""

    name: str
    part: str
    dsp: int
    bram36: int
    """Block RAMs of 36 kbit; each can be used as two of 18 kbit."""
    uram: int
    """UltraRAMs of 288 kbit."""
    lut: int
    ff: int
    ddr_bytes_per_second: float
    """Peak bandwidth of the processing system's memory, which its processors use too."""


def _ddr(bits: int, clock_mhz: int) -> float:
    """Peak bandwidth of a memory bus in bytes a second: two transfers per clock cycle."""
    return bits / 8 * 2 * clock_mhz * 1e6


BOARDS = {
    board.name: board
    for board in (
        # XCZU9EG, DDR4-2133 module
        Board("zcu102", "xczu9eg-ffvb1156-2-e", 2520, 912, 0, 274_080, 548_160, _ddr(64, 1067)),
        # XCZU7EV, DDR4-2133
        Board("zcu104", "xczu7ev-ffvc1156-2-e", 1728, 312, 96, 230_400, 460_800, _ddr(64, 1067)),
        Board("zcu106", "xczu7ev-ffvc1156-2-e", 1728, 312, 96, 230_400, 460_800, _ddr(64, 1067)),
        # K26 module, DDR4-2400
        Board("kv260", "xck26-sfvc784-2LV-c", 1248, 144, 64, 117_120, 234_240, _ddr(64, 1200)),
        # Ultra96-V2: XCZU3EG, 32-bit LPDDR4 at 533 MHz
        Board("ultra96", "xczu3eg-sbva484-1-i", 360, 216, 0, 70_560, 141_120, _ddr(32, 533)),
    )
}


def board(name: str) -> Board:
    """The board of that name, such as "zcu102".

    Raises:
        ConfigError: there is no board of that name.
    """
    if name not in BOARDS:
        raise ConfigError(f"no board named {name!r}; there are {', '.join(BOARDS)}")
    return BOARDS[name]
