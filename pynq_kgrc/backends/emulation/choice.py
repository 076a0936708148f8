"""Which exact form of a convolution is the fastest: an estimate of the work of each."""

from __future__ import annotations

import math

import numpy as np

from pynq_kgrc.backends.emulation.exact import (
    FLOAT32,
    GemmConvolution,
    Interval,
    PlanarConvolution,
    is_small,
)
from pynq_kgrc.backends.emulation.winograd import WIDTH, Inexact, WinogradConvolution, three_taps
from pynq_kgrc.graph import ConvShape
from pynq_kgrc.quant import Array, ceil_div

FEW_CHANNELS = 4
"""Up to so many channels a pixel's run is too short to copy, and the planar form is faster."""

ExactConvolution = GemmConvolution | PlanarConvolution | WinogradConvolution

ELEMENT_COST = 22
"""An element-wise operation on one value takes about as long as this many MACs of a GEMM."""

SMALL_COST = 0.85
"""A MAC of a product with small weights takes about this part of another's time."""

WEIGHT_COST = 120
"""So does this many the reading of a weight from memory, once for all outputs of a small map."""


def choose_convolution(
    weight: Array,
    shape: ConvShape,
    interval: Interval,
    dtype: np.dtype[np.generic],
    cores: int,
) -> ExactConvolution:
    """The faster exact form of a convolution, by an estimate of its work."""
    if shape.channels <= FEW_CHANNELS and shape.taps > 1 and shape.out_size[2] >= 16:
        return PlanarConvolution(weight, shape, interval, dtype, cores)
    axes = three_taps(shape)
    others = [axis for axis in range(3) if shape.kernel[axis] != 3]
    plain = all(shape.kernel[axis] == 1 for axis in others) and shape.stride == (1, 1, 1)
    if axes and plain and math.prod(shape.out_size) >= 16 and shape.channels >= 16:
        direct = _gemm_work(shape)
        works = {tuple(axes): _winograd_work(shape, axes)}
        if len(axes) > 1 and WIDTH in axes:
            works[tuple(axes[:-1])] = _winograd_work(shape, axes[:-1])
        best = min(works, key=lambda axes: works[axes])
        if works[best] < direct:
            try:
                return WinogradConvolution(weight, shape, interval, dtype, cores, list(best))
            except Inexact:
                pass
    return GemmConvolution(weight, shape, interval, dtype, cores)


def _gemm_work(shape: ConvShape) -> float:
    """MACs for an output, and as many as its share of moving memory takes the time of."""
    n, m = shape.channels, shape.filters
    reading = WEIGHT_COST * n * m / math.prod(shape.out_size)
    # a tap's channels are copied, or its products written and added up
    moved = 2 * m if shape.kernel[1:] == (1, 1) else n
    return shape.taps * (_product_work(n, m) + reading + ELEMENT_COST * moved)


def _winograd_work(shape: ConvShape, axes: list[int]) -> float:
    """The same for F(2,3) along these axes."""
    n, m, a = shape.channels, shape.filters, len(axes)
    length = shape.taps // 3**a
    width = shape.out_size[WIDTH]
    wasted = ceil_div(width + length - 1, length) * length / width
    reading = length * WEIGHT_COST * n * m / math.prod(shape.out_size)
    # an axis doubles the values: all are made on the way in, written, and added up on the way out
    moved = (2 ** (a + 1) - 2) * (n + m) + 2**a * m
    products = 2**a * _product_work(length * n, m)
    work: float = wasted * (products + ELEMENT_COST * moved) + 4**a * reading
    return work


def _product_work(channels: int, filters: int) -> float:
    """MACs for a row of a product; small ones take less time each."""
    small = is_small(channels, filters, FLOAT32)
    return channels * filters * (SMALL_COST if small else 1)
