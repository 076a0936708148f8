"""F(2,3) along axes of three taps, exact (Winograd 1980, Lavin and Gray 2016).

2^a instead of 3^a multiplications an output, for `a` transformed axes. The values are multiples of
2^-a, and the bounds of `exact` count in that unit.
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
    WIDE,
    Finish,
    Interval,
    largest_integer,
    largest_reach,
    lay_out_jobs,
    lay_out_weights,
    multiply,
    scratch,
    scratch_moves,
    split_evenly,
)
from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import Array, ceil_div

BLOCK_TILES = 800
"""Winograd tiles of a block; a compromise as that of BLOCK_BYTES."""

FEW_TILES = 400
"""With so few tiles the cores share out the filters instead."""

WIDTH = 2
"""The axis along which the channels of neighbours are contiguous."""


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
        nh = ceil_div(h, max(1, round(h * w / wanted)))  # blocks of equal height
        nd = max(1, wanted // (h * w)) if nh == h else 1
        if not few:  # a block for every core
            nd = min(nd, ceil_div(d, cores))
            nh = min(nh, ceil_div(h, cores)) if d == 1 else nh
        self.block = (nd, nh)
        self.plans: dict[tuple[int, Size, int, np.dtype[np.generic]], _WinogradPlan] = {}

    @property
    def tiles(self) -> Size:
        """Tiles of outputs along each axis: 2 outputs a tile on a transformed axis.

        With runs along the width the last two or more outputs of a row are no outputs.
        """
        d, h, w = (
            ceil_div(size, 2) if axis in self.axes else size
            for axis, size in enumerate(self.shape.out_size)
        )
        length = self.run_length
        return d, h, ceil_div(w + length - 1, length) * length

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
        return lay_out_jobs(self.tiles, self.block, len(self.filters))

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
        if plan is None or plan.moved != scratch_moves():
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
        self.moved = scratch_moves()
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
            reach = largest_reach(total[i], signed[i], (low, high))
            bound[i] = reach.max() * 2.0 ** middle_positions(i)
        worst.append(bound)
    return Bounds(worst[0], max(float(bound.max()) for bound in worst[1:]))


def three_taps(shape: ConvShape) -> list[int]:
    """The axes along which the kernel is 3."""
    return [axis for axis in range(3) if shape.kernel[axis] == 3]
