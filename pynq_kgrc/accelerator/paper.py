"""The KGRC paper's own model of its accelerator: equations (9) to (20), one function each.

It models the *published* designs, so that they and ours can be laid side by side. Every number
that comes out of this module is modelled; the published ones it is held to are in
`host_tests/kgrc_tables.json`. Numbers go in and come out: a design, a layer's shape, and what
a kernel group keeps of it, `kr` = G_M (1 - R_R) rows and `kc` = T_K (1 - R_C) columns a tap tile.

As printed, the equations do not give the published latencies. Four repairs do:

1. *Tap tiles.* A channel tile is computed once for each of its ceil(K_l / T_K) tap tiles
   (algorithm 2, line 5), but (18) counts it once. The factor is put back into (17), (18), (20).
   Weights are loaded for every tap tile, the input once for a channel tile.
2. *Rows of a group.* In (16) P_M stands beside the rows of one group, while (10) counts P_M over
   all T_M / G_M groups that work at once. (16) is read with P_M G_M / T_M rows, and with the kept
   T_K (1 - R_C) columns rather than T_K, both in whole steps.
3. *Clipped tiles.* A map smaller than T_D x T_H x T_W is not padded up to it: T_F is the product
   of min(T_D, D), min(T_H, H), min(T_W, W).
4. *Fill and drain.* Every pass over a tap tile costs a few cycles more, see `fill_cycles`.

Repairs 1 and 2 follow from the paper's algorithm 2, repair 3 is what the layers with small maps
show. Repair 4 is a fit of seven constants to 24 totals and 48 bars, not an independent finding.
The published figures are convolutions only, and agree with loads that are always hidden
(`HIDDEN_LOADS`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pynq_kgrc.accelerator.boards import Board
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import ceil_div

PUBLISHED_CLOCK_MHZ = 150.0

KeptConv = tuple[ConvShape, int, int]
"""A convolution with its `kr` and `kc`."""


@dataclass(frozen=True)
class Ports:
    """B_in, B_wgt, B_out: packed words of A_b numbers that a port moves in a cycle.

    The paper does not print them. Eight words are 64 bytes at 16 and 8 bits: what the four
    128-bit high-performance ports of a Zynq UltraScale+ carry together.
    """

    b_in: int | None = 8
    b_wgt: int | None = 8
    """None: this load is taken for hidden and costs no cycle."""
    b_out: int = 4


ASSUMED_PORTS = Ports()
HIDDEN_LOADS = Ports(b_in=None, b_wgt=None)
"""Loads hidden, B_out = 4: what the published latencies agree with."""


def packing(config: AcceleratorConfig) -> int:
    """A_b: numbers packed into a word; 4 of 16 bits, 8 of 8 or 4 bits."""
    return 4 if config.bits == 16 else 8


def utilisation(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int) -> float:
    """Eq. (9): the share of the array that works; 1 where P_M and P_K divide what is kept.

    G_M (1 - R_R) % (P_M G_M / T_M) = 0 and T_K (1 - R_C) % P_K = 0, said of one group.
    """
    config.check_kept(shape.taps, kr, kc)
    row_steps = ceil_div(kr, config.rows_per_cycle)
    column_steps = ceil_div(kc, config.pk)
    return kr * kc / (row_steps * config.rows_per_cycle * column_steps * config.pk)


DSP_PER_MAC = {16: 1.0, 8: 0.5, 4: 0.25}
"""U_DSP^prec: one 27x18-bit DSP does one, two or four multiplications."""

DSP_BESIDES_MACS = {False: 118, True: 106}
"""Dense and sparse designs: what table V uses beyond (10), on average; the six are 84 to 121."""


def dsp(config: AcceleratorConfig) -> int:
    """Eq. (10): U_DSP = U_DSP^prec P_M T_N P_K P_F."""
    return math.ceil(DSP_PER_MAC[config.bits] * config.pm * config.tn * config.pk * config.pf)


def dsp_used(config: AcceleratorConfig) -> int:
    """Eq. (10) and what addresses, scaling and control take: within 1.4 % of table V."""
    return dsp(config) + DSP_BESIDES_MACS[config.sparse]


LUT_PER_OUTPUT_BIT = 8.45
LUT_PER_ADDER_TREE = 154.8
LUT_PER_SELECTED_BIT = 9.65


def lut(config: AcceleratorConfig) -> int:
    """Eq. (11): U_LUT = U_LUT^prec T_M P_F, and two terms that it leaves out.

    A linear estimate of three constants, fitted to the six designs of table V (least squares of
    the relative error), residuals of +2.3, -2.5, -4.0, +3.8, +1.2, -1.3 % in the table's order:
    accumulation, T_M P_F b bits as in (11); adder trees over T_N, one for each of P_M P_F P_K;
    and in a sparse design the choice of columns, T_M / G_M groups each of P_K T_N P_F b bits.
    The three sparse designs have the same number of chosen bits, so that table V cannot tell the
    last term from a constant of 59 thousand.
    """
    accumulation = config.tm * config.pf * config.bits
    trees = config.pm * config.pf * config.pk
    selected = config.groups_per_tile * config.pk * config.tn * config.pf * config.bits
    total = LUT_PER_OUTPUT_BIT * accumulation + LUT_PER_ADDER_TREE * trees
    return round(total + (LUT_PER_SELECTED_BIT * selected if config.sparse else 0.0))


BANK_BITS = 18 * 1024


def bram_input(config: AcceleratorConfig) -> int:
    """Eq. (12): U_BRAM^in = T_N / A_b ceil(T_F T_K b A_b / 18k), 18-kbit banks, one buffer."""
    return _banks(config, config.tn, math.prod(config.tile) * config.tk)


def bram_weight(config: AcceleratorConfig) -> int:
    """Eq. (13): U_BRAM^wgt = T_N / A_b ceil(T_M T_K b A_b / 18k), one buffer, nothing pruned.

    The paper writes T_M (1 - R_R) and T_K (1 - R_C); a design that also runs dense layers has to
    hold a dense tile.
    """
    return _banks(config, config.tn, config.tm * config.tk)


def bram_output(config: AcceleratorConfig) -> int:
    """Eq. (13): U_BRAM^out = T_M / A_b ceil(T_F b A_b / 18k), 18-kbit banks, one buffer."""
    return _banks(config, config.tm, math.prod(config.tile))


def bram36(config: AcceleratorConfig) -> float:
    """Eqs. (12) to (14): 36-kbit block RAMs with every buffer double.

    This is the room that the data need, not what a design uses: buffers are cut into banks that
    are read in the same cycle, most of them far from full. Table V has 5.6 to 10.2 times as much.
    """
    return 2 * (bram_input(config) + bram_weight(config) + bram_output(config)) / 2


BRAM36_PER_INPUT_BANK = 1.019
BRAM36_PER_OUTPUT_BANK = 0.612


def bram36_banked(config: AcceleratorConfig) -> float:
    """36-kbit block RAMs if buffers are cut as the array reads them; not in the paper.

    Input banks T_N P_F T_K and output banks T_M P_F, counted in 16-bit ones. Two constants fitted
    to table V, residuals of -10, -13, +20, -4, -4, +5 % in the table's order. The first came out
    at 1.02, and two 18-kbit banks for a double buffer would be 1.
    """
    sixteenths = config.pf * config.bits / 16
    inputs = BRAM36_PER_INPUT_BANK * config.tn * config.tk
    return sixteenths * (inputs + BRAM36_PER_OUTPUT_BANK * config.tm)


def fits(config: AcceleratorConfig, board: Board, rho: float = 0.8) -> bool:
    """Eq. (14): 2 U_BRAM <= S_BRAM and U_DSP <= rho S_DSP.

    Stricter than the paper: DSPs are those of `dsp_used`, block RAMs also those of
    `bram36_banked`, and LUTs, which the paper takes for sufficient, may not pass `rho` either.
    """
    return (
        max(bram36(config), bram36_banked(config)) <= board.bram36
        and dsp_used(config) <= rho * board.dsp
        and lut(config) <= rho * board.lut
    )


def clipped_tile(config: AcceleratorConfig, shape: ConvShape) -> Size:
    """Repair 3: T_D, T_H, T_W of a layer, no more than its map."""
    d, h, w = (min(t, o) for t, o in zip(config.tile, shape.out_size, strict=True))
    return d, h, w


def input_cycles(config: AcceleratorConfig, shape: ConvShape, ports: Ports) -> int:
    """Eq. (15): L_in = T_N / A_b ceil(T_F^in / B_in), for one channel tile.

    T_F^in is the region that a clipped tile (repair 3) sees, no more than the map itself.
    """
    if ports.b_in is None:
        return 0
    tile = clipped_tile(config, shape)
    positions = math.prod(
        min((t - 1) * stride + kernel, size)
        for t, stride, kernel, size in zip(
            tile, shape.stride, shape.kernel, shape.in_size, strict=True
        )
    )
    return ceil_div(config.tn, packing(config)) * ceil_div(positions, ports.b_in)


def weight_cycles(
    config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int, ports: Ports
) -> int:
    """Eq. (16): L_wgt = T_M (1 - R_R) T_N / A_b ceil(T_K (1 - R_C) / B_wgt), for one tap tile.

    As printed, a word of another filter waits for the next cycle: a 1x1x1 kernel uses one word
    of the port's B_wgt.
    """
    config.check_kept(shape.taps, kr, kc)
    if ports.b_wgt is None:
        return 0
    rows = config.groups_per_tile * kr
    return rows * ceil_div(config.tn, packing(config)) * ceil_div(kc, ports.b_wgt)


def compute_cycles(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int) -> int:
    """Eq. (16): L_cmpt = ceil(T_F / P_F) ceil(kc / P_K) ceil(kr / (P_M G_M / T_M)), one tap tile.

    With repairs 2 and 3, and the fill and drain of repair 4 added.
    """
    config.check_kept(shape.taps, kr, kc)
    positions = math.prod(clipped_tile(config, shape))
    steps = (
        ceil_div(positions, config.pf)
        * ceil_div(kc, config.pk)
        * ceil_div(kr, config.rows_per_cycle)
    )
    return steps + fill_cycles(config, kr)


FILL_DENSE = {16: 6, 8: 8, 4: 19}
FILL_SPARSE = {16: 25, 8: 21, 4: 23}
FILL_PRUNED_ROWS = 42


def fill_cycles(config: AcceleratorConfig, kr: int) -> int:
    """Repair 4: cycles to fill and drain the pipeline at each pass over a tap tile.

    Fitted to table IV and figure 6. Reading row indices and scattering to the output buffer would
    explain why a sparse design with pruned rows takes longer; the paper does not say.
    """
    if not config.sparse:
        return FILL_DENSE[config.bits]
    return FILL_SPARSE[config.bits] + (FILL_PRUNED_ROWS if kr < config.gm else 0)


def output_cycles(config: AcceleratorConfig, shape: ConvShape, ports: Ports) -> int:
    """Eq. (16): L_out = T_M / A_b ceil(T_F / B_out), for one output tile of T_M filters."""
    positions = math.prod(clipped_tile(config, shape))
    return ceil_div(config.tm, packing(config)) * ceil_div(positions, ports.b_out)


def load_compute_cycles(
    config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int, ports: Ports
) -> int:
    """Eq. (17): L_load_cmpt = max(L_in, L_wgt, L_cmpt), for one channel tile.

    With repair 1: the input is loaded while all tap tiles are computed, max(L_in, ceil(K_l / T_K)
    max(L_wgt, L_cmpt)).
    """
    a_tap_tile = max(
        weight_cycles(config, shape, kr, kc, ports), compute_cycles(config, shape, kr, kc)
    )
    return max(input_cycles(config, shape, ports), _tap_tiles(config, shape) * a_tap_tile)


def store_cycles(
    config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int, ports: Ports
) -> int:
    """Eq. (18): L_store = max(ceil(N / T_N) L_load_cmpt + L_cmpt, L_out), one output tile."""
    accumulate = _channel_tiles(config, shape) * load_compute_cycles(config, shape, kr, kc, ports)
    last = compute_cycles(config, shape, kr, kc)
    return max(accumulate + last, output_cycles(config, shape, ports))


def paper_layer_cycles(
    config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int, ports: Ports
) -> int:
    """Eq. (19): L_l = ceil(D/T_D) ceil(H/T_H) ceil(W/T_W) ceil(M/T_M) L_store + L_out."""
    tile = clipped_tile(config, shape)
    tiles = math.prod(ceil_div(o, t) for o, t in zip(shape.out_size, tile, strict=True))
    tiles *= ceil_div(shape.filters, config.tm)
    stored = store_cycles(config, shape, kr, kc, ports)
    return tiles * stored + output_cycles(config, shape, ports)


def compute_bound(
    config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int, ports: Ports
) -> bool:
    """Eq. (20): max(L_in, L_wgt) <= L_cmpt and (ceil(N / T_N) + 1) L_cmpt >= L_out.

    With repair 1: L_in has all tap tiles to hide in, and L_out all of them and all channel tiles.
    """
    taps = _tap_tiles(config, shape)
    compute = compute_cycles(config, shape, kr, kc)
    return (
        input_cycles(config, shape, ports) <= taps * compute
        and weight_cycles(config, shape, kr, kc, ports) <= compute
        and output_cycles(config, shape, ports)
        <= (_channel_tiles(config, shape) * taps + 1) * compute
    )


def bound_by(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int, ports: Ports) -> str:
    """Which term of (17) and (18) a layer waits for: "compute", "input", "weight" or "output"."""
    taps = _tap_tiles(config, shape)
    compute = compute_cycles(config, shape, kr, kc)
    weight = weight_cycles(config, shape, kr, kc, ports)
    load = load_compute_cycles(config, shape, kr, kc, ports)
    if output_cycles(config, shape, ports) > _channel_tiles(config, shape) * load + compute:
        return "output"
    if input_cycles(config, shape, ports) > taps * max(weight, compute):
        return "input"
    return "weight" if weight > compute else "compute"


def layer_ms(
    config: AcceleratorConfig,
    shape: ConvShape,
    kr: int,
    kc: int,
    ports: Ports,
    clock_mhz: float = PUBLISHED_CLOCK_MHZ,
) -> float:
    """Modelled latency of one convolution as the paper publishes it: 150 MHz, loads hidden."""
    return paper_layer_cycles(config, shape, kr, kc, ports) / (clock_mhz * 1e3)


def network_ms(
    config: AcceleratorConfig,
    layers: Iterable[KeptConv],
    ports: Ports,
    clock_mhz: float = PUBLISHED_CLOCK_MHZ,
) -> float:
    """Modelled latency of a network as the paper publishes it: its convolutions one by one.

    Leave fully connected layers out to compare with table IV.
    """
    return sum(layer_ms(config, *layer, ports, clock_mhz) for layer in layers)


def _banks(config: AcceleratorConfig, channels: int, numbers: int) -> int:
    """18-kbit banks of `channels` / A_b buffers that each hold `numbers` words of A_b b bits."""
    pack = packing(config)
    return ceil_div(channels, pack) * -(-numbers * config.bits * pack // BANK_BITS)


def _channel_tiles(config: AcceleratorConfig, shape: ConvShape) -> int:
    """ceil(N / T_N)."""
    return config.group_size.counts(shape.filters, shape.channels, shape.taps)[1]


def _tap_tiles(config: AcceleratorConfig, shape: ConvShape) -> int:
    """ceil(K_l / T_K)."""
    return config.group_size.counts(shape.filters, shape.channels, shape.taps)[2]
