"""Integer convolution by floating-point GEMM, where every rounding is proved to be none.

A float32 holds every integer up to 2^24, a float64 up to 2^53. Each convolution here bounds, from
its weights and the range of its input, every partial sum that can be formed in any order; where
the bound is too large the input channels are cut into chunks for which it holds, and the chunk
sums are added in float64. So BLAS may add as it likes and the result is the integer result.

Three forms: `GemmConvolution` unfolds the input (any kernel and stride), `PlanarConvolution` does
so for a first layer of three channels, and `WinogradConvolution` does F(2,3) along each axis whose
kernel is 3 at stride 1 (Winograd 1980, Lavin and Gray 2016): 2^a instead of 3^a multiplications an
output for `a` such axes. Its values are multiples of 2^-a, and the same bound counts in that unit.

Maps are channel-last [D, H, W, C]: a tap's channels are contiguous. Only the planar form differs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import Array

Interval = tuple[int, int]
Region = tuple[slice, slice, slice]
"""The outputs along depth, height and width that a block of results stands for."""

Finish = Callable[[Array, Region, slice], None]
"""Takes exact sums [d, h, w, M] for a strided region of outputs and a slice of the filters."""

WIDE = np.dtype(np.float64)

BLOCK_BYTES = 2 << 20
"""Scratch of one block of the unfolded input. Smaller ones fit the second-level cache, but each
call of numpy ends in a struggle of the threads for the interpreter: fewer calls are faster."""

FEW_CHANNELS = 4
"""Up to so many channels a pixel's run is too short to copy, and the planar form is faster."""

FEW_ROWS = 128
"""With fewer rows of a GEMM for each thread, the threads share out the filters instead."""

FEWEST_ROWS = 128
"""Rows of a GEMM below which reading its weights costs more than the products."""

BLOCK_TILES = 800
"""Winograd tiles of a block; a compromise as that of BLOCK_BYTES."""

FEW_TILES = 400
"""With so few tiles the threads share out the filters instead."""

_scratch = threading.local()


