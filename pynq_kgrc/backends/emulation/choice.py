"""Choose the fastest exact form of a convolution (GEMM, planar or Winograd) by estimated work."""

from __future__ import annotations

import math

import numpy as np

from pynq_kgrc.backends.emulation.exact import (
    FLOAT32,
    GemmConvolution,
    Interval,
    PlanarConvolution,
    fits_small_matrix_kernel,
)
from pynq_kgrc.backends.emulation.winograd import (
    WIDTH,
    Inexact,
    WinogradConvolution,
    axes_of_three_taps,
)
from pynq_kgrc.graph import ConvShape
from pynq_kgrc.quant import Array, ceil_div

PLANAR_CHANNELS = 4
"""Up to this many channels the planar form is faster: a position's channels are too short to copy
one by one."""

ONE_AXIS_CHANNELS = 32
"""With fewer channels Winograd along one axis is no faster than a GEMM, which can pool the sums of
any window. A folded clip has so few."""

ExactConvolution = GemmConvolution | PlanarConvolution | WinogradConvolution

# Costs in MACs of a GEMM: what takes as much time as this many MACs.

ELEMENT_COST = 22
"""An element-wise operation on one value."""

SMALL_MATRIX_COST = 0.85
"""A MAC of a product that small matrix kernels compute."""

WEIGHT_COST = 120
"""Reading one weight from memory. It is paid once per layer, so it matters for small maps only."""


def choose_convolution(
    weight: Array,
    shape: ConvShape,
    interval: Interval,
    dtype: np.dtype[np.generic],
    cores: int,
) -> ExactConvolution:
    """The exact form of a convolution with the least estimated work.

    Args are those of `GemmConvolution`. Winograd is considered for stride 1, kernels of 3 (and 1)
    along each axis, and at least 16 channels and 16 outputs.
    """
    if shape.channels <= PLANAR_CHANNELS and shape.taps > 1 and shape.out_size[2] >= 16:
        return PlanarConvolution(weight, shape, interval, dtype, cores)
    axes = axes_of_three_taps(shape)
    others = [axis for axis in range(3) if shape.kernel[axis] != 3]
    suits_winograd = all(shape.kernel[axis] == 1 for axis in others) and shape.stride == (1, 1, 1)
    enough = shape.channels >= (16 if len(axes) > 1 else ONE_AXIS_CHANNELS)
    if axes and suits_winograd and math.prod(shape.out_size) >= 16 and enough:
        direct = _gemm_work(shape)
        works = {tuple(axes): _winograd_work(shape, axes)}
        if len(axes) > 1 and WIDTH in axes:  # or transform all axes but the width
            works[tuple(axes[:-1])] = _winograd_work(shape, axes[:-1])
        best = min(works, key=lambda axes: works[axes])
        if works[best] < direct:
            try:
                return WinogradConvolution(weight, shape, interval, dtype, cores, list(best))
            except Inexact:
                pass
    return GemmConvolution(weight, shape, interval, dtype, cores)


def _gemm_work(shape: ConvShape) -> float:
    """Cost of one output by im2col: its MACs, and its share of the memory traffic."""
    n, m = shape.channels, shape.filters
    reading = WEIGHT_COST * n * m / math.prod(shape.out_size)
    # unfolding copies the channels of a tap; without it, the products of a tap along depth are
    # written and added
    moved = 2 * m if shape.kernel[1:] == (1, 1) else n
    return shape.taps * (_product_work(n, m) + reading + ELEMENT_COST * moved)


def _winograd_work(shape: ConvShape, axes: list[int]) -> float:
    """Cost of one output by F(2,3) along these axes."""
    n, m, a = shape.channels, shape.filters, len(axes)
    width_taps = shape.taps // 3**a
    width = shape.out_size[WIDTH]
    rounding_up = ceil_div(width + width_taps - 1, width_taps) * width_taps / width
    reading = width_taps * WEIGHT_COST * n * m / math.prod(shape.out_size)
    # each transformed axis doubles the values: 2 + 4 + ... + 2^a input values are computed and as
    # many sums are added; 2^a products are written
    moved = (2 ** (a + 1) - 2) * (n + m) + 2**a * m
    products = 2**a * _product_work(width_taps * n, m)
    work: float = rounding_up * (products + ELEMENT_COST * moved) + 4**a * reading
    return work


def _product_work(channels: int, filters: int) -> float:
    """Cost of one row of a product."""
    small = fits_small_matrix_kernel(channels, filters, FLOAT32)
    return channels * filters * (SMALL_MATRIX_COST if small else 1)
