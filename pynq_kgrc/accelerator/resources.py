"""Modelled resources of a design of ours on a chip, counted from what hls_src instantiates.

`resource_parts` counts DSPs, block RAMs and LUTs part by part. The formulas of the lanes (constants
below without "assumed") are held within 15 % of what yosys finds for their twins in hls_src/rtl
(host_tests/test_rtl_lanes.py; synthesized, not placed). What has no twin is assumed, and its name
says so. No design was synthesized by the vendor's tools; `accelerator/reports.py` compares the
estimate with a synthesis report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from pynq_kgrc.accelerator.boards import Board
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.tiling import (
    CODE_WORDS_AHEAD,
    INPUT_BEATS_AHEAD,
    ITEMS_AHEAD,
    OUTPUT_BEATS_AHEAD,
    REGION_WORDS_AHEAD,
    RUNS_AHEAD,
    SUM_WORDS_AHEAD,
    TILES_AHEAD,
    WEIGHT_BEATS_AHEAD,
    WEIGHT_WORDS_AHEAD,
)
from pynq_kgrc.quant import ACCUMULATOR_BITS, ceil_div

PACKED = {16: (1, 1), 8: (2, 1), 4: (2, 2)}
"""By bit width: (filters, output positions) that share one DSP (hls_src/dot.h)."""

FIELD_BITS = {16: 32, 8: 18, 4: 11}
"""By bit width: bits of a product's field in the sum of a cascade (hls_src/dot.h)."""

ROW_BITS, SUM_ROW_BITS = 10, 9
"""Bits of a row of a region bank, and of a sum bank."""

DSP_PER_SCALE = {16: 4, 8: 3, 4: 3}
"""By bit width, of a lane of scale(): yosys's count for rtl/scale_lane.v. Two or three for a biased
sum times a multiplier of 15 bits, one for the shortcut's code."""

ADDRESSING_PROCESSES = 12
"""Processes that multiply sizes and pitches (hls_src: plan, memory, decode, schedule, pool)."""

DSP_PER_ADDRESS_ASSUMED = 6
"""Two products of 32 bits, 3 DSPs each, that a process uses again and again; assumed. The review
of the sources expects 60 to 100 DSPs for all of them."""

SRL_DEPTH_ASSUMED = 32
"""Depth up to which a FIFO is made of shift registers, 32 words a LUT; deeper ones are block RAM.
Assumed: what the tool chooses depends on its version."""

PROCESSES = 25
"""Of a task (hls_src/top.cpp)."""

LUT_PER_PROCESS_ASSUMED = 900
"""Counters, addresses, comparisons and control of a process, outside of its lanes; assumed."""

DIVIDERS_ASSUMED = 20
LUT_PER_DIVIDER_ASSUMED = 250
"""Sequential dividers that run where a task or a tile begins, shared within a process; assumed."""

PORTS = (("input", 2, 16), ("weights", 2, 16), ("shortcut", 1, 8), ("output", 1, 8))
"""Memory ports of beats: name, how many, bursts of 64 beats that are outstanding."""

TABLE_PORTS = 4
"""Ports of 64 bits for the plan, indices, scales and descriptors."""

LUT_PER_PORT_ASSUMED = 1200
"""The tool's AXI adapter of a memory port, without its buffer; assumed."""

SMARTCONNECTS = 6
LUT_PER_SMARTCONNECT_ASSUMED = 3000
"""One for each port of the processing system; each converts width and clock. Assumed. Adapters and
smartconnects together are within the 25 to 40 thousand LUTs that the review of the sources expects.
"""


@dataclass(frozen=True)
class Resources:
    """DSP48E2s, 36-kbit block RAMs, LUTs and UltraRAMs."""

    dsp: int
    bram36: float
    lut: int
    uram: int = 0

    def shares(self, board: Board) -> dict[str, float]:
        """The shares of a board that are used, by the name of the resource; 1 = all of it."""
        return {
            name: getattr(self, name) / getattr(board, name)
            for name in ("dsp", "bram36", "lut", "uram")
            if getattr(board, name) or getattr(self, name)
        }

    def share(self, board: Board) -> float:
        """The largest of the shares of a board, 1 = all of it."""
        return max(self.shares(board).values())


