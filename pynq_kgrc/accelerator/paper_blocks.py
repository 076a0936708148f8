"""The blockwise paper's model of its accelerator: equations (14) to (25), one function each.

"3D CNN Acceleration on FPGA using Hardware-Aware Pruning" (Sun, Zhao et al.): a design multiplies
T_m x T_n weights in a cycle, at one position and tap, and skips blocks of weights that are pruned.
Every number here is modelled, for the *published* designs. The paper does not print the widths of
its ports; without a port the load counts as hidden. Then, as printed, the dense networks come out
13 to 18 % faster than published and the pruned R(2+1)D 17 to 20 % slower
(`host_tests/test_published.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import ceil_div


@dataclass(frozen=True)
class BlockDesign:
    """T_m, T_n and T_d x T_r x T_c of a design."""

    tm: int
    tn: int
    tile: Size = (4, 14, 14)
    bits: int = 16


@dataclass(frozen=True)
class BlockPorts:
    """p_wgt, p_in, p_out: codes that a port moves in a cycle; None: the load is hidden."""

    weight: int | None = None
    inputs: int | None = None
    output: int | None = None


HIDDEN = BlockPorts()


def block_dsp(design: BlockDesign) -> int:
    """T_m T_n: a multiplication takes a DSP."""
    return design.tm * design.tn


def block_bram36(design: BlockDesign, shapes: Iterable[ConvShape]) -> float:
    """Eqs. (14) to (18): 36-kbit block RAMs that the doubled buffers need as capacity."""
    shapes = list(shapes)
    largest_kernel = max(shape.taps for shape in shapes)
    largest_input = max(math.prod(_input_tile(design, shape)) for shape in shapes)
    output = 2 * design.tm * math.prod(design.tile)
    inputs = 2 * design.tn * largest_input
    weight = 2 * design.tm * design.tn * largest_kernel
    return (output + inputs + weight) * design.bits / (36 * 1024)


def block_cycles(
    design: BlockDesign, shape: ConvShape, kept: float = 1.0, ports: BlockPorts = HIDDEN
) -> float:
    """Eqs. (19) to (25): cycles of a convolution that keeps the share `kept` of its blocks."""
    tm, tn, tile = design.tm, design.tn, math.prod(design.tile)
    t_wgt = _cycles(tm * tn * shape.taps, ports.weight)
    t_in = _cycles(tn * math.prod(_input_tile(design, shape)), ports.inputs)
    t_out = _cycles(tm * tile, ports.output)
    t_comp = shape.taps * tile
    t_l3 = max(t_wgt, t_in, t_comp)
    filters, channels = ceil_div(shape.filters, tm), ceil_div(shape.channels, tn)
    blocks = math.floor(kept * filters * channels) / filters
    t_l2 = max(t_l3 * blocks + t_comp, t_out)
    tiles = math.prod(ceil_div(o, t) for o, t in zip(shape.out_size, design.tile, strict=True))
    return tiles * filters * t_l2 + t_out


def _input_tile(design: BlockDesign, shape: ConvShape) -> Size:
    """T'_x = (T_x - 1) S_x + K_x."""
    d, h, w = (
        (t - 1) * stride + kernel
        for t, stride, kernel in zip(design.tile, shape.stride, shape.kernel, strict=True)
    )
    return d, h, w


def _cycles(codes: int, port: int | None) -> float:
    return 0.0 if port is None else codes / port
