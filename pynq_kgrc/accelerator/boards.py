"""Boards as data: the chip, its resources, its memory and ports, and what Vivado calls the board.

Chips: the vendor's device tables, DS891 (Zynq UltraScale+ overview) and DS987 (Kria K26). Memory:
bus width x 2 x clock of the processing system's DDR port, from the vendors' board presets
(github.com/Xilinx/XilinxBoardStore, `PSU__DDRC__BUS_WIDTH` and `PSU__CRF_APB__DDR_CTRL__FREQMHZ`),
whose names are the board parts. What a port of the programmable logic gives is assumed (`Memory`).
None of this was measured here, and nothing was built for any of the boards.
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


SYSTEM_PORTS = ("HPC0", "HPC1", "HP0", "HP1", "HP2", "HP3")
"""Ports of 128 bits by which the programmable logic of a Zynq UltraScale+ reaches memory (UG1085).
All chips of the family have them, the K26 too. Two more, ACP and ACE, are for coherent caches."""


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
    board_part: str = ""
    """Vendor and name of the board part, whose preset sets up the processing system; Vivado has it
    with a version behind. "" for a board that is only modelled."""
    free_tools: bool = False
    """Whether the free edition of Vivado builds for the part, to our knowledge (UG973)."""
    image: str = ""
    """Where PYNQ for the board comes from; "" if nobody publishes an image, to our knowledge."""
    ports: tuple[str, ...] = SYSTEM_PORTS
    """Ports of the processing system by which the accelerator may reach memory."""

    @property
    def memory(self) -> Memory:
        """The memory as the accelerator's ports see it."""
        return Memory(self.ddr_bytes_per_second)


def _ddr(bits: int, clock_mhz: int) -> float:
    """Peak bandwidth of a memory bus in bytes a second: two transfers per clock cycle."""
    return bits / 8 * 2 * clock_mhz * 1e6


PYNQ_IMAGE = "PYNQ image (pynq.io, boards)"

BOARDS = {
    board.name: board
    for board in (
        # XCZU9EG, DDR4-2133 module
        Board(
            *("zcu102", "xczu9eg-ffvb1156-2-e", 2520, 912, 0, 274_080, 548_160, _ddr(64, 1067)),
            board_part="xilinx.com:zcu102",
        ),
        # XCZU7EV, DDR4-2133
        Board(
            *("zcu104", "xczu7ev-ffvc1156-2-e", 1728, 312, 96, 230_400, 460_800, _ddr(64, 1067)),
            board_part="xilinx.com:zcu104",
            free_tools=True,
            image=PYNQ_IMAGE,
        ),
        Board(
            *("zcu106", "xczu7ev-ffvc1156-2-e", 1728, 312, 96, 230_400, 460_800, _ddr(64, 1067)),
            board_part="xilinx.com:zcu106",
            free_tools=True,
        ),
        # K26 module, DDR4-2400. The preset of the module sets up its memory; that of the carrier
        # adds SD card, UART, USB and Ethernet (`board_connections`), which the boot firmware has
        # set up before a bitstream is loaded. Kria-PYNQ's own overlay does without, too.
        Board(
            *("kv260", "xck26-sfvc784-2LV-c", 1248, 144, 64, 117_120, 234_240, _ddr(64, 1200)),
            board_part="xilinx.com:kv260_som",
            free_tools=True,
            image="Kria-PYNQ (github.com/Xilinx/Kria-PYNQ), on Ubuntu 22.04",
        ),
        # Ultra96-V2: XCZU3EG, 32-bit LPDDR4 at 533 MHz
        Board(
            *("ultra96", "xczu3eg-sbva484-1-i", 360, 216, 0, 70_560, 141_120, _ddr(32, 533)),
            board_part="avnet.com:ultra96v2",
            free_tools=True,
            image=PYNQ_IMAGE,
        ),
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


def board_of_design(name: str) -> Board:
    """The board that a design is built for if none is named: "8-kv260" is for the KV260.

    A design whose name does not end in that of a board is built for a ZCU102, as the KGRC paper's.
    """
    return BOARDS.get(name.rpartition("-")[2], BOARDS["zcu102"])


def overlay_name(design: str, target: Board) -> str:
    """The name of the folder of a design's overlay for a board.

    It is the design's name, and the board's too if the design is built for another one.
    """
    return design if target == board_of_design(design) else f"{design}-{target.name}"


def board_of_image(text: str) -> Board | None:
    """The board that an image says it is for; None if it names none of ours.

    Args:
        text: what PYNQ's images have in the environment variable BOARD or in the device tree
            (chosen/pynq_board), such as "ZCU104", "KV260" or "Ultra96v2".
    """
    plain = "".join(letter for letter in text.lower() if letter.isalnum())
    return next((each for each in BOARDS.values() if plain.startswith(each.name)), None)
