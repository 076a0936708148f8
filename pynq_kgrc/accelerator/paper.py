"""The KGRC paper's own model of its accelerator: equations (9) to (20), one function each.

It models the *published* designs, so that they can be compared with ours. Every number that this
module returns is modelled; the published numbers that tests compare it with are in
`host_tests/kgrc_tables.json`. The functions take a design, a layer's shape, and what each kernel
group keeps: `kr` = G_M (1 - R_R) rows, and `kc` = T_K (1 - R_C) columns in a tap tile.

As printed, the equations do not give the published latencies. With four repairs they do:

1. *Tap tiles.* A channel tile is computed once for each of its ceil(K_l / T_K) tap tiles
   (algorithm 2, line 5), but (18) counts it once. Here (17), (18) and (20) have the factor.
   Weights are loaded for every tap tile, the input once for a channel tile.
2. *Rows of a group.* (16) divides the rows of one group by P_M, but (10) counts P_M over all
   T_M / G_M groups that work at the same time. Here (16) divides by P_M G_M / T_M, and has the
   kept T_K (1 - R_C) columns rather than T_K; both quotients are rounded up.
3. *Clipped tiles.* A map smaller than T_D x T_H x T_W is not padded up to it: T_F is the product
   of min(T_D, D), min(T_H, H), min(T_W, W).
4. *Fill and drain.* Every pass over a tap tile costs a few cycles more, see `fill_cycles`.

Repairs 1 and 2 follow from the paper's algorithm 2; the layers with small maps show repair 3.
Repair 4 is a fit of seven constants to 24 totals and 48 bars, not an independent finding.
The published figures count convolutions only, and agree with loads that are always hidden
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
"""Shape of a convolution, `kr`, `kc`."""


@dataclass(frozen=True)
class Ports:
    """B_in, B_wgt, B_out: packed words of A_b codes that a port moves in a cycle.

    The paper does not print them; the defaults are our assumption. Eight words are 64 bytes at 16
    and 8 bits: what the four 128-bit high-performance ports of a Zynq UltraScale+ carry together.
    """

    b_in: int | None = 8
    b_wgt: int | None = 8
    """None, here or for `b_in`: the load is assumed hidden behind computing and costs no cycle."""
    b_out: int = 4


ASSUMED_PORTS = Ports()
"""Ports of assumed widths: every load is counted."""

HIDDEN_LOADS = Ports(b_in=None, b_wgt=None)
"""Input and weight loads hidden, B_out = 4: the published latencies agree with these."""


def packing(config: AcceleratorConfig) -> int:
    """A_b: codes packed into a word; 4 at 16 bits, 8 at 8 or 4 bits."""
    return 4 if config.bits == 16 else 8


def utilisation(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int) -> float:
    """The share of the array that is busy; 1 if eq. (9) holds.

    Eq. (9), written for one group: G_M (1 - R_R) % (P_M G_M / T_M) = 0 and T_K (1 - R_C) % P_K = 0.
    """
    config.check_kept(shape.taps, kr, kc)
    row_steps = ceil_div(kr, config.rows_per_cycle)
    column_steps = ceil_div(kc, config.pk)
    return kr * kc / (row_steps * config.rows_per_cycle * column_steps * config.pk)


DSP_PER_MAC = {16: 1.0, 8: 0.5, 4: 0.25}
"""U_DSP^prec: one 27x18-bit DSP does one, two or four multiplications."""

DSP_BESIDES_MACS = {False: 118, True: 106}
"""DSPs beyond (10) by `config.sparse`: the means of table V, where they are 84 to 121."""


def dsp(config: AcceleratorConfig) -> int:
    """Eq. (10): U_DSP = U_DSP^prec P_M T_N P_K P_F."""
    return math.ceil(DSP_PER_MAC[config.bits] * config.pm * config.tn * config.pk * config.pf)


def dsp_used(config: AcceleratorConfig) -> int:
    """Eq. (10) plus DSPs of addresses, scaling and control: within 1.4 % of table V."""
    return dsp(config) + DSP_BESIDES_MACS[config.sparse]


LUT_PER_OUTPUT_BIT = 8.45
LUT_PER_ADDER_TREE = 154.8
LUT_PER_SELECTED_BIT = 9.65


def lut(config: AcceleratorConfig) -> int:
    """Eq. (11), U_LUT = U_LUT^prec T_M P_F, and two terms that it leaves out.

    A linear estimate with three constants, fitted to the six designs of table V (least squares of
    the relative error). The residuals are +2.3, -2.5, -4.0, +3.8, +1.2, -1.3 % in the table's
    order. The terms are: accumulation, T_M P_F b bits as in (11); adder trees over T_N, one for
    each of P_M P_F P_K; and in a sparse design the selection of columns, P_K T_N P_F b bits for
    each of T_M / G_M groups. The three sparse designs select the same number of bits, so that
    table V cannot tell the last term from a constant of 59 thousand.
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
    """Eq. (13): U_BRAM^wgt = T_N / A_b ceil(T_M T_K b A_b / 18k), one buffer, for dense weights.

    The paper writes T_M (1 - R_R) and T_K (1 - R_C), but a design that also runs dense layers
    needs the capacity of a dense tile.
    """
    return _banks(config, config.tn, config.tm * config.tk)


