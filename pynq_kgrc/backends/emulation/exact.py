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
"""The lowest and the highest value of an input, zero point removed; low <= 0 <= high."""

OutputSlices = tuple[slice, slice, slice]
"""Which outputs of a map a block of sums belongs to: slices along depth, height and width."""

StoreSums = Callable[[Array, OutputSlices, slice], None]
"""Takes exact sums [d, h, w, M], the outputs and the filters that they belong to."""

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

BLOCK_BYTES = 2 << 20
"""Size of an unfolded block, a compromise: a small block stays in the cache, a large one needs
fewer numpy calls, for each of which threads compete for the GIL. Half or twice is about as fast."""

MIN_CORE_ROWS = 128
"""With fewer GEMM rows than this for each core, the cores split the filters, not the outputs."""

SKIP_PADDING_BELOW = 0.8
"""Products with padding are skipped if less than this part of all (output, tap along depth) pairs
reads the map itself."""

MIN_BLOCK_ROWS = 128
"""With fewer GEMM rows, reading the weights takes longer than multiplying."""

SMALL_MATRIX_CPUS = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""OpenBLAS's names of the processors that it has small matrix kernels for. These do not pack
(copy and reorder) their operands."""

SMALL_MATRIX_MACS = 1_000_000
"""OpenBLAS uses small matrix kernels up to this many MACs."""

SMALL_MATRIX_WEIGHTS = 15_000
"""With more weights than this, so few rows fit SMALL_MATRIX_MACS that packing is faster."""

MIN_SMALL_MATRIX_ROWS = 16
"""With fewer rows in a part, calling the kernel costs more than packing."""

_scratch = threading.local()


def scratch(key: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """An uninitialised array of this thread; the next call with this key reuses its memory."""
    arrays: dict[tuple[str, np.dtype[np.generic]], Array] = _scratch.__dict__.setdefault("a", {})
    count = math.prod(shape)
    array = arrays.get((key, dtype))
    if array is None or array.size < count:
        array = arrays[key, dtype] = np.empty(count, dtype)
        _scratch.reallocations = _scratch.__dict__.get("reallocations", 0) + 1
    return array[:count].reshape(shape)


@cache
def has_small_matrix_kernels() -> bool:
    """Whether numpy's BLAS has small matrix kernels for float32: OpenBLAS on AVX-512.

    They change the time of a product, not its result.
    """
    return any(
        library["internal_api"] == "openblas" and library.get("architecture") in SMALL_MATRIX_CPUS
        for library in threadpool_info()
    )


def fits_small_matrix_kernel(channels: int, filters: int, dtype: np.dtype[np.generic]) -> bool:
    """Whether a product with this matrix of weights is faster in parts for small matrix kernels."""
    return (
        channels * filters <= SMALL_MATRIX_WEIGHTS
        and dtype == FLOAT32
        and has_small_matrix_kernels()
    )


def lay_out_weights(matrices: Array) -> Array:
    """Matrices [..., K, M], in the memory layout for which `multiply` is fastest."""
    channels, filters = matrices.shape[-2:]
    if fits_small_matrix_kernel(channels, filters, matrices.dtype):
        return np.ascontiguousarray(matrices)
    return np.ascontiguousarray(matrices.swapaxes(-1, -2)).swapaxes(-1, -2)


def multiply(values: Array, weights: Array, out: Array) -> Callable[[], object]:
    """A callable that writes ``values @ weights``, [..., rows, K] @ [K, M], to `out`.

    If the weights are small, the rows are multiplied in equal parts, each small enough for a
    small matrix kernel.
    """
    rows, (channels, filters) = values.shape[-2], weights.shape
    if fits_small_matrix_kernel(channels, filters, weights.dtype):
        part = _largest_divisor(rows, SMALL_MATRIX_MACS // weights.size)
        if MIN_SMALL_MATRIX_ROWS <= part < rows:
            values, out = _split_rows(values, part), _split_rows(out, part)
    return partial(np.matmul, values, weights, out=out)


@cache
def _largest_divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is not above `most`."""
    return max(part for part in range(1, most + 1) if count % part == 0)


