"""Cuts a window with more taps than the accelerator has into windows one after the other.

The first window combines neighbouring inputs, the second combines what the first one gives. Along
each axis the first window has one tap, all taps, or a divisor of their number; then
``tap = tap of the second * taps of the first + tap of the first``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from pynq_kgrc.accelerator.header import MAX_TAPS
from pynq_kgrc.graph import AVERAGE_POOL, MAX_POOL, ConvShape, Graph, Layer, Size, WindowShape


class Cut(NamedTuple):
    """Two windows that together see what one does."""

    first: WindowShape
    second: WindowShape


class _AxisCut(NamedTuple):
    """Kernel, stride and padding of both windows along one axis."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad_before: tuple[int, int] = (0, 0)
    pad_after: tuple[int, int] = (0, 0)


def cut_window(shape: WindowShape, overlaps: bool = False) -> Cut | None:
    """The cut whose first window has the fewest taps, or None if there is none.

    The first window has `MAX_TAPS` taps at most; the second one too, or it can be cut again.
    `overlaps`: an input may be seen more than once, as in a maximum.
    """
    cuts = []
    for axes in product(*(list(_axis_cuts(shape, axis, overlaps)) for axis in range(3))):
        taps = prod(axis.kernel[0] for axis in axes)
        if 1 < taps <= MAX_TAPS:
            cuts.append((taps, axes))
    cuts.sort()
    for _, axes in cuts:
        if prod(axis.kernel[1] for axis in axes) <= MAX_TAPS:
            return _windows(shape, axes)
    for _, axes in reversed(cuts):
        cut = _windows(shape, axes)
        if cut.second.taps < shape.taps and cut_window(cut.second, overlaps) is not None:
            return cut
    return None