def estimate_resources(config: AcceleratorConfig, board: Board | None = None) -> Resources:
    """Modelled resources of a design on a board: the sum of its parts.

    Without a board all memories are block RAMs, as on a ZCU102, which has no UltraRAM.
    """
    parts = resource_parts(config)
    if board is not None and board.uram:
        return _place_memories(parts, config, board)[1]
    return _sum(parts.values())


def uram_parts(config: AcceleratorConfig, board: Board) -> tuple[str, ...]:
    """The parts of a design whose memories are UltraRAMs on a board: of `IN_URAM`, or none.

    The build gives the answer to the tools (hls_src/scripts/hls.tcl). It changes no code and no
    program, and no figure of latency.
    """
    return _place_memories(resource_parts(config), config, board)[0]


def _place_memories(
    parts: Mapping[str, Resources], config: AcceleratorConfig, board: Board
) -> tuple[tuple[str, ...], Resources]:
    """The choice of parts in UltraRAM with the smallest of the largest shares of the board."""
    used = _sum(parts.values())
    rams = {name: count(config) for name, count in IN_URAM.items()}
    choices = (
        [names for size in range(len(IN_URAM) + 1) for names in combinations(IN_URAM, size)]
        if board.uram
        else [()]
    )
    placed = {
        names: replace(
            used,
            bram36=used.bram36 - sum(parts[name].bram36 for name in names),
            uram=sum(rams[name] for name in names),
        )
        for names in choices
    }
    return min(placed.items(), key=lambda choice: choice[1].share(board))


def _sum(parts: Iterable[Resources]) -> Resources:
    dsp, bram36, lut = 0, 0.0, 0
    for part in parts:
        dsp, bram36, lut = dsp + part.dsp, bram36 + part.bram36, lut + part.lut
    return Resources(dsp, bram36, lut)


