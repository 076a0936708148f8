"""Boards as data: the resources of the chip, the peak bandwidth of its memory, and its ports.

Chips: the vendor's device tables, DS891 (Zynq UltraScale+ overview) and DS987 (Kria K26). Memory:
bus width x 2 x clock of the processing system's DDR port, from the vendors' board presets
(github.com/Xilinx/XilinxBoardStore, `PSU__DDRC__BUS_WIDTH` and `PSU__CRF_APB__DDR_CTRL__FREQMHZ`).
What a port of the programmable logic gives is assumed (`Memory`). None of this was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pynq_kgrc.errors import ConfigError

CLOCK_MHZ = 150.0
"""Clock of the array where nothing else is said: that of the KGRC paper."""


@dataclass(frozen=True)
class Memory:
    """What the memory gives to the ports of the accelerator. All but the peak is assumed.

    No board was at hand. The assumptions are those of the timed simulation (`backends/timed.py`).
    """

    peak_bytes_per_second: float
    """Peak bandwidth of the memory bus, which the processors use too."""
    port_bits: int = 128
    """Width of the AXI ports HP and HPC (UG1085, PS-PL interfaces)."""
    port_clock_mhz: float = 300.0
    """Clock of the ports, beside the array's. Assumed: within the ports' 333 MHz (DS925)."""
    efficiency: float = 0.8
    """Share of a port's cycles that move a beat. Assumed: refresh, page misses and the other
    masters take the rest."""
    latency: float = 70.0
    """Cycles of the array's clock from the request of a burst to its first beat, and from the last
    beat of a write to its response. Assumed, from the 60 to 100 cycles that are usual for these
    ports; `LATENCIES` are the variants that the tables show."""
    outstanding: int = 16
    """Bursts that a port has under way. UG1085 gives the ports 16 reads and writes each."""
    burst_beats: int = 64
    """Longest burst, in beats of the kernel's port: 4 KiB at 512 bits, the limit of AXI."""
    share: float = 0.75
    """Share of the peak that all ports together sustain. Assumed."""

    def port_bytes(self, clock_mhz: float = CLOCK_MHZ) -> float:
        """Bytes that a port moves in a cycle of the array, in each direction."""
        return self.port_bits / 8 * self.efficiency * self.port_clock_mhz / clock_mhz

    def all_bytes(self, clock_mhz: float = CLOCK_MHZ) -> float:
        """Bytes that all ports together move in a cycle of the array."""
        return self.peak_bytes_per_second * self.share / (clock_mhz * 1e6)

    def describe(self, clock_mhz: float = CLOCK_MHZ) -> str:
        """The assumptions in a line, for what stands beside a figure."""
        return (
            f"modelled with memory: II = 1 at {clock_mhz:g} MHz, {self.efficiency:.0%} of "
            f"{self.port_bits}-bit ports at {self.port_clock_mhz:g} MHz, latency {self.latency:g} "
            f"cycles, {self.outstanding} bursts under way a port, {self.share:.0%} of the memory's "
            f"{self.peak_bytes_per_second / 1e9:.1f} GB/s"
        )


LATENCIES = (40.0, 70.0, 100.0)
"""Latencies of memory, in cycles of the array, that the tables of docs/hardware.md show."""


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

    @property
    def memory(self) -> Memory:
        """The memory as the accelerator's ports see it."""
        return Memory(self.ddr_bytes_per_second)


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

REFERENCE = BOARDS["zcu102"].memory
"""The memory with which times are modelled where no board is named, and for which tiles are chosen:
a program runs with the same tiles everywhere."""


def board(name: str) -> Board:
    """The board of that name, such as "zcu102".

    Raises:
        ConfigError: there is no board of that name.
    """
    if name not in BOARDS:
        raise ConfigError(f"no board named {name!r}; there are {', '.join(BOARDS)}")
    return BOARDS[name]