def _axis_cuts(shape: WindowShape, axis: int, overlaps: bool) -> Iterator[_AxisCut]:
    """The ways to cut a window along one axis."""
    kernel, stride = shape.kernel[axis], shape.stride[axis]
    before, after = shape.pad_before[axis], shape.pad_after[axis]
    yield _AxisCut((1, kernel), (1, stride), (0, before), (0, after))
    if kernel == 1:
        return
    yield _AxisCut((kernel, 1), (stride, 1), (before, 0), (after, 0))
    if before:
        return
    alone = shape.out_size[axis] == 1
    parts = [part for part in range(2, kernel) if kernel % part == 0 and after < part]
    if overlaps and kernel > MAX_TAPS and not after:
        parts += [kernel // count for count in range(2, 17)]
    for part in parts:
        count = kernel // part
        # where `part` is no divisor, the first windows are longer than their step: they overlap
        first = kernel - (count - 1) * part
        if stride % part == 0:  # a first window begins where each window begins
            step = stride // part
        elif alone:
            step = max(1, (shape.in_size[axis] + after - first) // part + 2 - count)
        else:
            continue
        yield _AxisCut((first, count), (part, step), (0, 0), (after, 0))


def _windows(shape: WindowShape, axes: tuple[_AxisCut, ...]) -> Cut:
    def window(i: int, size: Size) -> WindowShape:
        parts = {name: tuple(getattr(a, name)[i] for a in axes) for name in _AxisCut._fields}
        return WindowShape(shape.channels, size, **parts)

    first = window(0, shape.in_size)
    second = window(1, first.out_size)
    assert second.out_size == shape.out_size
    return Cut(first, second)


# ---- pools ----------------------------------------------------------------------------------


def cut_pools(graph: Graph) -> Graph:
    """The graph with each pool of more than `MAX_TAPS` taps as several pools.

    A maximum of maxima is exact. An average of averages is equal in reals; in codes, the first
    average is rounded to a format of its own. A pool that cannot be cut stays as it is.
    """
    layers: list[Layer] = []
    for layer in graph.layers:
        layers += _cut_pool(layer) if layer.op in (MAX_POOL, AVERAGE_POOL) else [layer]
    return replace(graph, layers=tuple(layers))


def _cut_pool(pool: Layer) -> list[Layer]:
    shape = pool.shape
    assert shape is not None
    cut = cut_window(shape, pool.op == MAX_POOL) if shape.taps > MAX_TAPS else None
    if cut is None:
        return [pool]
    part = replace(
        pool,
        name=f"{pool.name}.part",
        size=cut.first.out_size,
        shape=cut.first,
        activation="none",
        out_quant=None,
        code_range=None,
    )
    rest = replace(pool, inputs=(part.name,), shape=cut.second)
    return [part, *_renamed(_cut_pool(rest))]


def _renamed(layers: list[Layer]) -> list[Layer]:
    """Layers with a 2 behind the names of all but the last, so that they can follow others."""
    names = {layer.name: f"{layer.name}2" for layer in layers[:-1]}
    return [
        replace(
            layer,
            name=names.get(layer.name, layer.name),
            inputs=tuple(names.get(name, name) for name in layer.inputs),
        )
        for layer in layers
    ]


# ---- convolutions ---------------------------------------------------------------------------


def cut_convolution(layer: Layer) -> list[Layer]:
    """A convolution with more than `MAX_TAPS` taps as copies and a smaller convolution.

    A copy moves the inputs at each tap of the first window to channels of their own (im2col), so
    that the convolution after it has fewer taps and more channels. Copies are exact. Taps without
    weights get no channels.

    Returns:
        The copies, then the convolution; the layer alone if it is small enough or cannot be cut.
        A copy's weight holds zeros and ones.
    """
    shape, weight = layer.shape, layer.weight
    assert isinstance(shape, ConvShape) and weight is not None
    if shape.taps <= MAX_TAPS:
        return [layer]
    for padded in _with_whole_kernels(shape):
        cut = cut_window(padded)
        if cut is not None:
            break
    else:
        return [layer]
    grown = np.zeros((*weight.shape[:2], *padded.kernel), weight.dtype)
    grown[:, :, : shape.kernel[0], : shape.kernel[1], : shape.kernel[2]] = weight
    copy, wide = _unfolded(grown, cut)
    own_weights = shape.own_weights or weight.size
    channels = copy.shape[0]
    unfold = Layer(
        name=f"{layer.name}.unfold",
        op=layer.op,
        inputs=layer.inputs,
        channels=channels,
        size=cut.first.out_size,
        shape=_convolution(cut.first, shape.channels, channels, own_weights=channels),
        weight=copy,
        bias=np.zeros(channels),
    )
    rest = replace(
        layer,
        inputs=(unfold.name,),
        shape=_convolution(cut.second, channels, shape.filters, own_weights=own_weights),
        weight=wide,
    )
    return [unfold, *_renamed(cut_convolution(rest))]


def _convolution(window: WindowShape, channels: int, filters: int, own_weights: int) -> ConvShape:
    return ConvShape(
        channels,
        window.in_size,
        window.kernel,
        window.stride,
        window.pad_before,
        window.pad_after,
        filters,
        own_weights,
    )


def _with_whole_kernels(shape: ConvShape) -> Iterator[ConvShape]:
    """The shape, and shapes with a longer kernel over padding where there is one output.

    A kernel whose length is prime cannot be cut; with zeros after its last tap it can.
    """
    yield shape
    for more in range(1, 8):
        added = [
            more if out == 1 and kernel > 7 and not before else 0
            for out, kernel, before in zip(
                shape.out_size, shape.kernel, shape.pad_before, strict=True
            )
        ]
        kd, kh, kw = map(sum, zip(shape.kernel, added, strict=True))
        ad, ah, aw = map(sum, zip(shape.pad_after, added, strict=True))
        yield replace(shape, kernel=(kd, kh, kw), pad_after=(ad, ah, aw))


def _unfolded(weight: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """The weight of the copy [A * N, N, *first kernel], and that of the convolution after it
    [M, A * N, *second kernel], where A counts the taps of the first window that have weights.
    """
    filters, channels = weight.shape[:2]
    (ad, ah, aw), (bd, bh, bw) = cut.first.kernel, cut.second.kernel
    split = weight.reshape(filters, channels, bd, ad, bh, ah, bw, aw)
    # [first taps, M, N, *second kernel]
    by_tap = split.transpose(3, 5, 7, 0, 1, 2, 4, 6).reshape(-1, filters, channels, bd, bh, bw)
    used = np.flatnonzero(by_tap.any(axis=(1, 2, 3, 4, 5)))
    used = used if used.size else np.array([0])
    wide = by_tap[used].swapaxes(0, 1).reshape(filters, -1, bd, bh, bw)
    copy = np.zeros((used.size, channels, channels, ad * ah * aw), np.float32)
    for i, tap in enumerate(used):
        copy[i, np.arange(channels), np.arange(channels), tap] = 1
    return copy.reshape(-1, channels, ad, ah, aw), np.ascontiguousarray(wide)
