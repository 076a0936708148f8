"""Folds the first convolution: the host writes its taps as channels of the clip (im2col).

A clip has three channels and the array multiplies T_N at a time, so that most of its products
would be with zeros. Along a folded axis the host writes, for each output, the codes that its taps
read, and the convolution is left with kernel 1, stride 1 and no padding. It adds the same products
as before: its sums are the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from pynq_kgrc.accelerator.boards import REFERENCE
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cutting import cut_convolution
from pynq_kgrc.accelerator.header import MAX_TAPS
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.accelerator.tiling import NO_POOL, convolution_work
from pynq_kgrc.compiler.pack import pack
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ConvShape, Layer, Size, WindowShape

MEMORY = REFERENCE
"""Memory for which foldings are chosen, whatever the board: a program does not depend on it."""

LEAST_GAIN = 1.02
"""A folding that makes the host write more codes has to be this many times faster."""

MAX_GROWTH = 16
"""A folded clip has at most this many times the codes of the clip."""

AXES = (2, 1, 0)
"""The axes in the order in which they are folded: taps along the width are neighbours in a frame,
so that the host copies a row of taps at once."""


class Folding(NamedTuple):
    """A convolution whose taps along some axes are channels of its input."""

    window: WindowShape
    """The taps that the host writes as channels; kernel 1, stride 1 along the other axes."""
    layer: Layer
    """The convolution that is left, with the weight [M, taps * N, ...]."""


def foldings(layer: Layer) -> Iterator[Folding]:
    """The ways to fold a convolution along some of its axes, from none to all."""
    shape = layer.shape
    assert shape is not None
    free = [axis for axis in AXES if shape.kernel[axis] > 1 or shape.stride[axis] > 1]
    for count in range(len(free) + 1):
        for axes in combinations(free, count):
            yield _fold(layer, axes)


def _fold(layer: Layer, axes: tuple[int, ...]) -> Folding:
    shape, weight = layer.shape, layer.weight
    assert isinstance(shape, ConvShape) and weight is not None

    def along(sides: Size, folded: bool, other: int) -> Size:
        d, h, w = (side if (axis in axes) == folded else other for axis, side in enumerate(sides))
        return d, h, w

    def window(channels: int, size: Size, folded: bool) -> WindowShape:
        kernel, stride = along(shape.kernel, folded, 1), along(shape.stride, folded, 1)
        pads = (along(pad, folded, 0) for pad in (shape.pad_before, shape.pad_after))
        return WindowShape(channels, size, kernel, stride, *pads)

    host = window(shape.channels, shape.in_size, True)
    left = window(shape.channels * host.taps, host.out_size, False)
    convolution = ConvShape(**vars(left), filters=shape.filters, own_weights=shape.own_weights)
    # [M, N, kd, kh, kw] to [M, taps, N, ...]: each tap has all channels, side by side
    parts = [length for pair in zip(host.kernel, left.kernel, strict=True) for length in pair]
    split = weight.reshape(*weight.shape[:2], *parts).transpose(0, 2, 4, 6, 1, 3, 5, 7)
    taps_first = split.reshape(shape.filters, left.channels, *left.kernel)
    return Folding(host, replace(layer, shape=convolution, weight=taps_first))


def choose_folding(
    config: AcceleratorConfig, layer: Layer, pool: Size = NO_POOL, *, wide: bool = False
) -> int:
    """The place of the best among the `foldings` of a convolution that reads the clip; 0 is none.

    It is the first one than which no other is `LEAST_GAIN` times faster: a folding of more axes
    costs the host time. Cycles are those of `folded_cycles`.

    Args:
        config: the design.
        layer: the convolution; its weight holds codes, and zeros where it is pruned.
        pool: window of a pool that is fused into it.
        wide: whether its output has 16 bits on a design of fewer.
    """
    cycles = [folded_cycles(config, folding, pool, wide=wide) for folding in foldings(layer)]
    limit = min(cycles) * LEAST_GAIN
    # if all are infinite, it is 0: then the compiler refuses the convolution as it is
    return next(place for place, count in enumerate(cycles) if count <= limit)


def folded_cycles(
    config: AcceleratorConfig, folding: Folding, pool: Size = NO_POOL, *, wide: bool = False
) -> float:
    """Modelled cycles of the task that a folded convolution becomes; infinite if it becomes none.

    Those of the array or of the busiest port, whichever takes longer. What a task takes to begin
    and to end is the same for all foldings and left out.
    """
    window, size = folding.window, folding.window.in_size
    grown = window.taps * math.prod(window.out_size) / math.prod(size)
    if grown > MAX_GROWTH or window.taps > MAX_TAPS:
        return math.inf
    parts = cut_convolution(folding.layer)
    cycles = 0.0
    for part in parts:
        shape, weight = part.shape, part.weight
        assert isinstance(shape, ConvShape) and weight is not None
        packed = pack(weight.reshape(*weight.shape[:2], -1), config)
        last = part is parts[-1]
        try:
            work = convolution_work(
                config,
                shape,
                *packed.kept,
                packed.enabled,
                pool if last else NO_POOL,
                wide=wide and last,
            )
        except CompileError:
            return math.inf
        cycles += max(task_time(config, work, MEMORY).busy.values())
    return cycles