def _split_rows(array: Array, part: int) -> Array:
    """A view of [..., rows, n] as [..., rows / part, part, n]."""
    *lead, rows, count = array.shape
    *steps, row, item = array.strides
    return as_strided(array, (*lead, rows // part, part, count), (*steps, part * row, row, item))


def scratch_reallocations() -> int:
    """How many scratch arrays of this thread were allocated: a growing one moves in memory."""
    count: int = _scratch.__dict__.get("reallocations", 0)
    return count


def forget_scratch() -> None:
    """Free this thread's scratch arrays."""
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
    """Up to `parts` nearly equal slices of range(count), none of them empty."""
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


def list_jobs(size: Size, block: tuple[int, ...], parts: int) -> list[tuple[int, int, int]]:
    """The jobs of a map: first depth and height of each block, and the number of a filter part."""
    blocks = product(range(0, size[0], block[0]), range(0, size[1], block[1]))
    return [(d0, h0, part) for d0, h0 in blocks for part in range(parts)]


class GemmConvolution:
    """im2col: unfold blocks of the input, one GEMM a block. A 1x1x1 kernel needs no unfolding.

    In two cases only height and width are unfolded, and each tap along depth is a GEMM of its own,
    whose products are added up: for kernels kd x 1 x 1, which then need no unfolding, and for maps
    so shallow that many taps along depth read padding only, whose products are skipped.

    Args:
        weight: codes [M, N, kd, kh, kw].
        shape: the convolution.
        interval: range of the input values, zero point removed.
        dtype: type of the GEMM, float32 or float64.
        cores: how many cores share the blocks.
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
        # rows in the order (kd, kh, kw, n): kw * n values are contiguous in a channel-last map
        matrix = weight.transpose(2, 3, 4, 1, 0).reshape(-1, shape.filters).astype(dtype)
        # rows whose sums are exact in `dtype`: of the whole matrix, and of each tap along depth
        self.chunks = _fewest_chunks(matrix, interval, dtype)
        d, h, w = shape.out_size
        kd = shape.kernel[0]
        self.sum_dtype = dtype if len(self.chunks) == 1 else FLOAT64
        self.depth_chunks: list[list[slice]] = []
        if kd > 1 and shape.stride[0] == 1:
            depth_only = shape.kernel[1:] == shape.stride[1:] == (1, 1)
            on_map = sum(len(self._outputs_on_map(tap, 0, d)) for tap in range(kd))
            if depth_only or on_map < SKIP_PADDING_BELOW * kd * d:
                taps = np.split(matrix, kd)
                self.depth_chunks = [_fewest_chunks(tap, interval, dtype) for tap in taps]
        split_filters = d * h * w < MIN_CORE_ROWS * cores and shape.filters >= 64 * cores
        parts = cores if split_filters else 1
        self.filters = split_evenly(shape.filters, parts)
        # one matrix for each tap along depth if each is a GEMM of its own, else one for all
        depths = kd if self.depth_chunks else 1
        self.matrices = [
            lay_out_weights(matrix[:, part].reshape(depths, -1, part.stop - part.start))
            for part in self.filters
        ]
        rows = max(MIN_BLOCK_ROWS, BLOCK_BYTES // (matrix.shape[0] * dtype.itemsize))
        self.block = (1, max(1, min(h, rows // w)), w)
        if self.block[1] == h:
            depths = d if split_filters else ceil_div(d, cores)
            self.block = (max(1, min(depths, rows // (h * w))), h, w)

    @property
    def in_size(self) -> Size:
        """Size of the padded map that `run` takes."""
        d, h, w = (
            (self.shape.out_size[i] - 1) * self.shape.stride[i] + self.shape.kernel[i]
            for i in range(3)
        )
        return d, h, w

    @property
    def jobs(self) -> list[tuple[int, int, int]]:
        """First depth and height, and number of the filter part, of each job."""
        return list_jobs(self.shape.out_size, self.block, len(self.filters))

    def align_blocks(self, depth: int, height: int) -> None:
        """Change the block size to whole windows of a pool, so that no window is cut."""
        d, h, w = self.block
        if d > 1 or depth > 1:
            d = max(1, d // depth) * depth
        self.block = (d, max(1, h // height) * height, w)

    def run(self, padded: Array, job: tuple[int, int, int], store: StoreSums) -> None:
        """Compute the sums of one block of outputs and pass them to `store`."""
        d0, h0, part = job
        d, h, w = self.shape.out_size
        nd, nh = min(self.block[0], d - d0), min(self.block[1], h - h0)
        matrix = self.matrices[part]
        if self.depth_chunks:
            sums = self._sum_over_depth(padded, (d0, h0), (nd, nh), matrix)
        else:
            unfolded = self._unfold(padded, (d0, h0), (nd, nh), self.shape.kernel[0])
            sums = _exact_product(unfolded, matrix[0], self.chunks)
        outputs = (slice(d0, d0 + nd), slice(h0, h0 + nh), slice(0, w))
        store(sums.reshape(nd, nh, w, -1), outputs, self.filters[part])

    def _outputs_on_map(self, tap: int, first: int, last: int) -> range:
        """The outputs in [first, last) along depth for which this depth tap reads the map."""
        shift = self.shape.pad_before[0] - tap
        return range(max(first, shift), min(last, self.shape.in_size[0] + shift))

    def _sum_over_depth(
        self, padded: Array, first: tuple[int, int], count: tuple[int, int], matrices: Array
    ) -> Array:
        """The sums of a block, one GEMM for each tap along depth; stride 1 along depth."""
        (d0, h0), (nd, nh), taps = first, count, self.shape.kernel[0]
        outputs = {tap: self._outputs_on_map(tap, d0, d0 + nd) for tap in range(taps)}
        outputs = {tap: depths for tap, depths in outputs.items() if depths}
        inputs = [depths[i] + tap for tap, depths in outputs.items() for i in (0, -1)]
        low, high = min(inputs, default=0), max(inputs, default=0)
        values = self._unfold(padded, (low, h0), (high - low + 1, nh), 1)
        pixels = nh * self.shape.out_size[2]
        total = scratch("total", (nd * pixels, matrices.shape[2]), self.sum_dtype)
        # a tap that reads the map for every output may write its product, instead of adding it
        writes = [tap for tap in outputs if len(outputs[tap]) == nd and len(self.chunks) == 1][:1]
        if not writes:
            total[...] = 0
        for tap in [*writes, *(tap for tap in outputs if tap not in writes)]:
            depths = outputs[tap]
            rows = values[pixels * (depths[0] + tap - low) :][: pixels * len(depths)]
            if tap in writes:
                multiply(rows, matrices[tap], total)()
            else:
                target = total[pixels * (depths[0] - d0) :][: pixels * len(depths)]
                target += _exact_product(rows, matrices[tap], self.depth_chunks[tap])
        return total

    def _unfold(
        self, padded: Array, first: tuple[int, int], count: tuple[int, int], kd: int
    ) -> Array:
        """The inputs that each output of a block reads, over `kd` depths.

        Shape [nd * nh * w, kd * kh * kw * n].
        """
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
    """``values @ matrix`` in this thread's scratch; chunk sums are added in float64."""
    sums = scratch("sums", (values.shape[0], matrix.shape[1]), matrix.dtype)
    if len(chunks) == 1:
        multiply(values, matrix, sums)()
        return sums
    total = scratch("wide", sums.shape, FLOAT64)
    total[...] = 0
    for chunk in chunks:
        np.matmul(values[:, chunk], matrix[chunk], out=sums)
        total += sums
    return total


def _fewest_chunks(matrix: Array, interval: Interval, dtype: np.dtype[np.generic]) -> list[slice]:
    """Cut the rows into the fewest chunks (1, 2, 4, ...) in which every partial sum is exact."""
    blocks = split_evenly(matrix.shape[0], 64)
    totals = np.stack([np.abs(matrix[b]).sum(axis=0, dtype=np.float64) for b in blocks])
    signed = np.stack([matrix[b].sum(axis=0, dtype=np.float64) for b in blocks])
    for parts in (1, 2, 4, 8, 16, 32, 64):
        chunks = split_evenly(len(blocks), parts)
        bounds = [
            largest_reach(totals[c].sum(axis=0), np.abs(signed[c].sum(axis=0)), interval)
            for c in chunks
        ]
        if float(np.max(bounds)) < largest_integer(dtype):
            return [slice(blocks[c.start].start, blocks[c.stop - 1].stop) for c in chunks]
    return [slice(i, i + 1) for i in range(matrix.shape[0])]  # one product is always exact


class PlanarConvolution:
    """im2col for the few channels of a first layer, on a planar (channel-first) map.

    The inputs that one tap reads for neighbouring outputs are then contiguous along the width, so
    that unfolding copies long rows. In a channel-last map it would copy kw * N values at a time.
    For strides the map is cut into phases, the positions with equal remainders modulo the
    strides: [N, sd, sh, sw, D / sd, H / sh, W / sw]. Within a phase the stride is 1, and the taps
    that read it are a regular grid.

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
        self.phase_taps = _phase_taps(shape)
        rows = weight.reshape(shape.filters, shape.channels, *shape.kernel)
        parts = [rows[(slice(None), slice(None), *taps)] for taps in self.phase_taps]
        matrix = np.concatenate([p.reshape(shape.filters, -1) for p in parts], axis=1)
        self.matrix = lay_out_weights(matrix.T.astype(dtype))
        self.chunks = _fewest_chunks(self.matrix, interval, dtype)
        _, h, w = shape.out_size
        wanted = max(1, BLOCK_BYTES // (self.matrix.shape[0] * dtype.itemsize * w))
        self.block = (1, min(h, wanted), w)

    @property
    def in_size(self) -> Size:
        """Size of the padded map that `run` takes: a multiple of the stride along each axis."""
        shape = self.shape
        d, h, w = (
            (shape.out_size[i] - 1 + ceil_div(shape.kernel[i], shape.stride[i])) * shape.stride[i]
            for i in range(3)
        )
        return d, h, w

    @property
    def jobs(self) -> list[tuple[int, int, int]]:
        """First depth and height of each block, and 0: a job computes all filters."""
        return list_jobs(self.shape.out_size, self.block, 1)

    def align_blocks(self, depth: int, height: int) -> None:
        """Change the block size to whole windows of a pool, so that no window is cut."""
        _, h, w = self.block
        self.block = (depth, max(1, h // (depth * height)) * height, w)

    def map_view(self, flat: Array) -> Array:
        """A view of the map's memory to fill: [D / sd, sd, H / sh, sh, W / sw, sw, N]."""
        d, h, w = self.in_size
        sd, sh, sw = self.shape.stride
        planar = flat.reshape(self.shape.channels, sd, sh, sw, d // sd, h // sh, w // sw)
        return planar.transpose(4, 1, 5, 2, 6, 3, 0)

    def run(self, padded: Array, job: tuple[int, int, int], store: StoreSums) -> None:
        """Compute the sums of one block and pass them to `store`; `padded` has any shape."""
        d0, h0, _ = job
        d, h, w = self.shape.out_size
        nd, nh = min(self.block[0], d - d0), min(self.block[1], h - h0)
        count = nd * nh * w
        unfolded = scratch("planar", (self.matrix.shape[0], count), self.dtype)
        size = [n // s for n, s in zip(self.in_size, self.shape.stride, strict=True)]
        planar = padded.reshape(self.shape.channels, *self.shape.stride, *size)
        row = 0
        for taps in self.phase_taps:
            first = tuple(axis.start for axis in taps)
            counts = [
                len(range(axis.start, k, axis.step))
                for axis, k in zip(taps, self.shape.kernel, strict=True)
            ]
            phase = planar[(slice(None), *first)][:, d0:, h0:]
            n, pd, ph, pw = phase.strides
            inputs = as_strided(
                phase, (phase.shape[0], *counts, nd, nh, w), (n, pd, ph, pw, pd, ph, pw)
            )
            rows = phase.shape[0] * math.prod(counts)
            unfolded[row : row + rows].reshape(inputs.shape)[...] = inputs
            row += rows
        sums = _exact_product(unfolded.T, self.matrix, self.chunks)
        outputs = (slice(d0, d0 + nd), slice(h0, h0 + nh), slice(0, w))
        store(sums.reshape(nd, nh, w, -1), outputs, slice(0, self.shape.filters))


def _phase_taps(shape: ConvShape) -> list[tuple[slice, slice, slice]]:
    """For each phase that is read: the taps that read it, as slices along each kernel axis."""
    sd, sh, sw = shape.stride
    return [
        (slice(d, None, sd), slice(h, None, sh), slice(w, None, sw))
        for d, h, w in np.ndindex(sd, sh, sw)
        if all(p < k for p, k in zip((d, h, w), shape.kernel, strict=True))
    ]