def resource_parts(config: AcceleratorConfig) -> dict[str, Resources]:
    """Modelled resources of the parts of a design, by name.

    The array multiplies T_M/G_M groups of P_M G_M/T_M rows, P_F positions, P_K columns and T_N
    channels, packed into DSPs as in hls_src/dot.h. The input buffer has two halves. Each half has
    P_F banks of 1024 vectors of T_N codes, in as many copies as the reads per trip need at two
    ports a bank. The sums have two halves of T_M x P_F banks. All memories are block RAMs.
    """
    bits, pf, tn = config.bits, config.pf, config.tn
    sum_bits = ACCUMULATOR_BITS[bits]
    filters, positions = PACKED[bits]
    rows = config.rows_per_cycle
    lanes = config.port_positions * tn
    reads, banks = _region_reads(config), _region_banks(config)
    dots = config.groups_per_tile * ceil_div(rows, filters) * ceil_div(pf, positions)
    # the low factor of a DSP holds one filter, the high one another: 9 bits of it are added
    weights = config.groups_per_tile * ceil_div(rows, filters) * config.pk * tn
    parts = {
        "dot products": Resources(
            dsp=dots * config.pk * tn,
            bram36=0,
            lut=dots * dot_total_luts(bits, config.pk) + (9 * weights if filters == 2 else 0),
        ),
        "region": Resources(
            dsp=0,
            bram36=banks * bram36(tn * bits, config.region_rows, True),
            lut=reads * region_lanes_luts(pf, tn * bits)
            + pf * region_load_luts(config.port_positions, tn * bits)
            # each port reads or is loaded: a choice of two rows
            + banks * 2 * (ROW_BITS // 2 + 1),
        ),
        "sums": Resources(
            dsp=0,
            bram36=2
            * config.tm
            * pf
            * bram36(sum_bits, config.filter_tiles * config.feature_rows, False),
            # a total of P_K dot products of T_N channels
            lut=config.tm * pf * sum_lane_luts(sum_bits, 2 * bits + 10, rows)
            # pools: largest or sum, of the first T_N filters
            + tn * pf * 3 * sum_bits
            # handed on: one vector of the filter tile, turned from lanes to positions
            + pf * tn * sum_bits * ceil_div(config.tm // tn, 4)
            + lanes * sum_bits * ceil_div(pf, 4),
        ),
        "scale": Resources(
            dsp=lanes * DSP_PER_SCALE[bits], bram36=0, lut=lanes * scale_lane_luts(sum_bits, bits)
        ),
        "place": Resources(
            dsp=0,
            # the places of a kernel's taps, a copy for each column
            bram36=config.pk * bram36(ROW_BITS + _bits(pf), 512, False),
            lut=config.port_positions * (place_lane_luts(pf, tn * bits) + tn * bits),
        ),
        "pool": Resources(
            dsp=0,
            bram36=lanes * bram36(16, config.features, True),
            # a lane, a pair of neighbours, and its bits in a beat of narrow or wide codes
            lut=lanes * (pool_lane_luts(_bits(config.features)) + 32 + 2 * bits),
        ),
        "FIFOs": _fifos(config),
        "memory ports": _ports(config),
        "addresses and control": Resources(
            dsp=ADDRESSING_PROCESSES * DSP_PER_ADDRESS_ASSUMED,
            bram36=0,
            lut=PROCESSES * LUT_PER_PROCESS_ASSUMED + DIVIDERS_ASSUMED * LUT_PER_DIVIDER_ASSUMED,
        ),
    }
    return parts


# ---- LUTs of the lanes: hls_src/rtl has a twin of each -------------------------------------------


def dot_total_luts(bits: int, columns: int) -> int:
    """Fields of the cascades of `columns` taps, and their sums (rtl/dot_total.v)."""
    if bits == 16:
        return (columns - 1) * 40
    pair = round(2.5 * FIELD_BITS[bits] * (columns - 1))
    # four fields: two pairs, and the borrow of the one from the other
    return pair if bits == 8 else 2 * pair + 2 * FIELD_BITS[4] * columns


def region_lanes_luts(pf: int, vector_bits: int) -> int:
    """A read of P_F banks: rows are turned to the banks, vectors back (rtl/region_lanes.v).

    A bit takes one LUT for an addition, or to choose the half, and a LUT for each four of the P_F
    places that it may come from.
    """
    return pf * (vector_bits + ROW_BITS) * (1 + ceil_div(pf, 4))


def region_load_luts(positions: int, vector_bits: int) -> int:
    """What a bank takes of a beat: two of its positions, or fewer (rtl/region_load.v)."""
    return (positions - 1) * (vector_bits + ROW_BITS) + round(0.8 * positions**2)


def sum_lane_luts(sum_bits: int, total_bits: int, rows: int) -> int:
    """A filter in a lane: the total of its row, two halves, handing on (rtl/sum_lane.v)."""
    chosen = total_bits * rows // 2 if rows > 1 else 0
    return 3 * sum_bits + 2 * SUM_ROW_BITS + 6 + chosen


def scale_lane_luts(sum_bits: int, bits: int) -> int:
    """A lane of scale() (rtl/scale_lane.v).

    Additions take a LUT a bit, comparisons half of one, a shift by 6 bits three.
    """
    wide, narrow = sum_bits + 18, bits + 18
    added = (sum_bits + 1) + (bits + 1) + wide + narrow + 2 * wide
    return added + wide + 3 * (wide + narrow) + 16


def place_lane_luts(pf: int, vector_bits: int) -> int:
    """A lane of place_input() (rtl/place_lane.v): two additions, two comparisons, fill or code."""
    return vector_bits + 2 * ROW_BITS + 2 * _bits(pf) + 11


def pool_lane_luts(row_bits: int) -> int:
    """A lane of pack_output() (rtl/pool_lane.v): the row's last values, the largest of two."""
    return 3 * 16 + 2 * ceil_div(row_bits, 3) + 4


def _bits(count: int) -> int:
    """Bits of a number below `count`."""
    return max(1, (count - 1).bit_length())


# ---- memories --------------------------------------------------------------------------------


def bram36(bits: int, rows: int, both_ports: bool) -> float:
    """36-kbit block RAMs, in halves, of a memory of `rows` x `bits` (UG573, RAMB18E2 shapes).

    A half holds 512 x 36 bits with one read port and one write port, or 1024 x 18 bits with two
    ports that read and write (`both_ports`). A memory of up to 64 rows is made of LUTs.
    """
    if rows <= 64:
        return 0.0
    width, depth = (18, 1024) if both_ports else (36, 512)
    return ceil_div(bits, width) * ceil_div(rows, depth) / 2


def uram288(bits: int, rows: int) -> int:
    """UltraRAMs of a memory of `rows` x `bits`: 4096 x 72 bits, two ports, each of which reads or
    writes (UG573).
    """
    return ceil_div(bits, 72) * ceil_div(rows, 4096)


def stream_words(config: AcceleratorConfig) -> Iterator[tuple[str, int, int, int]]:
    """(what, how many, bits, depth) of the streams between the processes (hls_src/top.cpp)."""
    beat = 8 * config.beat_bytes
    place = ROW_BITS + _bits(config.pf)
    lanes = config.port_positions * config.tn
    reads = config.groups_per_tile * config.pk
    codes = config.groups_per_tile * config.rows_per_cycle * config.pk * config.tn * config.bits
    indices = reads * place + config.groups_per_tile * config.rows_per_cycle * _bits(config.gm)
    # the array's copy has the place of each lane; five others are parts of it
    yield "tiles", 1, 40 * config.pf + 680, TILES_AHEAD
    yield "items", 6, 60, ITEMS_AHEAD
    yield "runs of ports", 4, 65, RUNS_AHEAD
    yield "lengths of runs", 3, 32, RUNS_AHEAD
    yield "input_beats", 2, beat, INPUT_BEATS_AHEAD
    yield "weight_beats", 2, 64 * config.weight_port_words, WEIGHT_BEATS_AHEAD
    yield "shortcut_beats", 1, beat, 64
    yield "output_beats", 1, beat, OUTPUT_BEATS_AHEAD
    yield "weight_chunks", 2, 64 * config.chunk_words, 16
    yield "table words", 2, 64, 64
    yield "vector_scales", 1, config.tn * (ACCUMULATOR_BITS[config.bits] + 21), 16
    yield "array_runs", 1, 27, 16
    yield "input_steps", 1, config.pf * (ROW_BITS + 1) + config.groups_per_tile + 12, 32
    yield "sum_steps", 1, config.pf + 15, 32
    position = config.tn * config.bits + place + 1
    yield "region_words", 1, config.port_positions * position + 1, REGION_WORDS_AHEAD
    yield "weight_words", 1, codes + indices, WEIGHT_WORDS_AHEAD
    yield "sum_words", 1, lanes * ACCUMULATOR_BITS[config.bits], SUM_WORDS_AHEAD
    yield "code_words", 1, lanes * 16, CODE_WORDS_AHEAD


def _fifos(config: AcceleratorConfig) -> Resources:
    luts, blocks = 0, 0.0
    for _, count, bits, depth in stream_words(config):
        if depth <= SRL_DEPTH_ASSUMED:
            luts += count * bits
        else:
            blocks += count * ceil_div(bits, 36) * ceil_div(depth, 512) / 2
    return Resources(0, blocks, luts)


def _ports(config: AcceleratorConfig) -> Resources:
    """Adapters with a buffer for all that is outstanding, and smartconnects."""
    blocks = sum(bram36(bits, rows, False) for bits, rows in _port_buffers(config))
    count = len(list(_port_buffers(config)))
    luts = count * LUT_PER_PORT_ASSUMED + SMARTCONNECTS * LUT_PER_SMARTCONNECT_ASSUMED
    return Resources(0, blocks, luts)


def _port_buffers(config: AcceleratorConfig) -> Iterator[tuple[int, int]]:
    """(bits, rows) of the buffer of each memory port."""
    yield from [(64, 4 * 64)] * TABLE_PORTS
    for name, ports, outstanding in PORTS:
        bits = 64 * config.weight_port_words if name == "weights" else 8 * config.beat_bytes
        yield from [(bits, outstanding * 64)] * ports


def _region_reads(config: AcceleratorConfig) -> int:
    """Reads of a bank of the input buffer in a trip."""
    return (config.groups_per_tile if config.sparse else 1) * config.pk


def _region_banks(config: AcceleratorConfig) -> int:
    return 2 * ceil_div(_region_reads(config), 2) * config.pf


IN_URAM: Mapping[str, Callable[[AcceleratorConfig], int]] = {
    "region": lambda config: (
        _region_banks(config) * uram288(config.tn * config.bits, config.region_rows)
    ),
    "memory ports": lambda config: sum(uram288(*buffer) for buffer in _port_buffers(config)),
}
"""Parts whose memories may be UltraRAMs, with how many they are then: the banks of the input buffer
(BIND_STORAGE) and the buffers of the memory ports (config_interface -m_axi_buffer_impl)."""
