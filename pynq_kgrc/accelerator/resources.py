"""Modelled resources of a design of ours on a chip.

DSPs and block RAMs are counted from the multipliers and memories that hls_src instantiates. LUTs
are the estimate `paper.lut`, which is fitted to the published designs of the same array. No design
was synthesized here; `accelerator/reports.py` compares the estimate with a synthesis report.
"""

from __future__ import annotations

from dataclasses import dataclass

from pynq_kgrc.accelerator import paper
from pynq_kgrc.accelerator.boards import Board
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.quant import ACCUMULATOR_BITS, ceil_div

PACKED = {16: (1, 1), 8: (2, 1), 4: (2, 2)}
"""By bit width: (filters, output positions) that share one DSP (hls_src/dot.h)."""

DSP_PER_SCALE = 3
"""Two for a sum of up to 48 bits times 15 bits, one for the shortcut's 17 by 15 (post.cpp)."""

DSP_OF_ADDRESSES = 32
"""DSPs for products of tile sizes and pitches in all processes; an allowance, not a count."""

BRAM36_OF_PORTS = 30
"""Block RAMs for the eight memory ports and the streams between processes; an allowance."""


@dataclass(frozen=True)
class Resources:
    """DSP48E2s, 36-kbit block RAMs and LUTs."""

    dsp: int
    bram36: float
    lut: int

    def share(self, board: Board) -> float:
        """The largest of the three shares of a board, 1 = all of it."""
        return max(self.dsp / board.dsp, self.bram36 / board.bram36, self.lut / board.lut)


def estimate_resources(config: AcceleratorConfig) -> Resources:
    """Modelled resources of a design.

    The array multiplies T_M/G_M groups of P_M G_M/T_M rows, P_F positions, P_K columns and T_N
    channels, packed into DSPs as in hls_src/dot.h. The input buffer has two halves. Each half has
    P_F banks of 1024 vectors of T_N codes, in as many copies as the reads per trip need at two
    ports a bank. The sums have two halves of T_M x P_F banks.
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
    """36-kbit block RAMs, in halves, of a memory of `rows` x `bits` (UG573, RAMB18E2 shapes).

    A half holds 512 x 36 bits with one read port and one write port, or 1024 x 18 bits with two
    ports that read and write (`both_ports`). A memory of up to 64 rows is made of LUTs.
    """
    if rows <= 64:
        return 0.0
    width, depth = (18, 1024) if both_ports else (36, 512)
    return ceil_div(bits, width) * ceil_div(rows, depth) / 2
