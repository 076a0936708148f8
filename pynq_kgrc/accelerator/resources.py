"""What a design of ours takes of a chip, by counting what hls_src instantiates.

Modelled, and never synthesized here: DSPs and block RAMs are counts of multipliers and memories as
the sources write them down, LUTs the estimate of `paper.lut`, which is fitted to the published
designs of the same array. `accelerator/reports.py` lays a synthesis report beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pynq_kgrc.accelerator import paper
from pynq_kgrc.accelerator.boards import Board
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.quant import ACCUMULATOR_BITS, ceil_div

PACKED = {16: (1, 1), 8: (2, 1), 4: (2, 2)}
"""Filters and output positions that share one DSP (hls_src/dot.h)."""

DSP_PER_SCALE = 3
"""A sum of up to 48 bits times 15 bits is two DSPs, the shortcut's 17 by 15 bits one (post.cpp)."""

DSP_OF_ADDRESSES = 32
"""Products of tile sizes and pitches, over all processes; an allowance, not a count."""

BRAM36_OF_PORTS = 30
"""Buffers of the eight memory ports and of the streams between processes; an allowance."""


@dataclass(frozen=True)
class Resources:
    """DSP48E2s, 36-kbit block RAMs and LUTs."""

    dsp: int
    bram36: float
    lut: int

    def share(self, board: Board) -> float:
        """The largest share that it takes of any of them."""
        return max(self.dsp / board.dsp, self.bram36 / board.bram36, self.lut / board.lut)


def estimate_resources(config: AcceleratorConfig) -> Resources:
    """Resources of a design, modelled.

    The array has T_M/G_M groups of P_M G_M/T_M rows, P_F positions, P_K columns, T_N channels,
    packed as hls_src/dot.h packs them. A region of 1024 rows lies in two halves, in as many
    copies as two ports a bank need, and P_F banks of T_N codes; the sums in two halves of
    T_M x P_F banks.
    """
    filters, positions = PACKED[config.bits]
    products = config.groups_per_tile * ceil_div(config.rows_per_cycle, filters)
    products *= ceil_div(config.pf, positions) * config.pk * config.tn
    scales = config.port_positions * config.tn
    reads = (config.groups_per_tile if config.sparse else 1) * config.pk
    copies = ceil_div(reads, 2)
    region = copies * config.pf * bram36(config.tn * config.bits, config.region_rows, True)
    sums = config.tm * config.pf
    sums_each = bram36(
        ACCUMULATOR_BITS[config.bits], config.filter_tiles * config.feature_rows, False
    )
    pooled = scales * bram36(16, config.features, True)
    return Resources(
        dsp=products + scales * DSP_PER_SCALE + DSP_OF_ADDRESSES,
        bram36=2 * region + 2 * sums * sums_each + pooled + BRAM36_OF_PORTS,
        lut=paper.lut(config),
    )


def bram36(bits: int, rows: int, both_ports: bool) -> float:
    """36-kbit block RAMs, in halves, of a memory of `rows` words (UG573, RAMB18E2 shapes).

    A half holds 512 words of 36 bits with one reading and one writing port, or 1024 of 18 with
    two that do both. Up to 64 words are LUT RAM.
    """
    if rows <= 64:
        return 0.0
    width, depth = (18, 1024) if both_ports else (36, 512)
    return ceil_div(bits, width) * ceil_div(rows, depth) / 2
