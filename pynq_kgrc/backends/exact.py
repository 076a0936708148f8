"""Integer convolution by floating-point GEMM, where every rounding is proved to be none.

A float32 holds every integer up to 2^24, a float64 up to 2^53. Each convolution here bounds, from
its weights and the range of its input, every partial sum that can be formed in any order; where
the bound is too large the input channels are cut into chunks for which it holds, and the chunk
sums are added in float64. So BLAS may add as it likes and the result is the integer result.

Two forms: `GemmConvolution` unfolds the input (any kernel and stride); `WinogradConvolution` does
F(2,3) along each axis whose kernel is 3 at stride 1 (Winograd 1980, Lavin and Gray 2016), with
2^a instead of 3^a multiplications a output for `a` such axes. Its values are multiples of 2^-a, so
the same bound counts in these units.

Maps are channel-last [D, H, W, C] here: a tap's channels are contiguous.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import Array

Interval = tuple[int, int]
Region = tuple[slice, slice, slice]
"""The outputs along depth, height and width that a block of results stands for."""

Finish = Callable[[Array, Region, slice], None]
"""Takes exact sums [d, h, w, M] for a strided region of outputs and a slice of the filters."""

BLOCK_BYTES = 512 << 10
"""Scratch of one block of the unfolded input: half of a 1 MiB second-level cache."""

WINOGRAD_TILES = 160
"""Output tiles to a block: V and Y of a block stay in the caches (measured, docs/architecture)."""

_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
"""F(2,3): transform of the weights along one axis."""

_scratch = threading.local()


def scratch(key: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """An uninitialised array of this thread, reused under its key."""
    arrays: dict[tuple[str, np.dtype[np.generic]], Array] = _scratch.__dict__.setdefault("a", {})
    count = math.prod(shape)
    array = arrays.get((key, dtype))
    if array is None or array.size < count:
        array = arrays[key, dtype] = np.empty(count, dtype)
    return array[:count].reshape(shape)


def largest_integer(dtype: np.dtype[np.generic]) -> int:
    """Every integer up to this is exact in `dtype`: 2^24 or 2^53."""
    return 1 << (24 if dtype == np.float32 else 53)


def largest_sum(weights: Array, interval: Interval, axis: int) -> Array:
    """Largest |partial sum| of ``w * x`` over `axis`, for any x in the interval, in any order.

    With p and n the sums of positive and of negative parts, that is the larger of p*hi - n*lo
    and n*hi - p*lo, for lo <= 0 <= hi.
    """
    low, high = interval
    total = np.abs(weights).sum(axis=axis, dtype=np.float64)
    signed = np.abs(weights.sum(axis=axis, dtype=np.float64))
    bound: Array = total * (high - low) / 2 + signed * abs(high + low) / 2
    return bound


def split_evenly(count: int, parts: int) -> list[slice]:
    """`parts` nearly equal slices of range(count), none of them empty."""
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


class GemmConvolution:
    """Unfold blocks of the input, one GEMM a block (im2col); a 1x1x1 kernel needs no unfolding.

    Args:
        weight: [M, N, kd, kh, kw] codes.
        shape: the convolution.
        interval: range of the input values, zero point removed.
        dtype: float32 or float64.
        threads: how many blocks may be worked on at once.
    """

    def __init__(
        self,
        weight: Array,
        shape: ConvShape,
        interval: Interval,
        dtype: np.dtype[np.generic],
        threads: int,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        # rows in the order (kd, kh, kw, n): a run of kw * n is contiguous in a channel-last map
        matrix = weight.transpose(2, 3, 4, 1, 0).reshape(-1, shape.filters).astype(dtype)
        self.chunks = _fewest_chunks(matrix, interval, dtype)
        d, h, w = shape.out_size
        parts = threads if d * h * w < 64 * threads and shape.filters >= 64 * threads else 1
        self.filters = split_evenly(shape.filters, parts)
        self.matrices = [np.ascontiguousarray(matrix[:, part]) for part in self.filters]
        rows = max(1, BLOCK_BYTES // (matrix.shape[0] * dtype.itemsize))
        self.block = (1, max(1, min(h, rows // w)), w)
        if self.block[1] == h:
            self.block = (max(1, min(-(-d // threads), rows // (h * w))), h, w)

    @property
    def in_size(self) -> Size:
        """Size of the padded map that `run` wants."""
        d, h, w = (
            (self.shape.out_size[i] - 1) * self.shape.stride[i] + self.shape.kernel[i]
            for i in range(3)
        )
        return d, h, w

    @property
    def jobs(self) -> list[tuple[int, int, int]]:
        """Depth, height and part of the filters of each block."""
        d, h, _ = self.shape.out_size
        blocks = product(range(0, d, self.block[0]), range(0, h, self.block[1]))
        return [(d0, h0, part) for d0, h0 in blocks for part in range(len(self.filters))]

    def align(self, depth: int, height: int) -> None:
        """Let blocks begin at multiples of a pool's window."""
        d, h, w = self.block
        if d > 1 or depth > 1:
            d = max(1, d // depth) * depth
        self.block = (d, max(1, h // height) * height, w)

    def run(self, padded: Array, job: tuple[int, int, int], finish: Finish) -> None:
        """The sums of one block of outputs."""
        d0, h0, part = job
        d, h, w = self.shape.out_size
        nd, nh = min(self.block[0], d - d0), min(self.block[1], h - h0)
        unfolded = self._unfold(padded, d0, h0, nd, nh)
        matrix = self.matrices[part]
        filters = matrix.shape[1]
        sums = scratch("sums", (nd * nh * w, filters), self.dtype)
        if len(self.chunks) == 1:
            np.matmul(unfolded, matrix, out=sums)
        else:
            total = scratch("wide", sums.shape, np.dtype(np.float64))
            total[...] = 0
            for chunk in self.chunks:
                np.matmul(unfolded[:, chunk], matrix[chunk], out=sums)
                total += sums
            sums = total
        region = (slice(d0, d0 + nd), slice(h0, h0 + nh), slice(0, w))
        finish(sums.reshape(nd, nh, w, filters), region, self.filters[part])

    def _unfold(self, padded: Array, d0: int, h0: int, nd: int, nh: int) -> Array:
        """[nd * nh * w, kd * kh * kw * n]: what each output of the block sees."""
        (kd, kh, kw), (sd, sh, sw) = self.shape.kernel, self.shape.stride
        w, n = self.shape.out_size[2], self.shape.channels
        block = padded[d0 * sd :, h0 * sh :]
        step = block.strides
        if (kd, kh, kw, sw) == (1, 1, 1, 1) and sd == sh == 1:
            return padded[d0 : d0 + nd, h0 : h0 + nh].reshape(nd * nh * w, n)
        windows = as_strided(
            block,
            (kd, kh, nd, nh, w, kw * n),
            (step[0], step[1], step[0] * sd, step[1] * sh, step[2] * sw, step[3]),
        )
        unfolded = scratch("unfolded", (nd, nh, w, kd, kh, kw * n), self.dtype)
        for a, b in np.ndindex(kd, kh):
            unfolded[:, :, :, a, b] = windows[a, b]
        return unfolded.reshape(nd * nh * w, kd * kh * kw * n)


def _fewest_chunks(matrix: Array, interval: Interval, dtype: np.dtype[np.generic]) -> list[slice]:
    """The fewest equal runs of rows for which every partial sum is exact."""
    rows = matrix.shape[0]
    for parts in range(1, rows + 1):
        slices = split_evenly(rows, parts)
        worst = max(float(largest_sum(matrix[s], interval, 0).max()) for s in slices)
        if worst < largest_integer(dtype):
            return slices
    raise AssertionError("one product is always exact")  # 16-bit products are below 2^33


class WinogradConvolution:
    """F(2,3) along every axis whose kernel is 3, for stride 1; the other axes have kernel 1.

    Takes the arguments of `GemmConvolution`.

    Raises:
        Inexact: no chunking of the channels proves exactness; use the GEMM.
    """

    def __init__(
        self,
        weight: Array,
        shape: ConvShape,
        interval: Interval,
        dtype: np.dtype[np.generic],
        threads: int,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.axes = [axis for axis in range(3) if shape.kernel[axis] == 3]
        self.positions = 4 ** len(self.axes)
        taps = weight.transpose(2, 3, 4, 1, 0).astype(dtype)  # [kd, kh, kw, N, M]
        self.chunks = _prove_winograd(taps, self.axes, interval, dtype)
        transformed = transform_weights(taps, self.axes)
        flat = transformed.reshape(self.positions, shape.channels, shape.filters)
        direct = float(largest_sum(taps.reshape(-1, shape.filters), interval, 0).max())
        self.wide = len(self.chunks) > 1 and direct >= largest_integer(dtype)
        d, h, w = self.tiles
        few = d * h * w <= WINOGRAD_TILES and threads > 1 and shape.filters >= 32 * threads
        self.filters = split_evenly(shape.filters, threads if few else 1)
        self.weights = [
            [np.ascontiguousarray(flat[:, chunk, part]) for chunk in self.chunks]
            for part in self.filters
        ]
        nh = min(h, max(1, WINOGRAD_TILES // w))
        nd = max(1, min(d, WINOGRAD_TILES // (h * w))) if nh == h else 1
        if not few and nd == d and nh == h and d >= threads:
            nd = -(-d // threads)
        self.block = (nd, nh)

    @property
    def tiles(self) -> Size:
        """Tiles of outputs along each axis: 2 outputs a tile on a transformed axis."""
        d, h, w = (
            -(-size // 2) if axis in self.axes else size
            for axis, size in enumerate(self.shape.out_size)
        )
        return d, h, w

    @property
    def in_size(self) -> Size:
        """Size of the padded map that `run` wants."""
        d, h, w = (
            2 * size + 2 if axis in self.axes else size for axis, size in enumerate(self.tiles)
        )
        return d, h, w

    @property
    def jobs(self) -> list[tuple[int, int, int]]:
        """First tile in depth and height, and part of the filters, of each block."""
        d, h, _ = self.tiles
        blocks = product(range(0, d, self.block[0]), range(0, h, self.block[1]))
        return [(d0, h0, part) for d0, h0 in blocks for part in range(len(self.filters))]

    def run(self, padded: Array, job: tuple[int, int, int], finish: Finish, pool: Size) -> None:
        """The sums of one block of tiles, the largest of each pool window of `pool` outputs.

        `pool` is 1 or 2 along transformed axes and 1 along the others.
        """
        d0, h0, part = job
        nd, nh = (min(b, t - f) for b, t, f in zip(self.block, self.tiles, (d0, h0), strict=False))
        nw = self.tiles[2]
        values = self._transform_input(padded, d0, h0, nd, nh)
        filters = self.filters[part]
        count = filters.stop - filters.start
        products = scratch("products", (self.positions, nd * nh * nw, count), self.dtype)
        total: list[Array] | None = None
        for chunk, weights in zip(self.chunks, self.weights[part], strict=True):
            np.matmul(values[:, :, chunk], weights, out=products)
            phases = self._transform_output(products)
            if len(self.chunks) == 1:
                total = phases
            elif total is None:
                kind = np.dtype(np.float64) if self.wide else self.dtype
                held = scratch("chunked", (len(phases), *phases[0].shape), kind)
                for i, phase in enumerate(phases):
                    held[i] = phase
                total = list(held)
            else:
                for kept, phase in zip(total, phases, strict=True):
                    kept += phase
        assert total is not None
        self._finish(total, (d0, h0), (nd, nh, nw), filters, finish, pool)

    def _finish(
        self,
        phases: list[Array],
        first: tuple[int, int],
        tiles: Size,
        filters: slice,
        finish: Finish,
        pool: Size,
    ) -> None:
        """Pool over the phases of the tiles, and hand each remaining phase on with its place."""
        shape = tuple(2 if axis in self.axes else 1 for axis in range(3))
        merged: dict[tuple[int, ...], Array] = {}
        for phase, sums in zip(np.ndindex(*shape), phases, strict=True):
            place = tuple(p // q for p, q in zip(phase, pool, strict=True))
            if place in merged:
                np.maximum(merged[place], sums, out=merged[place])
            else:
                merged[place] = sums
        begin = (first[0], first[1], 0)
        for place, sums in merged.items():
            d, h, w = (
                slice(
                    begin[axis] * (shape[axis] // pool[axis]) + place[axis],
                    (begin[axis] + tiles[axis]) * (shape[axis] // pool[axis]),
                    shape[axis] // pool[axis],
                )
                for axis in range(3)
            )
            finish(sums.reshape(*tiles, -1), (d, h, w), filters)

    def _transform_input(self, padded: Array, d0: int, h0: int, nd: int, nh: int) -> Array:
        """[positions, tiles, N]; depth first, then width, then height, where runs are longest."""
        in_depth, in_height, in_width = (axis in self.axes for axis in range(3))
        rows = slice(2 * h0, 2 * (h0 + nh) + 2) if in_height else slice(h0, h0 + nh)
        slabs = slice(2 * d0, 2 * (d0 + nd) + 2) if in_depth else slice(d0, d0 + nd)
        block = padded[slabs, rows]
        n, nw, wide = self.shape.channels, self.tiles[2], block.shape[2]
        height = block.shape[1]
        counts = [4 if axis in self.axes else 1 for axis in range(3)]
        out = scratch("values", (*counts, nd, nh, nw, n), self.dtype)
        by_depth = block[None]
        if in_depth:
            by_depth = scratch("by_depth", (4, nd, height, wide, n), self.dtype)
            _transform([block[i : i + 2 * nd - 1 : 2] for i in range(4)], list(by_depth))
        for i in range(counts[0]):
            slab = by_depth[i]
            by_width = slab[None]
            if in_width:
                # the last stage writes straight into `out` where height is not transformed
                target = scratch("by_width", (4, nd, height, nw, n), self.dtype)
                by_width = target if in_height else out[i, 0]
                views = [slab[:, :, e : e + 2 * nw - 1 : 2] for e in range(4)]
                _transform(views, list(by_width))
            for e in range(counts[2]):
                if in_height:
                    views = [by_width[e][:, k : k + 2 * nh - 1 : 2] for k in range(4)]
                    _transform(views, [out[i, k, e] for k in range(4)])
                elif not in_width:
                    out[i, 0, e] = by_width[e]
        return out.reshape(self.positions, nd * nh * nw, n)

    def _transform_output(self, products: Array) -> list[Array]:
        """The phases of the tiles, [tiles, M] each, in place; order of axes as in the proof."""
        blocks = [products]
        for _ in self.axes:
            blocks = [half for block in blocks for half in _untransform(block)]
        return [block[0] for block in blocks]


def _transform(rows: list[Array], out: list[Array]) -> None:
    """B^T of F(2,3): four values in, four out."""
    np.subtract(rows[0], rows[2], out=out[0])
    np.add(rows[1], rows[2], out=out[1])
    np.subtract(rows[2], rows[1], out=out[2])
    np.subtract(rows[1], rows[3], out=out[3])


def _untransform(block: Array) -> tuple[Array, Array]:
    """A^T of F(2,3) over the leading axis of 4 equal parts, in place.

    m1 + m2 and m1 - m2 come first: they are multiples of a unit twice as coarse, so that they are
    exact whenever m1 and m2 are; the proof counts on this order.
    """
    m0, m1, m2, m3 = block.reshape(4, block.shape[0] // 4, *block.shape[1:])
    difference = scratch(f"difference{m0.shape[0]}", m0.shape, block.dtype)
    np.subtract(m1, m2, out=difference)
    np.add(m1, m2, out=m1)
    np.add(m0, m1, out=m0)
    np.subtract(difference, m3, out=m1)
    return m0, m1


def transform_weights(taps: Array, axes: list[int]) -> Array:
    """[kd, kh, kw, N, M] with each axis of 3 taps in `axes` turned into 4 positions."""
    for axis in axes:
        first, middle, last = np.moveaxis(taps, axis, 0)
        half = (first + last) / 2
        parts = [first, half + middle / 2, half - middle / 2, last]
        taps = np.stack(parts, axis=axis)
    return taps


class Inexact(Exception):
    """No chunking was found for which the arithmetic is exact."""


def _prove_winograd(
    taps: Array, axes: list[int], interval: Interval, dtype: np.dtype[np.generic]
) -> list[slice]:
    """Channel chunks for which every number in the transformed convolution is exact.

    Bounds the sums at each stage: after the GEMM, and after the output transform of each axis in
    turn, where the axis' three taps are summed over directly. In units of 2^-(middle positions).

    Raises:
        Inexact: chunks of 8 channels would still not do.
    """
    channels = taps.shape[3]
    step = 8 if channels > 8 else channels
    edges = list(range(0, channels, step))
    totals: list[tuple[Array, Array, float, float]] = []
    for stage in range(len(axes) + 1):
        left = axes[stage:]
        transformed = transform_weights(taps, left)
        # sums over the channels of a step, and over the taps that are not transformed any more
        summed = tuple(axis for axis in range(3) if axis not in left)
        absolute = np.add.reduceat(np.abs(transformed), edges, axis=3).sum(axis=summed)
        signed = np.add.reduceat(transformed, edges, axis=3).sum(axis=summed)
        steps, filters = len(edges), taps.shape[4]
        absolute = absolute.reshape(-1, steps, filters)
        signed = signed.reshape(-1, steps, filters)
        for i, position in enumerate(product(range(4), repeat=len(left))):
            low, high = interval
            for p in position:
                low, high = (2 * low, 2 * high) if p == 1 else (low - high, high - low)
            unit = 2.0 ** sum(p in (1, 2) for p in position)
            half, centre = unit * (high - low) / 2, unit * abs(high + low) / 2
            totals.append((absolute[i], signed[i], half, centre))
    limit = largest_integer(dtype)
    for parts in range(1, len(edges) + 1):
        slices = split_evenly(len(edges), parts)
        if all(_worst(*total, slices) < limit for total in totals):
            return [slice(s.start * step, min(s.stop * step, channels)) for s in slices]
    raise Inexact


def _worst(
    absolute: Array, signed: Array, half: float, centre: float, slices: list[slice]
) -> float:
    starts = [s.start for s in slices]
    bound = np.add.reduceat(absolute, starts, axis=0).astype(np.float64) * half
    if centre:
        bound += np.abs(np.add.reduceat(signed, starts, axis=0)) * centre
    return float(bound.max())


ExactConvolution = GemmConvolution | WinogradConvolution

ELEMENT_COST = 25
"""An element-wise operation on one value takes about as long as this many MACs of a GEMM."""


def choose_convolution(
    weight: Array,
    shape: ConvShape,
    interval: Interval,
    dtype: np.dtype[np.generic],
    threads: int,
) -> ExactConvolution:
    """The faster exact form of a convolution, by an estimate of its work."""
    axes = [axis for axis in range(3) if shape.kernel[axis] == 3]
    others = [axis for axis in range(3) if shape.kernel[axis] != 3]
    plain = all(shape.kernel[axis] == 1 for axis in others) and shape.stride == (1, 1, 1)
    if axes and plain and math.prod(shape.out_size) >= 16 and shape.channels >= 16:
        try:
            fast = WinogradConvolution(weight, shape, interval, dtype, threads)
        except Inexact:
            pass
        else:
            a, n, m = len(axes), shape.channels, shape.filters
            work = 2**a * (n * m + ELEMENT_COST * (3 * n + 4 * m * len(fast.chunks)))
            if work < 3**a * (n * m + ELEMENT_COST * n):
                return fast
    return GemmConvolution(weight, shape, interval, dtype, threads)
