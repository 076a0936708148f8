"""Closed forms for what a layer costs on an accelerator: multiply-accumulates and bytes.

The emulation counts the same things while it walks the layer; the two have to agree exactly.
Loop order (KGRC paper, figure 4): output tiles outermost, inside them tiles of T_M filters, inside
those T_N channels and T_K taps. So weights are read once for every output tile, and the input
region of an output tile once for every T_M filters.
"""

from __future__ import annotations

import math
from itertools import product

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ConvShape, Size, WindowShape
from pynq_kgrc.quant import packed_bytes


def tile_size(config: AcceleratorConfig, shape: WindowShape, what: str = "layer") -> Size:
    """T_D, T_H, T_W of a layer: the largest tile whose input region fits the input buffer.

    Bounded by the design's tile and by the map. Large kernels and strides need a larger region,
    so their tiles shrink.

    Raises:
        CompileError: not even one output position fits; `what` names the layer.
    """
    depths, heights, widths = (
        range(min(t, o), 0, -1) for t, o in zip(config.tile, shape.out_size, strict=True)
    )
    fits = (
        tile
        for tile in product(depths, heights, widths)
        if math.prod(region_extent(shape, tile)) <= config.input_positions
    )
    best = max(fits, key=lambda tile: math.prod(tile), default=None)
    if best is None:
        raise CompileError(
            f"{what}: its kernel {shape.kernel} alone needs {math.prod(shape.kernel)} input "
            f"positions, the buffer of {config.name} holds {config.input_positions}"
        )
    return best


def region_extent(shape: WindowShape, tile: Size) -> Size:
    """Input positions along each axis that an output tile of that size sees."""
    d, h, w = ((tile[i] - 1) * shape.stride[i] + shape.kernel[i] for i in range(3))
    return d, h, w


def tile_count(shape: WindowShape, tile: Size) -> int:
    """Output tiles of a layer."""
    return math.prod(-(-o // t) for o, t in zip(shape.out_size, tile, strict=True))


def conv_macs(
    config: AcceleratorConfig, shape: ConvShape, rows: int, cols: int, enabled: int
) -> int:
    """MACs of the array, zero padding included: `rows` x `cols` kept in `enabled` groups."""
    tap_tiles = -(-shape.taps // config.group_size.columns(shape.taps))
    return enabled * rows * config.tn * cols * tap_tiles * math.prod(shape.out_size)


def weight_bytes(
    config: AcceleratorConfig, shape: ConvShape, rows: int, cols: int, enabled: int
) -> int:
    """Bytes of one reading of a layer's compact weights, indices and block-enable bits.

    An index takes a byte and is stored only where the axis is not dense; a group has one
    enable bit.
    """
    p, q, t = config.group_size.counts(shape.filters, shape.channels, shape.taps)
    gk = config.group_size.columns(shape.taps)
    values = packed_bytes(enabled * t * rows * config.tn * cols, config.bits)
    row_indices = enabled * rows if rows < config.gm else 0
    col_indices = enabled * t * cols if cols < gk else 0
    return values + row_indices + col_indices + -(-p * q // 8)


def input_bytes(config: AcceleratorConfig, shape: WindowShape, tile: Size) -> int:
    """Bytes of one reading of all input regions, all channels; padding is not read."""
    along = [
        sum(
            min(first * s - before + (min(t, o - first) - 1) * s + k, size)
            - max(first * s - before, 0)
            for first in range(0, o, t)
        )
        for o, t, s, k, before, size in zip(
            shape.out_size,
            tile,
            shape.stride,
            shape.kernel,
            shape.pad_before,
            shape.in_size,
            strict=True,
        )
    ]
    return packed_bytes(shape.channels * math.prod(along), config.bits)


def filter_tiles(config: AcceleratorConfig, shape: ConvShape) -> int:
    """Tiles of T_M filters: how often each input region is read."""
    return -(-shape.filters // config.tm)