def bram_output(config: AcceleratorConfig) -> int:
    """Eq. (13): U_BRAM^out = T_M / A_b ceil(T_F b A_b / 18k), 18-kbit banks, one buffer."""
    return _banks(config, config.tm, math.prod(config.tile))


def bram36(config: AcceleratorConfig) -> float:
    """Eqs. (12) to (14): 36-kbit block RAMs, with double buffering.

    This is the capacity that the data need. A design uses more: its buffers are split into banks
    that are read in the same cycle, and most banks are far from full. Table V has 5.6 to 10.2 times
    as much.
    """
    return 2 * (bram_input(config) + bram_weight(config) + bram_output(config)) / 2


BRAM36_PER_INPUT_BANK = 1.019
BRAM36_PER_OUTPUT_BANK = 0.612


def bram36_banked(config: AcceleratorConfig) -> float:
    """36-kbit block RAMs with buffers split into the banks that the array reads; not in the paper.

    T_N P_F T_K input banks and T_M P_F output banks, counted as banks of 16 bits. Two constants
    are fitted to table V, with residuals of -10, -13, +20, -4, -4, +5 % in the table's order. The
    first is 1.02; two 18-kbit banks for each double-buffered bank would be 1.
    """
    sixteenths = config.pf * config.bits / 16
    inputs = BRAM36_PER_INPUT_BANK * config.tn * config.tk
    return sixteenths * (inputs + BRAM36_PER_OUTPUT_BANK * config.tm)


def fits(config: AcceleratorConfig, board: Board, rho: float = 0.8) -> bool:
    """Eq. (14): 2 U_BRAM <= S_BRAM and U_DSP <= rho S_DSP.

    Stricter than the paper: DSPs are counted by `dsp_used`, and `bram36_banked` has to fit as well.
    LUTs may not exceed the share `rho` either; the paper assumes that there are enough.
    """
    return (
        max(bram36(config), bram36_banked(config)) <= board.bram36
        and dsp_used(config) <= rho * board.dsp
        and lut(config) <= rho * board.lut
    )


def clipped_tile(config: AcceleratorConfig, shape: ConvShape) -> Size:
    """Repair 3: T_D, T_H, T_W of a layer, no larger than its map."""
    d, h, w = (min(t, o) for t, o in zip(config.tile, shape.out_size, strict=True))
    return d, h, w


def input_cycles(config: AcceleratorConfig, shape: ConvShape, ports: Ports) -> int:
    """Eq. (15): L_in = T_N / A_b ceil(T_F^in / B_in), for one channel tile.

    T_F^in is the input region of a clipped tile (repair 3), no larger than the map.
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

    As printed, one cycle moves words of one filter only: a 1x1x1 kernel uses one word of the
    port's B_wgt.
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

    Fitted to table IV and figure 6. A sparse design with pruned rows takes longer, perhaps because
    it reads row indices and scatters to the output buffer; the paper does not say.
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

    With repair 1: L_in is hidden behind all tap tiles of a channel tile, and L_out behind all tap
    tiles of all channel tiles.
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
    """The largest term of (17) and (18): "compute", "input", "weight" or "output"."""
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
    """Modelled latency of one convolution in ms; the paper's clock is 150 MHz."""
    return paper_layer_cycles(config, shape, kr, kc, ports) / (clock_mhz * 1e3)


def network_ms(
    config: AcceleratorConfig,
    layers: Iterable[KeptConv],
    ports: Ports,
    clock_mhz: float = PUBLISHED_CLOCK_MHZ,
) -> float:
    """Modelled latency of a network in ms: its convolutions one after the other.

    Give `HIDDEN_LOADS`, and no fully connected layers, to compare with table IV.
    """
    return sum(layer_ms(config, *layer, ports, clock_mhz) for layer in layers)


def gops(macs: float, ms: float) -> float:
    """Tables VI and VII: billions of operations a second; a multiply-accumulate is two operations.

    The tables count operations in two ways: those of the pruned network, which the array runs, and
    those of the original network, which it saves the time of.

    >>> round(gops(38.5e9, 43.10))
    1787
    """
    return 2 * macs / (ms * 1e6)


def _banks(config: AcceleratorConfig, channels: int, words: int) -> int:
    """18-kbit banks of `channels` / A_b buffers, each with `words` words of A_b b bits."""
    pack = packing(config)
    return ceil_div(channels, pack) * ceil_div(words * config.bits * pack, BANK_BITS)


def _channel_tiles(config: AcceleratorConfig, shape: ConvShape) -> int:
    """ceil(N / T_N)."""
    return config.group_size.counts(shape.filters, shape.channels, shape.taps)[1]


def _tap_tiles(config: AcceleratorConfig, shape: ConvShape) -> int:
    """ceil(K_l / T_K)."""
    return config.group_size.counts(shape.filters, shape.channels, shape.taps)[2]
