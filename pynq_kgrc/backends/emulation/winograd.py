"""F(2,3) along axes of three taps, exact (Winograd 1980, Lavin and Gray 2016).

F(2,3) computes two neighbouring outputs of a filter of three taps with four multiplications
instead of six. Along `a` axes an output takes 2^a multiplications instead of 3^a.

In one dimension, with four inputs d, three taps g and two outputs y, all products element by
element::

    y = A^T [(G g) * (B^T d)]

    B^T = 1  0 -1  0        G =  1    0    0        A^T = 1  1  1  0
          0  1  1  0            1/2  1/2  1/2             0  1 -1 -1
          0 -1  1  0            1/2 -1/2  1/2
          0  1  0 -1             0    0    1

    d = (1, 2, 3, 4)    B^T d = (1 - 3, 2 + 3, 3 - 2, 2 - 4)      = (-2, 5, 1, -2)
    g = (1, 0, 2)       G g = (1, (1 + 0 + 2)/2, (1 - 0 + 2)/2, 2) = (1, 3/2, 3/2, 2)
                        m = (-2, 15/2, 3/2, -4)
    y = (m0 + m1 + m2, m1 - m2 - m3) = (7, 10)    as 1*1 + 2*0 + 3*2 = 7, 2*1 + 3*0 + 4*2 = 10

In more dimensions each axis is transformed like this. The words here:

- Winograd tile: two outputs along each transformed axis (and one along the others), made from four
  inputs along each of these axes.
- position: which of the four elements of m, along each transformed axis: 0 to 4^a - 1 in base 4.
  The products of all tiles at one position are one GEMM over the channels.
- phase: which of the two outputs, along each transformed axis: 2^a phases.

G g holds halves: the products of a position are multiples of 2^-f, where f is the number of its
axes at element 1 or 2 (`fraction_bits`). The bounds of `exact` count in these units.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pynq_kgrc.backends.emulation.exact import (
    FLOAT64,
    Interval,
    StoreSums,
    largest_integer,
    largest_reach,
    lay_out_weights,
    list_jobs,
    multiply,
    scratch,
    scratch_reallocations,
    split_evenly,
)
from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import Array, ceil_div

BLOCK_TILES = 800
"""Winograd tiles of a block: the same compromise between caches and numpy calls as BLOCK_BYTES."""

MAX_SPLIT_TILES = 400
"""With no more Winograd tiles than this, the cores split the filters, not the outputs."""

WIDTH = 2
"""The width axis, along which the channels of neighbouring positions are contiguous."""


class WinogradConvolution:
    """F(2,3) along axes whose kernel is 3, for stride 1; the other axes have kernel 1.

    Works through the positions depth first, so that all intermediate arrays fit the caches. At each
    axis a position's input is one sum or difference of two slices of the map, and its result is
    added to or subtracted from the two outputs of that axis. If exactness is not proved for every
    input, the actual values are checked at run time. A block that fails is computed again in
    float64.

    The width need not be transformed: three neighbouring pixels form one row of 3N inputs. Three
    GEMMs, shifted by one pixel each, produce outputs 0,3,6.., 1,4,7.. and 2,5,8..; the width is
    rounded up to a multiple of 3.

    Takes the arguments of `GemmConvolution`, and

    Args:
        axes: the axes to transform; by default all with a kernel of 3.

    Raises:
        Inexact: for some input not even float64 is exact; use `GemmConvolution`.
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
        self.axes = axes_of_three_taps(shape) if axes is None else axes
        self.width_taps = 1 if WIDTH in self.axes else shape.kernel[WIDTH]
        largest_input = max(-interval[0], interval[1]) << len(self.axes)
        # the input transform is limited by memory bandwidth, so it runs in int16 if that holds it
        self.map_dtype = np.dtype(np.int16) if largest_input < 1 << 15 else dtype
        taps = weight.transpose(2, 3, 4, 0, 1).astype(dtype)  # [kd, kh, kw, M, N]
        if self.width_taps > 1:
            taps = taps.transpose(0, 1, 3, 2, 4).reshape(*taps.shape[:2], 1, shape.filters, -1)
        transformed = transform_weights(taps, self.axes)
        bounds = winograd_bounds(taps, transformed, self.axes, interval)
        if max(bounds.products.max(), bounds.output_transform) >= largest_integer(FLOAT64):
            raise Inexact
        limit = largest_integer(dtype)
        unproved = np.flatnonzero(bounds.products >= limit)
        self.proved = unproved.size == 0 and bounds.output_transform < limit
        d, h, w = self.tiles
        split_filters = d * h * w <= MAX_SPLIT_TILES and cores > 1 and shape.filters >= 32 * cores
        self.filters = split_evenly(shape.filters, cores if split_filters else 1)
        flat = transformed.reshape(-1, *transformed.shape[3:])
        matrices = flat.swapaxes(1, 2)  # [positions, N, M]
        self.weights = [lay_out_weights(matrices[:, :, part]) for part in self.filters]
        self.weight_norms = [
            {int(i): _filter_norms(part[i].T) for i in unproved} for part in self.weights
        ]
        wanted = BLOCK_TILES * self.width_taps  # each of the shifted GEMMs gets BLOCK_TILES rows
        nh = ceil_div(h, max(1, round(h * w / wanted)))  # blocks of equal height
        nd = max(1, wanted // (h * w)) if nh == h else 1
        if not split_filters:  # at least one block for every core
            nd = min(nd, ceil_div(d, cores))
            nh = min(nh, ceil_div(h, cores)) if d == 1 else nh
        self.block = (nd, nh)
        self.sequences: dict[tuple[int, Size, int, np.dtype[np.generic]], _CallSequence] = {}

    @property
    def tiles(self) -> Size:
        """Number of Winograd tiles along each axis; a tile has 2 outputs along a transformed axis.

        If the width is not transformed, the last two or more outputs of a row are padding and are
        dropped.
        """
        d, h, w = (
            ceil_div(size, 2) if axis in self.axes else size
            for axis, size in enumerate(self.shape.out_size)
        )
        length = self.width_taps
        return d, h, ceil_div(w + length - 1, length) * length

    @property
    def in_size(self) -> Size:
        """Size of the padded map that `run` takes."""
        d, h, w = (
            2 * size + 2 if axis in self.axes else size for axis, size in enumerate(self.tiles)
        )
        return d, h, w

    @property
    def jobs(self) -> list[tuple[int, int, int]]:
        """First tile along depth and height, and number of the filter part, of each job."""
        return list_jobs(self.tiles, self.block, len(self.filters))

    def can_pool(self, size: Size) -> bool:
        """Whether no window of a pool crosses the edge of a tile, or of a row if it is not cut."""
        whole_rows = [WIDTH] if self.width_taps > 1 else []
        return all(
            window == 1 or (window == 2 and axis in [*self.axes, *whole_rows])
            for axis, window in enumerate(size)
        )

    def run(self, padded: Array, job: tuple[int, int, int], store: StoreSums, pool: Size) -> None:
        """Compute the sums of one block, max-pool them by `pool`, and pass them to `store`."""
        d0, h0, part = job
        nd, nh = (min(b, t - f) for b, t, f in zip(self.block, self.tiles, (d0, h0), strict=False))
        tiles, first = (nd, nh, self.tiles[2]), (d0, h0, 0)
        slab = padded[
            tuple(
                slice(2 * f, 2 * (f + n) + 2) if axis in self.axes else slice(f, f + n)
                for axis, (f, n) in enumerate(zip(first, tiles, strict=True))
            )
        ]
        phases = self._sequence(tiles, part, self.dtype).compute(slab)
        if phases is None:
            phases = self._sequence(tiles, part, FLOAT64).compute(slab)
            assert phases is not None
        self._pool_and_store(phases, first, tiles, self.filters[part], store, pool)

    def _sequence(self, tiles: Size, part: int, dtype: np.dtype[np.generic]) -> _CallSequence:
        """The calls for blocks of this size; a new sequence if this thread's scratch has moved."""
        key = threading.get_ident(), tiles, part, dtype
        sequence = self.sequences.get(key)
        if sequence is None or sequence.reallocations != scratch_reallocations():
            sequence = self.sequences[key] = _CallSequence(self, tiles, part, dtype)
        return sequence

    def _pool_and_store(
        self,
        phases: Array,
        first: Size,
        tiles: Size,
        filters: slice,
        store: StoreSums,
        pool: Size,
    ) -> None:
        """Max-pool over the phases of each tile, and pass each pooled phase to `store`."""
        shape = [2 if axis in self.axes else 1 for axis in range(3)]
        pools_width = pool[WIDTH] > shape[WIDTH]  # a window spans two tiles of one output each
        if pools_width:
            pool = (pool[0], pool[1], 1)
        merged: dict[tuple[int, ...], Array] = {}
        # the last axis is the outermost of the recursion, so its phase varies slowest
        for phase, sums in zip(np.ndindex(*reversed(shape)), phases, strict=True):
            pooled = tuple(p // size for p, size in zip(reversed(phase), pool, strict=True))
            if pooled in merged:
                np.maximum(merged[pooled], sums, out=merged[pooled])
            else:
                merged[pooled] = sums
        for pooled, sums in merged.items():
            step = [shape[axis] // pool[axis] for axis in range(3)]
            d, h, w = (
                slice(first[i] * step[i] + pooled[i], (first[i] + tiles[i]) * step[i], step[i])
                for i in range(3)
            )
            sums = sums.reshape(*tiles, -1)
            if pools_width:
                pairs = sums[:, :, : tiles[WIDTH] // 2 * 2]
                sums = np.maximum(pairs[:, :, ::2], pairs[:, :, 1::2])
                w = slice(0, sums.shape[WIDTH])
            store(sums, (d, h, w), filters)


class _CallSequence:
    """The numpy calls that compute one block of tiles, prepared once, and the run-time proof.

    Between two numpy calls a thread holds the GIL, and other threads have to wait for it. So all
    operands are prepared beforehand, as views of this thread's scratch: computing a block is
    nothing but the calls.

    The proof at run time, for a convolution that is not exact for every input:

    1. Products: a partial sum of ``u . v`` is at most |u| |v| (Cauchy-Schwarz). If that is not
       below the limit, the channels are cut into 2, 4 or 8 parts.
    2. The innermost axis: m1 + m2 and m1 - m2 are computed first, then one more product is added
       to or subtracted from each. We check the largest result. If it is below the limit, then
       m1 + m2 (m1 - m2), and that with one more product, were exact.
    3. The other axes: their sums are at most the sums of the largest results of step 2.
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
        proved = convolution.proved or dtype == FLOAT64
        self.weight_norms = {} if proved else convolution.weight_norms[part]
        # the largest of the two results of the innermost axis, at each position of the other axes
        self.largest = None if proved else np.zeros((2, 4 ** (len(self.axes) - 1)))
        self.width_taps = convolution.width_taps
        channels, count = convolution.shape.channels, math.prod(tiles)
        values = convolution.map_dtype
        size = [2 * n + 2 if axis in self.axes else n for axis, n in enumerate(tiles)]
        self.slab = scratch("slab", (*size, channels), values)
        self.transformed, self.partial_sums = {}, {}
        for inner, axis in reversed(list(enumerate(self.axes))):
            size[axis] = tiles[axis]
            kind = dtype if inner == 0 else values  # the innermost is the GEMM's operand
            # the last shifted GEMM rows read past the end; they belong to outputs that are dropped
            tail = (self.width_taps - 1) * channels if inner == 0 else 0
            room = scratch(f"transformed{axis}", (math.prod(size) * channels + tail,), kind)
            self.tail = room[room.size - tail :]
            self.transformed[axis] = room[: room.size - tail].reshape(*size, channels)
            self.partial_sums[axis] = scratch(f"partial{axis}", (2**inner, count, filters), dtype)
        self.phases = scratch("phases", (2 ** len(self.axes), count, filters), dtype)
        self.reallocations = scratch_reallocations()
        self.calls: list[Callable[[], object]] = []
        self._add_calls(self.slab, self.axes, self.phases, 0)

    def compute(self, slab: Array) -> Array | None:
        """The phases [2^a, tiles, M], the last axis slowest; None if they may be inexact."""
        self.exact = True  # until a check fails
        np.copyto(self.slab, slab)
        self.tail[:] = 0
        for call in self.calls:
            call()
        if self.largest is not None and self.exact:
            self.exact = self._output_transform_bound() < self.limit
        return self.phases if self.exact else None

    def _add_calls(self, slab: Array, axes: list[int], out: Array, position: int) -> None:
        """Append the calls that write the phases of `axes` [2^axes, tiles, M] to `out`.

        Recursive: the last axis is the outermost. The names are those of the head of this file.
        m1 + m2 and m1 - m2 come first: they are multiples of a unit twice as large, and therefore
        exact whenever m1 and m2 are. The proof relies on this order.
        """
        if not axes:
            self._add_product_call(slab, out[0], position)
            return
        *inner, axis = axes
        lead = (slice(None),) * axis
        span = slab.shape[axis] - 3
        d0, d1, d2, d3 = (slab[(*lead, slice(i, i + span, 2))] for i in range(4))
        transformed, product_sums = self.transformed[axis], self.partial_sums[axis]
        half = len(product_sums)
        first, second = out[:half], out[half:]  # the two outputs of this axis
        # positions are numbered as in the weights [d, h, w]: the last axis varies fastest
        step = 4 ** (len(self.axes) - len(axes))
        # compute in the type of the input; `out` of the innermost axis converts to float
        input_type = {"dtype": slab.dtype}
        self._call(np.add, d1, d2, out=transformed, **input_type)
        self._add_calls(transformed, inner, first, position + step)  # m1
        self._call(np.subtract, d2, d1, out=transformed, **input_type)
        self._add_calls(transformed, inner, product_sums, position + 2 * step)  # m2
        self._call(np.subtract, first, product_sums, out=second)
        self._call(np.add, first, product_sums, out=first)
        self._call(np.subtract, d0, d2, out=transformed, **input_type)
        self._add_calls(transformed, inner, product_sums, position)  # m0
        self._call(np.add, first, product_sums, out=first)
        self._call(np.subtract, d1, d3, out=transformed, **input_type)
        self._add_calls(transformed, inner, product_sums, position + 3 * step)  # m3
        self._call(np.subtract, second, product_sums, out=second)
        if self.largest is not None and not inner:
            self._call(self._record_largest, first, 0, position)
            self._call(self._record_largest, second, 1, position)

    def _call(self, function: Callable[..., object], *operands: object, **how: object) -> None:
        self.calls.append(partial(function, *operands, **how))

    def _add_product_call(self, slab: Array, out: Array, position: int) -> None:
        """Append the call of one position's GEMM, or of its three shifted GEMMs as one."""
        weight = self.weights[position].astype(self.dtype, copy=False)
        channels, length = slab.shape[-1], self.width_taps
        values = slab.reshape(-1, channels)
        if length > 1:
            rows, pixel, item = len(values) // length, *values.strides
            shape, strides = (length, rows, length * channels), (pixel, length * pixel, item)
            values = as_strided(values, shape, strides)
            out = out.reshape(rows, length, -1).transpose(1, 0, 2)
        if position in self.weight_norms:
            self._call(self._multiply_in_parts, values, weight, out, position)
        else:
            self.calls.append(multiply(values, weight, out))

    def _multiply_in_parts(self, values: Array, weight: Array, out: Array, position: int) -> None:
        """A product over the fewest parts of the channels that are exact for these values."""
        parts = self._count_parts(values, position)
        if parts == 1:
            multiply(values, weight, out)()
            return
        out[...] = 0
        for part in split_evenly(values.shape[-1], parts):
            out += values[..., part] @ weight[part]
            # each part is proved exact, their sum is not
            if _largest_magnitude(out) * 2.0 ** fraction_bits(position) >= self.limit:
                self.exact = False
                return

    def _record_largest(self, sums: Array, result: int, position: int) -> None:
        """Keep the largest sum of the innermost axis, at a position of the other axes."""
        assert self.largest is not None
        self.largest[result, position] = _largest_magnitude(sums)

    def _count_parts(self, values: Array, position: int) -> int:
        """How many channel parts make every partial sum exact; sets `exact` False if 8 do not."""
        unit = 2.0 ** fraction_bits(position)
        for parts, weight_norms in self.weight_norms[position].items():
            slices = split_evenly(values.shape[-1], parts)
            value_norms = [_largest_norm(values[..., part]) for part in slices]
            products = [v * w for v, w in zip(value_norms, weight_norms, strict=True)]
            if max(products) * unit < self.limit:
                return parts
        self.exact = False
        return 1

    def _output_transform_bound(self) -> float:
        """Bound of the sums of the output transform, in units of 2^-`fraction_bits`.

        Each turn of the loop transforms one more axis.
        """
        assert self.largest is not None
        largest, worst = self.largest, 0.0
        units = 2.0 ** np.array([fraction_bits(i) for i in range(largest.shape[1])])
        while True:
            count = largest.shape[1]
            worst = max(worst, float((largest * units[:count]).max()))
            if count == 1:
                return worst
            products = largest.max(axis=0).reshape(4, -1)  # one bound for both outputs of an axis
            largest = np.stack([products[:3].sum(axis=0), products[1:].sum(axis=0)])


def _largest_magnitude(sums: Array) -> float:
    return max(float(sums.max()), -float(sums.min()))


def _largest_norm(rows: Array) -> float:
    """The largest L2 norm of a row; the factor covers the rounding of squares and their sums."""
    return math.sqrt(float(np.einsum("...j,...j", rows, rows).max())) * 1.001


def _filter_norms(weight: Array) -> dict[int, list[float]]:
    """For 1, 2, 4 and 8 parts of the channels: the largest norm of a row of [M, N] in each part."""
    channels = weight.shape[1]
    return {
        parts: [_largest_norm(weight[:, part]) for part in split_evenly(channels, parts)]
        for parts in (1, 2, 4, 8)
        if parts <= channels
    }


def fraction_bits(position: int) -> int:
    """How many axes of a position are at element 1 or 2: its products are multiples of 2^-this."""
    bits = 0
    while position:
        position, element = divmod(position, 4)
        bits += element in (1, 2)
    return bits


def transform_weights(taps: Array, axes: list[int]) -> Array:
    """G g along `axes`: [kd, kh, kw, M, N] with 4 elements instead of 3 taps along each of them."""
    for axis in axes:
        first, middle, last = np.moveaxis(taps, axis, 0)
        half = (first + last) / 2
        parts = [first, half + middle / 2, half - middle / 2, last]
        taps = np.stack(parts, axis=axis)
    return taps


class Inexact(Exception):
    """Float64 would not be exact for every input."""


class Bounds(NamedTuple):
    """Largest possible numbers in a transformed convolution, in units of 2^-`fraction_bits`."""

    products: Array
    """For each position: of any partial sum of its GEMM."""
    output_transform: float
    """Of any number in the output transform."""


def winograd_bounds(taps: Array, transformed: Array, axes: list[int], interval: Interval) -> Bounds:
    """Bound every number that F(2,3) forms, for any input in the interval.

    The output transform handles one axis after the other. After some axes, a number is what direct
    convolution along these axes, and the products along the remaining ones, give. Each of these
    stages has its own bound.
    """
    worst = []
    for stage in range(len(axes) + 1):
        remaining = axes[stage:]
        sums = transformed if stage == 0 else transform_weights(taps, remaining)
        summed = tuple(axis for axis in (0, 1, 2, 4) if axis not in remaining)
        total = np.abs(sums).sum(axis=summed, dtype=np.float64).reshape(-1, taps.shape[3])
        signed = np.abs(sums.sum(axis=summed, dtype=np.float64)).reshape(total.shape)
        bound = np.zeros(len(total))
        for i, position in enumerate(product(range(4), repeat=len(remaining))):
            low, high = interval
            for element in position:
                # B^T d: element 1 is a sum of two inputs, the others are differences
                low, high = (2 * low, 2 * high) if element == 1 else (low - high, high - low)
            reach = largest_reach(total[i], signed[i], (low, high))
            bound[i] = reach.max() * 2.0 ** fraction_bits(i)
        worst.append(bound)
    return Bounds(worst[0], max(float(bound.max()) for bound in worst[1:]))


def axes_of_three_taps(shape: ConvShape) -> list[int]:
    """The axes along which the kernel is 3."""
    return [axis for axis in range(3) if shape.kernel[axis] == 3]
