"""Integer convolution by floating-point GEMM, where every rounding is proved to be none.

A float32 holds every integer up to 2^24, a float64 up to 2^53. Each convolution here bounds, from
its weights and the range of its input, every partial sum that can be formed in any order; where
the bound is too large the input channels are cut into chunks for which it holds, and the chunk
sums are added in float64. So BLAS may add as it likes and the result is the integer result.

Here are the proof, the products, and two forms: `GemmConvolution` unfolds the input (any kernel
and stride), `PlanarConvolution` does so for a first layer of three channels. The third is in
`winograd`; `choice` says which is the fastest.

Maps are channel-last [D, H, W, C]: a tap's channels are contiguous. Only the planar form differs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise, product

import numpy as np
from numpy.lib.stride_tricks import as_strided
from threadpoolctl import threadpool_info

from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import Array, ceil_div

Interval = tuple[int, int]
Region = tuple[slice, slice, slice]
"""The outputs along depth, height and width that a block of results stands for."""

Finish = Callable[[Array, Region, slice], None]
"""Takes exact sums [d, h, w, M] for a strided region of outputs and a slice of the filters."""

FLOAT32, WIDE = np.dtype(np.float32), np.dtype(np.float64)

BLOCK_BYTES = 2 << 20
"""Scratch of one block of the unfolded input. Half of it or twice as much is about as fast; where
threads share the work, each call of numpy ends in a struggle for the interpreter."""

FEW_ROWS = 128
"""With fewer rows of a GEMM for each core, the cores share out the filters instead."""

MUCH_SEEN = 0.8
"""Where fewer of the taps along depth see the map, products with padding are worth leaving out."""

FEWEST_ROWS = 128
"""Rows of a GEMM below which reading its weights costs more than the products."""

SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""Processors, as OpenBLAS calls them, for which it has products that do not pack operands."""

SMALL_PRODUCT = 1_000_000
"""MACs up to which it uses them."""

SMALL_WEIGHTS = 15_000
"""With more of them a part of the rows is too short, and packing is worth it."""

FEWEST_SMALL_ROWS = 16
"""With shorter parts of the rows the calls cost more than the packing."""

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


def scratch_moves() -> int:
    """How often an array of this thread's scratch was made anew, elsewhere in memory."""
    moves: int = _scratch.__dict__.get("moved", 0)
    return moves


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
    return largest_reach(total, np.abs(weights.sum(axis=axis, dtype=np.float64)), interval)


def largest_reach(total: Array, signed: Array, interval: Interval) -> Array:
    """The bound of `largest_sum` from the sum of magnitudes and the magnitude of the sum."""
    low, high = interval
    bound: Array = total * (high - low) / 2 + signed * abs(high + low) / 2
    return bound


def split_evenly(count: int, parts: int) -> list[slice]:
    """`parts` nearly equal slices of range(count), none of them empty."""
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


def lay_out_jobs(size: Size, block: tuple[int, ...], parts: int) -> list[tuple[int, int, int]]:
    """First depth, first height and part of the filters of each block of a map."""
    blocks = product(range(0, size[0], block[0]), range(0, size[1], block[1]))
    return [(d0, h0, part) for d0, h0 in blocks for part in range(parts)]


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
            self.block = (max(1, min(d if few else ceil_div(d, cores), rows // (h * w))), h, w)

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
        return lay_out_jobs(self.shape.out_size, self.block, len(self.filters))

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
        # the products of a tap that sees the map everywhere need nothing to be added to
        everywhere = [tap for tap in seen if len(seen[tap]) == nd and len(self.chunks) == 1][:1]
        if not everywhere:
            total[...] = 0
        for tap in [*everywhere, *(tap for tap in seen if tap not in everywhere)]:
            outputs = seen[tap]
            rows = values[pixels * (outputs[0] + tap - low) :][: pixels * len(outputs)]
            if tap in everywhere:
                multiply(rows, matrices[tap], total)()
            else:
                target = total[pixels * (outputs[0] - d0) :][: pixels * len(outputs)]
                target += _exact_product(rows, matrices[tap], self.depth_chunks[tap])
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
            largest_reach(totals[r].sum(axis=0), np.abs(signed[r].sum(axis=0)), interval)
            for r in runs
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
            (shape.out_size[i] - 1 + ceil_div(shape.kernel[i], shape.stride[i])) * shape.stride[i]
            for i in range(3)
        )
        return d, h, w

    @property
    def jobs(self) -> list[tuple[int, int, int]]:
        """First depth and height of each block; all filters."""
        return lay_out_jobs(self.shape.out_size, self.block, 1)

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