def scratch(key: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """An uninitialised array of this thread, reused under its key."""
    arrays: dict[tuple[str, np.dtype[np.generic]], Array] = _scratch.__dict__.setdefault("a", {})
    count = math.prod(shape)
    array = arrays.get((key, dtype))
    if array is None or array.size < count:
        array = arrays[key, dtype] = np.empty(count, dtype)
        _scratch.moved = _scratch.__dict__.get("moved", 0) + 1
    return array[:count].reshape(shape)


def forget_scratch() -> None:
    """Give this thread's scratch back."""
    _scratch.__dict__.get("a", {}).clear()


def largest_integer(dtype: np.dtype[np.generic]) -> int:
    """Every integer up to this is exact in `dtype`: 2^24 or 2^53."""
    return 1 << (24 if dtype == np.float32 else 53)


def largest_sum(weights: Array, interval: Interval, axis: int) -> Array:
    """Largest |partial sum| of ``w * x`` over `axis`, for any x in the interval, in any order.

    With p and n the sums of positive and of negative parts, that is the larger of p*hi - n*lo
    and n*hi - p*lo, for lo <= 0 <= hi.
    """
    total = np.abs(weights).sum(axis=axis, dtype=np.float64)
    return _largest(total, np.abs(weights.sum(axis=axis, dtype=np.float64)), interval)


def _largest(total: Array, signed: Array, interval: Interval) -> Array:
    """The bound of `largest_sum` from the sum of magnitudes and the magnitude of the sum."""
    low, high = interval
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
        self.shape, self.dtype, self.map_dtype = shape, dtype, dtype
        # rows in the order (kd, kh, kw, n): a run of kw * n is contiguous in a channel-last map
        matrix = weight.transpose(2, 3, 4, 1, 0).reshape(-1, shape.filters).astype(dtype)
        self.chunks = _fewest_chunks(matrix, interval, dtype)
        # nothing to unfold where a tap sees whole rows of the map
        self.along_depth = (
            shape.kernel[1:] == (1, 1) and shape.stride == (1, 1, 1) and len(self.chunks) == 1
        )
        d, h, w = shape.out_size
        few = d * h * w < FEW_ROWS * threads and shape.filters >= 64 * threads
        parts = threads if few else 1
        self.filters = split_evenly(shape.filters, parts)
        self.matrices = [np.asfortranarray(matrix[:, part]) for part in self.filters]
        rows = max(FEWEST_ROWS, BLOCK_BYTES // (matrix.shape[0] * dtype.itemsize))
        self.block = (1, max(1, min(h, rows // w)), w)
        if self.block[1] == h:
            self.block = (max(1, min(d if few else -(-d // threads), rows // (h * w))), h, w)

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
        matrix = self.matrices[part]
        filters = matrix.shape[1]
        if self.along_depth:
            sums = self._add_depths(padded[d0:, h0 : h0 + nh], nd, matrix)
        else:
            sums = _exact_product(self._unfold(padded, d0, h0, nd, nh), matrix, self.chunks)
        region = (slice(d0, d0 + nd), slice(h0, h0 + nh), slice(0, w))
        finish(sums.reshape(nd, nh, w, filters), region, self.filters[part])

    def _add_depths(self, rows: Array, nd: int, matrix: Array) -> Array:
        """One product for each tap along depth, straight from the map, added up."""
        taps, channels = self.shape.kernel[0], self.shape.channels
        total, product_ = None, None
        for a in range(taps):
            values = rows[a : a + nd].reshape(-1, channels)
            weights = matrix[a * channels : (a + 1) * channels]
            if total is None:
                total = scratch("sums", (len(values), matrix.shape[1]), self.dtype)
                np.matmul(values, weights, out=total)
            else:
                product_ = scratch("product", total.shape, self.dtype)
                np.matmul(values, weights, out=product_)
                total += product_
        assert total is not None
        return total

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


def _exact_product(values: Array, matrix: Array, chunks: list[slice]) -> Array:
    """``values @ matrix`` in this thread's scratch; the sums of several chunks add in float64."""
    sums = scratch("sums", (values.shape[0], matrix.shape[1]), matrix.dtype)
    if len(chunks) == 1:
        return np.matmul(values, matrix, out=sums)
    total = scratch("wide", sums.shape, WIDE)
    total[...] = 0
    for chunk in chunks:
        np.matmul(values[:, chunk], matrix[chunk], out=sums)
        total += sums
    return total


def _fewest_chunks(matrix: Array, interval: Interval, dtype: np.dtype[np.generic]) -> list[slice]:
    """The fewest runs of rows, 1 or 2 or 4 and so on, for which every partial sum is exact."""
    blocks = split_evenly(matrix.shape[0], 64)
    totals = np.stack([np.abs(matrix[b]).sum(axis=0, dtype=np.float64) for b in blocks])
    signed = np.stack([matrix[b].sum(axis=0, dtype=np.float64) for b in blocks])
    for parts in (1, 2, 4, 8, 16, 32, 64):
        runs = split_evenly(len(blocks), parts)
        bounds = [
            _largest(totals[r].sum(axis=0), np.abs(signed[r].sum(axis=0)), interval) for r in runs
        ]
        if float(np.max(bounds)) < largest_integer(dtype):
            return [slice(blocks[r.start].start, blocks[r.stop - 1].stop) for r in runs]
    return [slice(i, i + 1) for i in range(matrix.shape[0])]  # one product is always exact


class PlanarConvolution:
    """The GEMM form for the few channels of a first layer, on a planar map cut by stride phases.

    A tap's values then lie side by side along the width, so that unfolding copies long runs; the
    runs of a channel-last map would be a few pixels. The map is
    [N, sd, sh, sw, D / sd, H / sh, W / sw]; the taps of one phase are a regular lattice.

    Takes the arguments of `GemmConvolution`.
    """

    def __init__(
        self,
        weight: Array,
        shape: ConvShape,
        interval: Interval,
        dtype: np.dtype[np.generic],
        threads: int,
    ) -> None:
        self.shape, self.dtype, self.map_dtype = shape, dtype, dtype
        self.lattices = _lattices(shape)
        rows = weight.reshape(shape.filters, shape.channels, *shape.kernel)
        parts = [rows[(slice(None), slice(None), *lattice)] for lattice in self.lattices]
        matrix = np.concatenate([p.reshape(shape.filters, -1) for p in parts], axis=1)
        self.matrix = matrix.T.astype(dtype)
        self.chunks = _fewest_chunks(self.matrix, interval, dtype)
        _, h, w = shape.out_size
        wanted = max(1, BLOCK_BYTES // (self.matrix.shape[0] * dtype.itemsize * w))
        self.block = (1, min(h, wanted), w)

    @property
    def in_size(self) -> Size:
        """Size of the padded map, whole strides along each axis."""
        shape = self.shape
        d, h, w = (
            (shape.out_size[i] - 1 + -(-shape.kernel[i] // shape.stride[i])) * shape.stride[i]
            for i in range(3)
        )
        return d, h, w

    @property
    def jobs(self) -> list[tuple[int, int, int]]:
        """First depth and height of each block; all filters."""
        d, h, _ = self.shape.out_size
        return [(a, b, 0) for a in range(0, d, self.block[0]) for b in range(0, h, self.block[1])]

    def align(self, depth: int, height: int) -> None:
        """Let blocks begin at multiples of a pool's window."""
        _, h, w = self.block
        self.block = (depth, max(1, h // (depth * height)) * height, w)

    def map_view(self, flat: Array) -> Array:
        """[D, H, W, N] view of the memory that `run` takes, for whoever fills it."""
        d, h, w = self.in_size
        sd, sh, sw = self.shape.stride
        planar = flat.reshape(self.shape.channels, sd, sh, sw, d // sd, h // sh, w // sw)
        return planar.transpose(4, 1, 5, 2, 6, 3, 0)

    def run(self, padded: Array, job: tuple[int, int, int], finish: Finish) -> None:
        """The sums of one block of outputs; `padded` is the flat memory of the map."""
        d0, h0, _ = job
        d, h, w = self.shape.out_size
        nd, nh = min(self.block[0], d - d0), min(self.block[1], h - h0)
        count = nd * nh * w
        unfolded = scratch("planar", (self.matrix.shape[0], count), self.dtype)
        size = [n // s for n, s in zip(self.in_size, self.shape.stride, strict=True)]
        planar = padded.reshape(self.shape.channels, *self.shape.stride, *size)
        row = 0
        for lattice in self.lattices:
            first = tuple(part.start for part in lattice)
            taps = [
                len(range(p.start, k, p.step))
                for p, k in zip(lattice, self.shape.kernel, strict=True)
            ]
            phase = planar[(slice(None), *first)][:, d0:, h0:]
            n, pd, ph, pw = phase.strides
            seen = as_strided(
                phase, (phase.shape[0], *taps, nd, nh, w), (n, pd, ph, pw, pd, ph, pw)
            )
            rows = phase.shape[0] * math.prod(taps)
            unfolded[row : row + rows].reshape(seen.shape)[...] = seen
            row += rows
        sums = _exact_product(unfolded.T, self.matrix, self.chunks)
        region = (slice(d0, d0 + nd), slice(h0, h0 + nh), slice(0, w))
        finish(sums.reshape(nd, nh, w, -1), region, slice(0, self.shape.filters))


def _lattices(shape: ConvShape) -> list[tuple[slice, slice, slice]]:
    """The taps of each phase of the strides."""
    sd, sh, sw = shape.stride
    return [
        (slice(d, None, sd), slice(h, None, sh), slice(w, None, sw))
        for d, h, w in np.ndindex(sd, sh, sw)
        if all(p < k for p, k in zip((d, h, w), shape.kernel, strict=True))
    ]


class WinogradConvolution:
    """F(2,3) along every axis whose kernel is 3, for stride 1; the other axes have kernel 1.

    Works through the positions depth first, so that what is alive fits the caches: at each axis a
    position's input is one sum or difference of two slabs, and its result is added to or taken
    from the two outputs of that axis. Where exactness is not proved for every input, it is
    measured on the values at hand, and a block that fails is done again in float64.

    Takes the arguments of `GemmConvolution`.

    Raises:
        Inexact: not even float64 is exact for every input; use the GEMM.
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
        widest = max(-interval[0], interval[1]) << len(self.axes)
        # the transform of the input moves memory more than it computes: the narrower the better
        self.map_dtype = np.dtype(np.int16) if widest < 1 << 15 else dtype
        taps = weight.transpose(2, 3, 4, 0, 1).astype(dtype)  # [kd, kh, kw, M, N]
        transformed = transform_weights(taps, self.axes)
        bounds = winograd_bounds(taps, transformed, self.axes, interval)
        if max(bounds.partial.max(), bounds.later) >= largest_integer(WIDE):
            raise Inexact
        limit = largest_integer(dtype)
        suspects = np.flatnonzero(bounds.partial >= limit)
        self.proved = suspects.size == 0 and bounds.later < limit
        d, h, w = self.tiles
        few = d * h * w <= FEW_TILES and threads > 1 and shape.filters >= 32 * threads
        self.filters = split_evenly(shape.filters, threads if few else 1)
        flat = transformed.reshape(-1, *transformed.shape[3:])
        self.weights = [np.ascontiguousarray(flat[:, part]) for part in self.filters]
        self.norms = [
            {int(i): _longest_filters(part[i]) for i in suspects} for part in self.weights
        ]
        nh = -(-h // max(1, round(h * w / BLOCK_TILES)))  # blocks of equal height
        nd = max(1, BLOCK_TILES // (h * w)) if nh == h else 1
        if not few:  # a block for every thread
            nd = min(nd, -(-d // threads))
            nh = min(nh, -(-h // threads)) if d == 1 else nh
        self.block = (nd, nh)
        self.plans: dict[tuple[int, Size, int, np.dtype[np.generic]], _WinogradPlan] = {}

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
        tiles, first = (nd, nh, self.tiles[2]), (d0, h0, 0)
        slab = padded[
            tuple(
                slice(2 * f, 2 * (f + n) + 2) if axis in self.axes else slice(f, f + n)
                for axis, (f, n) in enumerate(zip(first, tiles, strict=True))
            )
        ]
        phases = self._plan(tiles, part, self.dtype).compute(slab)
        if phases is None:
            phases = self._plan(tiles, part, WIDE).compute(slab)
            assert phases is not None
        self._finish(phases, first, tiles, self.filters[part], finish, pool)

    def _plan(self, tiles: Size, part: int, dtype: np.dtype[np.generic]) -> _WinogradPlan:
        """The plan for blocks of this size, made anew when this thread's scratch has moved."""
        key = threading.get_ident(), tiles, part, dtype
        plan = self.plans.get(key)
        if plan is None or plan.moved != _scratch.__dict__.get("moved"):
            plan = self.plans[key] = _WinogradPlan(self, tiles, part, dtype)
        return plan

    def _finish(
        self,
        phases: Array,
        first: Size,
        tiles: Size,
        filters: slice,
        finish: Finish,
        pool: Size,
    ) -> None:
        """Pool over the phases of the tiles, and hand each remaining phase on with its place."""
        shape = [2 if axis in self.axes else 1 for axis in range(3)]
        merged: dict[tuple[int, ...], Array] = {}
        # phases vary slowest along the last axis, which is the outermost of the recursion
        for phase, sums in zip(np.ndindex(*reversed(shape)), phases, strict=True):
            place = tuple(p // size for p, size in zip(reversed(phase), pool, strict=True))
            if place in merged:
                np.maximum(merged[place], sums, out=merged[place])
            else:
                merged[place] = sums
        for place, sums in merged.items():
            step = [shape[axis] // pool[axis] for axis in range(3)]
            d, h, w = (
                slice(first[i] * step[i] + place[i], (first[i] + tiles[i]) * step[i], step[i])
                for i in range(3)
            )
            finish(sums.reshape(*tiles, -1), (d, h, w), filters)


class _WinogradPlan:
    """The sums of one block of tiles: every call of numpy, laid out once, and the proof.

    Between two calls of numpy a thread holds the interpreter, and another that comes back from
    one must wait, and be woken. So nothing but the calls is left to do while a block is computed:
    their operands lie in this thread's scratch and never move.

    The proof on values, where the one for every input fails: a partial sum of ``u . v`` is at most
    |u| |v| (Cauchy-Schwarz; channels are halved until that suffices), and the sums of the output
    transform are at most the sums of the largest products that were seen.
    """

    def __init__(
        self,
        convolution: WinogradConvolution,
        tiles: Size,
        part: int,
        dtype: np.dtype[np.generic],
    ) -> None:
        self.axes, self.dtype = convolution.axes, dtype
        self.weights = convolution.weights[part]
        filters = self.weights.shape[1]
        self.limit = largest_integer(dtype)
        proved = convolution.proved or dtype == WIDE
        self.norms = {} if proved else convolution.norms[part]
        self.largest = None if proved else np.zeros(4 ** len(self.axes))
        channels, count = convolution.shape.channels, math.prod(tiles)
        values = convolution.map_dtype
        size = [2 * n + 2 if axis in self.axes else n for axis, n in enumerate(tiles)]
        self.slab = scratch("slab", (*size, channels), values)
        self.components, self.others = {}, {}
        for inner, axis in reversed(list(enumerate(self.axes))):
            size[axis] = tiles[axis]
            kind = dtype if inner == 0 else values
            self.components[axis] = scratch(f"component{axis}", (*size, channels), kind)
            self.others[axis] = scratch(f"other{axis}", (2**inner, count, filters), dtype)
        self.phases = scratch("phases", (2 ** len(self.axes), count, filters), dtype)
        self.moved = _scratch.moved
        self.calls: list[Callable[[], object]] = []
        self._sum(self.slab, self.axes, self.phases, 0)

    def compute(self, slab: Array) -> Array | None:
        """The phases [2^a, tiles, M], the last axis slowest; none if they may not be exact."""
        self.exact = True  # until a sum is seen that may not be
        np.copyto(self.slab, slab)
        for call in self.calls:
            call()
        if self.largest is not None and self.exact:
            self.exact = self._later_sums() < self.limit
        return self.phases if self.exact else None

    def _sum(self, slab: Array, axes: list[int], out: Array, position: int) -> None:
        """Lay out the phases of the sums over `axes`, the last one outermost.

        m1 + m2 and m1 - m2 come first: they are multiples of a unit twice as coarse, so that they
        are exact whenever m1 and m2 are; the proof counts on this order.
        """
        if not axes:
            self._multiply(slab.reshape(-1, slab.shape[-1]), out[0], position)
            return
        *inner, axis = axes
        lead = (slice(None),) * axis
        span = slab.shape[axis] - 3
        row0, row1, row2, row3 = (slab[(*lead, slice(i, i + span, 2))] for i in range(4))
        component, other = self.components[axis], self.others[axis]
        half = len(other)
        near, far = out[:half], out[half:]
        # positions count in the order of the weights, [d, h, w]: the last axis varies fastest
        step = 4 ** (len(self.axes) - len(axes))
        # the innermost axis goes straight from the map's integers to the floats of the product
        narrow = {"dtype": slab.dtype}
        self._call(np.add, row1, row2, out=component, **narrow)
        self._sum(component, inner, near, position + step)
        self._call(np.subtract, row2, row1, out=component, **narrow)
        self._sum(component, inner, other, position + 2 * step)
        self._call(np.subtract, near, other, out=far)
        self._call(np.add, near, other, out=near)
        self._call(np.subtract, row0, row2, out=component, **narrow)
        self._sum(component, inner, other, position)
        self._call(np.add, near, other, out=near)
        self._call(np.subtract, row1, row3, out=component, **narrow)
        self._sum(component, inner, other, position + 3 * step)
        self._call(np.subtract, far, other, out=far)

    def _call(self, function: Callable[..., object], *operands: object, **how: object) -> None:
        self.calls.append(partial(function, *operands, **how))

    def _multiply(self, values: Array, out: Array, position: int) -> None:
        """Lay out one product of the block, and what the proof has to know of it."""
        weight = self.weights[position].astype(self.dtype, copy=False).T
        if position in self.norms:
            self._call(self._multiply_in_parts, values, weight, out, position)
        else:
            self._call(np.matmul, values, weight, out=out)
        if self.largest is not None:
            self._call(self._see, out, position)

    def _multiply_in_parts(self, values: Array, weight: Array, out: Array, position: int) -> None:
        """A product over as few parts of the channels as the values at hand need."""
        parts = self._parts(values, position)
        if parts == 1:
            np.matmul(values, weight, out=out)
            return
        out[...] = 0
        for part in split_evenly(values.shape[1], parts):
            out += values[:, part] @ weight[part]

    def _see(self, out: Array, position: int) -> None:
        """Note the largest product of a position."""
        assert self.largest is not None
        self.largest[position] = max(float(out.max()), -float(out.min()))

    def _parts(self, values: Array, position: int) -> int:
        """In how many parts of the channels every partial sum is exact; notes it if in none."""
        unit = 2.0 ** middle_positions(position)
        for parts, norms in self.norms[position].items():
            slices = split_evenly(values.shape[1], parts)
            lengths = [_longest(values[:, part]) for part in slices]
            if max(a * b for a, b in zip(lengths, norms, strict=True)) * unit < self.limit:
                return parts
        self.exact = False
        return 1

    def _later_sums(self) -> float:
        """Bound of the output transform's sums, in units; each step undoes the first axis left."""
        assert self.largest is not None
        units = 2.0 ** np.array([middle_positions(i) for i in range(self.largest.size)])
        worst = float((self.largest * units).max())
        largest = self.largest.reshape(4, -1)
        while True:
            summed = np.concatenate([largest[:3].sum(axis=0), largest[1:].sum(axis=0)])
            count = largest.shape[1]
            worst = max(worst, float((summed.reshape(2, count) * units[:count]).max()))
            if count == 1:
                return worst
            # outputs of one axis are bounded alike, whichever of its two they are
            largest = summed.reshape(2, count).max(axis=0).reshape(4, -1)


def _longest(rows: Array) -> float:
    """The largest length of a row; the factor covers the rounding of squares and their sums."""
    return math.sqrt(float(np.einsum("ij,ij->i", rows, rows).max())) * 1.001


def _longest_filters(weight: Array) -> dict[int, list[float]]:
    """For a cut into 1, 2, 4, 8 parts of the channels, the longest row of [M, N] in each."""
    channels = weight.shape[1]
    return {
        parts: [_longest(weight[:, part]) for part in split_evenly(channels, parts)]
        for parts in (1, 2, 4, 8)
        if parts <= channels
    }


def middle_positions(position: int) -> int:
    """How many axes of a position are in one of the two middle places, whose unit is a half."""
    count = 0
    while position:
        position, place = divmod(position, 4)
        count += place in (1, 2)
    return count


def transform_weights(taps: Array, axes: list[int]) -> Array:
    """[kd, kh, kw, M, N] with each axis of 3 taps in `axes` turned into 4 positions."""
    for axis in axes:
        first, middle, last = np.moveaxis(taps, axis, 0)
        half = (first + last) / 2
        parts = [first, half + middle / 2, half - middle / 2, last]
        taps = np.stack(parts, axis=axis)
    return taps


class Inexact(Exception):
    """The arithmetic is not exact for every input."""


class Bounds(NamedTuple):
    """Largest possible numbers in a transformed convolution, in units of 2^-(middle places)."""

    partial: Array
    """Of the partial sums of each position's GEMM."""
    later: float
    """Of the output transform, over all its stages."""


def winograd_bounds(taps: Array, transformed: Array, axes: list[int], interval: Interval) -> Bounds:
    """Bound every number that F(2,3) forms, for any input in the interval.

    After the output transform of some axes, the result is the sum over their taps directly and
    over the positions of the axes left: each stage has its own bound.
    """
    worst = []
    for stage in range(len(axes) + 1):
        left = axes[stage:]
        sums = transformed if stage == 0 else transform_weights(taps, left)
        summed = tuple(axis for axis in (0, 1, 2, 4) if axis not in left)
        total = np.abs(sums).sum(axis=summed, dtype=np.float64).reshape(-1, taps.shape[3])
        signed = np.abs(sums.sum(axis=summed, dtype=np.float64)).reshape(total.shape)
        bound = np.zeros(len(total))
        for i, position in enumerate(product(range(4), repeat=len(left))):
            low, high = interval
            for place in position:
                low, high = (2 * low, 2 * high) if place == 1 else (low - high, high - low)
            reach = _largest(total[i], signed[i], (low, high))
            bound[i] = reach.max() * 2.0 ** middle_positions(i)
        worst.append(bound)
    return Bounds(worst[0], max(float(bound.max()) for bound in worst[1:]))


ExactConvolution = GemmConvolution | PlanarConvolution | WinogradConvolution

ELEMENT_COST = 16
"""An element-wise operation on one value takes about as long as this many MACs of a GEMM."""

WEIGHT_COST = 120
"""So does this many the reading of a weight from memory, once for all outputs of a small map."""


def choose_convolution(
    weight: Array,
    shape: ConvShape,
    interval: Interval,
    dtype: np.dtype[np.generic],
    threads: int,
) -> ExactConvolution:
    """The faster exact form of a convolution, by an estimate of its work."""
    if shape.channels <= FEW_CHANNELS and shape.taps > 1 and shape.out_size[2] >= 16:
        return PlanarConvolution(weight, shape, interval, dtype, threads)
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
            reading = WEIGHT_COST * n * m / math.prod(shape.out_size)
            work = 2**a * (n * m + ELEMENT_COST * (3 * n + 4 * m)) + 4**a * reading
            if work < 3**a * (n * m + ELEMENT_COST * n + reading):
                return fast
    return GemmConvolution(weight, shape, interval, dtype, threads)
