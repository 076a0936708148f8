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
from functools import cache, partial
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from threadpoolctl import threadpool_info

from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import Array

Interval = tuple[int, int]
Region = tuple[slice, slice, slice]
"""The outputs along depth, height and width that a block of results stands for."""

Finish = Callable[[Array, Region, slice], None]
"""Takes exact sums [d, h, w, M] for a strided region of outputs and a slice of the filters."""

FLOAT32, WIDE = np.dtype(np.float32), np.dtype(np.float64)

BLOCK_BYTES = 2 << 20
"""Scratch of one block of the unfolded input. Half of it or twice as much is about as fast; where
threads share the work, each call of numpy ends in a struggle for the interpreter."""

FEW_CHANNELS = 4
"""Up to so many channels a pixel's run is too short to copy, and the planar form is faster."""

FEW_ROWS = 128
"""With fewer rows of a GEMM for each core, the cores share out the filters instead."""

MUCH_SEEN = 0.8
"""Where fewer of the taps along depth see the map, products with padding are worth leaving out."""

FEWEST_ROWS = 128
"""Rows of a GEMM below which reading its weights costs more than the products."""

BLOCK_TILES = 800
"""Winograd tiles of a block; a compromise as that of BLOCK_BYTES."""

FEW_TILES = 400
"""With so few tiles the cores share out the filters instead."""

SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""Processors, as OpenBLAS calls them, for which it has products that do not pack operands."""

SMALL_PRODUCT = 1_000_000
"""MACs up to which it uses them."""

SMALL_WEIGHTS = 15_000
"""With more of them a part of the rows is too short, and packing is worth it."""

FEWEST_SMALL_ROWS = 16

WIDTH = 2
"""The axis along which the channels of neighbours are contiguous."""

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


@cache
def has_small_kernels() -> bool:
    """Whether numpy's BLAS multiplies small float32 matrices without packing them.

    OpenBLAS does on processors with AVX-512. The results are the same; only the time is not.
    """
    return any(
        library["internal_api"] == "openblas" and library.get("architecture") in SMALL_KERNELS
        for library in threadpool_info()
    )


def is_small(channels: int, filters: int, dtype: np.dtype[np.generic]) -> bool:
    """Whether a matrix of weights is small enough to multiply a few rows at a time."""
    return channels * filters <= SMALL_WEIGHTS and dtype == FLOAT32 and has_small_kernels()


def lay_out_weights(matrices: Array) -> Array:
    """[..., K, M], in memory as the fastest product wants them."""
    channels, filters = matrices.shape[-2:]
    if is_small(channels, filters, matrices.dtype):
        return np.ascontiguousarray(matrices)
    return np.ascontiguousarray(matrices.swapaxes(-1, -2)).swapaxes(-1, -2)


def multiply(values: Array, weights: Array, out: Array) -> Callable[[], object]:
    """The call that writes ``values @ weights`` to `out`, [..., rows, K] @ [K, M].

    With small weights it goes through the rows in equal parts, each small enough for a kernel
    that does not pack its operands.
    """
    rows, (channels, filters) = values.shape[-2], weights.shape
    if is_small(channels, filters, weights.dtype):
        part = _largest_part(rows, SMALL_PRODUCT // weights.size)
        if FEWEST_SMALL_ROWS <= part < rows:
            values, out = _split_rows(values, part), _split_rows(out, part)
    return partial(np.matmul, values, weights, out=out)


@cache
def _largest_part(count: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return max(part for part in range(1, most + 1) if count % part == 0)


def _split_rows(array: Array, part: int) -> Array:
    """[..., rows, n] as [..., rows / part, part, n], never a copy."""
    *lead, rows, count = array.shape
    *steps, row, item = array.strides
    return as_strided(array, (*lead, rows // part, part, count), (*steps, part * row, row, item))


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

    A kernel that is deep only, or one on a map so shallow that much of what it sees is padding,
    is unfolded in the plane at most: the products of its taps along depth are added up, and those
    with nothing but padding are left out.

    Args:
        weight: [M, N, kd, kh, kw] codes.
        shape: the convolution.
        interval: range of the input values, zero point removed.
        dtype: float32 or float64.
        cores: how many blocks may be worked on at once.
    """

    def __init__(
        self,
        weight: Array,
        shape: ConvShape,
        interval: Interval,
        dtype: np.dtype[np.generic],
        cores: int,
    ) -> None:
        self.shape, self.dtype, self.map_dtype = shape, dtype, dtype
        # rows in the order (kd, kh, kw, n): a run of kw * n is contiguous in a channel-last map
        matrix = weight.transpose(2, 3, 4, 1, 0).reshape(-1, shape.filters).astype(dtype)
        self.chunks = _fewest_chunks(matrix, interval, dtype)
        d, h, w = shape.out_size
        kd = shape.kernel[0]
        self.sum_dtype = dtype if len(self.chunks) == 1 else WIDE
        self.depth_chunks: list[list[slice]] = []
        if kd > 1 and shape.stride[0] == 1:
            deep_only = shape.kernel[1:] == shape.stride[1:] == (1, 1)
            seen = sum(len(self._outputs(tap, 0, d)) for tap in range(kd))
            if deep_only or seen < MUCH_SEEN * kd * d:
                taps = np.split(matrix, kd)
                self.depth_chunks = [_fewest_chunks(tap, interval, dtype) for tap in taps]
        few = d * h * w < FEW_ROWS * cores and shape.filters >= 64 * cores
        parts = cores if few else 1
        self.filters = split_evenly(shape.filters, parts)
        # a tap along depth at a time, if each is a product of its own
        depths = kd if self.depth_chunks else 1
        self.matrices = [
            lay_out_weights(matrix[:, part].reshape(depths, -1, part.stop - part.start))
            for part in self.filters
        ]
        rows = max(FEWEST_ROWS, BLOCK_BYTES // (matrix.shape[0] * dtype.itemsize))
        self.block = (1, max(1, min(h, rows // w)), w)
        if self.block[1] == h:
            self.block = (max(1, min(d if few else -(-d // cores), rows // (h * w))), h, w)

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
        if self.depth_chunks:
            sums = self._add_depths(padded, (d0, h0), (nd, nh), matrix)
        else:
            unfolded = self._unfold(padded, (d0, h0), (nd, nh), self.shape.kernel[0])
            sums = _exact_product(unfolded, matrix[0], self.chunks)
        region = (slice(d0, d0 + nd), slice(h0, h0 + nh), slice(0, w))
        finish(sums.reshape(nd, nh, w, -1), region, self.filters[part])

    def _outputs(self, tap: int, first: int, last: int) -> range:
        """Of the outputs [first, last) along depth those whose tap sees the map, no padding."""
        shift = self.shape.pad_before[0] - tap
        return range(max(first, shift), min(last, self.shape.in_size[0] + shift))

    def _add_depths(
        self, padded: Array, first: tuple[int, int], count: tuple[int, int], matrices: Array
    ) -> Array:
        """The sums of a block, added up over the taps along depth, for stride 1 there."""
        (d0, h0), (nd, nh), taps = first, count, self.shape.kernel[0]
        seen = {tap: self._outputs(tap, d0, d0 + nd) for tap in range(taps)}
        seen = {tap: outputs for tap, outputs in seen.items() if outputs}
        depths = [outputs[i] + tap for tap, outputs in seen.items() for i in (0, -1)]
        low, high = min(depths, default=0), max(depths, default=0)
        values = self._unfold(padded, (low, h0), (high - low + 1, nh), 1)
        pixels = nh * self.shape.out_size[2]
        total = scratch("total", (nd * pixels, matrices.shape[2]), self.sum_dtype)
        begun = False
        for tap in sorted(seen, key=lambda tap: -len(seen[tap])):
            outputs = seen[tap]
            rows = values[pixels * (outputs[0] + tap - low) :][: pixels * len(outputs)]
            target = total[pixels * (outputs[0] - d0) :][: pixels * len(outputs)]
            weights, chunks = matrices[tap], self.depth_chunks[tap]
            if not begun and len(outputs) == nd and len(chunks) == 1 and total.dtype == rows.dtype:
                multiply(rows, weights, total)()
                begun = True
                continue
            if not begun:
                total[...] = 0
                begun = True
            target += _exact_product(rows, weights, chunks)
        if not begun:
            total[...] = 0
        return total

    def _unfold(
        self, padded: Array, first: tuple[int, int], count: tuple[int, int], kd: int
    ) -> Array:
        """[nd * nh * w, kd * kh * kw * n]: what each output of a block sees over `kd` depths."""
        (d0, h0), (nd, nh) = first, count
        (_, kh, kw), (sd, sh, sw) = self.shape.kernel, self.shape.stride
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
        multiply(values, matrix, sums)()
        return sums
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
        cores: int,
    ) -> None:
        self.shape, self.dtype, self.map_dtype = shape, dtype, dtype
        self.lattices = _lattices(shape)
        rows = weight.reshape(shape.filters, shape.channels, *shape.kernel)
        parts = [rows[(slice(None), slice(None), *lattice)] for lattice in self.lattices]
        matrix = np.concatenate([p.reshape(shape.filters, -1) for p in parts], axis=1)
        self.matrix = lay_out_weights(matrix.T.astype(dtype))
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
    """F(2,3) along axes whose kernel is 3, for stride 1; the other axes have kernel 1.

    Works through the positions depth first, so that what is alive fits the caches: at each axis a
    position's input is one sum or difference of two slabs, and its result is added to or taken
    from the two outputs of that axis. Where exactness is not proved for every input, it is
    measured on the values at hand, and a block that fails is done again in float64.

    The width may be left out: its three taps then lie side by side in a channel-last row and are
    one run of 3 N channels of the product. Every third output starts such a run, so that three
    products, each a pixel further on, give them all; a row is as wide as 3 goes into.

    Takes the arguments of `GemmConvolution`, and

    Args:
        axes: the axes to transform; by default all that have a kernel of 3.

    Raises:
        Inexact: not even float64 is exact for every input; use the GEMM.
    """

    def __init__(
        self,
        weight: Array,
        shape: ConvShape,
        interval: Interval,
        dtype: np.dtype[np.generic],
        cores: int,
        axes: list[int] | None = None,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.axes = three_taps(shape) if axes is None else axes
        self.run_length = 1 if WIDTH in self.axes else shape.kernel[WIDTH]
        widest = max(-interval[0], interval[1]) << len(self.axes)
        # the transform of the input moves memory more than it computes: the narrower the better
        self.map_dtype = np.dtype(np.int16) if widest < 1 << 15 else dtype
        taps = weight.transpose(2, 3, 4, 0, 1).astype(dtype)  # [kd, kh, kw, M, N]
        if self.run_length > 1:
            taps = taps.transpose(0, 1, 3, 2, 4).reshape(*taps.shape[:2], 1, shape.filters, -1)
        transformed = transform_weights(taps, self.axes)
        bounds = winograd_bounds(taps, transformed, self.axes, interval)
        if max(bounds.partial.max(), bounds.later) >= largest_integer(WIDE):
            raise Inexact
        limit = largest_integer(dtype)
        suspects = np.flatnonzero(bounds.partial >= limit)
        self.proved = suspects.size == 0 and bounds.later < limit
        d, h, w = self.tiles
        few = d * h * w <= FEW_TILES and cores > 1 and shape.filters >= 32 * cores
        self.filters = split_evenly(shape.filters, cores if few else 1)
        flat = transformed.reshape(-1, *transformed.shape[3:])
        by_row = flat.swapaxes(1, 2)  # [positions, N, M]
        self.weights = [lay_out_weights(by_row[:, :, part]) for part in self.filters]
        self.norms = [
            {int(i): _longest_filters(part[i].T) for i in suspects} for part in self.weights
        ]
        wanted = BLOCK_TILES * self.run_length  # each product of a run has its share of them
        nh = -(-h // max(1, round(h * w / wanted)))  # blocks of equal height
        nd = max(1, wanted // (h * w)) if nh == h else 1
        if not few:  # a block for every core
            nd = min(nd, -(-d // cores))
            nh = min(nh, -(-h // cores)) if d == 1 else nh
        self.block = (nd, nh)
        self.plans: dict[tuple[int, Size, int, np.dtype[np.generic]], _WinogradPlan] = {}

    @property
    def tiles(self) -> Size:
        """Tiles of outputs along each axis: 2 outputs a tile on a transformed axis.

        With runs along the width the last two or more outputs of a row are no outputs.
        """
        d, h, w = (
            -(-size // 2) if axis in self.axes else size
            for axis, size in enumerate(self.shape.out_size)
        )
        length = self.run_length
        return d, h, -(-(w + length - 1) // length) * length

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

    def pools(self, size: Size) -> bool:
        """Whether a pool's window of `size` outputs lies within a tile, or within a row."""
        whole_rows = [WIDTH] if self.run_length > 1 else []
        return all(
            window == 1 or (window == 2 and axis in [*self.axes, *whole_rows])
            for axis, window in enumerate(size)
        )

    def run(self, padded: Array, job: tuple[int, int, int], finish: Finish, pool: Size) -> None:
        """The sums of one block of tiles, the largest of each window of a pool that `pools`."""
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
        along_rows = pool[WIDTH] > shape[WIDTH]
        if along_rows:
            pool = (pool[0], pool[1], 1)
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
            sums = sums.reshape(*tiles, -1)
            if along_rows:
                pairs = sums[:, :, : tiles[WIDTH] // 2 * 2]
                sums = np.maximum(pairs[:, :, ::2], pairs[:, :, 1::2])
                w = slice(0, sums.shape[WIDTH])
            finish(sums, (d, h, w), filters)


class _WinogradPlan:
    """The sums of one block of tiles: every call of numpy, laid out once, and the proof.

    Between two calls of numpy a thread holds the interpreter, and another that comes back from
    one must wait, and be woken. So nothing but the calls is left to do while a block is computed:
    their operands lie in this thread's scratch and never move.

    The proof on values, where the one for every input fails: a partial sum of ``u . v`` is at most
    |u| |v| (Cauchy-Schwarz; channels are halved until that suffices). What the first axis undone
    makes of exact products is exact if it is below the limit, and it is looked at: m1 + m2 is, and
    to that one product is added. Later sums are at most the sums of the largest that were seen.
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
        filters = self.weights.shape[2]
        self.limit = largest_integer(dtype)
        proved = convolution.proved or dtype == WIDE
        self.norms = {} if proved else convolution.norms[part]
        # of the two results of the first axis undone, at each position of the others
        self.largest = None if proved else np.zeros((2, 4 ** (len(self.axes) - 1)))
        self.run_length = convolution.run_length
        channels, count = convolution.shape.channels, math.prod(tiles)
        values = convolution.map_dtype
        size = [2 * n + 2 if axis in self.axes else n for axis, n in enumerate(tiles)]
        self.slab = scratch("slab", (*size, channels), values)
        self.components, self.others = {}, {}
        for inner, axis in reversed(list(enumerate(self.axes))):
            size[axis] = tiles[axis]
            kind = dtype if inner == 0 else values
            # the last runs of a block, which give no outputs, end behind it
            beyond = (self.run_length - 1) * channels if inner == 0 else 0
            place = scratch(f"component{axis}", (math.prod(size) * channels + beyond,), kind)
            self.beyond = place[place.size - beyond :]
            self.components[axis] = place[: place.size - beyond].reshape(*size, channels)
            self.others[axis] = scratch(f"other{axis}", (2**inner, count, filters), dtype)
        self.phases = scratch("phases", (2 ** len(self.axes), count, filters), dtype)
        self.moved = _scratch.moved
        self.calls: list[Callable[[], object]] = []
        self._sum(self.slab, self.axes, self.phases, 0)

    def compute(self, slab: Array) -> Array | None:
        """The phases [2^a, tiles, M], the last axis slowest; none if they may not be exact."""
        self.exact = True  # until a sum is seen that may not be
        np.copyto(self.slab, slab)
        self.beyond[:] = 0
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
            self._multiply(slab, out[0], position)
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
        if self.largest is not None and not inner:
            self._call(self._see, near, 0, position)
            self._call(self._see, far, 1, position)

    def _call(self, function: Callable[..., object], *operands: object, **how: object) -> None:
        self.calls.append(partial(function, *operands, **how))

    def _multiply(self, slab: Array, out: Array, position: int) -> None:
        """Lay out one product of the block, or those of its runs as one."""
        weight = self.weights[position].astype(self.dtype, copy=False)
        channels, length = slab.shape[-1], self.run_length
        values = slab.reshape(-1, channels)
        if length > 1:
            rows, pixel, item = len(values) // length, *values.strides
            shape, strides = (length, rows, length * channels), (pixel, length * pixel, item)
            values = as_strided(values, shape, strides)
            out = out.reshape(rows, length, -1).transpose(1, 0, 2)
        if position in self.norms:
            self._call(self._multiply_in_parts, values, weight, out, position)
        else:
            self.calls.append(multiply(values, weight, out))

    def _multiply_in_parts(self, values: Array, weight: Array, out: Array, position: int) -> None:
        """A product over as few parts of the channels as the values at hand need."""
        parts = self._parts(values, position)
        if parts == 1:
            multiply(values, weight, out)()
            return
        out[...] = 0
        for part in split_evenly(values.shape[-1], parts):
            out += values[..., part] @ weight[part]
            # each part was proved, their sum was not
            if _largest_magnitude(out) * 2.0 ** middle_positions(position) >= self.limit:
                self.exact = False
                return

    def _see(self, sums: Array, result: int, position: int) -> None:
        """Note the largest of the sums of one axis, at a position of the others."""
        assert self.largest is not None
        self.largest[result, position] = _largest_magnitude(sums)

    def _parts(self, values: Array, position: int) -> int:
        """In how many parts of the channels every partial sum is exact; notes it if in none."""
        unit = 2.0 ** middle_positions(position)
        for parts, norms in self.norms[position].items():
            slices = split_evenly(values.shape[-1], parts)
            lengths = [_longest(values[..., part]) for part in slices]
            if max(a * b for a, b in zip(lengths, norms, strict=True)) * unit < self.limit:
                return parts
        self.exact = False
        return 1

    def _later_sums(self) -> float:
        """Bound of the output transform's sums, in units; each step undoes the first axis left."""
        assert self.largest is not None
        largest, worst = self.largest, 0.0
        units = 2.0 ** np.array([middle_positions(i) for i in range(largest.shape[1])])
        while True:
            count = largest.shape[1]
            worst = max(worst, float((largest * units[:count]).max()))
            if count == 1:
                return worst
            # outputs of one axis are bounded alike, whichever of its two they are
            left = largest.max(axis=0).reshape(4, -1)
            largest = np.stack([left[:3].sum(axis=0), left[1:].sum(axis=0)])


def _largest_magnitude(sums: Array) -> float:
    return max(float(sums.max()), -float(sums.min()))


def _longest(rows: Array) -> float:
    """The largest length of a row; the factor covers the rounding of squares and their sums."""
    return math.sqrt(float(np.einsum("...j,...j", rows, rows).max())) * 1.001


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


def three_taps(shape: ConvShape) -> list[int]:
    """The axes along which the kernel is 3."""
    return [axis for axis in range(3) if shape.kernel[axis] == 3]


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
    wasted = -(-(width + length - 1) // length) * length / width
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
